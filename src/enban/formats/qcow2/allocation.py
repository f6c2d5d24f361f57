"""Space for writes: which host clusters a write gets, and entering them in the L2 tables.

Functions on a node whose `mutex` is held. `node.reserve` walks the tables of a range and has each part
planned here; `link_entries` is what `publish` does; `undo` is what `abandon` does.
"""

from __future__ import annotations

from array import array

from ...block.node import Piece
from ...wire.qcow2_entries import ALL_ZERO, COMPRESSED, COPIED, OFFSET_MASK, SUBCLUSTERS
from ..common.tables import L2Table
from .leaving import forget_clusters
from .mapping import bad_entry, subcluster_kind

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import GuestOffset, HostOffset
    from .node import Qcow2Node


class Link:
    """What `publish` does for a piece: `count` entries from `first` of table `index` get the
    clusters from `host` on. owned: the clusters were allocated for this piece.
    masks: with extended entries, the subclusters of each that become data.
    packed: the ready entry of a compressed cluster, else 0."""

    __slots__ = ("count", "first", "host", "index", "masks", "owned", "packed")

    def __init__(
        self,
        index: int,
        first: int,
        count: int,
        host: HostOffset,
        *,
        owned: bool,
        masks: list[int] | None = None,
        packed: int = 0,
    ) -> None:
        self.index = index
        self.first = first
        self.count = count
        self.host = host
        self.owned = owned
        self.masks = masks
        self.packed = packed


def vet_table(node: Qcow2Node, index: int, table: L2Table) -> None:
    """Refuse to write through a table that names metadata as guest data."""
    metadata = node.refcounts.metadata
    entries = table.entries[::2] if node.extended else table.entries
    if node.external or metadata.isdisjoint(map(OFFSET_MASK.__and__, filter(None, entries))):
        return
    for position, entry in enumerate(entries):
        if not entry & COMPRESSED and node.present(entry) and entry & OFFSET_MASK in metadata:
            raise bad_entry(
                node,
                (index << node.l2_shift) + (position << node.cluster_bits),
                f"points to metadata at {entry & OFFSET_MASK:#x}",
            )


async def reserve_standard(
    node: Qcow2Node,
    pieces: list[Piece],
    index: int,
    table: L2Table,
    start: GuestOffset,
    stop: GuestOffset,
    want_start: GuestOffset,
    want_end: GuestOffset,
) -> None:
    entries, bits = table.entries, node.cluster_bits
    i = start >> bits & node.l2_mask
    last = i + (stop - start >> bits)
    while i < last:
        entry = entries[i]
        guest = (index << node.l2_shift) + (i << bits)
        count = 1
        if entry >> 63 and not entry & COMPRESSED and node.present(entry):
            # Ours alone: data is overwritten in place, a kept zero cluster is put to use.
            host = entry & OFFSET_MASK
            if host & node.cluster_mask:
                raise bad_entry(node, guest, f"points to {host:#x}, which is no cluster")
            while i + count < last and entries[i + count] == entry + (count << bits):
                count += 1
            if entry & ALL_ZERO:
                link = Link(index, i, count, host, owned=False)
                add_piece(node, pieces, table, guest, count << bits, host, clean=False, link=link)
            else:
                first, end = max(guest, want_start), min(guest + (count << bits), want_end)
                place = host + first - guest
                pieces.append(Piece(first, end - first, node.data, place, fill=False))
        else:
            while i + count < last and not (entries[i + count] >> 63 and node.present(entries[i + count])):
                count += 1
            host, count, clean = await new_clusters(node, guest, count)
            link = Link(index, i, count, host, owned=True)
            add_piece(node, pieces, table, guest, count << bits, host, clean=clean, link=link)
        i += count


def add_piece(
    node: Qcow2Node,
    pieces: list[Piece],
    table: L2Table,
    guest: GuestOffset,
    length: int,
    host: HostOffset,
    *,
    clean: bool,
    link: Link,
) -> None:
    table.pins += 1
    if node.external:
        length = min(length, node.size - guest)  # a data file ends where the disk ends
    pieces.append(Piece(guest, length, node.data, host, fill=True, clean=clean, token=link))


async def new_clusters(node: Qcow2Node, guest: GuestOffset, count: int) -> tuple[HostOffset, int, bool]:
    """(host offset, how many clusters, whether they read as zeros)."""
    if node.external:  # guest and host offsets are the same there, and nothing is counted
        return guest, count, guest >= node.data.size() and not node.data.fixed_size
    cluster, count, clean = await node.refcounts.allocate(count)
    return cluster << node.cluster_bits, count, clean


