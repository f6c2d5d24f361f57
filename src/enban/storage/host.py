"""Everything enban asks of the operating system about files, and nothing else.

This is the one module that may use Linux-only calls. Each has a portable road beside it,
taken when the name is missing (`os.preadv`, `os.copy_file_range`, `fcntl`, SEEK_DATA, ...);
other modules never ask which. Functions here raise plain OSError; `storage.file` translates.
"""

from __future__ import annotations

import _thread
import errno
import os
import stat
import sys

from ..block.runtime import interruptible

try:
    import fcntl
except ImportError:  # not a POSIX host
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

HAVE_PREADV = hasattr(os, "preadv") and hasattr(os, "pwrite")
HAVE_NOWAIT = HAVE_PREADV and hasattr(os, "RWF_NOWAIT")
HAVE_HOLES = hasattr(os, "SEEK_DATA")
HAVE_COPY = hasattr(os, "copy_file_range")
HAVE_LOCKS = fcntl is not None and hasattr(fcntl, "F_OFD_SETLK")
HAVE_DIRECT = hasattr(os, "O_DIRECT") and HAVE_PREADV
HAVE_FAULTS = sys.platform == "linux"  # each thread can be told of its own page faults
HAVE_FALLOCATE = sys.platform == "linux" and HAVE_COPY  # reached through libc, see _fallocate

_NOT_HERE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.ENOTTY, errno.EPERM)
_LARGEST_IO = 0x7FFFF000  # Linux moves no more in one call
_LARGE_PAGE = 2 << 20
_FS_IOC_RESVSP64 = 0x4030582A  # _IOW('X', 42, struct space_resv)

_cursor_guard = _thread.allocate_lock()  # hosts without positioned I/O share one cursor


def new_buffer(size: int) -> memoryview:
    """Zeroed memory to move data through, in large pages where the host has them: a loop that only reads and
    writes files takes a tenth less time with those."""
    if size >= _LARGE_PAGE:
        import mmap

        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            try:
                pages.madvise(mmap.MADV_HUGEPAGE)
            except OSError:
                pass  # a kernel built without them
            return memoryview(pages)
    return memoryview(bytearray(size))


def open_file(
    path: str, *, writable: bool, create: bool = False, direct: bool = False, claim: bool = False
) -> int:
    """A descriptor for a regular file or block device; `create` makes a new file and never replaces one.
    claim: of a device, not while it is mounted or claimed by somebody else (EBUSY)."""
    flags = os.O_RDWR if writable else os.O_RDONLY
    flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    if create:
        flags |= os.O_CREAT | os.O_EXCL
    else:
        # Opening a FIFO would wait for its other end for ever.
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, "is a directory", path)
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise OSError(errno.ENODEV, "is not a regular file or block device", path)
        if claim and stat.S_ISBLK(mode):
            flags |= os.O_EXCL
    if direct:
        flags |= os.O_DIRECT
    return os.open(path, flags, 0o644)


def open_temporary(directory: str) -> int:
    """A descriptor for a new file that has no name, and is gone when the descriptor is closed.

    Where the host cannot make a file without a name, it has one for a moment (on Windows until the end).
    """
    common = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(directory, common | os.O_TMPFILE, 0o600)
        except OSError as error:
            # EISDIR: a kernel that does not know the flag; the others: a file system that cannot.
            if error.errno not in (*_NOT_HERE, errno.EISDIR):
                raise
    path = os.path.join(directory, f".enban-{os.urandom(12).hex()}")
    on_close = getattr(os, "O_TEMPORARY", 0)
    fd = os.open(path, common | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0) | on_close, 0o600)
    if not on_close:
        try:
            os.unlink(path)
        except BaseException:
            os.close(fd)
            raise
    return fd


def temporary_directory() -> str:
    """Where large temporary files go: $TMPDIR, else /var/tmp (often /tmp is memory), else /tmp's like."""
    for directory in (os.environ.get("TMPDIR", ""), "/var/tmp"):
        if directory and os.path.isdir(directory):
            return directory
    from tempfile import gettempdir

    return gettempdir()


def facts(fd: int) -> tuple[int, bool, tuple[int, ...]]:
    """(size in bytes, whether the size is fixed, what makes this file equal to another)."""
    status = os.fstat(fd)
    if stat.S_ISBLK(status.st_mode):
        return os.lseek(fd, 0, os.SEEK_END), True, (status.st_rdev,)
    return status.st_size, False, (status.st_dev, status.st_ino)


