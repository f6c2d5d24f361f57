"""Where guest bytes live: L2 entries to extents. Reading only; nothing here waits.

Two kinds of image are mapped: with standard L2 entries one number says all about a
cluster; with extended entries a second number has two bits for each of 32 subclusters
(specification, "L2 table entry" and "Extended L2 Entries").
"""

from __future__ import annotations

from ...errors import CorruptImageError
from ...extent import COMPRESSED as PACKED
from ...extent import DATA, UNALLOCATED, ZERO, Extent
from ...wire.qcow2_entries import ALL_ZERO, COMPRESSED, OFFSET_MASK, unpack_compressed
from ..common.progressions import run_ahead

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array

    from ...units import GuestOffset
    from .places import Places

MEANING = COMPRESSED | OFFSET_MASK | ALL_ZERO  # the bits that say where a cluster is


def bad_entry(node: Places, offset: GuestOffset, what: str) -> CorruptImageError:
    return CorruptImageError(
        f"L2 entry of guest offset {offset:#x} {what}", path=node.name, hint="run: enban check -r all"
    )


def _packed(node: Places, entry: int, offset: GuestOffset, length: int) -> Extent:
    host, packed = unpack_compressed(entry, node.cluster_bits)
    inside = offset & node.cluster_mask
    return Extent(
        offset,
        min(length, node.cluster_size - inside),
        PACKED,
        node,
        node.file,
        host,
        packed=packed,
        unit=offset - inside,
    )


def lookup_standard(node: Places, entries: array[int], offset: GuestOffset, length: int) -> Extent:
    """The extent at `offset`; the range does not leave the table of `entries`."""
    bits = node.cluster_bits
    index = offset >> bits & node.l2_mask
    last = offset + length - 1 >> bits & node.l2_mask
    found = entries[index]  # once: another thread may change it while we look
    if found & COMPRESSED:
        return _packed(node, found, offset, length)
    entry = found & MEANING
    present = node.present(found)
    count = 1
    host = entry & OFFSET_MASK
    if host & node.cluster_mask:
        raise bad_entry(node, offset, f"points to {host:#x}, which is no cluster")
    if entry & ALL_ZERO and node.header.version < 3:
        raise bad_entry(node, offset, "has a zero flag, which version 2 does not know")
    step = node.cluster_size if present else 0
    count += run_ahead(entries, index + 1, last + 1, found + step, step)
    if step:
        expected = entry + count * step
        while index + count <= last and entries[index + count] & MEANING == expected:
            expected += step
            count += 1
    else:
        while index + count <= last and entries[index + count] & MEANING == entry:
            if node.external and entries[index + count] >> 63:
                break
            count += 1
    inside = offset & node.cluster_mask
    run = min(length, (count << bits) - inside)
    if entry & ALL_ZERO:
        return Extent(offset, run, ZERO, node, node.data if host else None, host + inside if host else -1)
    if present:
        return Extent(offset, run, DATA, node, node.data, host + inside)
    return Extent(offset, run, UNALLOCATED, node)


# Two numbers cannot be changed at once, and other threads read without a lock. So whoever changes
# them does it in an order in which the pair (new, old) or (old, new) that a reader may meet means
# the same as before or after: data comes in entry first, leaves bitmap first, and a compressed
# entry (which has no use for its bitmap) is the last to go. And a reader looks at the entry twice.


def entry_pair(entries: array[int], index: int) -> tuple[int, int]:
    """Entry and bitmap of a cluster as they belong together."""
    while True:
        entry, bitmap = entries[2 * index], entries[2 * index + 1]
        if entries[2 * index] == entry:
            return entry, bitmap


def subcluster_kind(node: Places, entry: int, bitmap: int, sub: int, offset: GuestOffset) -> int:
    """Kind of one subcluster of a cluster that is not compressed."""
    allocated, zero = bitmap >> sub & 1, bitmap >> 32 + sub & 1
    if allocated:
        if zero:
            raise bad_entry(node, offset, "calls a subcluster both data and zero")
        if not node.present(entry):
            raise bad_entry(node, offset, "has subclusters without a cluster")
        return DATA
    return ZERO if zero else UNALLOCATED


def lookup_extended(node: Places, entries: array[int], offset: GuestOffset, length: int) -> Extent:
    """As `lookup_standard`, for an image with extended L2 entries."""
    index = offset >> node.cluster_bits & node.l2_mask
    entry, bitmap = entry_pair(entries, index)
    if entry & COMPRESSED:
        return _packed(node, entry, offset, length)
    host = entry & OFFSET_MASK
    if host & node.cluster_mask:
        raise bad_entry(node, offset, f"points to {host:#x}, which is no cluster")
    inside = offset & node.cluster_mask
    kind = subcluster_kind(node, entry, bitmap, inside >> node.grain_bits, offset)
    end = offset + length
    position = offset - inside + ((inside >> node.grain_bits) + 1 << node.grain_bits)
    while position < end:
        inside_next = position & node.cluster_mask
        if not inside_next:
            index += 1
            entry, bitmap = entry_pair(entries, index)
            if entry & COMPRESSED:
                break
            if kind == DATA and entry & OFFSET_MASK != host + position - offset + inside:
                break
        if subcluster_kind(node, entry, bitmap, inside_next >> node.grain_bits, position) != kind:
            break
        position += node.grain
    run = min(end, position) - offset
    if kind == DATA:
        return Extent(offset, run, DATA, node, node.data, host + inside)
    if kind == ZERO and host:
        return Extent(offset, min(run, node.cluster_size - inside), ZERO, node, node.data, host + inside)
    return Extent(offset, run, kind, node)
