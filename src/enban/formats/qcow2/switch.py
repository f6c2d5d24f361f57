"""Changing an image's tables all at once: the ground for internal snapshots.

A snapshot changes the refcount of every cluster of the disk, and with it the COPIED flag of
every entry. In place that would pass through states in which flags and counts disagree.
Here nothing that is on the disk is changed: whatever differs is written anew to free
clusters (L2 tables, the L1 table, refcount blocks, the refcount table, the snapshot table),
all of it is made durable, and then one write of 48 bytes in the header's first sector
leads over to it:

    offset 24   size | crypt | L1 entries, offset | refcount table offset, clusters | snapshots, offset   72

Before that write the image is as it was, after it as it shall be. Clusters that nobody uses
any more keep a count of 1 through the switch, so that none of them is taken for something
new before it; they are counted down afterwards, and a crash in between leaks them. If
anything fails before, memory is set back to what it was. Memory taken: the refcount
blocks that change, 2 bytes a cluster as a rule.
"""

from __future__ import annotations

from array import array

from ...errors import EnbanError, HostError
from ...wire.qcow2_entries import COMPRESSED, COPIED, OFFSET_MASK, unpack_compressed
from ...wire.qcow2_snapshots import SnapshotEntry, build_snapshots
from ..common.progressions import Consecutive, run_ahead
from ..common.tables import from_big_endian, to_big_endian, toggle
from .barrier import settle
from .leaving import release_quarantine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from ...units import Cluster, HostOffset
    from .node import Qcow2Node


# Tables and refcount blocks that moved leave single clusters here and there, which are soon used again:
# giving each back to the host would cost more than everything else.
_WORTH_GIVING_BACK = 1 << 20


class Change:
    """What a switch does.

    counted: (L1 table, +1 or -1): everything reachable from it counts once more or less.
    l1: the new active L1 table; its flags are worked out here.
    snapshots, size: the new snapshot table and virtual size.
    freed: L1 tables that are not used any more, as (host offset, entries).
    """

    __slots__ = ("counted", "freed", "l1", "size", "snapshots")

    def __init__(
        self,
        l1: array[int],
        size: int,
        snapshots: list[SnapshotEntry],
        counted: list[tuple[array[int], int]],
        freed: list[tuple[HostOffset, int]],
    ) -> None:
        self.l1 = l1
        self.size = size
        self.snapshots = snapshots
        self.counted = counted
        self.freed = freed


async def switch(node: Qcow2Node, change: Change) -> None:
    """Do it. No allocating write may be in flight (the caller holds the range lock of the whole disk);
    reads and writes in place may: those belong to the state before.

    Raises HostError (NoSpaceError, ...), CorruptImageError or UnsupportedOperationError (a refcount
    would not fit); the image is then as before.
    """
    await settle(node)
    async with node.mutex:
        await node.prepare_change()
        await _Switch(node, change).run()
    try:
        # In memory only: a crash before the next barrier leaks what is free now.
        async with node.mutex:
            await release_quarantine(node, least=_WORTH_GIVING_BACK)
    except EnbanError:
        pass  # it is done; what is left to tidy up stays due, and the next flush tells of the trouble


