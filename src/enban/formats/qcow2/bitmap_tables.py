"""Where the bitmaps of an image lie, and how they get there: directory entries, tables, clusters of bits.

The lower half of `bitmaps`, which decides when what is read and written.
"""

from __future__ import annotations

from array import array

from ...block.bitmaps import Bits, full_chunk
from ...errors import CorruptImageError, NoSpaceError
from ...wire.qcow2_bitmaps import ALL_ONES, AUTO, IN_USE, BitmapEntry, valid_table_entry
from ...wire.qcow2_entries import OFFSET_MASK
from ..common.tables import from_big_endian, to_big_endian
from .barrier import barrier
from .leaving import release_quarantine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import Cluster, HostOffset
    from .node import Qcow2Node

# Clusters of bits that all bitmaps of an image may have in sum: what is read of a hostile image.
_MOST_DATA = 4 << 30
_AT_ONCE = 1 << 20
REPAIR = "run: enban check -r all"


class Bitmap:
    """One bitmap. entry: as it stands in the directory, but for flags while it is `armed`.

    table: the entries of its table that are not 0, by index; None as long as it was not read.
    bits: the content, None as long as nobody asked.
    armed: the in-use flag on disk was set by us, so what counts is in memory.
    """

    __slots__ = ("armed", "bits", "entry", "table")

    def __init__(self, entry: BitmapEntry) -> None:
        self.entry = entry
        self.table: dict[int, int] | None = None
        self.bits: Bits | None = None
        self.armed = False

    @property
    def name(self) -> str:
        return self.entry.name

    @property
    def enabled(self) -> bool:
        return bool(self.entry.flags & AUTO)

    @property
    def usable(self) -> bool:
        """Whether it says anything."""
        return self.entry.understood and (self.armed or not self.entry.flags & IN_USE)


