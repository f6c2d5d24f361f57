"""The checked door: the only way for a request into a disk.

Every guest request passes here: its range and the disk's permission are checked, it is
entered in the ledger, handed to the mover, and ended exactly once. What lies behind may
rely on ranges that are inside the disk and on a disk that is open.
"""

from __future__ import annotations

from ..errors import ClosedError, CorruptImageError, OutOfRangeError, ReadOnlyError, UsageError
from . import mover, requests
from .locks import Mutex
from .requests import Ledger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, Protocol, TypeVar

    from ..extent import Extent
    from ..wire.qcow2_snapshots import SnapshotEntry
    from .bitmaps import Bitmaps
    from .mover import PlannedWrite
    from .node import Node
    from .requests import Request
    from .storage import ReadBuffer, WriteBuffer

    T = TypeVar("T")

    class Temporary(Protocol):
        """What `enban.temporary.Temporary` is to its door."""

        async def commit(self) -> int: ...

        def drop(self) -> None: ...


class Door:
    """A disk's node behind its checks.

    writable: whether guest writes are allowed; a node may be writable while its door is not.
    writethrough: every write is flushed before it is done.
    """

    __slots__ = (
        "closed",
        "ledger",
        "node",
        "paused",
        "resizing",
        "runtime",
        "temporary",
        "writable",
        "writethrough",
    )

    def __init__(self, node: Node, *, writable: bool, writethrough: bool = False) -> None:
        self.node = node
        self.runtime = node.runtime
        self.writable = writable
        self.writethrough = writethrough
        self.closed = False
        self.resizing = Mutex(node.runtime)  # held while the size or all tables change
        self.paused = False  # requests that come now wait for `resizing`
        self.ledger = node.ledger = Ledger(node.runtime)
        self.temporary: Temporary | None = None  # the node is a temporary overlay

    def check(self, offset: int, length: int) -> None:
        if self.closed:
            raise ClosedError("the disk is closed", path=self.node.name)
        if offset < 0 or length < 0 or offset + length > self.node.size:
            raise OutOfRangeError(
                f"range {offset}+{length} is outside the disk of {self.node.size} bytes", path=self.node.name
            )

    def _check_write(self, offset: int, length: int) -> None:
        self.check(offset, length)
        if not self.writable:
            raise ReadOnlyError("the disk is open read-only", path=self.node.name)

    async def _run(self, operation: str, offset: int, length: int, work: Coroutine[Any, Any, T]) -> T:
        request = self.ledger.begin(operation, offset, length)
        if self.paused and operation != requests.RESIZE:
            request = await self._wait_for_size(request, work)
        request.state = requests.IN_FLIGHT
        try:
            result = await work
        except BaseException as error:
            try:
                if isinstance(error, CorruptImageError) and error.path == self.node.name:
                    await self.node.corrupted()
            finally:
                self.ledger.end(request, error)
            raise
        self.ledger.end(request)
        return result

    async def _wait_for_size(self, request: Request, work: Coroutine[Any, Any, Any]) -> Request:
        """The size is being changed: begin again when that is over, if the range is still there."""
        try:
            while self.paused:
                self.ledger.withdraw(request)
                async with self.resizing:
                    pass
                self.check(request.offset, request.length)
                request = self.ledger.begin(request.operation, request.offset, request.length)
        except BaseException:
            work.close()
            raise
        return request

    async def read_into(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill `buffer` (bytes) from the guest offset `offset`."""
        view = memoryview(buffer).cast("B")
        self.check(offset, len(view))
        if len(view):
            await self._run(requests.READ, offset, len(view), mover.read_into(self.node, view, offset))

    async def write(self, buffer: ReadBuffer, offset: int, *, fua: bool = False) -> None:
        """Write all of `buffer` at the guest offset; with `fua` it is durable when this returns."""
        view = memoryview(buffer).cast("B")
        self._check_write(offset, len(view))
        if len(view):
            work = mover.write(self.node, view, offset)
            if fua or self.writethrough:
                work = self._durable(work, fua)
            await self._run(requests.WRITE, offset, len(view), work)

    async def plan_write(self, buffer: ReadBuffer, offset: int) -> tuple[PlannedWrite, Request]:
        """Allocate for a write of at most `mover.STRIDE` bytes; `run_plan` does it. For jobs that
        allocate in order but move bytes from several threads. See `mover.plan_write`."""
        view = memoryview(buffer).cast("B")
        self._check_write(offset, len(view))
        request = self.ledger.begin(requests.WRITE, offset, len(view))
        try:
            return await mover.plan_write(self.node, view, offset), request
        except BaseException as error:
            self.ledger.end(request, error)
            raise

    async def run_plan(self, planned: tuple[PlannedWrite, Request]) -> None:
        plan, request = planned
        request.state = requests.IN_FLIGHT
        try:
            await mover.run_plan(plan)
        except BaseException as error:
            self.ledger.end(request, error)
            raise
        self.ledger.end(request)

    async def write_packed(self, packed: bytes, offset: int) -> None:
        """Store a compressed cluster, packed by the node's codec."""
        await self.write_packed_run([packed], offset)

    async def write_packed_run(self, packed: list[bytes], offset: int) -> None:
        """Store compressed clusters, one after the other from `offset` on."""
        size = self.node.cluster_size
        length = min(size * len(packed), self.node.size - offset)
        self._check_write(offset, max(1, length - size + 1))
        if not self.node.codec or offset % size:
            raise UsageError("not a place for a compressed cluster", path=self.node.name, offset=offset)
        work = mover.write_packed(self.node, packed, offset)
        await self._run(requests.WRITE, offset, length, self._durable(work, False))

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True, fua: bool = False) -> None:
        self._check_write(offset, length)
        if length:
            work = mover.write_zeroes(self.node, offset, length, unmap=unmap)
            await self._run(requests.ZERO, offset, length, self._durable(work, fua))

    async def discard(self, offset: int, length: int) -> None:
        self._check_write(offset, length)
        if length:
            work = mover.discard(self.node, offset, length)
            await self._run(requests.DISCARD, offset, length, self._durable(work, False))

    async def _durable(self, work: Coroutine[Any, Any, None], fua: bool) -> None:
        await work
        if fua or self.writethrough:
            await self.node.flush()

    async def flush(self) -> None:
        """Return once every write that was done before the call is durable."""
        self.check(0, 0)
        if self.writable:
            await self._run(requests.FLUSH, 0, 0, self.node.flush())

    async def extent(self, offset: int, length: int) -> Extent:
        """Where the bytes at `offset` live, down the whole chain; see `mover.resolve`."""
        self.check(offset, length)
        return await mover.resolve(self.node, offset, length)

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Change the virtual size, in bytes. Requests in flight end first; those that come meanwhile wait."""
        self._check_write(0, 0)
        if size < 0:
            raise UsageError(f"size {size} is negative", path=self.node.name)

        def start() -> Coroutine[Any, Any, None]:
            work = self.node.resize(size, preallocation=preallocation)
            return self._run(requests.RESIZE, 0, size, self.runtime.finish(work))

        await self._with_nothing_in_flight(start)

    async def _with_nothing_in_flight(self, start: Callable[[], Coroutine[Any, Any, None]]) -> None:
        async with self.resizing:
            self.paused = True
            try:
                await self.ledger.rest()
                self._check_write(0, 0)
                await start()
            finally:
                self.paused = False

    async def write_vm_state(self, data: ReadBuffer, offset: int) -> None:
        """Write a part of the VM state that the next snapshot shall hold."""
        view = memoryview(data).cast("B")
        self._check_write(0, 0)
        if offset < 0:
            raise OutOfRangeError(f"offset {offset} of the VM state is negative", path=self.node.name)
        while len(view):
            work = self.node.write_vm_state(view, offset)
            if await self._run(requests.VM_STATE, 0, 0, work):
                return
            await self._with_nothing_in_flight(
                lambda: self.runtime.finish(self.node.prepare_vm_state(offset + len(view)))
            )

    async def read_vm_state(self, buffer: WriteBuffer, offset: int) -> None:
        """Fill `buffer` from the VM state."""
        view = memoryview(buffer).cast("B")
        self.check(0, 0)
        if offset < 0 or offset + len(view) > self.node.vm_state_size:
            raise OutOfRangeError(
                f"range {offset}+{len(view)} is outside the VM state of {self.node.vm_state_size} bytes",
                path=self.node.name,
            )
        if len(view):
            await self._run(requests.VM_STATE, 0, 0, self.node.read_vm_state(view, offset))

    async def create_snapshot(
        self, name: str, *, snapshot_id: str = "", vm_clock_ns: int = 0
    ) -> SnapshotEntry:
        """Keep the present state as an internal snapshot, while I/O goes on: writes that were done before
        the call are in it, writes that begin after it returns are not, those in between may be.
        VM state that was written since the last snapshot goes with it."""
        from time import time_ns

        from ..wire.qcow2_snapshots import SnapshotEntry

        self._check_write(0, 0)
        entry = SnapshotEntry()
        if not name:
            raise UsageError("a snapshot needs a name", path=self.node.name)
        if not 0 <= vm_clock_ns < 1 << 64:
            raise UsageError(f"a VM clock of {vm_clock_ns} ns is not possible", path=self.node.name)
        entry.name, entry.id, entry.vm_clock_ns = name, snapshot_id, vm_clock_ns
        entry.date_s, entry.date_ns = divmod(time_ns(), 10**9)
        async with self.resizing:
            await self.alone(self.node.create_snapshot(entry))
        return entry

    async def apply_snapshot(self, name: str) -> None:
        """Go back to an internal snapshot, by id or name; the virtual size becomes that of then."""
        self._check_write(0, 0)
        # No drain here while requests are held up: a server's batch would wait for us, and we for it.
        await self._with_nothing_in_flight(lambda: self._change_tables(self.node.apply_snapshot(name)))
        await self.ledger.drain()

    async def delete_snapshot(self, name: str) -> None:
        """Remove an internal snapshot, by name or id."""
        self._check_write(0, 0)
        async with self.resizing:
            await self.alone(self.node.delete_snapshot(name))

    async def bitmaps(self) -> Bitmaps:
        """The dirty bitmaps, to look at. Raises UnsupportedOperationError, CorruptImageError."""
        self.check(0, 0)
        return await self.node.bitmaps()

    async def change_bitmaps(self, change: Callable[[Bitmaps], Coroutine[Any, Any, None]]) -> None:
        """Change the bitmaps while I/O goes on. Writes that were done before the call are in what a bitmap
        says before it, those that begin when it has returned in what it says after."""
        self._check_write(0, 0)
        bitmaps = await self.node.bitmaps()
        async with self.resizing:
            await self.alone(change(bitmaps))

    async def alone(self, work: Coroutine[Any, Any, None]) -> None:
        """For who holds `resizing`: do work that changes all tables at once. Allocating writes wait for it;
        writes in place that were under way have ended when this returns."""
        await self._change_tables(work)
        await self.ledger.drain()

    async def _change_tables(self, work: Coroutine[Any, Any, None]) -> None:
        try:
            held = await self.node.ranges.acquire(0, 1 << 63)
        except BaseException:
            work.close()
            raise
        try:
            await self.runtime.finish(work)
        finally:
            self.node.ranges.release(held)

    async def commit(self) -> int:
        """Write what a temporary overlay holds down into the image, and go on with an empty one, while I/O
        goes on too. Returns the number of bytes written."""
        self.check(0, 0)
        if self.temporary is None:
            raise UsageError(
                "the disk has no temporary overlay", path=self.node.name, hint="open it with snapshot=True"
            )
        async with self.resizing:
            return await self.runtime.finish(self.temporary.commit())

    async def pull(self, base: str = "", progress: Callable[[int, int], None] | None = None) -> int:
        """Copy into the image what it shows of the images above `base`, of all below if that is "", while
        I/O goes on; then it stands on the base, or alone. Returns the number of bytes copied."""
        from .pull import pull

        self._check_write(0, 0)
        if self.temporary is not None:
            raise UsageError("a temporary overlay cannot stand alone", path=self.node.name)
        async with self.resizing:
            return await pull(self, base, progress)

    async def close(self) -> None:
        """Let requests in flight end, flush, and release every storage of the chain.

        Raises the first error met, after everything is released. Closing twice is fine.
        """
        if self.closed:
            return
        self.closed = True
        await self.runtime.finish(self._close())

    async def _close(self) -> None:
        async with self.resizing:  # whatever changes all tables comes to its end first
            await self.ledger.drain()
            if self.temporary is not None:
                self.temporary.drop()
            await close_chain(self.node)


async def close_chain(node: Node | None) -> None:
    """Close a node and all below it; the first error is raised when all are closed."""
    first: BaseException | None = None
    while node is not None:
        try:
            await node.close()
        except BaseException as error:
            first = first or error
        node = node.backing
    if first is not None:
        raise first
