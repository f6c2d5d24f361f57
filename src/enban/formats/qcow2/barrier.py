"""The order in which an image's changes reach the disk.

Table changes collect in memory. A barrier takes a copy of them at one moment and writes it
in steps, each durable before the next begins:

    1  refcount blocks; L2 tables and refcount tables nobody points to yet
       (the guest data they count was written before)                             sync
    2  refcount table entries of new blocks, the header's pointer to a moved table  sync if any
    3  entries of old L2 tables, L1 entries                                         sync
    4  clusters that step 3 unlinked may be counted down

So at every moment what an entry on disk points to is counted and written (allocate,
reference, publish), and what a table still on disk points to is not reused. A crash leaves
clusters counted that nobody uses, never the reverse. Entries never cross a 512-byte sector,
the unit a disk writes whole.

If a step fails, what was taken goes back among the changes, and the error goes to whoever
asked for the barrier; a later barrier writes all of it again.
"""

from __future__ import annotations

from ..common.tables import SECTOR_ENTRIES, TakenTables, sector_runs, to_big_endian
from .leaving import refcount_table_moved, release_quarantine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.storage import Storage
    from .node import Qcow2Node
    from .refcounts import Block


class Changes:
    """What one barrier writes: (offset, bytes) by step, and what to restore if it fails."""

    def __init__(self, node: Qcow2Node) -> None:
        self.first: list[tuple[int, bytes]] = []
        self.second: list[tuple[int, bytes]] = []
        self.third: list[tuple[int, bytes]] = []
        self.blocks: list[tuple[Block, set[int], bool]] = []
        self.l1 = set(node.l1_dirty)
        self.table_entries = set(node.refcounts.table_dirty)
        self.moved, node.refcounts.moved = node.refcounts.moved, None
        self.header, node.header_doubtful = node.header_doubtful, False
        self.settled = False  # step 1 is durable
        self.unlinked = node.unlinked
        if self.header:
            self.second.append((24, node.header.state()))
        self._take_refcounts(node)
        self.tables = TakenTables(node.cache)
        self.first += self.tables.whole
        self.third += self.tables.parts
        for start, end in sector_runs({index // SECTOR_ENTRIES for index in self.l1}):
            self.third.append((node.header.l1_offset + start, to_big_endian(node.l1, start // 8, end // 8)))
        node.l1_dirty.clear()
        node.unlinked = []

    def _take_refcounts(self, node: Qcow2Node) -> None:
        refcounts = node.refcounts
        size = refcounts.cluster_size
        for block in refcounts.blocks.values():
            if not (block.dirty or block.fresh):
                continue
            if block.fresh:
                self.first.append((block.offset, block.counts.big_endian(0, size)))
            else:
                self.first.extend(
                    (block.offset + start, block.counts.big_endian(start, end))
                    for start, end in sector_runs(block.dirty)
                )
            self.blocks.append((block, block.dirty, block.fresh))
            block.busy += 1
            block.dirty = set()
            block.fresh = False
        if self.moved is not None:
            offset, clusters = self.moved
            self.first.append((offset, to_big_endian(refcounts.table)))
            self.second.append((48, offset.to_bytes(8, "big") + clusters.to_bytes(4, "big")))
        else:
            base = node.header.refcount_table_offset
            for start, end in sector_runs({index // SECTOR_ENTRIES for index in self.table_entries}):
                self.second.append((base + start, to_big_endian(refcounts.table, start // 8, end // 8)))
        refcounts.table_dirty.clear()

    def done(self) -> None:
        for block, _, _ in self.blocks:
            block.busy -= 1
        self.tables.release()

    def restore(self, node: Qcow2Node) -> None:
        """Put back among the changes what may not have reached the disk.

        Once step 1 is durable, fresh tables and blocks are complete on disk and may be pointed
        to already, so from then on they are changed in step 3 like any other.
        """
        self.done()
        for block, dirty, fresh in self.blocks:
            if not self.settled:
                block.dirty |= dirty
                block.fresh |= fresh
        self.tables.restore(settled=self.settled)
        node.l1_dirty |= self.l1
        node.refcounts.table_dirty |= self.table_entries
        node.unlinked = self.unlinked + node.unlinked
        node.header_doubtful |= self.header
        if self.moved is not None:
            if self.settled:
                # The header may name the new table already, so it counts as moved from now on; the
                # next barrier makes sure of the header before it frees the old table.
                node.unlinked.append(refcount_table_moved(node, self.moved))
                node.header_doubtful = True
            elif node.refcounts.moved is None:
                node.refcounts.moved = self.moved
            else:  # outgrown before it came into use
                offset, clusters = self.moved
                node.unlinked.append((offset >> node.cluster_bits, clusters, 0))


async def barrier(node: Qcow2Node) -> None:
    """Make everything durable that was published before the call."""
    ticket = node.barriers_started
    async with node.barrier_mutex:
        if node.barriers_done > ticket:
            return  # one that began after our call has ended meanwhile: it took our changes along
        node.barriers_started += 1
        number = node.barriers_started
        async with node.mutex:
            changes = Changes(node)
        try:
            if node.data is not node.file:
                await node.data.flush()
            await _write(node.file, changes)
        except BaseException:
            async with node.mutex:
                changes.restore(node)
            raise
        async with node.mutex:
            changes.done()
            if changes.moved is not None:
                node.quarantine.append(refcount_table_moved(node, changes.moved))
            node.quarantine.extend(changes.unlinked)
            await release_quarantine(node)
        node.barriers_done = number


async def settle(node: Qcow2Node) -> None:
    """Bring all changes of tables to the file, if there are any. What the guest wrote in place need not be
    durable afterwards: for callers that make the file durable themselves."""
    async with node.barrier_mutex, node.mutex:
        refcounts = node.refcounts
        waiting = (
            node.cache.dirty
            or node.l1_dirty
            or node.unlinked
            or node.header_doubtful
            or refcounts.table_dirty
            or refcounts.moved is not None
            or any(block.dirty or block.fresh for block in refcounts.blocks.values())
        )
    if waiting:
        await barrier(node)


async def _write(file: Storage, changes: Changes) -> None:
    for offset, content in changes.first:
        await file.write(content, offset)
    await file.flush()
    changes.settled = True
    for step in (changes.second, changes.third):
        if step:
            for offset, content in step:
                await file.write(content, offset)
            await file.flush()
