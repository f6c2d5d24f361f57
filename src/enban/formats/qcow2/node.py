"""A qcow2 image as a node: its changes, and its life from the first of them to the close.

What lives where:

- `places` finds guest bytes, by the tables in memory; `mapping` reads the entries;
- `reserve`, `publish`, `zero` and `discard` here change tables in memory, under `mutex`;
  `claim` is the short cut of a write to one new cluster; `allocation` and `clearing` have the details;
- `metadata` says where the tables are, before the first change;
- `barrier` brings the changes to the disk in order;
- `leaving` counts down what left the mapping: from `unlinked` (that is in memory only) over
  `quarantine` (durable, but a request that began before may still read or write the cluster).
"""

from __future__ import annotations

import _thread
from array import array

from ...block.locks import Mutex
from ...block.node import Piece
from ...errors import (
    CorruptImageError,
    EnbanError,
    HostError,
    ReadOnlyError,
    UnsupportedOperationError,
)
from ...units import align_down, align_up
from ...wire.qcow2 import (
    AUTOCLEAR_BITMAPS,
    AUTOCLEAR_RAW_DATA,
    CORRUPT,
    EXT_BITMAPS,
)
from ...wire.qcow2_entries import (
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    OFFSET_MASK,
    pack_compressed,
    unpack_compressed,
)
from ..common.tables import L2Table, to_big_endian
from .allocation import Link, link_entries, new_packed, reserve_extended, reserve_standard, undo, vet_table
from .barrier import barrier
from .clearing import clear
from .leaving import release_quarantine
from .places import Places
from .refcounts import Refcounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ...block.runtime import Runtime
    from ...block.storage import Storage
    from ...units import Cluster, GuestOffset, HostOffset
    from ...wire.qcow2 import Header
    from ...wire.qcow2_snapshots import SnapshotEntry
    from .bitmaps import Qcow2Bitmaps


class Qcow2Node(Places):
    """An open qcow2 image. Made by `opening.open_qcow2`."""

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
        super().__init__(name, runtime, file, header, l1, snapshots, writable=writable)
        self.refcounts = Refcounts(file, header, refcount_table, name)
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
        self.mark_zeroes = False  # also where the backing file shows zeros
        self._halted: type[EnbanError] | None = None
        self.vm_state_new = False  # the VM state was written since the last snapshot
        self.header_doubtful = False  # what the header on disk says is unknown: the next barrier writes it

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
        from .metadata import collect_metadata

        await collect_metadata(self, places)
        self._metadata_known = True

    async def own_table(self, index: int) -> L2Table:
        """The L2 table of an L1 entry, made or copied if need be, ready for changes; mutex held."""
        l1 = self.l1[index]
        offset = l1 & OFFSET_MASK
        if not offset:
            entries = array("Q", bytes(self.cluster_size))
        elif l1 & COPIED:
            table = await self.load_table(index)
            if not table.writable:
                vet_table(self, index, table)
                self.cache.allow_overwrite(index)
            return table
        else:
            table = await self.load_table(index)
            vet_table(self, index, table)
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
                await release_quarantine(self)

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
        from .snapshots import find

        snapshot = find(await read_snapshots(self.file, self.header, self.name), name, self.name)
        what = f"L1 table of snapshot '{snapshot.name}'"
        self.l1 = await read_table(self.file, snapshot.l1_offset, snapshot.l1_entries, what, self.name)
        self.size = snapshot.disk_size
        self.vm_state_size = snapshot.vm_state_size
        if len(self.l1) << self.l2_shift < self.size:
            raise CorruptImageError(f"{what} is too small", path=self.name, offset=snapshot.l1_offset)
        self.header.autoclear &= ~AUTOCLEAR_BITMAPS  # they speak of the active state

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
                    await release_quarantine(self)
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
