"""The asyncio face: the names of `enban`, as coroutines.

    async with await enban.aio.open("disk.qcow2", writable=True) as disk:
        await disk.pwrite(b"hello", 4096)

It drives the same engine as the blocking face. What is in memory or in the page cache is
answered in line; a host call that may wait runs in a small thread pool. Cancelling a task
cancels its request: the request ends when host calls already under way have ended, its
locks are free then, and each unit of a cancelled write holds its old or its new bytes.
A disk belongs to the event loop it was opened in.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from os import fspath

from .block.gate import SIBLINGS, Gate
from .catalog import open_door
from .errors import CancelledError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterator, Callable, Coroutine
    from types import TracebackType
    from typing import Any, TypeVar, TypeVarTuple

    from .block.bitmaps import BitmapInfo
    from .block.cipher import Passphrase
    from .block.door import Door
    from .block.node import Node
    from .block.storage import ReadBuffer, WriteBuffer
    from .extent import Extent
    from .jobs.backup import BackupResult
    from .jobs.check import CheckResult
    from .jobs.copier import ConvertResult
    from .wire.qcow2_snapshots import SnapshotEntry

    T = TypeVar("T")
    Ts = TypeVarTuple("Ts")

__all__ = [
    "AsyncDisk",
    "AsyncioRuntime",
    "amend",
    "backup",
    "check",
    "commit",
    "convert",
    "create",
    "image_info",
    "open",
    "rebase",
    "stream",
]


class FutureWaiter:
    __slots__ = ("_future",)

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._future: asyncio.Future[None] = loop.create_future()

    def set(self) -> None:
        if not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        await self._future


class AsyncioRuntime:
    """Waits suspend the task. Host calls that may block run in `threads` threads of its own."""

    blocking = False

    def __init__(self, threads: int = 16) -> None:
        self._loop = asyncio.get_running_loop()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="enban-io")

    def waiter(self) -> FutureWaiter:
        return FutureWaiter(self._loop)

    async def offload(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        return await _to_the_end(self._loop.run_in_executor(self._pool, call, *args))

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        return await _to_the_end(self._loop.create_task(work))

    def close(self) -> None:
        """Let the threads end; they have nothing to do when every disk of the runtime is closed."""
        self._pool.shutdown(wait=False)


async def _to_the_end(work: asyncio.Future[T]) -> T:
    """The result of `work`. A cancellation is raised only when it has ended."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        while not work.done():
            try:
                await asyncio.wait([work])
            except asyncio.CancelledError:  # asked again: the answer stays the same
                continue
        if not work.cancelled():
            work.exception()  # taken note of; the cancellation is what the caller sees
        raise


