"""Persistent dirty bitmaps of an open image.

A bitmap is believed when it is read only if its in-use flag is clear. So:

    before the first change of the image   the in-use flag of every enabled bitmap is set,
                                           durably; from then on the bitmap lives in memory
    while it is written                    `Qcow2Node.tracked` has the bits of enabled bitmaps
    at close                               the bits are written, then, durably, the tables, and
                                           only then are the flags cleared

A crash in between leaves bitmaps that say of themselves that they cannot be trusted. Storing
overwrites the bitmap's own clusters where it has some. Where a new one cannot be had, because the
disk is full, the table says "all ones" of that part: then a bitmap reports more than has changed,
which costs time, but never less.

Whatever changes the list of bitmaps, or a bitmap that is not in use, writes a new directory (and
a new table) to free clusters, makes them durable, and then writes the header's first sector, in
which the bitmaps extension, the autoclear bits and everything else that matters stand: before that
write the bitmaps are as they were, after it as they shall be. See `_switch`.
"""

from __future__ import annotations

from ...block.bitmaps import BitmapInfo, Bitmaps, Bits
from ...errors import (
    CorruptImageError,
    HostError,
    ImageError,
    UnsupportedOperationError,
    UsageError,
)
from ...wire.qcow2 import AUTOCLEAR_BITMAPS, EXT_BITMAPS
from ...wire.qcow2_bitmaps import (
    ALL_ONES,
    AUTO,
    DIRTY_TRACKING,
    IN_USE,
    MAX_BITMAP_BYTES,
    MAX_BITMAPS,
    MAX_GRANULARITY_BITS,
    MAX_NAME,
    MIN_GRANULARITY_BITS,
    BitmapEntry,
    build_bitmap_directory,
    build_bitmaps_extension,
    parse_bitmap_directory,
    parse_bitmaps_extension,
    table_entries,
)
from ...wire.qcow2_entries import OFFSET_MASK
from .barrier import barrier
from .bitmap_tables import REPAIR, Bitmap, BitmapTables
from .upkeep import write_first_sector

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import Cluster, HostOffset
    from .node import Qcow2Node


async def open_bitmaps(node: Qcow2Node) -> Qcow2Bitmaps:
    """The bitmaps of an image: none if the header does not say that those it has are up to date.
    Raises CorruptImageError, HostError."""
    data = node.header.extension(EXT_BITMAPS)
    if data is None or not node.header.autoclear & AUTOCLEAR_BITMAPS:
        return Qcow2Bitmaps(node, [], 0, 0)
    try:
        count, length, offset = parse_bitmaps_extension(data, path=node.name)
        if not offset or offset & node.cluster_mask or offset + length > node.file.size():
            raise CorruptImageError(
                "the bitmap directory is not inside the file", path=node.name, offset=offset
            )
        entries = parse_bitmap_directory(await node.file.read(offset, length), count, path=node.name)
    except CorruptImageError as error:
        error.hint = REPAIR
        raise
    return Qcow2Bitmaps(node, [Bitmap(entry) for entry in entries], offset, length)


