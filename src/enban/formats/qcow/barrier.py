"""The order in which an image's changes reach the disk.

Table changes collect in memory. A barrier takes a copy of them at one moment and writes it
in two steps, each durable before the next begins:

    1  L2 tables nobody points to yet (the guest data was written before)     sync
    2  entries of old L2 tables, L1 entries                                   sync

So what an entry on disk points to is on disk. Nothing counts clusters and none is ever used
again, so that is all: a crash leaves space at the end of the file that nobody points to.
An entry never crosses a 512-byte sector, the unit a disk writes whole.

If a step fails, what was taken goes back among the changes, and the error goes to whoever
asked for the barrier; a later barrier writes all of it again.
"""

from __future__ import annotations

from ..common.tables import SECTOR_ENTRIES, TakenTables, sector_runs, to_big_endian

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import QcowNode


class Changes:
    """What one barrier writes: (offset, bytes) by step, and what to restore if it fails."""

    def __init__(self, node: QcowNode) -> None:
        self.tables = TakenTables(node.cache)
        self.first, self.second = self.tables.whole, self.tables.parts
        self.l1, node.l1_dirty = node.l1_dirty, set()
        self.settled = False  # step 1 is durable
        for start, end in sector_runs({index // SECTOR_ENTRIES for index in self.l1}):
            self.second.append((node.header.l1_offset + start, to_big_endian(node.l1, start // 8, end // 8)))

    def restore(self, node: QcowNode) -> None:
        """Put back among the changes what may not have reached the disk."""
        self.tables.release()
        self.tables.restore(settled=self.settled)
        node.l1_dirty |= self.l1


async def barrier(node: QcowNode) -> None:
    """Make everything durable that was published before the call."""
    ticket = node.barriers_started
    async with node.barrier_mutex:
        if node.barriers_done > ticket:
            return  # one that began after our call has ended meanwhile: it took our changes along
        node.barriers_started += 1
        number = node.barriers_started
        async with node.mutex:
            # A new cluster that reads as zeros may reach past the end of the file: make it real.
            if not node.file.fixed_size and node.end > node.file.size():
                await node.file.truncate(node.end)
            changes = Changes(node)
        try:
            await _write(node, changes)
        except BaseException:
            async with node.mutex:
                changes.restore(node)
            raise
        async with node.mutex:
            changes.tables.release()
        node.barriers_done = number


async def _write(node: QcowNode, changes: Changes) -> None:
    for offset, content in changes.first:
        await node.file.write(content, offset)
    await node.file.flush()
    changes.settled = True
    if changes.second:
        for offset, content in changes.second:
            await node.file.write(content, offset)
        await node.file.flush()