class BitmapTables:
    """found: the bitmaps in the directory's order. directory, length: where that is, in bytes."""

    def __init__(self, node: Qcow2Node, found: list[Bitmap], directory: HostOffset, length: int) -> None:
        self.node = node
        self.found = found
        self.directory = directory
        self.length = length

    # -- reading ---------------------------------------------------------------------------

    async def _table(self, bitmap: Bitmap) -> dict[int, int]:
        if bitmap.table is None:
            self._check_entry(bitmap.entry)
            bitmap.table = await self._read_table(bitmap.entry)
        return bitmap.table

    def _check_entry(self, entry: BitmapEntry) -> None:
        node = self.node
        fault = entry.fault(node.size, node.cluster_bits)
        if not fault and entry.table_offset + entry.table_entries * 8 > node.file.size():
            fault = f"the table of bitmap {entry.name!r} reaches past the end of the file"
        if fault:
            raise CorruptImageError(fault, path=node.name, offset=self.directory + entry.place, hint=REPAIR)

    async def _read_table(self, entry: BitmapEntry) -> dict[int, int]:
        node = self.node
        table: dict[int, int] = {}
        size = node.file.size()
        for start in range(0, entry.table_entries * 8, _AT_ONCE):
            place = entry.table_offset + start
            content = await node.file.read(place, min(_AT_ONCE, entry.table_entries * 8 - start))
            if content.count(0) == len(content):
                continue
            words: array[int] = from_big_endian(content)
            for index, word in enumerate(words):
                if not word:
                    continue
                offset = word & OFFSET_MASK
                if not valid_table_entry(word, node.cluster_bits) or offset + node.cluster_size > size:
                    raise CorruptImageError(
                        f"the table of bitmap {entry.name!r} has an entry {word:#x}",
                        path=node.name,
                        offset=place + index * 8,
                        hint=REPAIR,
                    )
                table[start // 8 + index] = word
        return table

    async def _load(self, bitmap: Bitmap) -> Bits:
        """The content of a usable bitmap; mutex held."""
        if bitmap.bits is None:
            node = self.node
            bits = Bits(node.size, bitmap.entry.granularity_bits, node.cluster_size)
            for index, word in (await self._table(bitmap)).items():
                if word & OFFSET_MASK:
                    bits.put(index, await node.file.read(word & OFFSET_MASK, node.cluster_size))
                else:
                    bits.put(index, full_chunk(node.cluster_size))
            bitmap.bits = bits
        return bitmap.bits

    async def places(self, *, counted: bool = True) -> list[tuple[HostOffset, int, str]]:
        """(offset, length, what) of everything the bitmaps occupy. Raises CorruptImageError.

        counted: make sure that it is theirs alone, by the refcounts: it will be written over."""
        size = self.node.cluster_size
        found = [(self.directory, self.length, "bitmap directory")] if self.found else []
        for bitmap in self.found:
            self._check_entry(bitmap.entry)
        if sum(bitmap.entry.table_entries for bitmap in self.found) * size > _MOST_DATA:
            raise CorruptImageError(
                f"the {len(self.found)} bitmaps are larger than {_MOST_DATA >> 30} GiB in sum",
                path=self.node.name,
                hint=REPAIR,
            )
        for bitmap in self.found:
            entry = bitmap.entry
            table = await self._table(bitmap)
            found.append((entry.table_offset, entry.table_entries * 8, "bitmap table"))
            found += [(word, size, "bitmap data") for word in table.values() if word > ALL_ONES]
        for offset, length, what in found if counted else []:
            for place in range(offset, offset + length, size):
                if await self.node.refcounts.get(place >> self.node.cluster_bits) != 1:
                    raise CorruptImageError(
                        f"a cluster of the {what} is not its own by the refcounts",
                        path=self.node.name,
                        offset=place,
                        hint=REPAIR,
                    )
        return found

    # -- writing ---------------------------------------------------------------------------

    async def _write_flags(self, entry: BitmapEntry, flags: int) -> None:
        """The length of the table and the flags, which a disk writes as one."""
        content = entry.table_entries.to_bytes(4, "big") + flags.to_bytes(4, "big")
        await self.node.file.write(content, self.directory + entry.place + 8)

    def _table_clusters(self, entries: int) -> int:
        return -(-entries * 8 >> self.node.cluster_bits)

    async def _place(
        self, bits: Bits, old: dict[int, int] | None
    ) -> tuple[dict[int, int], list[tuple[Cluster, int]]]:
        """Write the bits to clusters, those of `old` where it has some: (the table, new clusters)."""
        node, refcounts = self.node, self.node.refcounts
        full = full_chunk(bits.chunk_size)
        table: dict[int, int] = {}
        made: list[tuple[Cluster, int]] = []
        try:
            for number, chunk in bits.chunks.items():
                if chunk is full or chunk == full:
                    table[number] = ALL_ONES
                    continue
                place = (old or {}).get(number, 0) & OFFSET_MASK
                new = not place
                try:
                    if new:
                        place = await refcounts.allocate_adjacent(1)
                        made.append((place >> node.cluster_bits, 1))
                    await node.file.write(chunk, place)
                    table[number] = place
                except NoSpaceError:
                    table[number] = ALL_ONES
                    if made and new and made[-1][0] == place >> node.cluster_bits:
                        made.pop()
                        await refcounts.release(place >> node.cluster_bits)
        except BaseException:
            await self._release(made)
            raise
        return table, made

    async def _release(self, made: list[tuple[Cluster, int]]) -> None:
        for first, count in made:
            await self.node.refcounts.release(first, count)

    async def _write_table(self, offset: HostOffset, table: dict[int, int], entries: int) -> None:
        """A whole table, to the end of its last cluster."""
        per_piece = _AT_ONCE // 8
        total = self._table_clusters(entries) << self.node.cluster_bits - 3
        filled = sorted(table)
        position = 0
        for start in range(0, total, per_piece):
            words = array("Q", bytes(8 * min(per_piece, total - start)))
            while position < len(filled) and filled[position] < start + per_piece:
                words[filled[position] - start] = table[filled[position]]
                position += 1
            await self.node.file.write(to_big_endian(words), offset + start * 8)

    async def _free(self, freed: list[tuple[Cluster, int]]) -> None:
        """Nothing points to these any more, and that is durable."""
        node = self.node
        async with node.mutex:
            node.quarantine += [(first, count, 0) for first, count in freed]
            await release_quarantine(node)
        await barrier(node)
