"""A qcow2 image as a node: mapping guest ranges, and allocating for them.

What lives where:

- `mapping` reads L2 entries; `locate`/`locate_write` here are its short cuts;
- `reserve`, `publish`, `zero` and `discard` change tables in memory, under `mutex`;
- `barrier` brings the changes to the disk in order.

A host cluster that leaves the mapping goes from `unlinked` (its unlinking is in memory
only) to `quarantine` (durable, but a request that began before may still read or write the
cluster) and is then counted down.
"""

from __future__ import annotations

import _thread
from array import array

from ...block.locks import Mutex
from ...block.node import Node, Piece
from ...errors import (
    CorruptImageError,
    EnbanError,
    HostError,
    ReadOnlyError,
    UnsupportedOperationError,
    UsageError,
)
from ...extent import UNALLOCATED, Extent
from ...units import align_down, align_up
from ...wire.qcow2 import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_RAW_DATA,
    COMPRESSION_NAMES,
    CORRUPT,
    EXT_BITMAPS,
    EXTERNAL_DATA,
)
from ...wire.qcow2_entries import (
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    REFTABLE_MASK,
    pack_compressed,
    unpack_compressed,
)
from ...wire.qcow2_snapshots import build_snapshots
from ..common.tables import L2Table, TableCache, from_big_endian, to_big_endian
from .allocation import Link, link_entries, new_packed, reserve_extended, reserve_standard, undo
from .barrier import barrier
from .clearing import clear
from .mapping import bad_entry, lookup_extended, lookup_standard
from .refcounts import Refcounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from typing import Any

    from ...block.bitmaps import Bits
    from ...block.runtime import Runtime
    from ...block.storage import Storage
    from ...units import Cluster, GuestOffset, HostOffset
    from ...wire.qcow2 import Header
    from ...wire.qcow2_snapshots import SnapshotEntry
    from .bitmaps import Qcow2Bitmaps

_ALWAYS_KNOWN = 64 << 10  # bytes
NOT_PLAIN = COMPRESSED | ALL_ZERO


