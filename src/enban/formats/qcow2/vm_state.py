"""The VM state area: where QEMU keeps the memory and devices of a guest that a snapshot is taken of.

It lies behind the disk, in the same tables, from the first L1 entry on that the virtual size does not
need (specification, "Snapshots"; QEMU maps byte 0 of the state to that entry's first cluster):

    L1   | disk ...        | VM state ... |
           ^ 0               ^ ceil(size / bytes an L2 table maps)

Whoever saves a guest writes the state there and then takes a snapshot, which takes the state with it and
leaves the area empty. Applying a snapshot brings its state back, to be read. State that was read back is
not taken along by another snapshot: the disk has changed since, and memory that does not belong to its
disk would destroy the guest's file systems.

How long the state is the snapshot's entry says; of an area found in an image only the clusters are known.
"""

from __future__ import annotations

from ...block import mover
from ...block.node import Node, Piece
from ...errors import CorruptImageError, UnsupportedOperationError
from ...extent import Extent
from ...wire.qcow2 import MAX_L1_BYTES
from ...wire.qcow2_entries import COMPRESSED, OFFSET_MASK
from .barrier import barrier
from .resize import grow_l1
from .upkeep import drop_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import GuestOffset, HostOffset
    from .node import Qcow2Node

_LOOKED_AT = 4  # tables in which the end of a state found in an image is looked for


class StateView(Node):
    """The tables of an image behind its disk, as a node for the mover: offsets are the image's own."""

    format = "qcow2"

    def __init__(self, node: Qcow2Node) -> None:
        super().__init__(node.name, node.runtime, node.file, writable=node.writable)
        self.data = node.data
        self.unit = node.unit
        self.grain = node.grain
        self.ranges = node.ranges
        self.size = len(node.l1) << node.l2_shift
        self.node = node

    def lookup(self, offset: GuestOffset, length: int) -> Extent | None:
        return self.node.lookup(offset, length)

    async def load(self, offset: GuestOffset) -> None:
        await self.node.load(offset)

    def locate_write(self, offset: GuestOffset, length: int) -> HostOffset:
        return self.node.locate_write(offset, length)

    async def reserve(self, offset: GuestOffset, length: int) -> list[Piece]:
        return await self.node.reserve(offset, length)

    async def publish(self, pieces: list[Piece]) -> None:
        await self.node.publish(pieces)

    async def abandon(self, pieces: list[Piece]) -> None:
        await self.node.abandon(pieces)


def first_index(node: Qcow2Node) -> int:
    """The first L1 entry of the area."""
    return -(-node.size // (1 << node.l2_shift))


async def write(node: Qcow2Node, buffer: memoryview, offset: int) -> bool:
    """Write a part of the state. False: `prepare` has to make room first."""
    start = first_index(node) << node.l2_shift
    end = offset + len(buffer)
    if start + end > len(node.l1) << node.l2_shift or (node.vm_state_size and not node.vm_state_new):
        return False
    await mover.write(StateView(node), buffer, start + offset)
    async with node.mutex:
        node.vm_state_new = True
        node.vm_state_size = max(node.vm_state_size, end)
    return True


async def prepare(node: Qcow2Node, end: int) -> None:
    """Room in the L1 table for a state of `end` bytes, nothing of an older one. No request is in flight."""
    if node.external:
        raise UnsupportedOperationError(
            "an image with an external data file has no place for VM state", path=node.name
        )
    async with node.mutex:
        await node.prepare_change()
    if not node.vm_state_new:
        await drop(node)
    needed = first_index(node) + -(-end // (1 << node.l2_shift))
    if needed * 8 > MAX_L1_BYTES:
        raise UnsupportedOperationError(
            "the image cannot hold so much VM state", path=node.name, hint="use a larger cluster size"
        )
    if needed > len(node.l1):
        # Half as much again, or each table of state would move the L1 table.
        await grow_l1(node, min(needed + needed // 2, MAX_L1_BYTES // 8))


async def read(node: Qcow2Node, buffer: memoryview, offset: int) -> None:
    """Fill `buffer` from the state; what was never written reads as zeros."""
    start = (first_index(node) << node.l2_shift) + offset
    inside = max(0, min(len(buffer), (len(node.l1) << node.l2_shift) - start))
    if inside:
        await mover.read_into(StateView(node), buffer[:inside], start)
    mover.fill_zeroes(buffer[inside:])


async def drop(node: Qcow2Node) -> None:
    """Empty the area, durably. No request is in flight that uses it."""
    first = first_index(node)
    if any(node.l1[first:]):
        async with node.mutex:
            await node.prepare_change()
            for index in range(first, len(node.l1)):
                if node.l1[index] & OFFSET_MASK:
                    await drop_table(node, index)
        await barrier(node)
    node.vm_state_size, node.vm_state_new = 0, False


async def find(node: Qcow2Node) -> None:
    """How much state a newly opened image holds, as far as its tables tell: whole clusters."""
    first = first_index(node)
    indexes = [index for index in range(first, len(node.l1)) if node.l1[index] & OFFSET_MASK]
    for index in reversed(indexes[-_LOOKED_AT:]):
        try:
            entries = await node.read_l2(node.l1[index] & OFFSET_MASK)
        except CorruptImageError:
            continue  # the disk can be read all the same
        for place in range(len(entries) // node.numbers - 1, -1, -1):
            if entries[place * node.numbers] & (OFFSET_MASK | COMPRESSED):
                node.vm_state_size = (index - first << node.l2_shift) + (place + 1 << node.cluster_bits)
                return