class Qcow2Bitmaps(BitmapTables, Bitmaps):
    """found: in the directory's order. directory, length: where that is, in bytes."""

    # -- reading ---------------------------------------------------------------------------

    def infos(self) -> list[BitmapInfo]:
        return [
            BitmapInfo(
                bitmap.name,
                1 << bitmap.entry.granularity_bits,
                enabled=bitmap.enabled,
                inconsistent=not bitmap.usable,
            )
            for bitmap in self.found
        ]

    def _find(self, name: str) -> Bitmap:
        for bitmap in self.found:
            if bitmap.name == name:
                return bitmap
        raise UsageError(f"there is no bitmap {name!r}", path=self.node.name, hint="see: enban info")

    def _usable(self, name: str) -> Bitmap:
        bitmap = self._find(name)
        if not bitmap.usable:
            raise ImageError(
                f"bitmap {name!r} is inconsistent: it was in use when the image was last closed",
                path=self.node.name,
                hint="remove it; the next backup must be a full one",
            )
        return bitmap

    async def bits(self, name: str) -> Bits:
        bitmap = self._usable(name)
        async with self.node.mutex:
            return await self._load(bitmap)

    # -- before the first change -----------------------------------------------------------

    async def arm(self, *, all: bool = False) -> None:
        """Have the in-use flag of every enabled bitmap (or of all that are usable) on the disk, and their
        content in memory. Mutex held."""
        due = [b for b in self.found if b.usable and not b.armed and (all or b.enabled)]
        for bitmap in due:
            await self._load(bitmap)
        if due:
            for bitmap in due:
                await self._write_flags(bitmap.entry, bitmap.entry.flags | IN_USE)
            await self.node.file.flush()
            for bitmap in due:
                bitmap.armed = True
        self._track()

    def _track(self) -> None:
        """Let writes be recorded in the bitmaps they belong in."""
        self.node.tracked = tuple(
            bitmap.bits
            for bitmap in self.found
            if bitmap.armed and bitmap.enabled and bitmap.bits is not None
        )

    async def distrust(self) -> None:
        """The disk was changed past us: say of every enabled bitmap that it cannot be relied upon."""
        for bitmap in self.found:
            if bitmap.enabled:
                bitmap.entry.flags |= IN_USE
                await self._write_flags(bitmap.entry, bitmap.entry.flags)
        await self.node.file.flush()

    # -- storing ---------------------------------------------------------------------------

    async def store(self) -> None:
        """Write armed bitmaps down and clear their in-use flags; nothing is in flight, and guest data is
        durable. Raises HostError; they stay in use then."""
        node = self.node
        armed = [bitmap for bitmap in self.found if bitmap.armed]
        if not armed:
            return
        freed: list[tuple[Cluster, int]] = []
        tables: list[tuple[Bitmap, dict[int, int], int]] = []
        async with node.mutex:
            for bitmap in armed:
                assert bitmap.bits is not None and bitmap.table is not None
                table, _ = await self._place(bitmap.bits, bitmap.table)
                entries = table_entries(node.size, bitmap.entry.granularity_bits, node.cluster_bits)
                tables.append((bitmap, table, entries))
        await barrier(node)  # the bits are durable, and the clusters they are in counted
        for bitmap, table, entries in tables:
            await self._write_table(bitmap.entry.table_offset, table, entries)
        await node.file.flush()
        async with node.mutex:
            for bitmap, table, entries in tables:
                assert bitmap.table is not None
                entry = bitmap.entry
                kept = {word & OFFSET_MASK for word in table.values()}
                old = [word & OFFSET_MASK for word in bitmap.table.values()]
                freed += [(place >> node.cluster_bits, 1) for place in old if place and place not in kept]
                before, after = self._table_clusters(entry.table_entries), self._table_clusters(entries)
                if after < before:
                    first = entry.table_offset >> node.cluster_bits
                    freed.append((first + after, before - after))
                entry.table_entries, bitmap.table = entries, table
                entry.flags &= ~IN_USE
                await self._write_flags(entry, entry.flags)
            await node.file.flush()
            for bitmap in armed:
                bitmap.armed = False
            self._track()
        await self._free(freed)

    # -- changing the list -----------------------------------------------------------------

    async def add(self, name: str, granularity: int, *, enabled: bool) -> None:
        await self._prepare()
        if any(bitmap.name == name for bitmap in self.found):
            raise UsageError(f"there is a bitmap {name!r} already", path=self.node.name)
        if len(self.found) >= MAX_BITMAPS:
            raise UnsupportedOperationError(
                f"an image has {MAX_BITMAPS} bitmaps at most", path=self.node.name
            )
        bitmap = self._empty(name, granularity, enabled=enabled)
        await self._switch([*self.found, bitmap], {bitmap: None}, [])

    async def restart(self, name: str, granularity: int) -> None:
        await self._prepare()
        old = [bitmap for bitmap in self.found if bitmap.name == name]
        bitmap = self._empty(name, granularity, enabled=True)
        others = [bitmap for bitmap in self.found if bitmap not in old]
        await self._switch([*others, bitmap], {bitmap: None}, old)

    def vet(self, name: str, granularity: int) -> None:
        self._check_version()
        self._empty(name, granularity, enabled=True)

    def _empty(self, name: str, granularity: int, *, enabled: bool) -> Bitmap:
        node = self.node
        bits = granularity.bit_length() - 1
        if granularity != 1 << max(bits, 0) or not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
            raise UsageError(
                f"granularity {granularity} is not possible", hint="use a power of two from 512 to 2G"
            )
        entry = BitmapEntry(0, 0, AUTO if enabled else 0, DIRTY_TRACKING, bits, name)
        if not 0 < len(entry.encoded_name) <= MAX_NAME or "\0" in name:
            raise UsageError(f"a bitmap's name has 1 to {MAX_NAME} bytes", path=node.name)
        self._check_size(entry, node.size)
        bitmap = Bitmap(entry)
        bitmap.bits = Bits(node.size, bits, node.cluster_size)
        return bitmap

    def _check_size(self, entry: BitmapEntry, size: int) -> None:
        entries = table_entries(size, entry.granularity_bits, self.node.cluster_bits)
        if entries > 1 and entries << self.node.cluster_bits > MAX_BITMAP_BYTES:
            raise UsageError(
                f"bitmap {entry.name!r} would have more than {MAX_BITMAP_BYTES >> 20} MiB",
                path=self.node.name,
                hint="use a larger granularity",
            )

    async def remove(self, name: str) -> None:
        await self._prepare()
        bitmap = self._find(name)
        await self._switch([other for other in self.found if other is not bitmap], {}, [bitmap])

    async def clear(self, name: str) -> None:
        await self._prepare()
        bitmap = self._usable(name)
        if bitmap.armed and bitmap.bits is not None:
            bitmap.bits.clear()
            return
        empty = Bits(self.node.size, bitmap.entry.granularity_bits, self.node.cluster_size)
        await self._replace(bitmap, empty)

    async def enable(self, name: str, on: bool) -> None:
        await self._prepare()
        bitmap = self._usable(name)
        if bitmap.enabled == on:
            return
        async with self.node.mutex:
            flags = bitmap.entry.flags ^ AUTO
            if not bitmap.armed:
                await self._load(bitmap)
                arm = on and self.node.changing
                await self._write_flags(bitmap.entry, flags | IN_USE if arm else flags)
                await self.node.file.flush()
                bitmap.armed = arm
            bitmap.entry.flags = flags
            self._track()

    async def merge(self, name: str, source: Bits) -> None:
        await self._prepare()
        bitmap = self._usable(name)
        if source.size != self.node.size:
            raise UsageError(
                f"the bitmaps are of disks of {source.size} and {self.node.size} bytes and cannot be merged",
                path=self.node.name,
            )
        async with self.node.mutex:
            bits = await self._load(bitmap)
        if bitmap.armed:
            bits.merge(source)
            return
        merged = bits.copy()
        merged.merge(source)
        await self._replace(bitmap, merged)

    def _check_version(self) -> None:
        if self.node.header.version < 3:
            raise UnsupportedOperationError(
                "an image of version 2 has no bitmaps", path=self.node.name, hint="upgrade it to compat=1.1"
            )

    async def _prepare(self) -> None:
        self._check_version()
        node = self.node
        async with node.mutex:
            await node.prepare_metadata()

    async def _replace(self, old: Bitmap, bits: Bits) -> None:
        """Other content for a bitmap that is not in use."""
        entry = old.entry
        new = Bitmap(
            BitmapEntry(0, 0, entry.flags, entry.kind, entry.granularity_bits, entry.name, entry.extra)
        )
        new.bits = bits
        found = [new if bitmap is old else bitmap for bitmap in self.found]
        await self._switch(found, {new: bits}, [old])

    async def _switch(self, found: list[Bitmap], new: dict[Bitmap, Bits | None], gone: list[Bitmap]) -> None:
        """Make `found` the bitmaps of the image. new: those without clusters, and their content (None:
        empty). gone: those whose clusters become free.

        Raises HostError or UnsupportedOperationError; the image is then as before, unless it was the
        last write that failed: after that nothing more is written to it."""
        node, bits = self.node, self.node.cluster_bits
        header = node.header
        freed = self._clusters(gone)
        if self.found:
            freed.append((self.directory >> bits, -(-self.length >> bits)))
        made: list[tuple[Cluster, int]] = []
        try:
            async with node.mutex:
                for bitmap, content in new.items():
                    await self._settle(bitmap, content, made)
                entries = [self._on_disk(bitmap) for bitmap in found]
                directory = build_bitmap_directory(entries)
                place = await self._store(directory, made) if entries else 0
            await barrier(node)  # all of it is durable and counted
        except BaseException:
            async with node.mutex:
                await self._release(made)
            raise
        async with node.mutex:
            before = list(header.extensions), header.autoclear
            if entries:
                header.set_extension(EXT_BITMAPS, build_bitmaps_extension(len(found), len(directory), place))
                header.autoclear |= AUTOCLEAR_BITMAPS
            else:
                header.set_extension(EXT_BITMAPS, None)
                header.autoclear &= ~AUTOCLEAR_BITMAPS
            try:
                await write_first_sector(node)
            except UnsupportedOperationError:
                header.extensions, header.autoclear = before
                await self._release(made)
                raise
            except BaseException:
                node.halt(HostError)  # which of the two the disk has is not known
                raise
            for bitmap, entry in zip(found, entries, strict=True):
                bitmap.entry.place = entry.place
                bitmap.armed = bitmap.usable and bool(entry.flags & IN_USE)
            self.found, self.directory, self.length = found, place, len(directory)
            self._track()
        await self._free(freed)

    def _on_disk(self, bitmap: Bitmap) -> BitmapEntry:
        """Its entry for the directory. An enabled bitmap is in use once the image is being changed."""
        entry = bitmap.entry.copy()
        if bitmap.armed or (bitmap.usable and bitmap.enabled and self.node.changing):
            entry.flags |= IN_USE
        return entry

    async def _settle(self, bitmap: Bitmap, content: Bits | None, made: list[tuple[Cluster, int]]) -> None:
        """Clusters for a bitmap that has none yet."""
        node, entry = self.node, bitmap.entry
        bitmap.table = {}
        if content is not None:
            bitmap.table, clusters = await self._place(content, None)
            made += clusters
        entry.table_entries = table_entries(node.size, entry.granularity_bits, node.cluster_bits)
        clusters_needed = self._table_clusters(entry.table_entries)
        entry.table_offset = await node.refcounts.allocate_adjacent(clusters_needed)
        made.append((entry.table_offset >> node.cluster_bits, clusters_needed))
        await self._write_table(entry.table_offset, bitmap.table, entry.table_entries)

    async def _store(self, content: bytes, made: list[tuple[Cluster, int]]) -> HostOffset:
        node = self.node
        clusters = -(-len(content) >> node.cluster_bits)
        place = await node.refcounts.allocate_adjacent(clusters)
        made.append((place >> node.cluster_bits, clusters))
        await node.file.write(content + bytes(-len(content) % node.cluster_size), place)
        return place

    def _clusters(self, gone: list[Bitmap]) -> list[tuple[Cluster, int]]:
        """What bitmaps occupy. Their tables were read: `prepare_metadata` does."""
        bits = self.node.cluster_bits
        freed: list[tuple[Cluster, int]] = []
        for bitmap in gone:
            assert bitmap.table is not None
            entry = bitmap.entry
            freed.append((entry.table_offset >> bits, self._table_clusters(entry.table_entries)))
            freed += [(word >> bits, 1) for word in bitmap.table.values() if word > ALL_ONES]
        return freed

    # -- another size ----------------------------------------------------------------------

    async def prepare_resize(self, size: int) -> None:
        """Before the disk gets another size: all bitmaps are in use, and their tables have room.
        Raises UsageError, HostError; then nothing has changed but for that."""
        node = self.node
        usable = [bitmap for bitmap in self.found if bitmap.usable]
        for bitmap in usable:
            self._check_size(bitmap.entry, size)
        async with node.mutex:
            await self.arm(all=True)
        for bitmap in usable:
            entries = table_entries(size, bitmap.entry.granularity_bits, node.cluster_bits)
            if self._table_clusters(entries) > self._table_clusters(bitmap.entry.table_entries):
                await self._longer_table(bitmap, entries)

    async def _longer_table(self, bitmap: Bitmap, entries: int) -> None:
        """Move the table of an armed bitmap to a place with room; while it is in use its content is of no
        account, but its clusters must be found."""
        node, entry = self.node, bitmap.entry
        assert bitmap.table is not None
        made: list[tuple[Cluster, int]] = []
        try:
            async with node.mutex:
                clusters = self._table_clusters(entries)
                place = await node.refcounts.allocate_adjacent(clusters)
                made.append((place >> node.cluster_bits, clusters))
                await self._write_table(place, bitmap.table, entries)
            await barrier(node)
        except BaseException:
            async with node.mutex:
                await self._release(made)
            raise
        old = (entry.table_offset >> node.cluster_bits, self._table_clusters(entry.table_entries))
        try:
            await node.file.write(place.to_bytes(8, "big"), self.directory + entry.place)
            await node.file.flush()
            entry.table_offset, entry.table_entries = place, entries
            await self._write_flags(entry, entry.flags | IN_USE)
            await node.file.flush()
        except BaseException:
            node.halt(HostError)
            raise
        await self._free([old])

    def resized(self, size: int) -> None:
        """The disk has this size now."""
        for bitmap in self.found:
            if bitmap.bits is not None:
                bitmap.bits.resize(size)