async def reserve_extended(
    node: Qcow2Node,
    pieces: list[Piece],
    index: int,
    table: L2Table,
    start: GuestOffset,
    stop: GuestOffset,
    want_start: GuestOffset,
    want_end: GuestOffset,
) -> None:
    entries, grain = table.entries, node.grain
    for guest in range(start, stop, node.cluster_size):
        i = guest >> node.cluster_bits & node.l2_mask
        entry = entries[2 * i]
        first = max(want_start - guest, 0) >> node.grain_bits
        end = min(-(-(want_end - guest) // grain), SUBCLUSTERS)
        if entry & COMPRESSED or (node.present(entry) and not entry >> 63):
            first, end = 0, SUBCLUSTERS  # the whole cluster moves
        elif node.present(entry):
            host = entry & OFFSET_MASK
            if host & node.cluster_mask:
                raise bad_entry(node, guest, f"points to {host:#x}, which is no cluster")
            reserve_subclusters(node, pieces, index, table, i, guest, first, end)
            continue
        host, _, clean = await new_clusters(node, guest, 1)
        mask = (1 << end - first) - 1 << first
        link = Link(index, i, 1, host, owned=True, masks=[mask])
        place = first << node.grain_bits
        length = (end - first) << node.grain_bits
        add_piece(node, pieces, table, guest + place, length, host + place, clean=clean, link=link)


def reserve_subclusters(
    node: Qcow2Node,
    pieces: list[Piece],
    index: int,
    table: L2Table,
    i: int,
    guest: GuestOffset,
    first: int,
    end: int,
) -> None:
    """Pieces inside a cluster that is ours: data subclusters stay, the others come into use."""
    entry, bitmap = table.entries[2 * i], table.entries[2 * i + 1]
    host = entry & OFFSET_MASK
    while first < end:
        data = bitmap >> first & 1
        subcluster_kind(node, entry, bitmap, first, guest)
        count = 1
        while first + count < end and bitmap >> first + count & 1 == data:
            count += 1
        place = first << node.grain_bits
        length = count << node.grain_bits
        if data:
            pieces.append(Piece(guest + place, length, node.data, host + place, fill=False))
        else:
            mask = (1 << count) - 1 << first
            link = Link(index, i, 1, host, owned=False, masks=[mask])
            add_piece(node, pieces, table, guest + place, length, host + place, clean=False, link=link)
        first += count


async def new_packed(node: Qcow2Node, length: int) -> HostOffset:
    """Space for packed bytes: after the last ones if that is possible, else in a new cluster.
    Every host cluster it touches is counted once more. A new cluster is the first free one; only if
    that follows the last do the bytes run on into it. So space that became free is used again."""
    refcounts, size = node.refcounts, node.cluster_size
    host = node.packed_end
    shared = host >> node.cluster_bits
    may_share = host % size and await refcounts.get(shared) < refcounts.largest
    if not may_share or host + length - 1 >> node.cluster_bits != shared:
        cluster, _, _ = await refcounts.allocate(1)
        if cluster != shared + 1:
            may_share = False
        if not may_share:
            host = cluster << node.cluster_bits
    if may_share:
        await refcounts.add(shared, 1)
    node.packed_end = host + length
    return host


def link_entries(node: Qcow2Node, link: Link) -> None:
    entries = node.cache.tables[link.index].entries
    numbers = node.numbers
    if numbers == 1 and not link.packed and link.masks is None:
        last = link.first + link.count
        old_entries = entries[link.first : last]
        start, step = link.host | COPIED, 1 << node.cluster_bits
        entries[link.first : last] = array("Q", range(start, start + link.count * step, step))
        if link.owned:
            for old in filter(None, old_entries):
                node.unlink_entry(old)
        node.cache.touch(link.index, link.first, link.count)
        return
    for position in range(link.count):
        i = (link.first + position) * numbers
        old = entries[i]
        # Extended entries: the order keeps other threads' reads right, see `mapping.entry_pair`.
        if link.packed:
            entries[i] = link.packed
            if node.extended:
                entries[i + 1] = 0
        else:
            new = link.host + (position << node.cluster_bits) | COPIED
            if link.masks is None:
                entries[i] = new
            else:
                mask = link.masks[position]
                bitmap = (entries[i + 1] | mask) & ~(mask << 32)
                if old & COMPRESSED:
                    entries[i + 1] = bitmap
                    entries[i] = new
                else:
                    entries[i] = new
                    entries[i + 1] = bitmap
        if link.owned:
            node.unlink_entry(old)
    node.cache.touch(link.index, link.first * numbers, link.count * numbers)


async def undo(node: Qcow2Node, pieces: list[Piece]) -> None:
    for piece in pieces:
        link = piece.token
        if not isinstance(link, Link):
            continue
        node.cache.tables[link.index].pins -= 1
        if link.packed:
            await drop_packed(node, link.host, piece.length)
        elif link.owned and not node.external:
            await node.refcounts.release(link.host >> node.cluster_bits, link.count)


async def drop_packed(node: Qcow2Node, host: HostOffset, length: int) -> None:
    for cluster in range(host >> node.cluster_bits, (host + length - 1 >> node.cluster_bits) + 1):
        if not await node.refcounts.add(cluster, -1):
            forget_clusters(node, cluster, 1)
