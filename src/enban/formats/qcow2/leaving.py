"""Host clusters that left the mapping: when they may be counted down, and what is forgotten then.

    Qcow2Node.unlink    the unlinking is in memory only          -> node.unlinked
    barrier             it is durable                            -> node.quarantine
    release_quarantine  no request that began before is left     -> counted down, free

The rule: a cluster is free for others only after all three, and before anybody can get it, nothing is
known any more of what it held.
"""

from __future__ import annotations

from ...errors import EnbanError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import Cluster, HostOffset
    from .node import Qcow2Node


async def release_quarantine(node: Qcow2Node, *, least: int = 0) -> None:
    """Count down clusters whose unlinking is durable and that no running request can reach;
    mutex held. What is free now is given back to the host before anyone can get it; with `least`
    only runs of that many bytes, made of more than single clusters."""
    oldest = node.ledger.oldest if node.ledger is not None else 1
    due = [entry for entry in node.quarantine if entry[2] < oldest]
    if not due:
        return
    node.quarantine = [entry for entry in node.quarantine if entry[2] >= oldest]
    run = end = 0  # free clusters not given back yet
    try:
        while due:
            first, count, _ = due[0]
            span, left = await node.refcounts.drop_span(first, count)
            due[0] = (first + span, count - span, 0)
            if span == count:
                del due[0]
            if not left:
                forget_clusters(node, first, span)
                if count == 1 and least:
                    continue  # a table or the like: such places are used again soon
                if first != end:
                    await _give_back(node, run, end, least)
                    run = first
                end = first + span
    finally:
        node.quarantine.extend(due)  # if a refcount block could not be read, the rest stays due
        await _give_back(node, run, end, least)


async def _give_back(node: Qcow2Node, first: Cluster, end: Cluster, least: int) -> None:
    """Tell the host that the space of free clusters is not needed."""
    if node.pass_discards and end - first << node.cluster_bits > least:
        try:
            await node.file.discard(first << node.cluster_bits, end - first << node.cluster_bits)
        except EnbanError:
            node.pass_discards = False  # advice was not wanted; the space stays with the file


def refcount_table_moved(node: Qcow2Node, moved: tuple[HostOffset, int]) -> tuple[Cluster, int, int]:
    """The header shall name the new refcount table; the old one, for `unlinked` or `quarantine`."""
    old, clusters = node.header.refcount_table_offset, node.header.refcount_table_clusters
    node.header.refcount_table_offset, node.header.refcount_table_clusters = moved
    return old >> node.cluster_bits, clusters, 0


def forget_clusters(node: Qcow2Node, first: Cluster, count: int) -> None:
    """Clusters are free: nothing may be known of their old content."""
    if first <= node.packed_end - 1 >> node.cluster_bits < first + count:
        node.packed_end = 0
    node.generation += 1
    node.unpacked.clear()
    metadata, bits = node.refcounts.metadata, node.cluster_bits
    if count > len(metadata):
        metadata.difference_update([m for m in metadata if first << bits <= m < first + count << bits])
    else:
        metadata.difference_update(range(first << bits, first + count << bits, 1 << bits))