def is_block_device(file: int | str) -> bool:
    """file: a descriptor or a path; False if there is no such file."""
    try:
        return stat.S_ISBLK(os.stat(file).st_mode)
    except (OSError, ValueError):
        return False


def allocated(fd: int) -> int:
    """Bytes of the medium in use; the length where the host does not tell."""
    status = os.fstat(fd)
    return status.st_blocks * 512 if hasattr(status, "st_blocks") else status.st_size


@interruptible
def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` from `offset`; how many bytes there were (fewer only at the end of the file)."""
    done = 0
    while done < len(view):
        part = view[done : done + _LARGEST_IO]
        if HAVE_PREADV:
            n = os.preadv(fd, (part,), offset + done)
        else:
            with _cursor_guard:
                os.lseek(fd, offset + done, os.SEEK_SET)
                data = os.read(fd, len(part))
            n = len(data)
            part[:n] = data
        if not n:
            break
        done += n
    return done


def read_cached(fd: int, view: memoryview, offset: int) -> int:
    """Like `read_into` but never waits for the medium: -1 if it would have to (or this host cannot say)."""
    if not HAVE_NOWAIT:
        return -1
    try:
        return os.preadv(fd, (view,), offset, os.RWF_NOWAIT)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EOPNOTSUPP):
            return -1
        raise


def will_need(fd: int, offset: int, length: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, offset, length, os.POSIX_FADV_WILLNEED)


def map_file(fd: int, most: int) -> memoryview:
    """The bytes of a regular file of up to `most` bytes as memory that cannot be written to. Empty if it
    is anything else, or the host will not. They stay as long as the view does, or the file gets shorter."""
    import mmap

    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= most:
            return memoryview(b"")
        return memoryview(mmap.mmap(fd, status.st_size, access=mmap.ACCESS_READ))
    except (OSError, ValueError):
        return memoryview(b"")


def leave_mapped(view: memoryview) -> None:
    """Have what was used of a mapped file no longer count as this process's memory. It can be used on."""
    import mmap

    if isinstance(view.obj, mmap.mmap):
        view.obj.madvise(mmap.MADV_DONTNEED)


def page_faults() -> int:
    """How often this thread had to wait for the medium because it used mapped memory; see HAVE_FAULTS."""
    import resource

    return resource.getrusage(resource.RUSAGE_THREAD).ru_majflt


def resident_pages() -> int:
    """Bytes of files, mapped or shared, that count as memory of this process; see HAVE_FAULTS."""
    with open("/proc/self/statm", "rb", buffering=0) as file:
        return int(file.read(256).split()[2]) * os.sysconf("SC_PAGE_SIZE")


@interruptible
def write_all(fd: int, view: memoryview, offset: int) -> None:
    done = 0
    while done < len(view):
        part = view[done : done + _LARGEST_IO]
        if HAVE_PREADV:
            n = os.pwrite(fd, part, offset + done)
        else:
            with _cursor_guard:
                os.lseek(fd, offset + done, os.SEEK_SET)
                n = os.write(fd, part)
        if n <= 0:
            raise OSError(errno.EIO, "write made no progress")
        done += n


def sync(fd: int) -> None:
    if hasattr(os, "fdatasync"):
        os.fdatasync(fd)
    else:
        os.fsync(fd)


def sync_directory(path: str) -> None:
    """Make a rename in a directory durable, where directories can be opened."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_HERE:
            raise
    finally:
        os.close(fd)


_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_libc: Any = None


def _fallocate(fd: int, mode: int, offset: int, length: int) -> bool:
    """fallocate(2), which Python does not wrap. False where the file system cannot."""
    global _libc
    if not HAVE_FALLOCATE:
        return False
    import ctypes

    if _libc is None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        _libc = libc
    while _libc.fallocate64(fd, mode, offset, length):
        number = ctypes.get_errno()
        if number == errno.EINTR:
            continue
        if number in _NOT_HERE:
            return False
        raise OSError(number, os.strerror(number))
    return True


def punch_hole(fd: int, offset: int, length: int) -> bool:
    """Give a range back; it reads as zeros. The size stays. False if this host cannot."""
    return _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> bool:
    """Zero a range and keep space for it. False if this host cannot."""
    return _fallocate(fd, _ZERO_RANGE, offset, length)


def reserve(fd: int, offset: int, length: int) -> bool:
    """Reserve space for a range, growing the file. False if this host cannot."""
    if not hasattr(os, "posix_fallocate"):
        return False
    try:
        os.posix_fallocate(fd, offset, length)
    except OSError as error:
        if error.errno in _NOT_HERE:
            return False
        raise
    return True


def lay_out(fd: int, offset: int, length: int) -> bool:
    """Find place for a range of a regular file without growing it. False if this host cannot, OSError if
    the file cannot.

    ext4 and its kind then write into blocks that are there, at half the cost of finding one for each page.
    An ioctl of Linux, on most processors by this number, and not fallocate: in a short job the import of
    ctypes would be seen.
    """
    if not HAVE_FALLOCATE or fcntl is None:
        return False
    import struct

    fcntl.ioctl(fd, _FS_IOC_RESVSP64, struct.pack("=hh4xqq24x", 0, os.SEEK_SET, offset, length))
    return True


def start_writing(fd: int, offset: int, length: int) -> None:
    """Begin to write a range of the page cache to the medium.

    Linux does so when told that the range will not be needed; what is on its way stays in the cache.
    """
    if hasattr(os, "posix_fadvise"):
        try:
            os.posix_fadvise(fd, offset, length, os.POSIX_FADV_DONTNEED)
        except OSError:
            pass  # no file of a kind that could


def data_or_hole(fd: int, offset: int, end: int) -> tuple[bool, int]:
    """(whether `offset` is in a hole, how many bytes on that holds, at most to `end`)."""
    if not HAVE_HOLES:
        return False, end - offset
    if HAVE_PREADV:
        return _seek_data(fd, offset, end)
    with _cursor_guard:  # looking moves the cursor that others read and write at
        return _seek_data(fd, offset, end)


def _seek_data(fd: int, offset: int, end: int) -> tuple[bool, int]:
    try:
        data = os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data until the end of the file
            return True, end - offset
        return False, end - offset
    if data > offset:
        return True, min(data, end) - offset
    hole = os.lseek(fd, offset, os.SEEK_HOLE)
    return False, min(hole, end) - offset


def copy(source: int, source_offset: int, target: int, offset: int, length: int) -> int:
    """Copy inside the kernel, by reflink where the file system can; 0 if it cannot."""
    if not HAVE_COPY:
        return 0
    try:
        return os.copy_file_range(source, target, min(length, _LARGEST_IO), source_offset, offset)
    except OSError as error:
        if error.errno in (*_NOT_HERE, errno.EBADF):
            return 0
        raise


# QEMU's image locks: one byte for each permission a user of the file holds, at 100 + bit, and
# one for each permission it does not let others have, at 200 + bit. All are shared locks; a
# conflict shows as a lock on the opposite byte. (QEMU docs/system/images, "image locking")
_HOLDS, _FORBIDS = 100, 200
_CONSISTENT_READ, _WRITE, _RESIZE = 0, 1, 3


def lock_image(fd: int, *, writable: bool, instead_of: int = -1) -> bool:
    """Take QEMU's locks for the life of the descriptor. False if another process conflicts.

    instead_of: a descriptor of ours for the same file that gives up its locks when these are taken, so
        that there is no moment without one. Where this says False they are given up as well.
    """
    if not HAVE_LOCKS:
        return True
    holds = (_CONSISTENT_READ, _WRITE, _RESIZE) if writable else (_CONSISTENT_READ,)
    forbids = (_WRITE, _RESIZE)
    taken = [_HOLDS + bit for bit in holds] + [_FORBIDS + bit for bit in forbids]
    watched = [_FORBIDS + bit for bit in holds] + [_HOLDS + bit for bit in forbids]
    try:
        for byte in taken:
            fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        if instead_of >= 0:
            for byte in (*range(_HOLDS, _HOLDS + 5), *range(_FORBIDS, _FORBIDS + 5)):
                fcntl.fcntl(instead_of, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, byte))
        free = all(
            _lock_type(fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))) == fcntl.F_UNLCK
            for byte in watched
        )
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        if error.errno in (*_NOT_HERE, errno.ENOLCK):
            return True  # this file system has no locks
        raise
    return free


def share_image(fd: int) -> None:
    """Of the locks for writing keep those of a reader: others may read, nobody may write."""
    if HAVE_LOCKS:
        try:
            for bit in (_WRITE, _RESIZE):
                fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_UNLCK, _HOLDS + bit))
        except OSError as error:
            if error.errno not in (*_NOT_HERE, errno.ENOLCK):
                raise


def _flock(kind: int, byte: int) -> bytes:
    """struct flock for one byte."""
    from struct import pack

    return pack("@hhqqi4x", kind, os.SEEK_SET, byte, 1, 0)


def _lock_type(flock: bytes) -> int:
    return int.from_bytes(flock[:2], sys.byteorder, signed=True)
