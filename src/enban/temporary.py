"""A disk whose writes vanish: a temporary overlay over any image, and `commit`, which keeps them after all.

The overlay is a qcow2 image in a file without a name. The image below is opened for reading only, so
any number of overlays may stand over it, and it may lie on a medium that cannot be written. However the
process ends, the file is gone and the image is as it was.

`commit` opens the image below for writing (or fails with a reason), copies what the overlay held when it
began, and lets go of that in the overlay. Reads and writes go on meanwhile. Between commits nobody else
can write to the image, but others may read it.
"""

from __future__ import annotations

from .block import mover
from .errors import EnbanError, ReadOnlyError, UsageError
from .extent import UNALLOCATED, ZERO
from .formats.qcow2 import overlay
from .storage.file import open_temporary

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .block.door import Door
    from .block.node import Node
    from .block.runtime import Runtime
    from .formats.qcow2.node import Qcow2Node

_PIECE = 2 << 20
_FROZEN = "being committed"


async def make_overlay(base: Node, runtime: Runtime, directory: str | None) -> Qcow2Node:
    """An empty overlay of an open chain. directory: where its file goes. Raises HostError, UsageError."""
    storage = open_temporary(directory, runtime, f"temporary overlay of {base.name}")
    try:
        return await overlay.make_overlay(storage, base, runtime)
    except BaseException:
        await storage.close()
        raise


class Temporary:
    """The overlay of a door.

    reopen: opens the image below once more, for writing, without what is below that; the locks of the node
        it is given go to the new one.
    """

    __slots__ = ("_door", "_node", "_reopen", "_writable")

    def __init__(self, door: Door, node: Qcow2Node, reopen: Callable[[Node], Awaitable[Node]]) -> None:
        self._door = door
        self._node = node
        self._reopen = reopen
        self._writable = False  # the image below is open for writing

    def drop(self) -> None:
        """The overlay will be closed: nothing of it need be written any more."""
        self._node.writable = False

    async def commit(self) -> int:
        """See `Door.commit`; its mutex is held. Raises HostError (LockedError, NoSpaceError), ReadOnlyError,
        UsageError. After an error the disk reads as before; the image below may have got a part."""
        node = self._node
        if node.snapshots:
            raise UsageError(
                "a temporary overlay with internal snapshots cannot be committed, they would change",
                path=node.name,
                hint="delete them first",
            )
        base = await self._claim_base()
        try:
            written = await self._merge(base)
        finally:
            await self._settle(base)
        return written

    async def _claim_base(self) -> Node:
        """The image below, open and locked for writing."""
        node, ledger = self._node, self._door.ledger
        old = node.backing
        assert old is not None
        if self._writable:
            for storage in {old.file, old.data}:
                await storage.hold(writing=True)
            return old
        try:
            base = await self._reopen(old)
        except UsageError as error:
            raise ReadOnlyError(
                f"cannot be committed to: {error.what}", path=error.path, hint=error.hint
            ) from error
        base.backing, base.ledger = old.backing, ledger
        node.backing = base
        self._writable = True
        await ledger.drain()  # whoever looks into the old node has begun before
        await old.close()
        return base

    async def _merge(self, base: Node) -> int:
        node, door = self._node, self._door
        if base.size < node.size:
            await base.resize(node.size)
        await door.alone(overlay.freeze(node, _FROZEN))
        try:
            view = await overlay.frozen(node, _FROZEN)
            written = await _copy(view, base)
            await base.flush()
            await overlay.let_go(node, view)
        finally:
            await door.alone(overlay.thaw(node, _FROZEN))
        return written

    async def _settle(self, base: Node) -> None:
        """Write out all that is left to do in the image below, so that its lock for writing can go."""
        try:
            await base.flush()
            await self._door.ledger.drain()
            await base.flush()  # what the first one unlinked is free now
            await base.flush()  # and its counts are written
            for storage in {base.file, base.data}:
                await storage.hold(writing=False)
        except EnbanError:
            pass  # what was committed is durable; the lock stays


async def _copy(view: Node, base: Node) -> int:
    """Write to `base` what `view` holds; the number of bytes."""
    written = offset = 0
    with memoryview(bytearray(min(_PIECE, view.size))) as buffer:
        while offset < view.size:
            extent = await mover.resolve(view, offset, view.size - offset)
            length = extent.length
            if extent.kind == ZERO:
                await mover.write_zeroes(base, offset, length)
            elif extent.kind != UNALLOCATED:
                length = min(length, _PIECE)
                await mover.read_into(view, buffer[:length], offset)
                await mover.write(base, buffer[:length], offset)
            if extent.kind != UNALLOCATED:
                written += length
            offset += length
    return written
