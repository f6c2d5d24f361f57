"""Extents for those who list a whole image: packed clusters that follow each other as one run."""

from __future__ import annotations

from ...extent import COMPRESSED as PACKED
from ...wire.qcow import COMPRESSED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import GuestOffset, HostOffset
    from .node import QcowNode


def runs(
    node: QcowNode, offset: GuestOffset, length: int
) -> list[tuple[GuestOffset, int, int, HostOffset]] | None:
    """See `Node.runs`. Of the packed clusters of a run only the first one's place is looked at."""
    extent = node.lookup(offset, length)
    if extent is None:
        return None
    if extent.kind != PACKED:
        return [(offset, extent.length, extent.kind, extent.host)]
    end = offset + extent.length
    entries = node.cache.readable.get(offset >> node.l2_shift)
    if entries is not None:
        last = min(offset + length, (offset >> node.l2_shift) + 1 << node.l2_shift)
        while end < last and entries[end >> node.cluster_bits & node.l2_mask] & COMPRESSED:
            end = min(last, end + node.cluster_size)
    return [(offset, end - offset, PACKED, -1)]
