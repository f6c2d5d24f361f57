"""The one place that moves guest bytes.

Nodes say where bytes live (`Node.lookup`) or may be put (`Node.reserve`); the functions
here walk the chain, read, inflate, fill around partial writes and write. Order of a write
that needs space, the same for every format:

    lock the units -> reserve -> move the bytes -> publish (or abandon) -> unlock

so a failed or cancelled write has shown nothing, and bytes are in place before a table
names them.
"""

from __future__ import annotations

from ..errors import EnbanError
from ..extent import COMPRESSED, DATA, UNALLOCATED, ZERO, Extent
from ..units import SECTOR, align_down, align_up
from . import codec
from .runtime import drive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..units import GuestOffset
    from .locks import HeldRange
    from .node import Node, Piece

# Work on a long range goes in strides, so that locks and table memory stay bounded.
STRIDE = 8 << 20
# A partial unit and its surroundings are joined to one write up to this size.
JOIN = 2 << 20
_UNPACKED_BYTES = 4 << 20  # inflated clusters kept for the next small read
# Packed units that stand close together are read and inflated at once: so many packed bytes at most,
# and so many between two of them that nobody asked for.
_PACKED_BATCH = 1 << 20
_PACKED_GAP = 4096

_ZEROES = memoryview(bytes(1 << 20))


async def resolve(node: Node, offset: GuestOffset, length: int) -> Extent:
    """Where the bytes at `offset` live, looking down the backing chain.

    The extent is at most `length` long. UNALLOCATED now means: in no layer, reads as zeros.
    """
    layer, depth = node, 0
    while True:
        extent = layer.lookup(offset, length)
        while extent is None:
            await layer.load(offset)
            extent = layer.lookup(offset, length)
        extent.depth = depth
        if extent.kind != UNALLOCATED:
            return extent
        below = layer.backing
        if below is None or offset >= below.size:
            return extent
        length = min(extent.length, below.size - offset)
        layer = below
        depth += 1


async def read_into(node: Node, buffer: memoryview, offset: GuestOffset) -> None:
    """Fill `buffer` with the guest bytes at `offset`; the range lies inside the disk."""
    length = len(buffer)
    host = node.locate(offset, length)
    if host >= 0:
        if not node.data.read_now(buffer, host):
            await node.data.read_into(buffer, host)
        return
    position = 0
    packed: list[Extent] = []  # units before `position` that are still to be read
    while position < length:
        extent = await resolve(node, offset + position, length - position)
        if packed and not _close_by(packed, extent):
            await _read_packed(packed, buffer, offset)
            packed = []
        part = buffer[position : position + extent.length]
        position += extent.length
        if extent.kind == DATA:
            if extent.storage is None:
                await _read_encrypted(extent, part)
            elif not extent.storage.read_now(part, extent.host):
                await extent.storage.read_into(part, extent.host)
        elif extent.kind == COMPRESSED:
            packed.append(extent)
        else:
            fill_zeroes(part)
    if packed:
        await _read_packed(packed, buffer, offset)


def fill_zeroes(buffer: memoryview) -> None:
    for start in range(0, len(buffer), len(_ZEROES)):
        part = buffer[start : start + len(_ZEROES)]
        part[:] = _ZEROES[: len(part)]


async def _read_encrypted(extent: Extent, part: memoryview) -> None:
    node, lead = extent.node, extent.start % SECTOR
    assert node.cipher is not None
    sectors = part
    if lead or len(part) % SECTOR:
        sectors = memoryview(bytearray(align_up(lead + len(part), SECTOR)))
    if not node.data.read_now(sectors, extent.host - lead):
        await node.data.read_into(sectors, extent.host - lead)
    await node.runtime.offload(node.cipher.decrypt, sectors, extent.start - lead)
    if sectors is not part:
        part[:] = sectors[lead : lead + len(part)]


def _close_by(packed: list[Extent], extent: Extent) -> bool:
    """Whether a packed unit can be read together with those before it."""
    before = packed[-1]
    return (
        extent.kind == COMPRESSED
        and extent.node is before.node
        and before.host < extent.host <= before.host + before.packed + _PACKED_GAP
        and extent.host + extent.packed - packed[0].host <= _PACKED_BATCH
    )


async def _read_packed(extents: list[Extent], buffer: memoryview, offset: GuestOffset) -> None:
    """Inflate units of one node, in the order of their places, into the buffer of a read at `offset`."""
    first = extents[0]
    node, generation = first.node, first.node.generation
    if len(extents) == 1 and (data := node.unpacked.get((generation, first.host))) is not None:
        _place(first, data, buffer, offset)
        return
    # Where lengths are in whole sectors, a unit may seem to reach past the start of the next one.
    packed = bytearray(max([extent.host + extent.packed for extent in extents]) - first.host)
    assert first.storage is not None
    if not first.storage.read_now(packed, first.host):
        await first.storage.read_into(packed, first.host)
    await node.runtime.offload(_inflate, extents, generation, packed, buffer, offset)


