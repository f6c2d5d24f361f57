"""A qcow2 overlay over an open node, and merging what it holds into that node while it is in use.

The overlay of a disk whose writes shall vanish: its header names no backing file; the node below
is attached to it in memory. To merge, its content is first frozen:

    freeze     an internal snapshot: nothing of it is changed from here on, new writes go elsewhere
    (the caller copies what `frozen` holds into the node below, and flushes that)
    let_go     entries that still are as in the snapshot become unallocated: the node below shows the same
    thaw       the snapshot goes, and with it the space that only it held

A reader sees the same bytes all along. If copying fails, `thaw` without `let_go` leaves the overlay as
it was.
"""

from __future__ import annotations

from ...wire.qcow2_entries import COPIED, OFFSET_MASK
from ...wire.qcow2_snapshots import SnapshotEntry
from ..common.tables import L2Table
from .barrier import barrier
from .create import Qcow2Options, write_empty
from .opening import open_qcow2
from .snapshots import delete

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.node import Node
    from ...block.runtime import Runtime
    from ...block.storage import Storage
    from .node import Qcow2Node

CLUSTER_BYTES = 64 << 10
_MOST_L1_ENTRIES = 1 << 13  # so that an overlay is made and opened in no time, whatever the size
_LARGEST_CLUSTER = 2 << 20


async def make_overlay(storage: Storage, base: Node, runtime: Runtime) -> Qcow2Node:
    """An empty overlay of `base` in an empty storage; `base` is attached. Raises HostError, UsageError."""
    cluster = CLUSTER_BYTES
    header = Qcow2Options(base.size, cluster_size=cluster).header()
    while header.l1_needed > _MOST_L1_ENTRIES and cluster < _LARGEST_CLUSTER:
        cluster *= 2
        header = Qcow2Options(base.size, cluster_size=cluster).header()
    await write_empty(storage, header)
    node = await open_qcow2(storage.name, runtime, storage, writable=True)
    node.backing = base
    return node


async def freeze(node: Qcow2Node, name: str) -> None:
    """The range lock of the whole disk is held; the caller then waits for writes that were under way."""
    snapshot = SnapshotEntry()
    snapshot.name = name
    await node.create_snapshot(snapshot)


async def frozen(node: Qcow2Node, name: str) -> Qcow2Node:
    """What was frozen, for reading: alone, without anything below. It shares the storage: do not close it."""
    view = await open_qcow2(node.name, node.runtime, node.file, writable=False)
    await view.show_snapshot(name)
    return view


async def let_go(node: Qcow2Node, view: Qcow2Node) -> None:
    """Make unallocated what is still as in `view`, a table at a time."""
    for index, l1_entry in enumerate(view.l1):
        if not l1_entry & OFFSET_MASK:
            continue
        held = await node.ranges.acquire(index << node.l2_shift, index + 1 << node.l2_shift)
        try:
            await node.make_room()
            async with node.mutex:
                await node.prepare_change()
                await _let_go_table(node, view, index)
        finally:
            node.ranges.release(held)
    await barrier(node)


async def _let_go_table(node: Qcow2Node, view: Qcow2Node, index: int) -> None:
    place = node.l1[index] & OFFSET_MASK
    if place == view.l1[index] & OFFSET_MASK:
        table = await node.load_table(index)
        for entry in filter(None, table.entries[:: node.numbers]):
            node.unlink_entry(entry)
        node.unlink(place >> node.cluster_bits, 1)
        node.cache.remove(index)
        node.l1[index] = 0
        node.l1_dirty.add(index)
    elif place:
        old = await view.load_table(index)
        view.cache.remove(index)
        _let_go_entries(node, index, await node.own_table(index), old)


def _let_go_entries(node: Qcow2Node, index: int, table: L2Table, old: L2Table) -> None:
    entries = table.entries
    for place, (entry, before) in enumerate(zip(entries, old.entries, strict=True)):
        # A cluster that was written since has moved: the snapshot holds the old one.
        if entry and (entry ^ before) | COPIED == COPIED:
            entries[place] = 0
            node.cache.touch(index, place, 1)
            node.unlink_entry(entry)


async def thaw(node: Qcow2Node, name: str) -> None:
    """Remove the snapshot; the range lock of the whole disk is held."""
    await delete(node, name)
