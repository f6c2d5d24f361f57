"""Zeroing and discarding by the tables: entries that say "zeros" or nothing, and what they let go of."""

from __future__ import annotations

from ...units import align_down, align_up
from ...wire.qcow2_entries import ALL_ZERO, COMPRESSED, OFFSET_MASK
from ..common.tables import L2Table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import GuestOffset
    from .node import Qcow2Node


async def clear(node: Qcow2Node, offset: GuestOffset, length: int, *, unmap: bool, zero: bool) -> bool:
    """Make grains read as zeros by their entries. False if a compressed cluster is in the way
    of zeroing a part of it (nothing was changed then)."""
    end = offset + length
    if end == node.size:
        end = align_up(end, node.cluster_size)
    await node.make_room()
    async with node.mutex:
        await node.prepare_change()
        if node.tracked:
            node.mark(offset, length)
        if zero and node.extended and await packed_edges(node, offset, end):
            return False
        while offset < end:
            index = offset >> node.l2_shift
            stop = min(end, index + 1 << node.l2_shift)
            flag_needed = zero and (
                node.mark_zeroes or (node.may_show_backing and backing_reaches(node, offset))
            )
            if node.l1[index] & OFFSET_MASK or flag_needed:
                table = await node.own_table(index)
                clear_entries(node, index, table, offset, stop, unmap=unmap, flag_needed=flag_needed)
            offset = stop
    return True


def backing_reaches(node: Qcow2Node, offset: GuestOffset) -> bool:
    return node.backing is None or offset < node.backing.size


async def packed_edges(node: Qcow2Node, offset: GuestOffset, end: GuestOffset) -> bool:
    for edge in {offset, end} - {align_down(offset, node.cluster_size), align_up(end, node.cluster_size)}:
        index = edge >> node.l2_shift
        if node.l1[index] & OFFSET_MASK:
            table = await node.load_table(index)
            if table.entries[(edge >> node.cluster_bits & node.l2_mask) * 2] & COMPRESSED:
                return True
    return False


def clear_entries(
    node: Qcow2Node,
    index: int,
    table: L2Table,
    offset: GuestOffset,
    stop: GuestOffset,
    *,
    unmap: bool,
    flag_needed: bool,
) -> None:
    entries, numbers = table.entries, node.numbers
    while offset < stop:
        i = (offset >> node.cluster_bits & node.l2_mask) * numbers
        after = min(stop, align_down(offset, node.cluster_size) + node.cluster_size)
        entry = entries[i]
        bitmap = entries[i + 1] if node.extended else 0
        whole = after - offset == node.cluster_size
        used = bool(entry) or bool(bitmap)
        if entry & COMPRESSED and not whole:
            pass  # a part of a compressed cluster cannot be discarded
        elif used or flag_needed:
            keep = node.present(entry) and not entry & COMPRESSED and not unmap
            if node.extended:
                first = (offset & node.cluster_mask) >> node.grain_bits
                mask = (1 << (after - offset >> node.grain_bits)) - 1 << first
                new_bitmap = (bitmap | mask << 32) & ~mask
                drop = whole and not (keep and entry >> 63)
                new = 0 if drop else entry
            else:
                new_bitmap = 0
                drop = not (keep and entry >> 63)
                flag = ALL_ZERO if node.header.version > 2 else 0
                new = flag if drop else entry | flag
            if new != entry or new_bitmap != bitmap:
                if node.extended:
                    entries[i + 1] = new_bitmap
                entries[i] = new
                node.cache.touch(index, i, numbers)
                if drop:
                    node.unlink_entry(entry)
        offset = after