def _inflate(
    extents: list[Extent], generation: int, packed: bytearray, buffer: memoryview, offset: GuestOffset
) -> None:
    node, base = extents[0].node, extents[0].host
    size = node.cluster_size
    with memoryview(packed) as view:
        for extent in extents:
            start = extent.host - base
            data = codec.inflate(
                node.codec, view[start : start + extent.packed], size, path=node.name, offset=extent.host
            )
            _place(extent, data, buffer, offset)
            if extent.length < size:  # the rest of the unit is likely to be read next
                kept = node.unpacked
                most = max(2, _UNPACKED_BYTES // size)
                for old in list(kept)[: max(0, len(kept) - most + 1)]:  # one step, so safe among threads
                    kept.pop(old, None)
                kept[generation, extent.host] = data


def _place(extent: Extent, data: bytes, buffer: memoryview, offset: GuestOffset) -> None:
    """Put the part of an inflated unit that the extent speaks of where it belongs."""
    start, skip = extent.start - offset, extent.start - extent.unit
    buffer[start : start + extent.length] = memoryview(data)[skip : skip + extent.length]


async def write(node: Node, buffer: memoryview, offset: GuestOffset) -> None:
    """Write guest bytes. On an error each unit of the range is as before or as asked."""
    length = len(buffer)
    switches = node.switches
    host = node.locate_write(offset, length)
    if host >= 0:
        await node.data.write(buffer, host)
        if switches == node.switches:
            return
        # A snapshot was made meanwhile. The place is its too now, and another write may have copied the
        # unit before our bytes were there: write again, where the disk has it now.
    if length <= node.unit and node.runtime.blocking and write_now(node, buffer, offset):
        return
    position = 0
    while position < length:
        start = offset + position
        n = min(length - position, STRIDE - start % STRIDE)
        held = await lock_units(node, start, n)
        try:
            part = buffer[position : position + n]
            await node.vet(part, start)
            await node.runtime.finish(write_locked(node, part, start))
        finally:
            node.ranges.release(held)
        position += n


def write_now(node: Node, buffer: memoryview, offset: GuestOffset) -> bool:
    """A write inside one unit that needs new space, by plain calls, in the order at the top.

    False: nothing was changed, take `write`. For the blocking runtime only.
    """
    length = len(buffer)
    start = offset - offset % node.unit
    end = start + node.unit
    if offset + length > end:
        return False
    held = node.ranges.try_acquire(start, end)
    if held is None:
        return False
    piece, written = None, False
    try:
        piece = node.claim(offset, length)
        if piece is None:
            return False
        if piece.fill:
            drive(_write_piece(node, piece, buffer, offset))
            written = True
        else:
            written = piece.storage.write_now(buffer, piece.host + offset - piece.start)
    except EnbanError:
        pass  # `write` will meet it again, and report it
    finally:
        try:
            if piece is not None:
                drive(node.publish([piece]) if written else node.abandon([piece]))
        finally:
            node.ranges.release(held)
    return written


async def lock_units(node: Node, offset: GuestOffset, length: int) -> HeldRange:
    """Wait for the units that a range touches."""
    return await node.ranges.acquire(align_down(offset, node.unit), align_up(offset + length, node.unit))


async def write_locked(node: Node, buffer: memoryview, offset: GuestOffset) -> None:
    """A write of at most STRIDE bytes by who holds the lock of its units."""
    pieces = await node.reserve(offset, len(buffer))
    await _move_and_publish(PlannedWrite(node, buffer, offset, None, pieces))


class PlannedWrite:
    """A write that has its space, and with `held` its locks."""

    __slots__ = ("buffer", "held", "node", "offset", "pieces")

    def __init__(
        self, node: Node, buffer: memoryview, offset: GuestOffset, held: HeldRange | None, pieces: list[Piece]
    ) -> None:
        self.node = node
        self.buffer = buffer
        self.offset = offset
        self.held = held
        self.pieces = pieces


async def plan_write(node: Node, buffer: memoryview, offset: GuestOffset) -> PlannedWrite:
    """The first half of a write of at most STRIDE bytes: wait for the units and allocate. Space is
    given out in the order of these calls, so a job that calls them in guest order gets an image
    laid out in guest order whoever moves the bytes. `run_plan` must follow, once; a task that may
    be cancelled in between calls `write` instead."""
    held = await lock_units(node, offset, len(buffer))
    try:
        await node.vet(buffer, offset)
        pieces = await node.reserve(offset, len(buffer))
    except BaseException:
        node.ranges.release(held)
        raise
    return PlannedWrite(node, buffer, offset, held, pieces)


async def run_plan(plan: PlannedWrite) -> None:
    """The second half: move the bytes, publish (or abandon on an error), unlock."""
    try:
        await _move_and_publish(plan)
    finally:
        if plan.held is not None:
            plan.node.ranges.release(plan.held)


async def _move_and_publish(plan: PlannedWrite) -> None:
    node = plan.node
    try:
        for piece in plan.pieces:
            await _write_piece(node, piece, plan.buffer, plan.offset)
    except BaseException:
        await node.abandon(plan.pieces)
        raise
    await node.publish(plan.pieces)


async def _write_piece(node: Node, piece: Piece, buffer: memoryview, offset: GuestOffset) -> None:
    end = piece.start + piece.length
    first, last = max(piece.start, offset), min(end, offset + len(buffer))
    body = buffer[first - offset : last - offset]
    storage, host = piece.storage, piece.host
    head, tail = first - piece.start, end - last
    if node.cipher is not None:
        head_bytes = await _surroundings(node, piece, piece.start, head)
        tail_bytes = await _surroundings(node, piece, last, tail)
        plain = b"".join((head_bytes or b"", body, tail_bytes or b"", bytes(-piece.length % SECTOR)))
        await storage.write(await node.runtime.offload(node.cipher.encrypt, plain, piece.start), host)
        return
    if piece.fill and (head or tail):
        head_bytes = await _surroundings(node, piece, piece.start, head)
        tail_bytes = await _surroundings(node, piece, last, tail)
        if head_bytes is not None or tail_bytes is not None:
            if piece.length <= JOIN and (head_bytes or not head) and (tail_bytes or not tail):
                await storage.write(b"".join((head_bytes or b"", body, tail_bytes or b"")), host)
                return
            if head_bytes:
                await storage.write(head_bytes, host)
            if tail_bytes:
                await storage.write(tail_bytes, host + piece.length - tail)
    await storage.write(body, host + head)


async def _surroundings(node: Node, piece: Piece, start: GuestOffset, length: int) -> bytearray | None:
    """What the guest reads in a part of a piece nobody writes; None where nothing need be written.
    Behind the disk's end it reads zeros: a part of a unit that comes to light when the disk grows."""
    if not length:
        return None
    inside = max(0, min(length, node.size - start))
    if piece.clean and await reads_zero(node, start, inside):
        return None
    content = bytearray(length)
    if inside:
        await read_into(node, memoryview(content)[:inside], start)
    return content


async def reads_zero(node: Node, offset: GuestOffset, length: int) -> bool:
    """Whether the tables alone say that a range reads as zeros."""
    end = offset + length
    while offset < end:
        extent = await resolve(node, offset, end - offset)
        if extent.kind not in (ZERO, UNALLOCATED):
            return False
        offset += extent.length
    return True


async def write_packed(node: Node, units: list[bytes], offset: GuestOffset) -> None:
    """Store whole units, one after the other from `offset` on, that are compressed already."""
    held = await node.ranges.acquire(offset, offset + node.unit * len(units))
    try:
        await node.runtime.finish(_write_packed_locked(node, units, offset))
    finally:
        node.ranges.release(held)


async def _write_packed_locked(node: Node, units: list[bytes], offset: GuestOffset) -> None:
    pieces: list[Piece] = []
    try:
        for number, packed in enumerate(units):
            pieces.append(await node.reserve_packed(offset + number * node.unit, len(packed)))
        first = 0
        for last in range(1, len(pieces) + 1):  # neighbours in the storage go out in one write
            before = pieces[last - 1]
            if last == len(pieces) or pieces[last].host != before.host + before.length:
                together = units[first] if last == first + 1 else b"".join(units[first:last])
                await before.storage.write(together, pieces[first].host)
                first = last
    except BaseException:
        await node.abandon(pieces)
        raise
    await node.publish(pieces)


async def write_zeroes(node: Node, offset: GuestOffset, length: int, *, unmap: bool = True) -> None:
    """Make a range read as zeros, by the tables where they can say it, else by writing zeros."""
    end = offset + length
    first = align_up(offset, node.grain)
    last = end if end == node.size else align_down(end, node.grain)
    if first >= last:
        await _write_plain_zeroes(node, offset, length)
        return
    if first > offset:
        await _write_plain_zeroes(node, offset, first - offset)
    position = first
    while position < last:
        n = min(last - position, _table_stride(node) - position % _table_stride(node))
        held = await lock_units(node, position, n)
        try:
            done = await node.runtime.finish(node.zero(position, n, unmap=unmap))
        finally:
            node.ranges.release(held)
        if not done:
            await _write_plain_zeroes(node, position, n)
        position += n
    if last < end:
        await _write_plain_zeroes(node, last, end - last)


def _table_stride(node: Node) -> int:
    """How much one call to the tables covers: much more than when bytes move."""
    return max(STRIDE, node.unit * 4096)


async def _write_plain_zeroes(node: Node, offset: GuestOffset, length: int) -> None:
    while length:
        n = min(length, len(_ZEROES))
        if not await reads_zero(node, offset, n):
            await write(node, _ZEROES[:n], offset)
        offset += n
        length -= n


async def discard(node: Node, offset: GuestOffset, length: int) -> None:
    """Give back the space of the whole grains inside a range."""
    end = offset + length
    position = align_up(offset, node.grain)
    last = end if end == node.size else align_down(end, node.grain)
    while position < last:
        n = min(last - position, _table_stride(node) - position % _table_stride(node))
        held = await lock_units(node, position, n)
        try:
            await node.runtime.finish(node.discard(position, n))
        finally:
            node.ranges.release(held)
        position += n