class _Switch:
    def __init__(self, node: Qcow2Node, change: Change) -> None:
        self.node = node
        self.change = change
        self.refcounts = node.refcounts
        self.free: list[tuple[Cluster, int]] = []  # runs that nobody uses after the switch
        self.buffer = bytearray(node.cluster_size)  # one for all: it stays in the processor's cache
        self.starts: dict[HostOffset, int] = {}  # of L2 tables that were seen: the first entry
        plain = not (node.extended or node.external)
        self.consecutive = Consecutive(node.cluster_bits, node.l2_mask + 1) if plain else None

    async def run(self) -> None:
        node, refcounts = self.node, self.refcounts
        before = refcounts.remember()
        try:
            fields = await self._build()
        except BaseException:
            refcounts.forget(before)
            raise
        try:
            await node.file.write(fields, 24)
            await node.file.flush()
        except BaseException:
            node.halt(HostError)  # which of the two states the disk has is not known
            raise
        self._adopt()
        youngest = node.ledger.newest if node.ledger is not None else 0
        node.quarantine += [(first, count, youngest) for first, count in self.free]

    async def _build(self) -> bytes:
        """Write everything new; the header fields that make it count."""
        node, refcounts, change = self.node, self.refcounts, self.change
        header = node.header
        for l1, step in change.counted:
            await self._count(l1, step)
        self.new_l1 = await self._own(change.l1)
        self.l1_offset = await self._store(to_big_endian(self.new_l1))
        content = build_snapshots(change.snapshots)
        self.snapshots_offset = await self._store(content) if content else 0
        for offset, entries in [(header.l1_offset, header.l1_entries), *change.freed]:
            if entries and not self._kept(offset):
                await self._drop(offset, entries * 8)
        if header.snapshot_count:
            await self._drop(header.snapshots_offset, len(build_snapshots(node.snapshots)))
        await self._move_refcounts()
        await node.file.flush()
        return b"".join(
            (
                change.size.to_bytes(8, "big"),
                header.crypt_method.to_bytes(4, "big"),
                len(self.new_l1).to_bytes(4, "big"),
                self.l1_offset.to_bytes(8, "big"),
                self.table_offset.to_bytes(8, "big"),
                (len(refcounts.table) * 8 >> node.cluster_bits).to_bytes(4, "big"),
                len(change.snapshots).to_bytes(4, "big"),
                self.snapshots_offset.to_bytes(8, "big"),
            )
        )

    def _kept(self, offset: HostOffset) -> bool:
        return any(snapshot.l1_offset == offset for snapshot in self.change.snapshots)

    async def _store(self, content: bytes) -> HostOffset:
        """Write a table to adjacent new clusters."""
        node = self.node
        clusters = max(1, -(-len(content) // node.cluster_size))
        offset = await self.refcounts.allocate_adjacent(clusters)
        await node.file.write(content + bytes(clusters * node.cluster_size - len(content)), offset)
        return offset

    async def _drop(self, offset: HostOffset, length: int) -> None:
        bits = self.node.cluster_bits
        await self._change(offset >> bits, -(-length // self.node.cluster_size), -1)

    async def _table(self, l1_entry: int) -> tuple[bytearray, int]:
        """An L2 table as it is stored, and its first entry if its clusters all follow one another, else 0."""
        raw, offset = self.buffer, l1_entry & OFFSET_MASK
        await self.node.read_stored_l2(raw, offset)
        start = 0 if self.consecutive is None else self.consecutive.first(raw, COPIED)
        if start:
            self.starts[offset] = start
        return raw, start

    async def _count(self, l1: array[int], step: int) -> None:
        """Count everything reachable from an L1 table once more or less."""
        bits = self.node.cluster_bits
        for l1_entry in l1:
            if not l1_entry & OFFSET_MASK:
                continue
            raw, start = await self._table(l1_entry)
            if start:
                await self._change((start & OFFSET_MASK) >> bits, len(raw) >> 3, step)
            else:
                for _, first, count in self._runs(from_big_endian(raw)):
                    await self._change(first, count, step)
            await self._change((l1_entry & OFFSET_MASK) >> bits, 1, step)

    async def _change(self, cluster: Cluster, count: int, step: int) -> None:
        """Count a run of clusters up or down; a last reference stays and is noted in `free`."""
        refcounts = self.refcounts
        if step > 0:
            await refcounts.add_run(cluster, count, step)
            return
        while count:
            inside = cluster % refcounts.per_block
            span = min(count, refcounts.per_block - inside)
            block = await refcounts.block(cluster // refcounts.per_block)
            if block is None or not block.counts.uniform(inside, span):
                span = 1
            if block is not None and block.counts[inside] == 1:
                self.free.append((cluster, span))
            else:
                await refcounts.add_run(cluster, span, step)
            cluster += span
            count -= span

    def _runs(self, entries: array[int]) -> Iterator[tuple[int, Cluster, int]]:
        """(index of the entry, first host cluster, count) of adjacent clusters in an L2 table."""
        node = self.node
        bits, size = node.cluster_bits, node.cluster_size
        standard = entries[::2] if node.extended else entries
        index, end = 0, len(standard)
        while index < end:
            entry = standard[index]
            if entry & COMPRESSED:
                host, packed = unpack_compressed(entry, bits)
                yield index, host >> bits, (host + packed - 1 >> bits) - (host >> bits) + 1
                index += 1
            elif not entry & OFFSET_MASK or node.external:
                index += 1 + run_ahead(standard, index + 1, end, entry, 0)
            else:
                count = 1 + run_ahead(standard, index + 1, end, entry + size, size)
                while index + count < end and standard[index + count] == entry + count * size:
                    count += 1
                yield index, (entry & OFFSET_MASK) >> bits, count
                index += count

    async def _own(self, l1: array[int]) -> array[int]:
        """The active L1 table with right flags; L2 tables whose flags would change are copied."""
        node, refcounts = self.node, self.refcounts
        bits = node.cluster_bits
        result = array("Q", bytes(8 * len(l1)))
        for index, l1_entry in enumerate(l1):
            offset = l1_entry & OFFSET_MASK
            if not offset:
                continue
            stored = await self._stored_with_flags(l1_entry)
            if stored is not None:
                cluster, _, _ = await refcounts.allocate(1)
                place = cluster << bits
                await node.file.write(stored, place)
                refcounts.metadata.add(place)
                await self._change(offset >> bits, 1, -1)
                result[index] = place | COPIED
            else:
                single = await refcounts.get(offset >> bits) == 1
                result[index] = offset | (COPIED if single else 0)
        return result

    async def _stored_with_flags(self, l1_entry: int) -> bytes | bytearray | None:
        """An L2 table as it has to be stored for its flags to be right; None if they are so already."""
        raw, start = self.buffer, self.starts.get(l1_entry & OFFSET_MASK, 0)
        known = start != 0  # and so the table need not be read again
        if not known:
            raw, start = await self._table(l1_entry)
        if start and self.consecutive is not None:
            first, count = (start & OFFSET_MASK) >> self.node.cluster_bits, len(raw) >> 3
            flag = await self._one_flag(first, count)
            if flag == start & COPIED:
                return None
            if flag >= 0:
                return self.consecutive.build(start ^ COPIED)
            if known:
                raw = self.consecutive.build(start)
        flagged = await self._flagged(from_big_endian(raw))
        return None if flagged is None else to_big_endian(flagged)

    async def _one_flag(self, first: Cluster, count: int) -> int:
        """The COPIED flag of adjacent clusters, if it is the same for all, else -1."""
        refcounts = self.refcounts
        flag = -1
        while count:
            inside = first % refcounts.per_block
            span = min(count, refcounts.per_block - inside)
            block = await refcounts.block(first // refcounts.per_block)
            if block is None or not block.counts.uniform(inside, span):
                return -1
            here = COPIED if block.counts[inside] == 1 else 0
            if flag not in (-1, here):
                return -1
            flag = here
            first += span
            count -= span
        return flag

    async def _flagged(self, entries: array[int]) -> array[int] | None:
        """A copy of an L2 table with COPIED exactly where the refcount is 1; None if it is so already."""
        node, refcounts = self.node, self.refcounts
        if node.external:
            return None
        numbers = node.numbers
        changed: array[int] | None = None
        for index, first, count in self._runs(entries):
            if entries[index * numbers] & COMPRESSED:
                continue
            position = 0
            while position < count:
                cluster = first + position
                block = await refcounts.block(cluster // refcounts.per_block)
                inside = cluster % refcounts.per_block
                span = min(count - position, refcounts.per_block - inside)
                value = block.counts[inside] if block else 0
                if block is None or not block.counts.uniform(inside, span):
                    span = 1
                flag = COPIED if value == 1 else 0
                if (entries[index * numbers] ^ flag) & COPIED:  # all of a run have the same flag
                    if changed is None:
                        changed = array("Q", entries)
                    toggle(changed, index + position, span, COPIED, numbers)
                position += span
        return changed

    async def _move_refcounts(self) -> None:
        """New places for every refcount block that changed and for the refcount table, until the
        places themselves are counted."""
        node, refcounts = self.node, self.refcounts
        bits = node.cluster_bits
        old_table, old_clusters = node.header.refcount_table_offset, node.header.refcount_table_clusters
        await self._drop(old_table, old_clusters << bits)
        if refcounts.moved is None:
            clusters = len(refcounts.table) * 8 >> bits
            self.table_offset = await refcounts.allocate_adjacent(clusters)
        while True:
            stale = [i for i, b in refcounts.blocks.items() if b.dirty and not b.fresh]
            if not stale:
                break
            for index in stale:
                block = refcounts.blocks[index]
                cluster, _, _ = await refcounts.allocate(1)
                refcounts.metadata.add(cluster << bits)
                await self._change(block.offset >> bits, 1, -1)
                block.offset = cluster << bits
                block.fresh = True  # so it is written whole, at its new place
                refcounts.table[index] = block.offset
        if refcounts.moved is not None:  # the table had to grow meanwhile
            self.table_offset, clusters = refcounts.moved
        for block in refcounts.blocks.values():
            if block.fresh:
                await node.file.write(block.counts.big_endian(0, node.cluster_size), block.offset)
        await node.file.write(to_big_endian(refcounts.table), self.table_offset)

    def _adopt(self) -> None:
        """The disk has the new tables: so shall memory."""
        node, refcounts, change = self.node, self.refcounts, self.change
        header = node.header
        header.size = node.size = change.size
        header.l1_entries, header.l1_offset = len(self.new_l1), self.l1_offset
        header.refcount_table_offset = self.table_offset
        header.refcount_table_clusters = len(refcounts.table) * 8 >> node.cluster_bits
        header.snapshot_count, header.snapshots_offset = len(change.snapshots), self.snapshots_offset
        node.snapshots = change.snapshots
        node.l1 = self.new_l1
        node.cache.clear()
        node.l1_dirty.clear()
        node.packed_end = 0
        node.switches += 1
        node.generation += 1
        node.unpacked.clear()
        refcounts.moved = None
        refcounts.table_dirty.clear()
        for block in refcounts.blocks.values():
            block.dirty.clear()
            block.fresh = False


async def read_l1(node: Qcow2Node, snapshot: SnapshotEntry) -> array[int]:
    """The L1 table of a snapshot."""
    from .opening import read_table

    what = f"L1 table of snapshot '{snapshot.name}'"
    return await read_table(node.file, snapshot.l1_offset, snapshot.l1_entries, what, node.name)
