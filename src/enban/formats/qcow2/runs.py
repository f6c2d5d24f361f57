"""Many extents at once, for those who list a whole image.

The same answers as `mapping`, as plain tuples and a table at a time: listing an image of a
million fragments is then a matter of a second, not of ten.
"""

from __future__ import annotations

from ...extent import COMPRESSED as PACKED
from ...extent import DATA, UNALLOCATED, ZERO
from ...wire.qcow2_entries import ALL_ALLOCATED, ALL_ZERO, ALL_ZEROES, COMPRESSED, OFFSET_MASK
from ..common.progressions import BATCH, run_ahead
from .mapping import bad_entry, subcluster_kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array

    from ...units import GuestOffset, HostOffset
    from .node import Qcow2Node

    Run = tuple[GuestOffset, int, int, HostOffset]

_MOST = 8192  # clusters in one answer, so that it stays small in images with large tables
_UNIFORM = {0: UNALLOCATED, ALL_ALLOCATED: DATA, ALL_ZEROES: ZERO}


def runs(node: Qcow2Node, offset: GuestOffset, length: int) -> list[Run] | None:
    """The runs from `offset` on, as many as one table tells; None if it is not in memory."""
    index = offset >> node.l2_shift
    entries = node.cache.readable.get(index)
    if entries is None:
        extent = node.lookup(offset, length)
        return None if extent is None else [(offset, extent.length, UNALLOCATED, -1)]
    start = offset - (offset & node.cluster_mask)
    end = min(offset + length, index + 1 << node.l2_shift, start + (_MOST << node.cluster_bits))
    first = start >> node.cluster_bits & node.l2_mask
    last = (end - 1 >> node.cluster_bits & node.l2_mask) + 1
    found = (_extended if node.extended else _standard)(node, entries, start, first, last)
    return _clip(found, offset, end)


def _clip(found: list[Run], offset: GuestOffset, end: GuestOffset) -> list[Run]:
    """Cut runs of whole clusters to the range that was asked for."""
    for place in range(len(found)):  # more than one only where subclusters come before the range
        start, length, kind, host = found[place]
        if start + length > offset:
            cut = max(0, offset - start)
            found[place] = (start + cut, length - cut, kind, host + cut if host >= 0 else -1)
            del found[:place]
            break
    while found and found[-1][0] >= end:
        del found[-1]
    start, length, kind, host = found[-1]
    found[-1] = (start, min(length, end - start), kind, host)
    return found


def _standard(node: Qcow2Node, entries: array[int], guest: GuestOffset, first: int, last: int) -> list[Run]:
    """Runs of the entries [first, last); `guest` is where the first one's cluster starts."""
    found: list[Run] = []
    add = found.append
    bits, size, mask, present = node.cluster_bits, node.cluster_size, node.cluster_mask, node.present_mask
    zero_flag_known = node.header.version > 2
    base = guest - (first << bits)
    i = first
    while i < last:
        entry = entries[i]
        j = i + 1
        if entry & COMPRESSED:
            while j < last and entries[j] & COMPRESSED:
                j += 1
            add((base + (i << bits), j - i << bits, PACKED, -1))
            i = j
            continue
        host = entry & OFFSET_MASK
        if host & mask:
            raise bad_entry(node, base + (i << bits), f"points to {host:#x}, which is no cluster")
        step = size if entry & present else 0
        expected = entry + step
        if j < last and entries[j] == expected:
            j += run_ahead(entries, j, last, expected, step)
            if j - i > BATCH > last - j and j < last:  # one batch more, that ends where the range does
                tail = last - BATCH
                j += run_ahead(entries, tail, last, entry + (tail - i) * step, step) and last - j
            expected = entry + (j - i) * step
            while j < last and entries[j] == expected:
                expected += step
                j += 1
        if entry & ALL_ZERO:
            if not zero_flag_known:
                raise bad_entry(node, base + (i << bits), "has a zero flag, which version 2 does not know")
            kind = ZERO
        else:
            kind = DATA if step else UNALLOCATED
        add((base + (i << bits), j - i << bits, kind, host if step else -1))
        i = j
    return found


def _extended(node: Qcow2Node, entries: array[int], guest: GuestOffset, first: int, last: int) -> list[Run]:
    """As `_standard`, for clusters with subclusters."""
    found: list[Run] = []
    bits, size = node.cluster_bits, node.cluster_size
    i = first
    while i < last:
        entry, bitmap = entries[2 * i], entries[2 * i + 1]
        host = entry & OFFSET_MASK
        present = entry & node.present_mask
        start = guest + (i - first << bits)
        j = i + 1
        if entry & COMPRESSED:
            while j < last and entries[2 * j] & COMPRESSED:
                j += 1
            found.append((start, j - i << bits, PACKED, -1))
            i = j
            continue
        if host & node.cluster_mask:
            raise bad_entry(node, start, f"points to {host:#x}, which is no cluster")
        kind = _UNIFORM.get(bitmap)
        if kind is None or (kind == DATA and not present):
            _subclusters(node, found, entry, bitmap, start, host if present else -1)
        else:
            step = size if present else 0
            expected = entry + step
            while j < last and entries[2 * j] == expected and entries[2 * j + 1] == bitmap:
                expected += step
                j += 1
            found.append((start, j - i << bits, kind, host if present else -1))
        i = j
    return found


def _subclusters(
    node: Qcow2Node, found: list[Run], entry: int, bitmap: int, start: GuestOffset, host: HostOffset
) -> None:
    """The runs inside one cluster."""
    grain = node.grain
    before = -1
    for sub in range(32):
        kind = subcluster_kind(node, entry, bitmap, sub, start + sub * grain)
        if kind == before:
            place, length, _, run_host = found[-1]
            found[-1] = (place, length + grain, kind, run_host)
        else:
            found.append((start + sub * grain, grain, kind, host + sub * grain if host >= 0 else -1))
            before = kind
