"""Changing what an image is based on: another backing file, or no data of its own.

A new name is written behind everything else, where nothing points to; then one write of the
header's first sector switches over. The old name stays behind. The format of a backing file
has no place in the image.
"""

from __future__ import annotations

from array import array

from ...units import SECTOR, align_up
from ...wire.qcow import BACKING_AT, build_backing
from .create import encode_backing_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import HostOffset
    from .node import QcowNode

_ZEROES = bytes(1 << 20)


async def set_backing(node: QcowNode, name: str) -> None:
    content = encode_backing_name(name)
    await node.flush()
    async with node.mutex:
        await node.prepare_change()
        place = 0
        if content:
            place, _ = node.allocate(len(content), 8)
            await node.file.write(content, place)
            await node.file.flush()
        await node.file.write(build_backing(place, len(content)), BACKING_AT)
        await node.file.flush()
        node.header.backing_offset, node.header.backing_length = place, len(content)
        node.header.backing_name, node.backing_name = content, name


def metadata_end(node: QcowNode) -> HostOffset:
    """The end of the header, the L1 table and the backing file's name, wherever they stand."""
    header = node.header
    l1_end = header.l1_offset + align_up(len(node.l1) * 8, SECTOR)
    return max(l1_end, header.backing_offset + len(header.backing_name))


async def make_empty(node: QcowNode) -> None:
    """Zero the L1 table, durably, then cut off what is behind the metadata."""
    await node.flush()  # from here on no table is known to memory alone
    async with node.barrier_mutex, node.mutex:
        await node.prepare_change()
        offset, end = node.header.l1_offset, node.header.l1_offset + len(node.l1) * 8
        try:
            while offset < end:
                n = min(end - offset, len(_ZEROES))
                await node.file.write(memoryview(_ZEROES)[:n], offset)
                offset += n
            await node.file.flush()
        except BaseException:
            await node.corrupted()  # which tables the disk still knows is not certain: no more changes
            raise
        node.forget_tables(array("Q", bytes(len(node.l1) * 8)))
        end = metadata_end(node)
        if not node.file.fixed_size:
            await node.file.truncate(end)
            await node.file.flush()
        node.begin_space(end)