class AsyncDisk:
    """A virtual disk for asyncio. Offsets and lengths are in bytes and need no alignment.

    Made by `enban.aio.open`. Any number of tasks may have requests in flight.
    """

    __slots__ = ("_runtime", "door")

    def __init__(self, door: Door, runtime: AsyncioRuntime | None = None) -> None:
        self.door = door
        self._runtime = runtime  # ours to close, if given

    @property
    def node(self) -> Node:
        return self.door.node

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.door.node.size

    @property
    def format(self) -> str:
        """Name of the format driver."""
        return self.door.node.format

    @property
    def name(self) -> str:
        """The path or URI it was opened by."""
        return self.door.node.name

    @property
    def writable(self) -> bool:
        return self.door.writable

    async def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from `offset`. Raises OutOfRangeError past the end, HostError, ImageError."""
        self.door.check(offset, length)
        buffer = bytearray(length)
        await self.door.read_into(buffer, offset)
        return bytes(buffer)

    async def readinto(self, buffer: WriteBuffer, offset: int) -> int:
        """Fill `buffer` from `offset`; its length in bytes is returned."""
        await self.door.read_into(buffer, offset)
        return memoryview(buffer).nbytes

    async def pwrite(self, data: ReadBuffer, offset: int, *, fua: bool = False) -> int:
        """Write all of `data` at `offset`; with `fua` it is durable on return. Returns its length.

        `data` must not change until then.
        """
        await self.door.write(data, offset, fua=fua)
        return memoryview(data).nbytes

    async def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeros; with `unmap` its space may be given back."""
        await self.door.write_zeroes(offset, length, unmap=unmap)

    async def discard(self, offset: int, length: int) -> None:
        """The range is not needed: whole units in it may be given back and then read as zeros."""
        await self.door.discard(offset, length)

    async def flush(self) -> None:
        """Return once everything written so far is durable."""
        await self.door.flush()

    async def map(self, offset: int = 0, length: int | None = None) -> AsyncIterator[Extent]:
        """The extents of a range, in order and without gaps, each answered by the layer that has it."""
        end = self.size if length is None else offset + length
        self.door.check(offset, end - offset)
        while offset < end:
            extent = await self.door.extent(offset, end - offset)
            yield extent
            offset += extent.length

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Set the virtual size in bytes. Bytes beyond a smaller size are lost; new ones read as zeros."""
        await self.door.resize(size, preallocation=preallocation)

    @property
    def snapshots(self) -> list[SnapshotEntry]:
        """The internal snapshots, oldest first: id, name, date_s, disk_size, vm_state_size, ..."""
        return self.door.node.snapshots_here()

    async def create_snapshot(self, name: str, *, vm_clock_ns: int = 0) -> SnapshotEntry:
        """Keep the present state inside the image, with the VM state written since the last snapshot.
        vm_clock_ns: the guest's time. Raises UsageError if the name is taken."""
        return await self.door.create_snapshot(name, vm_clock_ns=vm_clock_ns)

    async def apply_snapshot(self, name: str) -> None:
        """Go back to a snapshot (id or name): its bytes and its virtual size."""
        await self.door.apply_snapshot(name)

    async def delete_snapshot(self, name: str) -> None:
        """Remove a snapshot (name or id)."""
        await self.door.delete_snapshot(name)

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state that can be read: as written, or as an applied snapshot had it."""
        return self.door.node.vm_state_size

    async def write_vm_state(self, data: ReadBuffer, offset: int) -> int:
        """Write a part of a guest's memory and devices beside the disk, for the next snapshot to take with
        it. The first write after a snapshot was made or applied begins a new state. Returns its length."""
        await self.door.write_vm_state(data, offset)
        return memoryview(data).nbytes

    async def read_vm_state(self, length: int, offset: int) -> bytes:
        """`length` bytes of the VM state from `offset`."""
        buffer = bytearray(max(0, min(length, self.vm_state_size - offset + 1)))  # one too many is refused
        await self.door.read_vm_state(buffer, offset)
        return bytes(buffer)

    async def pull(self, base: str = "", *, progress: Callable[[int, int], None] | None = None) -> int:
        """Copy into the image what it shows of the images below, and let go of them; other requests go on
        meanwhile. base: how far down the chain to let go, a name as stored there or a path; "": all.
        Cancelled, it can be begun again. Returns the number of bytes copied."""
        return await self.door.pull(base, progress)

    async def commit(self) -> int:
        """Of a disk opened with `snapshot=True`: write its changes down into the image, and go on with an
        empty overlay. Other requests go on meanwhile. Returns the number of bytes written."""
        return await self.door.commit()

    async def bitmaps(self) -> list[BitmapInfo]:
        """The persistent dirty bitmaps: name, granularity, enabled, inconsistent. Raises
        UnsupportedOperationError if the format has none, CorruptImageError."""
        return (await self.door.bitmaps()).infos()

    async def add_bitmap(self, name: str, *, granularity: int = 65536, enabled: bool = True) -> None:
        """Make an empty bitmap, a bit for each `granularity` bytes (a power of two from 512 to 2 GiB).
        While it is enabled, everything that is written from now on is recorded in it."""
        await self.door.change_bitmaps(lambda found: found.add(name, granularity, enabled=enabled))

    async def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap, also one that is inconsistent."""
        await self.door.change_bitmaps(lambda found: found.remove(name))

    async def clear_bitmap(self, name: str) -> None:
        """From now on nothing counts as changed. Raises ImageError if the bitmap is inconsistent, as do
        all below."""
        await self.door.change_bitmaps(lambda found: found.clear(name))

    async def enable_bitmap(self, name: str) -> None:
        """Record what is written."""
        await self.door.change_bitmaps(lambda found: found.enable(name, True))

    async def disable_bitmap(self, name: str) -> None:
        """Keep the bitmap as it is now."""
        await self.door.change_bitmaps(lambda found: found.enable(name, False))

    async def merge_bitmap(self, target: str, source: str, *, of: AsyncDisk | None = None) -> None:
        """Add what bitmap `source` (of this disk, or of another one of the same size) says to `target`."""
        found = await (of or self).door.bitmaps()
        bits = await found.bits(source)
        await self.door.change_bitmaps(lambda found: found.merge(target, bits))

    async def dirty(
        self, name: str, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[tuple[int, int]]:
        """What of a range changed, by a bitmap: (offset, length) in bytes, in order."""
        end = self.size if length is None else offset + length
        self.door.check(offset, end - offset)
        bits = await (await self.door.bitmaps()).bits(name)
        for extent in bits.extents(offset, end - offset):
            yield extent

    async def close(self) -> None:
        """Let requests in flight end, write out what is in memory, release the files."""
        try:
            await self.door.close()
        finally:
            if self._runtime is not None:
                self._runtime.close()

    async def __aenter__(self) -> AsyncDisk:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        state = "closed" if self.door.closed else ("rw" if self.writable else "ro")
        return f"<AsyncDisk {self.name!r} {self.format} {self.size} bytes {state}>"


async def open(
    path: str | os.PathLike[str] | dict[str, Any],
    *,
    writable: bool = False,
    format: str = "",
    backing: bool = True,
    cache: str = "writeback",
    gate: Gate = SIBLINGS,
    force_share: bool = False,
    snapshot: bool = False,
    snapshot_dir: str | os.PathLike[str] | None = None,
    snapshot_name: str = "",
    passphrase: Passphrase = None,
) -> AsyncDisk:
    """Open a disk image and everything below it; parameters and errors as for `enban.open`."""
    if force_share and writable and not snapshot:
        raise UsageError("force_share is for reading only")
    runtime = AsyncioRuntime()
    try:
        door = await open_door(
            path if isinstance(path, dict) else fspath(path),
            runtime,
            format=format,
            writable=writable,
            backing=backing,
            cache=cache,
            gate=gate,
            lock=not force_share,
            snapshot=snapshot,
            snapshot_dir=None if snapshot_dir is None else fspath(snapshot_dir),
            snapshot_name=snapshot_name,
            passphrase=passphrase,
        )
    except BaseException:
        runtime.close()
        raise
    return AsyncDisk(door, runtime)


class _Stop:
    """A job's progress report that ends the job once its task is cancelled."""

    def __init__(self, report: Any) -> None:
        self._report = report
        self.wanted = False

    def __call__(self, done: int, total: int) -> None:
        if self.wanted:
            raise CancelledError("the job was cancelled")
        if self._report is not None:
            self._report(done, total)


async def _in_thread(name: str, reports: bool, args: tuple[Any, ...], settings: dict[str, Any]) -> Any:
    """Run a job of `enban` in a thread. A cancelled task waits until the job has cleaned up."""
    import enban

    stop = _Stop(settings.get("progress"))
    if reports:
        settings["progress"] = stop
    work = asyncio.get_running_loop().run_in_executor(None, partial(getattr(enban, name), *args, **settings))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        stop.wanted = True
        await asyncio.wait([work])
        if not work.cancelled():
            work.exception()
        raise


async def amend(*args: Any, **settings: Any) -> None:
    """`enban.amend` without blocking the loop. Cancelled, it still goes to its end."""
    await _in_thread("amend", False, args, settings)


async def backup(*args: Any, **settings: Any) -> BackupResult:
    """`enban.backup` without blocking the loop. Cancelled, it leaves nothing behind."""
    result: BackupResult = await _in_thread("backup", True, args, settings)
    return result


async def check(*args: Any, **settings: Any) -> CheckResult:
    """`enban.check` without blocking the loop."""
    result: CheckResult = await _in_thread("check", True, args, settings)
    return result


async def commit(*args: Any, **settings: Any) -> int:
    """`enban.commit` without blocking the loop."""
    result: int = await _in_thread("commit", True, args, settings)
    return result


async def convert(*args: Any, **settings: Any) -> ConvertResult:
    """`enban.convert` without blocking the loop. Cancelled, it leaves nothing behind."""
    result: ConvertResult = await _in_thread("convert", True, args, settings)
    return result


async def create(*args: Any, **settings: Any) -> int:
    """`enban.create` without blocking the loop."""
    result: int = await _in_thread("create", False, args, settings)
    return result


async def image_info(*args: Any, **settings: Any) -> list[dict[str, Any]]:
    """`enban.image_info` without blocking the loop."""
    result: list[dict[str, Any]] = await _in_thread("image_info", False, args, settings)
    return result


async def rebase(*args: Any, **settings: Any) -> int:
    """`enban.rebase` without blocking the loop."""
    result: int = await _in_thread("rebase", True, args, settings)
    return result


async def stream(*args: Any, **settings: Any) -> int:
    """`enban.stream` without blocking the loop."""
    result: int = await _in_thread("stream", True, args, settings)
    return result