class Qcow2Node(Node):
    """An open qcow2 image. Made by `opening.open_qcow2`."""

    format = "qcow2"

    def __init__(
        self,
        name: str,
        runtime: Runtime,
        file: Storage,
        header: Header,
        l1: array[int],
        refcount_table: array[int],
        snapshots: list[SnapshotEntry],
        *,
        writable: bool,
    ) -> None:
        super().__init__(name, runtime, file, writable=writable)
        self.header = header
        self.snapshots = snapshots
        self.size = header.size
        self.cluster_bits = header.cluster_bits
        self.cluster_size = self.unit = header.cluster_size
        self.cluster_mask = self.cluster_size - 1
        self.extended = header.extended_l2
        self.grain_bits = self.cluster_bits - 5 if self.extended else self.cluster_bits
        self.grain = 1 << self.grain_bits
        self.l2_shift = self.cluster_bits + header.l2_entries.bit_length() - 1
        self.l2_mask = header.l2_entries - 1
        self.numbers = 2 if self.extended else 1  # array items an L2 entry takes
        self.codec = COMPRESSION_NAMES[header.compression]
        self.backing_name = header.backing_name.decode("utf-8", "surrogateescape")
        self.external = bool(header.incompatible & EXTERNAL_DATA)
        # Without an external data file no cluster can lie at offset 0, so the offset alone tells.
        self.present_mask = OFFSET_MASK | COPIED if self.external else OFFSET_MASK
        self.l1 = l1
        self.l1_dirty: set[int] = set()
        self.cache = TableCache(self.cluster_size)
        self.refcounts = Refcounts(file, header, refcount_table, name)
        self.mutex = Mutex(runtime)
        self.barrier_mutex = Mutex(runtime)
        self.barriers_started = 0
        self.barriers_done = 0
        self.unlinked: list[tuple[Cluster, int, int]] = []  # (first, count, youngest request then)
        self.quarantine: list[tuple[Cluster, int, int]] = []
        self.packed_end: HostOffset = 0  # where the next compressed cluster may continue, 0: nowhere
        self.pass_discards = True
        self._metadata_known = False
        self._ready_to_change = False
        self.dirty_bitmaps: Qcow2Bitmaps | None = None  # None: not looked at yet
        self._bitmaps_guard = _thread.allocate_lock()
        self.tracked: tuple[Bits, ...] = ()  # where writes are recorded
        self.mark_zeroes = False  # also where the backing file shows zeros
        self._halted: type[EnbanError] | None = None
        self.vm_state_new = False  # the VM state was written since the last snapshot
        self.header_doubtful = False  # what the header on disk says is unknown: the next barrier writes it

    def present(self, entry: int) -> bool:
        """Whether a standard L2 entry has a host cluster."""
        return bool(entry & self.present_mask)

    @property
    def may_show_backing(self) -> bool:
        """Whether unallocated clusters may read as something else than zeros."""
        return bool(self.header.backing_name) or self.backing is not None

    # -- read side -------------------------------------------------------------------------

    def locate(self, offset: GuestOffset, length: int) -> HostOffset:
        return self._place(self.cache.readable, offset, length)

    def locate_write(self, offset: GuestOffset, length: int) -> HostOffset:
        entries = self.cache.overwritable.get(offset >> self.l2_shift)
        if entries is None:
            return -1
        if not entries[(offset >> self.cluster_bits & self.l2_mask) * self.numbers] >> 63:
            return -1
        if self.tracked:
            self.mark(offset, length)
        return self._place(self.cache.overwritable, offset, length)

    def _place(self, tables: dict[int, array[int]], offset: GuestOffset, length: int) -> HostOffset:
        entries = tables.get(offset >> self.l2_shift)
        if entries is None:
            return -1
        inside = offset & self.cluster_mask
        if inside + length > self.cluster_size:
            return -1 if self.extended else self._place_run(entries, offset, inside + length)
        if self.extended:
            index = (offset >> self.cluster_bits & self.l2_mask) * 2
            entry = entries[index]
            first = inside >> self.grain_bits
            count = (inside + length - 1 >> self.grain_bits) - first + 1
            wanted = (1 << count) - 1 << first
            if entry & COMPRESSED or entries[index + 1] & (wanted | wanted << 32) != wanted:
                return -1
            if entries[index] != entry:  # changed meanwhile by another thread
                return -1
        else:
            entry = entries[offset >> self.cluster_bits & self.l2_mask]
            if entry & NOT_PLAIN:
                return -1
        host = entry & OFFSET_MASK
        if host & self.cluster_mask or not entry & self.present_mask:
            return -1
        return host + inside

    def _place_run(self, entries: array[int], offset: GuestOffset, length: int) -> HostOffset:
        """The place of several clusters that follow one another on the host too, with equal flags;
        `length` is from the start of the first."""
        bits = self.cluster_bits
        index = offset >> bits & self.l2_mask
        end = index + (length + self.cluster_mask >> bits)
        entry = expected = entries[index]
        host = entry & OFFSET_MASK
        if (
            end > len(entries)
            or entry & NOT_PLAIN
            or host & self.cluster_mask
            or not entry & self.present_mask
        ):
            return -1
        for found in entries[index + 1 : end]:
            expected += self.cluster_size
            if found != expected:
                return -1
        return host + (offset & self.cluster_mask)

    def lookup(self, offset: GuestOffset, length: int) -> Extent | None:
        index = offset >> self.l2_shift
        entries = self.cache.readable.get(index)
        if entries is None:
            if self.l1[index] & OFFSET_MASK:
                return None
            last = offset + length - 1 >> self.l2_shift
            while index < last and not self.l1[index + 1] & OFFSET_MASK:
                index += 1
            return Extent(offset, min(length, (index + 1 << self.l2_shift) - offset), UNALLOCATED, self)
        length = min(length, (index + 1 << self.l2_shift) - offset)
        if self.extended:
            return lookup_extended(self, entries, offset, length)
        return lookup_standard(self, entries, offset, length)

    async def load(self, offset: GuestOffset) -> None:
        async with self.mutex:
            await self.load_table(offset >> self.l2_shift)

    async def load_table(self, index: int) -> L2Table:
        """The L2 table of an L1 entry that has one; the mutex is held."""
        table = self.cache.tables.get(index)
        if table is None:
            offset = self.l1[index] & OFFSET_MASK
            table = L2Table(offset, await self.read_l2(offset), fresh=False)
            self.cache.insert(index, table)
        return table

    async def read_l2(self, offset: HostOffset) -> array[int]:
        """The entries of the L2 table at a host offset, from the file."""
        buffer = bytearray(self.cluster_size)
        await self.read_stored_l2(buffer, offset)
        return from_big_endian(buffer)

    async def read_stored_l2(self, buffer: bytearray, offset: HostOffset) -> None:
        """The L2 table at a host offset, as it is in the file, into a buffer of a cluster's size."""
        if offset & self.cluster_mask or not offset or offset + self.cluster_size > self.file.size():
            raise CorruptImageError(
                f"L2 table at {offset:#x} is not inside the file",
                path=self.name,
                hint="run: enban check -r all",
            )
        await self.file.read_into(buffer, offset)

    # -- preparing a change ----------------------------------------------------------------

    async def prepare_change(self) -> None:
        """What must be so before the first change of an image since it was opened; mutex held."""
        self._check_not_halted()
        if self._ready_to_change:
            return
        await self.prepare_metadata()
        if self.dirty_bitmaps is not None:
            await self.dirty_bitmaps.arm()
        self._ready_to_change = True

    @property
    def changing(self) -> bool:
        """Whether guest data may have been changed since the image was opened."""
        return self._ready_to_change

    async def prepare_metadata(self) -> None:
        """What must be so before the first change even of what the guest does not see; mutex held."""
        self._check_not_halted()
        if self._metadata_known:
            return
        if not self.writable:
            raise ReadOnlyError("the image is open read-only", path=self.name)
        known = AUTOCLEAR_RAW_DATA  # we do keep a raw data file raw
        places: list[tuple[HostOffset, int, str]] = []
        if self.header.autoclear & AUTOCLEAR_BITMAPS and self.header.extension(EXT_BITMAPS) is not None:
            places = await (await self.bitmaps()).places()
            known |= AUTOCLEAR_BITMAPS
        if self.header.autoclear & ~known:
            kept = self.header.autoclear & known
            await self.file.write(kept.to_bytes(8, "big"), 88)
            await self.file.flush()
            self.header.autoclear = kept
        await self._collect_metadata(places)
        self._metadata_known = True

    async def _collect_metadata(self, bitmaps: list[tuple[HostOffset, int, str]]) -> None:
        """Learn where the tables are. If any overlap, changing one would destroy another: refuse."""
        size, header = self.cluster_size, self.header
        metadata: set[HostOffset] = set()

        def add(offset: HostOffset, length: int, what: str) -> None:
            for place in range(offset, offset + length, size):
                if place in metadata:
                    raise CorruptImageError(
                        f"{what} lies on other metadata",
                        path=self.name,
                        offset=place,
                        hint="run: enban check -r all",
                    )
                metadata.add(place)

        add(0, size, "header")
        add(header.l1_offset, header.l1_entries * 8, "L1 table")
        add(header.refcount_table_offset, header.refcount_table_clusters * size, "refcount table")
        for entry in filter(None, self.refcounts.table):
            add(entry & REFTABLE_MASK, size, "refcount block")
        for entry in filter(OFFSET_MASK.__and__, self.l1):
            add(entry & OFFSET_MASK, size, "L2 table")
        for snapshot in self.snapshots:
            if snapshot.l1_offset + snapshot.l1_entries * 8 > self.file.size():
                raise CorruptImageError(
                    f"L1 table of snapshot '{snapshot.name}' reaches past the end of the file",
                    path=self.name,
                    offset=snapshot.l1_offset,
                    hint="run: enban check -r all",
                )
            async for place, length in self._stored(snapshot.l1_offset, snapshot.l1_entries * 8):
                add(place, length, "L1 table of a snapshot")
        if header.snapshot_count:
            add(header.snapshots_offset, len(build_snapshots(self.snapshots)), "snapshot table")
        for region in bitmaps:
            add(*region)
        self.refcounts.metadata |= metadata

    async def _stored(self, offset: HostOffset, length: int) -> AsyncIterator[tuple[HostOffset, int]]:
        """Of a large table the clusters that are not holes of the file: the numbers in a header shall not
        decide how much memory is taken."""
        end = offset + length
        while offset < end:
            hole, length = False, end - offset
            if length > _ALWAYS_KNOWN:
                hole, length = await self.file.status(offset, length)
                if offset + length < end:  # one hole ends inside a cluster that is stored, then
                    length = max(align_down(offset + length, self.cluster_size) - offset, self.cluster_size)
            if not hole:
                yield offset, length
            offset += length

    async def own_table(self, index: int) -> L2Table:
        """The L2 table of an L1 entry, made or copied if need be, ready for changes; mutex held."""
        l1 = self.l1[index]
        offset = l1 & OFFSET_MASK
        if not offset:
            entries = array("Q", bytes(self.cluster_size))
        elif l1 & COPIED:
            table = await self.load_table(index)
            if not table.writable:
                self._vet_table(index, table)
                self.cache.allow_overwrite(index)
            return table
        else:
            table = await self.load_table(index)
            self._vet_table(index, table)
            entries = array("Q", table.entries)
        place = await self.refcounts.allocate_table(to_big_endian(entries))
        if offset:
            self.unlink(offset >> self.cluster_bits, 1)
        table = L2Table(place, entries, fresh=True)
        self.l1[index] = place | COPIED
        self.l1_dirty.add(index)
        self.cache.insert(index, table)
        self.cache.touch(index, 0, len(entries))
        return table

    def _vet_table(self, index: int, table: L2Table) -> None:
        """Refuse to write through a table that names metadata as guest data."""
        metadata = self.refcounts.metadata
        entries = table.entries[::2] if self.extended else table.entries
        if self.external or metadata.isdisjoint(map(OFFSET_MASK.__and__, filter(None, entries))):
            return
        for position, entry in enumerate(entries):
            if not entry & COMPRESSED and self.present(entry) and entry & OFFSET_MASK in metadata:
                raise bad_entry(
                    self,
                    (index << self.l2_shift) + (position << self.cluster_bits),
                    f"points to metadata at {entry & OFFSET_MASK:#x}",
                )

    # -- write side ------------------------------------------------------------------------

    async def reserve(self, offset: GuestOffset, length: int) -> list[Piece]:
        await self.make_room()
        pieces: list[Piece] = []
        position = align_down(offset, self.cluster_size)
        end = align_up(offset + length, self.cluster_size)
        async with self.mutex:
            await self.prepare_change()
            if self.tracked:
                self.mark(offset, length)
            try:
                while position < end:
                    index = position >> self.l2_shift
                    stop = min(end, index + 1 << self.l2_shift)
                    table = await self.own_table(index)
                    if self.extended:
                        await reserve_extended(
                            self, pieces, index, table, position, stop, offset, offset + length
                        )
                    else:
                        await reserve_standard(
                            self, pieces, index, table, position, stop, offset, offset + length
                        )
                    position = stop
            except BaseException:
                await undo(self, pieces)
                raise
        return pieces

    def claim(self, offset: GuestOffset, length: int) -> Piece | None:
        index = offset >> self.l2_shift
        entries = self.cache.overwritable.get(index)
        if (
            entries is None
            or self.extended
            or self.external
            or self.may_show_backing
            or self.quarantine
            or not self._ready_to_change
            or len(self.cache.dirty) >= self.cache.most_dirty
        ):
            return None
        i = offset >> self.cluster_bits & self.l2_mask
        if entries[i] & ~ALL_ZERO or not self.mutex.try_acquire():
            return None
        try:
            table = self.cache.tables.get(index)
            if table is None or not table.writable:
                return None
            found = self.refcounts.allocate_now(1)
            if found is None:
                return None
            cluster, _, clean = found
            link = Link(index, i, 1, cluster << self.cluster_bits, owned=True)
            table.pins += 1
        finally:
            self.mutex.release()
        if self.tracked:
            self.mark(offset, length)
        inside = offset & self.cluster_mask
        if clean:  # what reads as zeros takes the place of what read as zeros
            return Piece(offset, length, self.data, link.host + inside, fill=False, token=link)
        start = offset - inside
        length = self.cluster_size
        return Piece(start, length, self.data, link.host, fill=True, token=link)

    async def make_room(self) -> None:
        """Before changing more: write out changes if many have collected, take back free clusters."""
        if len(self.cache.dirty) >= self.cache.most_dirty:
            await barrier(self)
        elif self.quarantine:
            async with self.mutex:
                await self.release_quarantine()

    async def reserve_packed(self, offset: GuestOffset, length: int) -> Piece:
        if self.external:
            raise UnsupportedOperationError(
                "an image with an external data file cannot hold compressed clusters", path=self.name
            )
        if not 0 < length < self.cluster_size:
            raise UnsupportedOperationError(
                "a compressed cluster must be smaller than a cluster", path=self.name
            )
        await self.make_room()
        async with self.mutex:
            await self.prepare_change()
            self.mark(offset, self.cluster_size)
            index = offset >> self.l2_shift
            table = await self.own_table(index)
            host = await new_packed(self, length)
            entry = pack_compressed(host, length, self.cluster_bits)
            link = Link(index, offset >> self.cluster_bits & self.l2_mask, 1, host, owned=True, packed=entry)
            table.pins += 1
        return Piece(offset, length, self.file, host, fill=False, token=link)

    async def publish(self, pieces: list[Piece]) -> None:
        if not self.mutex.try_acquire():
            await self.mutex.__aenter__()
        try:
            for piece in pieces:
                link = piece.token
                if isinstance(link, Link):
                    link_entries(self, link)
                    self.cache.tables[link.index].pins -= 1
        finally:
            self.mutex.release()

    async def abandon(self, pieces: list[Piece]) -> None:
        async with self.mutex:
            await undo(self, pieces)

    def forget_clusters(self, first: Cluster, count: int) -> None:
        """Clusters are free: nothing may be known of their old content."""
        if first <= self.packed_end - 1 >> self.cluster_bits < first + count:
            self.packed_end = 0
        self.generation += 1
        self.unpacked.clear()
        metadata, bits = self.refcounts.metadata, self.cluster_bits
        if count > len(metadata):
            metadata.difference_update([m for m in metadata if first << bits <= m < first + count << bits])
        else:
            metadata.difference_update(range(first << bits, first + count << bits, 1 << bits))

    # -- leaving the mapping ---------------------------------------------------------------

    def unlink(self, cluster: Cluster, count: int) -> None:
        youngest = self.ledger.newest if self.ledger is not None else 0
        if self.unlinked:
            first, n, _ = self.unlinked[-1]
            if first + n == cluster:
                self.unlinked[-1] = (first, n + count, youngest)
                return
        self.unlinked.append((cluster, count, youngest))

    def unlink_entry(self, entry: int) -> None:
        if entry & COMPRESSED:
            host, packed = unpack_compressed(entry, self.cluster_bits)
            first = host >> self.cluster_bits
            self.unlink(first, (host + packed - 1 >> self.cluster_bits) - first + 1)
        elif entry & OFFSET_MASK and not self.external:
            self.unlink((entry & OFFSET_MASK) >> self.cluster_bits, 1)

    async def release_quarantine(self, *, least: int = 0) -> None:
        """Count down clusters whose unlinking is durable and that no running request can reach;
        mutex held. What is free now is given back to the host before anyone can get it; with `least`
        only runs of that many bytes, made of more than single clusters."""
        oldest = self.ledger.oldest if self.ledger is not None else 1
        due = [entry for entry in self.quarantine if entry[2] < oldest]
        if not due:
            return
        self.quarantine = [entry for entry in self.quarantine if entry[2] >= oldest]
        run = end = 0  # free clusters not given back yet
        try:
            while due:
                first, count, _ = due[0]
                span, left = await self.refcounts.drop_span(first, count)
                due[0] = (first + span, count - span, 0)
                if span == count:
                    del due[0]
                if not left:
                    self.forget_clusters(first, span)
                    if count == 1 and least:
                        continue  # a table or the like: such places are used again soon
                    if first != end:
                        await self._give_back(run, end, least)
                        run = first
                    end = first + span
        finally:
            self.quarantine.extend(due)  # if a refcount block could not be read, the rest stays due
            await self._give_back(run, end, least)

    async def _give_back(self, first: Cluster, end: Cluster, least: int) -> None:
        """Tell the host that the space of free clusters is not needed."""
        if self.pass_discards and end - first << self.cluster_bits > least:
            try:
                await self.file.discard(first << self.cluster_bits, end - first << self.cluster_bits)
            except EnbanError:
                self.pass_discards = False  # advice was not wanted; the space stays with the file

    def refcount_table_moved(self, moved: tuple[HostOffset, int]) -> tuple[Cluster, int, int]:
        """The header shall name the new refcount table; the old one, for `unlinked` or `quarantine`."""
        old, clusters = self.header.refcount_table_offset, self.header.refcount_table_clusters
        self.header.refcount_table_offset, self.header.refcount_table_clusters = moved
        return old >> self.cluster_bits, clusters, 0

    # -- zero and discard ------------------------------------------------------------------

    def zeroes_fast(self, *, unmap: bool) -> bool:
        if self.external and not self.data.zeroes_fast():
            return False
        return self.header.version >= 3 or (unmap and not self.may_show_backing)

    async def zero(self, offset: GuestOffset, length: int, *, unmap: bool) -> bool:
        if self.header.version < 3 and (self.may_show_backing or not unmap):
            return False
        if self.external:
            await self._change_data(offset, length)
            await self.data.write_zeroes(offset, length, unmap=unmap)
        return await clear(self, offset, length, unmap=unmap, zero=True)

    async def discard(self, offset: GuestOffset, length: int) -> None:
        if self.header.version < 3 and self.may_show_backing:
            return  # there an unallocated cluster would show what the backing file holds
        if self.external:
            await self._change_data(offset, length)
            await self.data.write_zeroes(offset, length, unmap=True)
        await clear(self, offset, length, unmap=True, zero=False)

    async def _change_data(self, offset: GuestOffset, length: int) -> None:
        """Before a data file is changed past the tables."""
        async with self.mutex:
            await self.prepare_change()
            self.mark(offset, length)

    # -- dirty bitmaps ---------------------------------------------------------------------

    def mark(self, offset: GuestOffset, length: int) -> None:
        """Record in the bitmaps that a range is about to change."""
        for bits in self.tracked:
            bits.set(offset, length)

    async def bitmaps(self) -> Qcow2Bitmaps:
        if self.dirty_bitmaps is None:
            from .bitmaps import open_bitmaps

            found = await open_bitmaps(self)
            with self._bitmaps_guard:  # one for all who may have asked at once
                if self.dirty_bitmaps is None:
                    self.dirty_bitmaps = found
        return self.dirty_bitmaps

    # -- size, flush, close ----------------------------------------------------------------

    async def show_snapshot(self, name: str) -> None:
        from .opening import read_snapshots, read_table

        for snapshot in await read_snapshots(self.file, self.header, self.name):
            if name in (snapshot.id, snapshot.name):
                what = f"L1 table of snapshot '{snapshot.name}'"
                self.l1 = await read_table(
                    self.file, snapshot.l1_offset, snapshot.l1_entries, what, self.name
                )
                self.size = snapshot.disk_size
                self.vm_state_size = snapshot.vm_state_size
                if len(self.l1) << self.l2_shift < self.size:
                    raise CorruptImageError(f"{what} is too small", path=self.name, offset=snapshot.l1_offset)
                self.header.autoclear &= ~AUTOCLEAR_BITMAPS  # they speak of the active state
                return
        raise UsageError(f"there is no snapshot '{name}'", path=self.name, hint="see: enban info")

    def snapshots_here(self) -> list[SnapshotEntry]:
        return list(self.snapshots)

    async def create_snapshot(self, snapshot: SnapshotEntry) -> None:
        from .snapshots import create

        await create(self, snapshot)

    async def apply_snapshot(self, name: str) -> None:
        from .snapshots import apply

        await apply(self, name)

    async def delete_snapshot(self, name: str) -> None:
        from .snapshots import delete

        await delete(self, name)

    async def write_vm_state(self, buffer: memoryview, offset: int) -> bool:
        from .vm_state import write

        return await write(self, buffer, offset)

    async def prepare_vm_state(self, end: int) -> None:
        from .vm_state import prepare

        await prepare(self, end)

    async def read_vm_state(self, buffer: memoryview, offset: int) -> None:
        from .vm_state import read

        await read(self, buffer, offset)

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        from .resize import resize

        await resize(self, size, preallocation)

    async def preallocate(self, offset: GuestOffset, length: int, mode: str) -> None:
        from .resize import preallocate

        await preallocate(self, offset, length, mode)

    async def flush(self) -> None:
        self._check_not_halted()
        if self.writable:
            await self.runtime.finish(barrier(self))

    async def corrupted(self) -> None:
        if not self.writable:
            return
        self.halt(CorruptImageError)
        if self.header.version > 2 and not self.header.incompatible & CORRUPT:
            self.header.incompatible |= CORRUPT
            await self.file.write(self.header.incompatible.to_bytes(8, "big"), 72)
            await self.file.flush()

    def halt(self, reason: type[EnbanError]) -> None:
        """From now on nothing is written: the tables are wrong (CorruptImageError), or which state
        the disk has is not known (HostError). Writes and flushes raise; reading goes on."""
        self.writable = False
        self._halted = reason
        self.cache.overwritable.clear()

    def _check_not_halted(self) -> None:
        if self._halted is CorruptImageError:
            raise CorruptImageError(
                "the image was found damaged and is written no more",
                path=self.name,
                hint="run: enban check -r all",
            )
        if self._halted is not None:
            raise HostError(
                "a failed switch of tables left its state unknown, it is written no more",
                path=self.name,
                hint="close it and open it again",
            )

    async def write_header(self) -> None:
        """Rewrite the header cluster from the fields in memory, durably."""
        content = self.header.build()
        await self.file.write(content + bytes(self.cluster_size - len(content)), 0)
        await self.file.flush()

    async def close(self) -> None:
        try:
            if self.writable:
                await barrier(self)
                self.ledger = None  # nothing is in flight any more: all of the quarantine is due
                async with self.mutex:
                    self.quarantine = [(first, count, 0) for first, count, _ in self.quarantine]
                    await self.release_quarantine()
                if any(block.dirty for block in self.refcounts.blocks.values()):
                    await barrier(self)
                if self.dirty_bitmaps is not None:
                    await self.dirty_bitmaps.store()
            elif self._halted is not None:
                await self.data.flush()  # for writes in place
                if self.cache.dirty or self.l1_dirty:
                    self._check_not_halted()  # changes that were not flushed are lost
        finally:
            try:
                if self.data is not self.file:
                    await self.data.close()
            finally:
                await self.file.close()

    # -- facts and upkeep --------------------------------------------------------------------

    def runs(self, offset: GuestOffset, length: int) -> list[tuple[GuestOffset, int, int, HostOffset]] | None:
        from .runs import runs

        return runs(self, offset, length)

    async def holes(self) -> bool:
        from .facts import holes

        return await holes(self)

    async def describe(self) -> dict[str, Any]:
        from .facts import describe

        return await describe(self)

    async def set_backing(self, name: str, format: str = "") -> None:
        from .upkeep import set_backing

        await set_backing(self, name, format)

    def state_zeroes(self) -> bool:
        self.mark_zeroes = self.header.version > 2
        return self.mark_zeroes

    async def make_empty(self) -> None:
        from .upkeep import make_empty

        await make_empty(self)
