"""Pulling: copying into an image what it shows of the images below, until it needs them no more.

    for each part of the disk: lock its units; what a layer above the base still answers is read
    through the chain and written to the image; unlock               (reads and writes go on)
    flush; the header names the base, or nothing                     one atomic step
    the layers that were in between are closed

Nothing that a reader sees changes at any moment. Whatever was pulled is part of the image, so a run that
was interrupted is simply begun again.
"""

from __future__ import annotations

import os

from ..errors import ClosedError, UnsupportedOperationError, UsageError
from ..extent import COMPRESSED, UNALLOCATED, ZERO
from ..units import align_down, align_up
from . import mover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..units import GuestOffset
    from .door import Door
    from .node import Node

_STEP = 2 << 20
_LEAVE, _COPY, _ZERO = 0, 1, 2


def names(base: str, node: Node) -> bool:
    """Whether `base` means the backing file of `node`: as it is stored there, or as a path."""
    name = node.backing_name
    if base == name:
        return True
    try:
        return os.path.samefile(base, os.path.join(os.path.dirname(node.name), name))
    except OSError:
        return False


def find_base(top: Node, base: str) -> int:
    """How deep `base` is in a chain; 0 for none. Raises UsageError."""
    if not base:
        return 0
    node, depth = top, 0
    while node.backing is not None:
        depth += 1
        if names(base, node):
            return depth
        node = node.backing
    raise UsageError(
        f"'{base}' is not in the backing chain", path=top.name, hint="see: enban info --backing-chain"
    )


def name_from(top: Node, parent: Node) -> str:
    """The backing file of `parent`, as an image in the place of `top` has to name it."""
    name = parent.backing_name
    if parent is top or os.path.isabs(name) or ":" in name:
        return name
    here, there = os.path.dirname(top.name), os.path.dirname(parent.name)
    if here == there:
        return name
    return os.path.relpath(os.path.join(there, name), here or ".")


async def pull(door: Door, base: str, progress: Callable[[int, int], None] | None) -> int:
    """Pull in everything above `base`, or all if it is "". The door's `resizing` is held. Returns the number
    of guest bytes written. Raises UsageError, HostError, ImageError; what was pulled by then stays."""
    top = door.node
    if top.backing is None:
        return 0
    if not top.backing_name:
        raise UsageError("the image names no backing file, so there is none to let go of", path=top.name)
    if top.snapshots_here():
        raise UnsupportedOperationError(
            "the image has internal snapshots, which need its backing file",
            path=top.name,
            hint="delete them first",
        )
    depth = find_base(top, base)
    if depth == 1:
        return 0
    parent = _at(top, depth - 1) if depth else None
    below = parent.backing if parent is not None else None
    if below is not None:
        top.state_zeroes()
    pulling = _Pulling(top, below, depth)
    offset = 0
    while offset < top.size:
        if door.closed:
            raise ClosedError("the disk was closed while data was pulled", path=top.name)
        length, kind = await pulling.look(offset, top.size - offset)
        if kind != _LEAVE:
            length = min(top.size - offset, _STEP - offset % _STEP)
            await door.runtime.finish(pulling.take(offset, length))
        offset += length
        if progress is not None:
            progress(offset, top.size)
    await door.flush()
    await door.runtime.finish(_let_go(door, parent))
    return pulling.written


def _at(node: Node, depth: int) -> Node:
    for _ in range(depth):
        assert node.backing is not None
        node = node.backing
    return node


class _Pulling:
    """below, depth: the base and how deep it is; None and 0 if nothing shall be left below."""

    def __init__(self, top: Node, below: Node | None, depth: int) -> None:
        self.top = top
        self.below = below
        self.depth = depth
        self.written = 0

    async def look(self, offset: GuestOffset, length: int) -> tuple[int, int]:
        """(bytes from `offset` on, what is to be done with them)."""
        extent = await mover.resolve(self.top, offset, length)
        length, kind = extent.length, extent.kind
        if kind not in (ZERO, UNALLOCATED):
            if not extent.depth or (self.depth and extent.depth >= self.depth):
                return length, _LEAVE
            if kind == COMPRESSED or extent.storage is None:
                return length, _COPY
            hole, run = await extent.storage.status(extent.host, length)
            length = min(run, length)
            if not hole:
                return length, _COPY
        elif not extent.depth and kind == ZERO:
            return length, _LEAVE
        # Zeros, known by a layer above the base, or because one of them is short: they are in the way
        # of what the base has there.
        if self.below is None or extent.depth >= self.depth or offset >= self.below.size:
            return length, _LEAVE
        return length, _ZERO

    async def take(self, offset: GuestOffset, length: int) -> None:
        """Pull one part, whose units nobody else can write to meanwhile."""
        held = await mover.lock_units(self.top, offset, length)
        try:
            start, end, doing = offset, offset + length, _LEAVE
            while offset < end:
                n, kind = await self.look(offset, end - offset)
                if kind != doing:
                    await self._do(doing, start, offset - start)
                    start, doing = offset, kind
                offset += n
            await self._do(doing, start, end - start)
        finally:
            self.top.ranges.release(held)

    async def _do(self, kind: int, offset: GuestOffset, length: int) -> None:
        if kind == _LEAVE or not length:
            return
        if kind == _COPY:
            content = bytearray(length)
            with memoryview(content) as view:
                await mover.read_into(self.top, view, offset)
                if content != bytes(length):
                    await mover.write_locked(self.top, view, offset)
                elif self.below is not None:
                    kind = _ZERO
                else:
                    return  # without a base it reads as zeros anyway
        if kind == _ZERO:
            await _zero(self.top, offset, length)
        self.written += length


async def _zero(top: Node, offset: GuestOffset, length: int) -> None:
    end = offset + length
    first, last = align_up(offset, top.grain), end if end == top.size else align_down(end, top.grain)
    if first < last and await top.zero(first, last - first, unmap=True):
        rest = [(offset, first), (last, end)]
    else:
        rest = [(offset, end)]
    for start, stop in rest:
        if start < stop:
            with memoryview(bytes(stop - start)) as zeroes:
                await mover.write_locked(top, zeroes, start)


async def _let_go(door: Door, parent: Node | None) -> None:
    """Name the base, and close what was between; a crash leaves the old name or the new one."""
    top = door.node
    unused = top.backing
    if parent is None:
        await top.set_backing("", "")
        top.backing, last = None, None
    else:
        last = parent.backing
        await top.set_backing(name_from(top, parent), parent.backing_format or (last.format if last else ""))
        top.backing = last
    await door.ledger.drain()  # whoever looks into one of them has begun before
    while unused is not None and unused is not last:
        await unused.close()
        unused = unused.backing
