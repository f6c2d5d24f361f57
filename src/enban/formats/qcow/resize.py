"""Changing the virtual size.

Order of growing: a longer L1 table at the end of the file (durable), the header's pointer to
it (durable), zeros over whatever the new range would show (durable), then the size. Order of
shrinking: the size. A crash leaves the old or the new size, and in both cases tables that fit
it. What lay beyond a smaller size stays behind in the file.
"""

from __future__ import annotations

from array import array

from ...block import mover
from ...errors import UsageError
from ...units import SECTOR, align_up
from ...wire.qcow import L1_AT, SIZE_AT
from ..common.tables import to_big_endian

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import QcowNode


async def resize(node: QcowNode, size: int, preallocation: str) -> None:
    header, old = node.header, node.size
    if preallocation != "off":
        raise UsageError("preallocation is not possible for qcow", path=node.name)
    if size % SECTOR:
        raise UsageError(f"size {size} is not a multiple of {SECTOR}", path=node.name)
    if size > header.largest_size:
        raise UsageError(
            f"size {size} is too large for this image",
            path=node.name,
            hint=f"the limit is {header.largest_size}",
        )
    async with node.mutex:
        await node.prepare_change()
    entries = header.l1_entries_for(size)
    if size > old:
        if entries > len(node.l1):
            await _move_l1(node, entries)
        try:
            node.size = size
            await mover.write_zeroes(node, old, size - old)
            await node.flush()
        except BaseException:
            node.size = old
            raise
        await _set_size(node, size)
    elif size < old:
        await node.flush()
        await _set_size(node, size)
        async with node.barrier_mutex, node.mutex:
            for index in [i for i in node.cache.tables if i >= entries]:
                node.cache.remove(index)
            node.l1 = node.l1[:entries]
            node.l1_dirty = {i for i in node.l1_dirty if i < entries}


async def _set_size(node: QcowNode, size: int) -> None:
    await node.file.write(size.to_bytes(8, "big"), SIZE_AT)
    await node.file.flush()
    node.header.size = node.size = size


async def _move_l1(node: QcowNode, entries: int) -> None:
    """A longer copy of the L1 table; the barrier waits, for it writes to the place of the table."""
    async with node.barrier_mutex, node.mutex:
        longer = array("Q", node.l1)
        longer.extend([0] * (entries - len(longer)))
        content = array("Q", longer)
        for index in node.l1_dirty:  # the table behind it may not be on disk yet; a barrier will write both
            content[index] = 0
        length = align_up(entries * 8, SECTOR)
        place, _ = node.allocate(length)
        try:
            await node.file.write(to_big_endian(content).ljust(length, b"\0"), place)
            await node.file.flush()
            await node.file.write(place.to_bytes(8, "big"), L1_AT)
            await node.file.flush()
        except BaseException:
            node.take_back(place, length)
            raise
        node.l1 = longer
        node.header.l1_offset = place
