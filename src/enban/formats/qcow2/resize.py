"""Changing the virtual size, and allocating ahead of use.

Order of growing: room in the L1 table (durable), zeros over whatever the new range would
show (durable), then the size in the header. Order of shrinking: the size, then the clusters
beyond it. A crash leaves the old or the new size, and in both cases tables that fit it.
"""

from __future__ import annotations

from array import array

from ...block import mover
from ...errors import UnsupportedOperationError, UsageError
from ...units import align_up
from ..common.tables import to_big_endian
from .allocation import Link
from .create import largest_size
from .leaving import release_quarantine

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Qcow2Node

_STRIDE = 64 << 20


async def resize(node: Qcow2Node, size: int, preallocation: str) -> None:
    header = node.header
    old = node.size
    if size % 512:
        raise UsageError(f"size {size} is not a multiple of 512", path=node.name)
    if size > largest_size(header):
        raise UsageError(
            f"size {size} is too large for this image",
            path=node.name,
            hint=f"the limit is {largest_size(header)}",
        )
    if header.version < 3 and header.snapshot_count:
        raise UnsupportedOperationError(
            "a version 2 image with snapshots cannot be resized",
            path=node.name,
            hint="upgrade it to compat=1.1",
        )
    async with node.mutex:
        await node.prepare_change()
    if size != old and node.dirty_bitmaps is not None:
        await node.dirty_bitmaps.prepare_resize(size)
    if size != old:
        from .vm_state import drop

        await drop(node)  # the area begins somewhere else then, and the state would not fit the disk
    if size > old:
        await _grow(node, old, size, preallocation)
    elif size < old:
        if preallocation != "off":
            raise UsageError("preallocation goes with growing only", path=node.name)
        await _shrink(node, old, size)


async def _grow(node: Qcow2Node, old: int, size: int, preallocation: str) -> None:
    needed = -(-size // (1 << node.l2_shift))
    if needed > len(node.l1):
        await grow_l1(node, needed)
    try:
        node.size = size
        if node.dirty_bitmaps is not None:
            node.dirty_bitmaps.resized(size)
            node.mark(old, size - old)  # it may have been longer once, with other bytes there
        await mover.write_zeroes(node, old, size - old)
        if preallocation != "off":
            await preallocate(node, old, size - old, preallocation)
        await node.flush()
        await _set_size(node, size)
    except BaseException:
        node.size = old
        if node.dirty_bitmaps is not None:
            node.dirty_bitmaps.resized(old)
        raise


async def _shrink(node: Qcow2Node, old: int, size: int) -> None:
    await node.flush()
    await _set_size(node, size)
    first = min(align_up(size, node.cluster_size), old)
    node.size = old  # the mover looks at ranges inside the disk
    try:
        # The rest of the last cluster would come to light again in a program that does not clear it.
        await mover.write_zeroes(node, size, first - size)
        await mover.discard(node, first, old - first)
    finally:
        node.size = size
        if node.dirty_bitmaps is not None:
            node.dirty_bitmaps.resized(size)
    await node.flush()
    async with node.mutex:
        await release_quarantine(node)
    await node.flush()


async def _set_size(node: Qcow2Node, size: int) -> None:
    try:
        await node.file.write(size.to_bytes(8, "big"), 24)
        await node.file.flush()
    except BaseException:
        node.header_doubtful = True
        raise
    node.header.size = node.size = size


async def grow_l1(node: Qcow2Node, entries: int) -> None:
    """Move the L1 table to a place with room; one 12-byte write in the header switches over."""
    await node.flush()
    header, cluster = node.header, node.cluster_size
    async with node.mutex:
        old_offset, old_clusters = header.l1_offset, -(-header.l1_entries * 8 // cluster)
        clusters = -(-entries * 8 // cluster)
        longer = array("Q", node.l1)
        longer.extend([0] * (entries - len(longer)))
        offset = await node.refcounts.allocate_adjacent(clusters)
        try:
            await node.file.write(to_big_endian(longer), offset)
        except BaseException:
            await node.refcounts.release(offset >> node.cluster_bits, clusters)
            raise
    try:
        await node.flush()  # the new place is counted and written before the header names it
        await node.file.write(entries.to_bytes(4, "big") + offset.to_bytes(8, "big"), 36)
        await node.file.flush()
    except BaseException:
        node.header_doubtful = True
        node.unlinked.append((offset >> node.cluster_bits, clusters, 0))
        raise
    async with node.mutex:
        node.l1 = longer
        header.l1_entries, header.l1_offset = entries, offset
        if old_clusters:
            node.quarantine.append((old_offset >> node.cluster_bits, old_clusters, 0))


async def preallocate(node: Qcow2Node, offset: int, length: int, mode: str) -> None:
    """Give every cluster of a range a place: `metadata` only that, `falloc` reserves the host's
    space too, `full` writes zeros there. What is allocated already stays."""
    end = offset + length
    while offset < end:
        n = min(end - offset, _STRIDE - offset % _STRIDE)
        pieces = await node.reserve(offset, n)
        try:
            for piece in pieces:
                link = piece.token
                if not isinstance(link, Link):
                    continue
                span = link.count << node.cluster_bits
                if mode == "full":
                    await _write_zeroes(node, link.host, span)
                else:
                    if not piece.clean:
                        await piece.storage.write_zeroes(link.host, span, unmap=mode == "metadata")
                    if mode == "falloc":
                        await piece.storage.allocate(link.host, span)
                    if piece.storage.size() < link.host + span and not piece.storage.fixed_size:
                        await piece.storage.truncate(link.host + span)
                if node.extended and node.may_show_backing:
                    link.masks = [0] * link.count
        except BaseException:
            await node.abandon(pieces)
            raise
        await node.publish(pieces)
        offset += n


async def _write_zeroes(node: Qcow2Node, host: int, length: int) -> None:
    zeroes = bytes(min(length, 1 << 20))
    for start in range(0, length, len(zeroes)):
        await node.data.write(memoryview(zeroes)[: length - start], host + start)
