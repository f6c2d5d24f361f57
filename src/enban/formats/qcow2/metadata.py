"""Where an image has its tables: learnt once, before its first change, and only then.

The rule: if two tables overlap, changing one would destroy the other, so nothing is changed; and the
numbers in a header do not decide how much memory is taken. (A check tells more; this is what every writer
needs to know.)
"""

from __future__ import annotations

from ...errors import CorruptImageError
from ...units import align_down
from ...wire.qcow2_entries import OFFSET_MASK, REFTABLE_MASK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ...units import HostOffset
    from .node import Qcow2Node

_ALWAYS_KNOWN = 64 << 10  # bytes


async def collect_metadata(node: Qcow2Node, bitmaps: list[tuple[HostOffset, int, str]]) -> None:
    """Learn where the tables are. If any overlap, changing one would destroy another: refuse."""
    size, header = node.cluster_size, node.header
    metadata: set[HostOffset] = set()

    def add(offset: HostOffset, length: int, what: str) -> None:
        for place in range(offset, offset + length, size):
            if place in metadata:
                raise CorruptImageError(
                    f"{what} lies on other metadata",
                    path=node.name,
                    offset=place,
                    hint="run: enban check -r all",
                )
            metadata.add(place)

    add(0, size, "header")
    add(header.l1_offset, header.l1_entries * 8, "L1 table")
    add(header.refcount_table_offset, header.refcount_table_clusters * size, "refcount table")
    for entry in filter(None, node.refcounts.table):
        add(entry & REFTABLE_MASK, size, "refcount block")
    for entry in filter(OFFSET_MASK.__and__, node.l1):
        add(entry & OFFSET_MASK, size, "L2 table")
    for snapshot in node.snapshots:
        if snapshot.l1_offset + snapshot.l1_entries * 8 > node.file.size():
            raise CorruptImageError(
                f"L1 table of snapshot '{snapshot.name}' reaches past the end of the file",
                path=node.name,
                offset=snapshot.l1_offset,
                hint="run: enban check -r all",
            )
        async for place, length in _stored(node, snapshot.l1_offset, snapshot.l1_entries * 8):
            add(place, length, "L1 table of a snapshot")
    if header.snapshot_count:
        from ...wire.qcow2_snapshots import build_snapshots

        add(header.snapshots_offset, len(build_snapshots(node.snapshots)), "snapshot table")
    for region in bitmaps:
        add(*region)
    node.refcounts.metadata |= metadata


async def _stored(node: Qcow2Node, offset: HostOffset, length: int) -> AsyncIterator[tuple[HostOffset, int]]:
    """Of a large table the clusters that are not holes of the file: the numbers in a header shall not
    decide how much memory is taken."""
    end = offset + length
    while offset < end:
        hole, length = False, end - offset
        if length > _ALWAYS_KNOWN:
            hole, length = await node.file.status(offset, length)
            if offset + length < end:  # one hole ends inside a cluster that is stored, then
                length = max(align_down(offset + length, node.cluster_size) - offset, node.cluster_size)
        if not hole:
            yield offset, length
        offset += length
