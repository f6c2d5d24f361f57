"""Local files and block devices as a storage.

Cache modes are QEMU's: `writeback` (the page cache, durable at flush), `none` (O_DIRECT),
`writethrough` and `directsync` (durable at every write; the door sees to that), `unsafe`
(flush does nothing). A failed fsync is sticky, see FlushFailedError.
"""

from __future__ import annotations

import _thread
import errno
import os

from ..block.storage import Storage
from ..errors import (
    FlushFailedError,
    HostError,
    LockedError,
    ReadOnlyError,
    UnsupportedOperationError,
    UsageError,
    from_oserror,
)
from . import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable
    from mmap import mmap

    from ..block.runtime import Runtime
    from ..block.storage import ReadBuffer, WriteBuffer
    from ..units import HostOffset

CACHE_MODES = ("writeback", "none", "writethrough", "directsync", "unsafe")
DIRECT_ALIGNMENT = 4096  # bytes; satisfies every logical block size in use
_DIRECT_STRIDE = 1 << 20
_WORTH_SYNC = 1 << 20  # so many zeros take longer to write than to write out what they replace


class FileStorage(Storage):
    """A file opened once, for reading or for reading and writing, under QEMU's image locks."""

    def __init__(self, path: str, fd: int, runtime: Runtime, *, writable: bool, cache: str) -> None:
        self.name = path
        self.runtime = runtime
        self.writable = writable
        self._fd = fd
        self._size, self.fixed_size, self._identity = host.facts(fd)
        self._guard = _thread.allocate_lock()
        self._flushes = cache != "unsafe"
        self._flush_error: OSError | None = None
        self._direct = -1
        self._alignment = DIRECT_ALIGNMENT
        self._bounces: list[mmap] = []
        self._zeroes_fast: bool | None = None  # not asked yet
        self._locked = False
        self._laid_to = 0  # the end of what `lay_out` asked for

    @property
    def identity(self) -> Hashable:
        return self._identity

    def fileno(self) -> int:
        """The descriptor, for callers that send or map the file themselves."""
        return self._fd

    def plain_fd(self) -> int:
        return self._fd if self._direct < 0 else -1

    def size(self) -> int:
        return self._size

    def allocated(self) -> int:
        return host.allocated(self._fd)

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        if self._direct >= 0:
            if not self.runtime.blocking:
                return False
            self._read(memoryview(buffer), offset)
            return True
        if self.runtime.blocking:
            self._read(memoryview(buffer), offset)
            return True
        view = memoryview(buffer)
        try:
            if host.read_cached(self._fd, view, offset) == len(view):
                return True
            if offset < self._size:
                host.will_need(self._fd, offset, len(view))
        except OSError as error:
            raise from_oserror(error, "read", self.name, offset) from error
        return False

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self.runtime.offload(self._read, memoryview(buffer), offset)

    def _read(self, view: memoryview, offset: HostOffset) -> None:
        try:
            if self._direct >= 0:
                self._read_direct(view, offset)
                return
            n = host.read_into(self._fd, view, offset)
        except OSError as error:
            raise from_oserror(error, "read", self.name, offset) from error
        if n < len(view):
            view[n:] = bytes(len(view) - n)

    def write_now(self, buffer: ReadBuffer, offset: HostOffset) -> bool:
        if not self.runtime.blocking:
            return False
        self._write(memoryview(buffer), offset)
        return True

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self.runtime.offload(self._write, memoryview(buffer), offset)

    def _write(self, view: memoryview, offset: HostOffset) -> None:
        end = offset + len(view)
        if self.fixed_size and end > self._size:
            raise from_oserror(
                OSError(errno.ENOSPC, ""), "write past the end of the device", self.name, offset
            )
        try:
            if self._direct >= 0:
                self._write_direct(view, offset)
            else:
                host.write_all(self._fd, view, offset)
        except OSError as error:
            if end > self._size:
                self._grown(host.facts(self._fd)[0])  # a part of it may have arrived
            raise from_oserror(error, "write", self.name, offset) from error
        if end > self._size:
            self._grown(end)

    def _grown(self, end: int) -> None:
        with self._guard:
            self._size = max(self._size, end)

    # O_DIRECT: whole aligned blocks go through page-aligned bounce buffers; the edges of an
    # unaligned request go through the page cache of the other descriptor, which the kernel
    # keeps coherent with direct I/O. So no read-modify-write happens here.

    def open_direct(self) -> None:
        try:
            self._direct = os.open(self.name, (os.O_RDWR if self.writable else os.O_RDONLY) | os.O_DIRECT)
        except OSError as error:
            hint = "use another cache mode" if error.errno == errno.EINVAL else ""
            raise from_oserror(error, "open with O_DIRECT", self.name, hint=hint) from error

    def _bounce(self) -> mmap:
        from mmap import mmap

        try:
            return self._bounces.pop()
        except IndexError:
            return mmap(-1, _DIRECT_STRIDE)

    def _read_direct(self, view: memoryview, offset: HostOffset) -> None:
        bounce = self._bounce()
        try:
            with memoryview(bounce) as space:
                done = 0
                while done < len(view):
                    lead = (offset + done) % self._alignment
                    want = min(len(view) - done, _DIRECT_STRIDE - lead)
                    span = -(-(lead + want) // self._alignment) * self._alignment
                    start = offset + done - lead
                    n = 0
                    while n < span:  # a short read that is no multiple of a block is the end of the file
                        got = os.preadv(self._direct, (space[n:span],), start + n)
                        n += got
                        if not got or n % self._alignment:
                            break
                    space[n:span] = bytes(span - n)
                    view[done : done + want] = space[lead : lead + want]
                    done += want
        finally:
            self._bounces.append(bounce)

    def _write_direct(self, view: memoryview, offset: HostOffset) -> None:
        first = -(-offset // self._alignment) * self._alignment
        last = (offset + len(view)) // self._alignment * self._alignment
        if first >= last:
            host.write_all(self._fd, view, offset)
            return
        host.write_all(self._fd, view[: first - offset], offset)
        bounce = self._bounce()
        try:
            with memoryview(bounce) as space:
                for start in range(first, last, _DIRECT_STRIDE):
                    n = min(_DIRECT_STRIDE, last - start)
                    space[:n] = view[start - offset : start - offset + n]
                    host.write_all(self._direct, space[:n], start)
        finally:
            self._bounces.append(bounce)
        host.write_all(self._fd, view[last - offset :], last)

    async def flush(self) -> None:
        if self._flushes and self.writable:
            await self.runtime.offload(self._sync)

    def _sync(self) -> None:
        if self._flush_error is None:
            try:
                host.sync(self._fd)
                return
            except OSError as error:
                self._flush_error = error
        failed = self._flush_error
        raise FlushFailedError(
            f"flush failed: {os.strerror(failed.errno or errno.EIO).lower()}",
            path=self.name,
            hint="writes since the last flush may be lost; check the medium and open the image again",
            errno=failed.errno or errno.EIO,
        ) from failed

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        if not await self.runtime.offload(self._zero, offset, length, unmap):
            await super().write_zeroes(offset, length, unmap=unmap)

    def _zero(self, offset: HostOffset, length: int, unmap: bool) -> bool:
        end = offset + length
        try:
            if unmap and end > self._size and not self.fixed_size:
                # A hole does not make the file longer. Neither does this ever make it shorter, as setting
                # a size would if another thread has just written behind `end`.
                host.write_all(self._fd, memoryview(b"\0"), end - 1)
            done = host.punch_hole(self._fd, offset, length) if unmap else self._zero_in_place(offset, length)
        except OSError as error:
            raise from_oserror(error, "write zeroes", self.name, offset) from error
        if done and end > self._size:
            self._grown(end)
        return done

    def _zero_in_place(self, offset: HostOffset, length: int) -> bool:
        """Zero a range and keep its space; False to have the zeros written.

        ext4 forgets what the page cache holds of the range before it finds that it has no room to do this.
        Then the range shows what the medium had. What is there goes to the medium first, or is overwritten.
        """
        if host.data_or_hole(self._fd, offset, offset + length) != (True, length):
            if length < _WORTH_SYNC:
                return False
            self._sync()
        return host.zero_range(self._fd, offset, length)

    def zeroes_fast(self) -> bool:
        if self._zeroes_fast is None:
            try:  # a hole behind the end changes nothing
                self._zeroes_fast = not self.fixed_size and host.punch_hole(self._fd, self._size, 4096)
            except OSError:
                self._zeroes_fast = False
        return self._zeroes_fast

    async def discard(self, offset: HostOffset, length: int) -> None:
        length = min(length, self._size - offset)
        if length > 0:
            try:
                await self.runtime.offload(host.punch_hole, self._fd, offset, length)
            except OSError as error:
                raise from_oserror(error, "discard", self.name, offset) from error

    async def truncate(self, size: int) -> None:
        if self.fixed_size:
            if size > self._size:
                raise UnsupportedOperationError("a device cannot grow", path=self.name)
            return
        try:
            with self._guard:
                os.ftruncate(self._fd, size)
                self._size = size
        except OSError as error:
            raise from_oserror(error, "set the size", self.name, size) from error

    async def allocate(self, offset: HostOffset, length: int) -> None:
        if self.fixed_size or not length:
            return
        try:
            if await self.runtime.offload(host.reserve, self._fd, offset, length):
                self._grown(offset + length)
        except OSError as error:
            raise from_oserror(error, "reserve space", self.name, offset) from error

    def lay_out(self, offset: HostOffset, length: int) -> bool:
        if self.fixed_size or self._direct >= 0:
            return False
        with self._guard:
            self._laid_to = max(self._laid_to, offset + length)
        try:
            return host.lay_out(self._fd, offset, length)
        except OSError:
            return False  # a full disk, for one: the write will say so if it needs the room

    def write_behind(self, offset: HostOffset, length: int) -> None:
        if self._flushes and self._direct < 0:
            host.start_writing(self._fd, offset, length)

    async def status(self, offset: HostOffset, length: int) -> tuple[bool, int]:
        if offset >= self._size:
            return True, length
        try:
            return host.data_or_hole(self._fd, offset, offset + length)
        except OSError as error:
            raise from_oserror(error, "look for holes", self.name, offset) from error

    async def copy_from(
        self, source: Storage, source_offset: HostOffset, offset: HostOffset, length: int
    ) -> int:
        if not isinstance(source, FileStorage) or self._direct >= 0 or source._direct >= 0:
            return 0
        try:
            n = await self.runtime.offload(host.copy, source._fd, source_offset, self._fd, offset, length)
        except OSError as error:
            raise from_oserror(error, f"copy from {source.name}", self.name, offset) from error
        if n:
            self._grown(offset + n)
        return n

    async def hold(self, *, writing: bool) -> None:
        if not self._locked:
            return
        try:
            free = host.lock_image(self._fd, writable=writing)
            if not (free and writing):
                host.share_image(self._fd)
            if not free:
                raise _in_use(self.name, writing=writing)
        except OSError as error:
            if isinstance(error, HostError):
                raise
            raise from_oserror(error, "lock", self.name) from error

    async def close(self) -> None:
        fd, self._fd = self._fd, -1
        direct, self._direct = self._direct, -1
        if direct >= 0:
            os.close(direct)
        if fd >= 0:
            try:
                if self._laid_to > self._size:
                    os.ftruncate(fd, self._size)
                os.close(fd)
            except OSError as error:
                raise from_oserror(error, "close", self.name) from error


def open_file(
    path: str,
    runtime: Runtime,
    *,
    writable: bool,
    cache: str = "writeback",
    lock: bool = True,
    create: bool = False,
    heir_of: FileStorage | None = None,
) -> FileStorage:
    """Open (or create) a local file.

    lock: take QEMU's image locks; without them a running guest's image can be read (`--force-share`).
    heir_of: a storage of the same file, which gives up its locks for this one's; if this fails it has them
        back. A file that is another one by now is refused.
    Raises HostError (LockedError if another process holds the image) and UsageError.
    """
    if cache not in CACHE_MODES:
        raise UsageError(f"cache mode '{cache}' is not known", hint=f"use one of {', '.join(CACHE_MODES)}")
    if writable and not create and _read_only_device(path):  # the kernel opens it and fails the writes
        raise ReadOnlyError("the device is read-only", path=path)
    try:
        claim = writable and lock and heir_of is None
        fd = host.open_file(path, writable=writable, create=create, claim=claim)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise HostError("is not a regular file or block device", path=path, errno=errno.ENODEV) from error
        if error.errno == errno.EBUSY:
            raise LockedError(
                "the device is in use: mounted, or a part of another device",
                path=path,
                hint="unmount it first",
                errno=errno.EBUSY,
            ) from error
        doing = "create" if create else ("open for writing" if writable else "open")
        raise from_oserror(error, doing, path) from error
    except ValueError as error:  # a NUL byte in the name
        raise UsageError(f"'{path!r}' cannot be a file name: {error}") from None
    try:
        storage = _storage_class(fd)(path, fd, runtime, writable=writable, cache=cache)
        if heir_of is not None and storage.identity != heir_of.identity:
            raise HostError(
                "is not the file any more that was opened under this name",
                path=path,
                hint="put the file back in its place",
                errno=errno.ESTALE,
            )
        if lock:
            elder = -1 if heir_of is None else heir_of.fileno()
            if not host.lock_image(fd, writable=writable, instead_of=elder):
                raise _in_use(path, writing=writable)
            storage._locked = True
        if cache in ("none", "directsync") and host.HAVE_DIRECT:
            storage.open_direct()
    except OSError as error:
        os.close(fd)
        if heir_of is not None and lock:
            host.lock_image(heir_of.fileno(), writable=heir_of.writable)
        if isinstance(error, HostError):
            raise
        raise from_oserror(error, "open", path) from error
    return storage


def _storage_class(fd: int) -> type[FileStorage]:
    if not host.is_block_device(fd):
        return FileStorage
    from .device import DeviceStorage

    return DeviceStorage


def _read_only_device(path: str) -> bool:
    if not host.is_block_device(path):
        return False
    from . import kernel

    try:
        fd = kernel.KERNEL.open(path)
    except OSError:
        return False
    try:
        return bool(kernel.number(kernel.KERNEL, fd, kernel.BLKROGET))
    except OSError:
        return False
    finally:
        kernel.KERNEL.close(fd)


def _in_use(path: str, *, writing: bool) -> LockedError:
    return LockedError(
        "another process is using the image",
        path=path,
        hint="stop it" if writing else "stop it, or read anyway with --force-share (-U)",
        errno=errno.EAGAIN,
    )


def open_temporary(directory: str | None, runtime: Runtime, what: str) -> FileStorage:
    """A new file without a name in `directory` (None: where the host keeps large temporary files). It is
    gone when it is closed, or when the process ends in whatever way; a flush does nothing.

    what: what it is, for messages. Raises HostError.
    """
    where = directory or host.temporary_directory()
    try:
        fd = host.open_temporary(where)
    except OSError as error:
        raise from_oserror(error, "make a temporary file", where, hint="choose another directory") from error
    return FileStorage(f"{what} in {where}", fd, runtime, writable=True, cache="unsafe")
