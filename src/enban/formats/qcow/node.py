"""A qcow image as a node: mapping guest ranges, and allocating for them.

The format counts no clusters, so space is only ever taken at the end of the file, and what
leaves the mapping (a packed cluster that is overwritten) stays behind unused. Only space that
was reserved and never shown is taken back, where it is the last of the file.

`reserve`, `publish` and `zero` change tables in memory, under `mutex`; `barrier` brings the
changes to the disk in order. Zeroing and discarding an allocated cluster leave it mapped and
make a hole in the file, which needs no table.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left

from ...block.locks import Mutex
from ...block.node import Node, Piece
from ...errors import CorruptImageError, NoSpaceError, ReadOnlyError, UnsupportedOperationError
from ...extent import COMPRESSED as PACKED
from ...extent import DATA, UNALLOCATED, Extent
from ...units import SECTOR, align_down, align_up
from ...wire.qcow import (
    COMPRESSED,
    HEADER,
    PLACE_UNIT,
    largest_packed_host,
    pack_compressed,
    unpack_compressed,
)
from ..common.progressions import run_ahead
from ..common.tables import L2Table, TableCache, from_big_endian, to_big_endian
from .barrier import barrier

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...block.cipher import Cipher
    from ...block.runtime import Runtime
    from ...block.storage import Storage
    from ...units import GuestOffset, HostOffset
    from ...wire.qcow import Header


class Link:
    """What `publish` does for a piece: `count` entries from `first` of table `index` get the
    clusters from `host` on. packed: the ready entry of a packed cluster, else 0."""

    __slots__ = ("count", "first", "host", "index", "length", "packed")

    def __init__(
        self, index: int, first: int, count: int, host: HostOffset, length: int, *, packed: int = 0
    ) -> None:
        self.index = index
        self.first = first
        self.count = count
        self.host = host
        self.length = length  # bytes taken of the file
        self.packed = packed


class QcowNode(Node):
    """An open qcow image. Made by `opening.open_qcow`.

    end: where new space begins. clean_from: from here on the file was never written.
    last_place: the last offset where a plain cluster can begin and lie inside the file.
    """

    format = "qcow"
    codec = "zlib"

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        file: Storage,
        header: Header,
        l1: array[int],
        *,
        writable: bool,
        cipher: Cipher | None = None,
    ) -> None:
        super().__init__(name, runtime, file, writable=writable)
        self.header = header
        self.size = header.size
        self.cipher = cipher
        self.encrypted = bool(header.crypt_method)
        self.cluster_bits = header.cluster_bits
        self.cluster_size = self.unit = self.grain = header.cluster_size
        self.cluster_mask = self.cluster_size - 1
        self.l2_shift = header.cluster_bits + header.l2_bits
        self.l2_mask = header.l2_entries - 1
        self.table_bytes = header.table_bytes
        self.backing_name = header.backing_name.decode("utf-8", "surrogateescape")
        self.l1 = l1
        self.l1_dirty: set[int] = set()
        self.cache = TableCache(self.table_bytes)
        # What the short cuts look into; they are not for encrypted data.
        self._readable = self.cache.readable if cipher is None else {}
        self._overwritable = self.cache.overwritable if cipher is None else {}
        self.mutex = Mutex(runtime)
        self.barrier_mutex = Mutex(runtime)
        self.barriers_started = 0
        self.barriers_done = 0
        self.end: HostOffset = 0
        self.clean_from: HostOffset = 0
        self.last_place: HostOffset = 0
        self.begin_space(file.size())
        self._places: array[int] = array("Q")  # offsets of all L2 tables, ascending
        self._ready_to_change = False
        self._damaged = False

    # -- read side -------------------------------------------------------------------------

    def locate(self, offset: GuestOffset, length: int) -> HostOffset:
        return self._place(self._readable, offset, length)

    def locate_write(self, offset: GuestOffset, length: int) -> HostOffset:
        return self._place(self._overwritable, offset, length)

    def _place(self, tables: dict[int, array[int]], offset: GuestOffset, length: int) -> HostOffset:
        entries = tables.get(offset >> self.l2_shift)
        if entries is None:
            return -1
        inside = offset & self.cluster_mask
        if inside + length > self.cluster_size:
            return -1
        entry = entries[offset >> self.cluster_bits & self.l2_mask]
        # The entry of a packed cluster is larger than any place.
        if not 0 < entry <= self.last_place or entry % PLACE_UNIT:
            return -1
        return entry + inside

    def lookup(self, offset: GuestOffset, length: int) -> Extent | None:
        index = offset >> self.l2_shift
        entries = self.cache.readable.get(index)
        if entries is None:
            if self.l1[index]:
                return None
            last = offset + length - 1 >> self.l2_shift
            while index < last and not self.l1[index + 1]:
                index += 1
            return Extent(offset, min(length, (index + 1 << self.l2_shift) - offset), UNALLOCATED, self)
        length = min(length, (index + 1 << self.l2_shift) - offset)
        bits, inside = self.cluster_bits, offset & self.cluster_mask
        i = offset >> bits & self.l2_mask
        last = offset + length - 1 >> bits & self.l2_mask
        entry = entries[i]
        if entry & COMPRESSED:
            host, packed = unpack_compressed(entry, bits)
            if not host or host + packed > self.file.size():
                raise self._bad_entry(
                    offset, f"points to {packed} packed bytes at {host:#x}, not inside the file"
                )
            length = min(length, self.cluster_size - inside)
            return Extent(offset, length, PACKED, self, self.file, host, packed=packed, unit=offset - inside)
        step = 0
        if entry:
            self._check_place(entry, offset)
            step = self.cluster_size
            last = min(last, i + (self.last_place - entry >> bits))
        count = 1 + run_ahead(entries, i + 1, last + 1, entry + step, step)
        expected = entry + count * step
        while i + count <= last and entries[i + count] == expected:
            expected += step
            count += 1
        length = min(length, (count << bits) - inside)
        if entry:
            storage = self.file if self.cipher is None else None
            return Extent(offset, length, DATA, self, storage, entry + inside)
        return Extent(offset, length, UNALLOCATED, self)

    def runs(self, offset: GuestOffset, length: int) -> list[tuple[GuestOffset, int, int, HostOffset]] | None:
        from .runs import runs

        return runs(self, offset, length)

    def _check_place(self, entry: int, offset: GuestOffset) -> None:
        if entry > self.last_place:
            raise self._bad_entry(offset, f"points to {entry:#x}, past the end of the file")
        if entry % PLACE_UNIT:
            raise self._bad_entry(offset, f"points to {entry:#x}, which is no multiple of {PLACE_UNIT}")

    def _bad_entry(self, offset: GuestOffset, what: str) -> CorruptImageError:
        return CorruptImageError(
            f"L2 entry of guest offset {offset:#x} {what}", path=self.name, hint="run: enban check"
        )

    async def load(self, offset: GuestOffset) -> None:
        async with self.mutex:
            await self._load_table(offset >> self.l2_shift)

    async def _load_table(self, index: int) -> L2Table:
        """The L2 table of an L1 entry that has one; the mutex is held."""
        table = self.cache.tables.get(index)
        if table is None:
            offset = self.l1[index]
            table = L2Table(offset, await self.read_table(index), fresh=False)
            self.cache.insert(index, table)
        return table

    async def read_table(self, index: int) -> array[int]:
        """The L2 table of an L1 entry as it is on disk. Raises CorruptImageError, HostError."""
        offset, header = self.l1[index], self.header
        l1_end = header.l1_offset + len(self.l1) * 8
        if offset + self.table_bytes > self.file.size():
            what = "reaches past the end of the file"
        elif offset < HEADER.size or (offset < l1_end and header.l1_offset < offset + self.table_bytes):
            what = "lies over the header or the L1 table"
        else:
            return from_big_endian(await self.file.read(offset, self.table_bytes))
        raise CorruptImageError(
            f"L2 table {index} at {offset:#x} {what}",
            path=self.name,
            offset=header.l1_offset + index * 8,
            hint="run: enban check",
        )

    # -- preparing a change ----------------------------------------------------------------

    async def prepare_change(self) -> None:
        """What must be so before a change; mutex held."""
        if self._damaged:
            raise CorruptImageError(
                "the image was found damaged and is not changed any more",
                path=self.name,
                hint="run: enban check",
            )
        if self._ready_to_change:
            return
        if not self.writable:
            raise ReadOnlyError("the image is open read-only", path=self.name)
        if self.header.l1_offset % 8:
            raise UnsupportedOperationError(
                f"the L1 table at {self.header.l1_offset:#x} is not aligned, so it cannot be changed safely",
                path=self.name,
                hint="convert the image to a new one",
            )
        self._places = array("Q", sorted(filter(None, self.l1)))
        if self.file.fixed_size:
            self.begin_space(await self._find_end())
        self._ready_to_change = True

    async def _find_end(self) -> HostOffset:
        """The end of what tables point to: on a device its own end says nothing."""
        from .upkeep import metadata_end

        end = metadata_end(self)
        for index, place in enumerate(self.l1):
            if place:
                end = max(end, place + self.table_bytes)
                for entry in await self.read_table(index):
                    if entry & COMPRESSED:
                        end = max(end, sum(unpack_compressed(entry, self.cluster_bits)))
                    elif entry:
                        end = max(end, entry + self.cluster_size)
        return end

    def forget_tables(self, l1: array[int]) -> None:
        """Take another L1 table, none of whose changes are pending; mutex held."""
        self.l1 = l1
        self.l1_dirty.clear()
        self.cache.clear()
        self._places = array("Q", sorted(filter(None, l1)))
        self.generation += 1  # packed data may come to lie where other packed data was
        self.unpacked.clear()

    async def own_table(self, index: int) -> L2Table:
        """The L2 table of an L1 entry, made if need be, ready for changes; mutex held."""
        if self.l1[index]:
            table = await self._load_table(index)
            if not table.writable:
                self._vet_table(index, table)
                self.cache.allow_overwrite(index)
            return table
        entries = array("Q", bytes(self.table_bytes))
        place, _ = self.allocate(self.table_bytes)
        try:
            await self.file.write(to_big_endian(entries), place)  # so that its space is real
        except BaseException:
            self.take_back(place, self.table_bytes)
            raise
        table = L2Table(place, entries, fresh=True)
        self.l1[index] = place
        self.l1_dirty.add(index)
        self._places.append(place)
        self.cache.insert(index, table)
        self.cache.touch(index, 0, len(entries))
        return table

    def _vet_table(self, index: int, table: L2Table) -> None:
        """Refuse to write into a table that others overlap, or through one that names metadata
        as guest data."""
        places, span = self._places, self.table_bytes
        header = self.header
        at = bisect_left(places, table.offset)
        if (
            table.offset % 8
            or (at and places[at - 1] + span > table.offset)
            or (at + 1 < len(places) and table.offset + span > places[at + 1])
        ):
            raise CorruptImageError(
                f"L2 table {index} at {table.offset:#x} overlaps another one or is not aligned",
                path=self.name,
                offset=header.l1_offset + index * 8,
                hint="run: enban check",
            )
        l1_end = header.l1_offset + len(self.l1) * 8
        for position, entry in enumerate(table.entries):
            if entry and not entry & COMPRESSED:
                guest = (index << self.l2_shift) + (position << self.cluster_bits)
                self._check_place(entry, guest)
                end = entry + self.cluster_size
                at = bisect_left(places, end)
                over_table = at and places[at - 1] + span > entry
                if over_table or entry < HEADER.size or (entry < l1_end and header.l1_offset < end):
                    raise self._bad_entry(guest, f"points to metadata at {entry:#x}")

    # -- space -----------------------------------------------------------------------------

    def allocate(self, length: int, unit: int = 0) -> tuple[HostOffset, bool]:
        """(where `length` bytes of new space begin, whether they read as zeros); mutex held.
        The place is a multiple of `unit`, by default of the cluster size. Raises NoSpaceError."""
        host = align_up(self.end, unit or self.cluster_size)
        end = host + length
        if self.file.fixed_size and end > self.file.size():
            raise NoSpaceError("cannot allocate: the device is full", path=self.name, errno=28)
        clean = host >= self.clean_from and not self.file.fixed_size
        self.end = end
        self.clean_from = max(self.clean_from, end)
        self.last_place = max(self.last_place, end - self.cluster_size)
        return host, clean

    def begin_space(self, end: HostOffset) -> None:
        """New space begins at `end`; behind the end of a file nothing was ever written."""
        self.end = self.clean_from = end
        self.last_place = align_up(max(end, self.file.size()), self.cluster_size) - self.cluster_size

    def take_back(self, host: HostOffset, length: int) -> None:
        if host + length == self.end:
            self.end = host

    # -- write side ------------------------------------------------------------------------

    async def reserve(self, offset: GuestOffset, length: int) -> list[Piece]:
        return await self._reserve(offset, length, zeroing=False)

    async def _reserve(self, offset: GuestOffset, length: int, *, zeroing: bool) -> list[Piece]:
        """zeroing: leave out clusters that are unallocated and read as zeros already."""
        await self._make_room()
        pieces: list[Piece] = []
        position = align_down(offset, self.cluster_size)
        end = align_up(offset + length, self.cluster_size)
        below = self._end_below()
        async with self.mutex:
            await self.prepare_change()
            try:
                while position < end:
                    index = position >> self.l2_shift
                    stop = min(end, index + 1 << self.l2_shift)
                    skip = zeroing and position >= below
                    if zeroing and not skip:
                        stop = min(stop, align_up(below, self.cluster_size))
                    if self.l1[index] or not skip:
                        table = await self.own_table(index)
                        self._reserve_in_table(
                            pieces, index, table, position, stop, offset, offset + length, skip=skip
                        )
                    position = stop
            except BaseException:
                self._undo(pieces)
                raise
        return pieces

    async def _make_room(self) -> None:
        if len(self.cache.dirty) >= self.cache.most_dirty:
            await barrier(self)

    def _end_below(self) -> GuestOffset:
        """Unallocated clusters from here on read as zeros for certain."""
        if not self.backing_name:
            return 0
        return self.size if self.backing is None else self.backing.size

    def _reserve_in_table(
        self,
        pieces: list[Piece],
        index: int,
        table: L2Table,
        start: GuestOffset,
        stop: GuestOffset,
        want_start: GuestOffset,
        want_end: GuestOffset,
        *,
        skip: bool,
    ) -> None:
        entries, bits = table.entries, self.cluster_bits
        i = start >> bits & self.l2_mask
        last = i + (stop - start >> bits)
        while i < last:
            entry = entries[i]
            guest = (index << self.l2_shift) + (i << bits)
            count = 1
            if entry and not entry & COMPRESSED:
                while i + count < last and entries[i + count] == entry + (count << bits):
                    count += 1
                first, end = max(guest, want_start), min(guest + (count << bits), want_end)
                if self.cipher is not None:
                    first, end = align_down(first, SECTOR), min(align_up(end, SECTOR), self.size)
                place, fill = entry + first - guest, self.cipher is not None
                pieces.append(Piece(first, end - first, self.file, place, fill=fill))
            elif entry or not skip:
                while i + count < last and (
                    entries[i + count] & COMPRESSED or not (entries[i + count] or skip)
                ):
                    count += 1
                host, clean = self.allocate(count << bits)
                table.pins += 1
                link = Link(index, i, count, host, count << bits)
                length = min(count << bits, self.size - guest)
                clean = clean and self.cipher is None  # zeros would not decrypt to zeros
                pieces.append(Piece(guest, length, self.file, host, fill=True, clean=clean, token=link))
            i += count

    async def reserve_packed(self, offset: GuestOffset, length: int) -> Piece:
        if self.encrypted:
            raise UnsupportedOperationError(
                "an encrypted image cannot hold compressed clusters",
                path=self.name,
                hint="use one of the two",
            )
        if not 0 < length < self.cluster_size:
            raise UnsupportedOperationError(
                "a compressed cluster must be smaller than a cluster", path=self.name
            )
        await self._make_room()
        async with self.mutex:
            await self.prepare_change()
            index = offset >> self.l2_shift
            table = await self.own_table(index)
            host, _ = self.allocate(length, 1)
            if host > largest_packed_host(self.cluster_bits):
                self.take_back(host, length)
                raise NoSpaceError(
                    "the file is too long for compressed clusters",
                    path=self.name,
                    hint="write plain ones",
                    errno=27,
                )
            entry = pack_compressed(host, length, self.cluster_bits)
            link = Link(index, offset >> self.cluster_bits & self.l2_mask, 1, host, length, packed=entry)
            table.pins += 1
        return Piece(offset, length, self.file, host, fill=False, token=link)

    async def publish(self, pieces: list[Piece]) -> None:
        async with self.mutex:
            for piece in pieces:
                link = piece.token
                if isinstance(link, Link):
                    table = self.cache.tables[link.index]
                    places = range(
                        link.host, link.host + (link.count << self.cluster_bits), self.cluster_size
                    )
                    new = array("Q", [link.packed] if link.packed else places)
                    table.entries[link.first : link.first + link.count] = new
                    self.cache.touch(link.index, link.first, link.count)
                    table.pins -= 1

    async def abandon(self, pieces: list[Piece]) -> None:
        async with self.mutex:
            self._undo(pieces)

    def _undo(self, pieces: list[Piece]) -> None:
        for piece in reversed(pieces):
            link = piece.token
            if isinstance(link, Link):
                self.cache.tables[link.index].pins -= 1
                self.take_back(link.host, link.length)

    # -- zero and discard ------------------------------------------------------------------

    async def zero(self, offset: GuestOffset, length: int, *, unmap: bool) -> bool:
        if self.cipher is not None:
            return False
        pieces = await self._reserve(offset, length, zeroing=True)
        try:
            for piece in pieces:
                if not piece.clean:
                    await self.file.write_zeroes(piece.host, piece.length, unmap=unmap)
        except BaseException:
            await self.abandon(pieces)
            raise
        await self.publish(pieces)
        return True

    async def discard(self, offset: GuestOffset, length: int) -> None:
        """Make holes in the file where whole clusters are; they stay mapped, so nothing below shows."""
        if self.cipher is not None:
            return
        async with self.mutex:
            await self.prepare_change()
        end = offset + length
        while offset < end:
            extent = self.lookup(offset, end - offset)
            if extent is None:
                await self.load(offset)
                continue
            if extent.kind == DATA:
                async with self.mutex:
                    await self.own_table(offset >> self.l2_shift)  # vets the places
                await self.file.write_zeroes(extent.host, extent.length, unmap=True)
            offset += extent.length

    # -- upkeep --------------------------------------------------------

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        from .resize import resize

        await resize(self, size, preallocation)

    async def describe(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"encrypted": True} if self.encrypted else {}
        return {**facts, "cluster-size": self.cluster_size, "dirty-flag": False}

    async def set_backing(self, name: str, format: str = "") -> None:
        from .upkeep import set_backing

        await set_backing(self, name)

    async def make_empty(self) -> None:
        from .upkeep import make_empty

        await make_empty(self)

    async def flush(self) -> None:
        if self.writable:
            await barrier(self)

    async def corrupted(self) -> None:
        """No new changes; those made before go to tables that were vetted and may still be flushed."""
        self._damaged = True
        self._overwritable = {}
