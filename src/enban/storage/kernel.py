"""What the kernel tells and does about devices: sysfs, ioctls, and nothing else.

The layer under `device` and `cdrom`. Its few calls can be faked, so that every state of a drive
can be tested on a machine that has none. Calls raise plain OSError. Beside `host` this is the
only module that may use Linux-only names; elsewhere there simply are no drives.
"""

from __future__ import annotations

import errno
import os
import stat

from ..block.runtime import interruptible
from . import host

try:
    import fcntl
except ImportError:  # not a POSIX host
    fcntl = None  # type: ignore[assignment]

# linux/fs.h, as x86 and ARM number them
BLKROGET = 0x125E  # int: read-only?
BLKSSZGET = 0x1268  # int: bytes of a logical block, the smallest that can be read or written
BLKDISCARD = 0x1277  # two 64-bit numbers: start and length in bytes
BLKZEROOUT = 0x127F  # the same
BLKPBSZGET = 0x127B  # unsigned int: bytes of a physical block
BLKGETSIZE64 = 0x80081272  # 64-bit number: size in bytes

# linux/cdrom.h
CDROMREADTOCHDR = 0x5305  # two bytes: first and last track
CDROMREADTOCENTRY = 0x5306  # struct cdrom_tocentry, 12 bytes
CDROMEJECT = 0x5309
CDROMCLOSETRAY = 0x5319
CDROM_DRIVE_STATUS = 0x5326
CDROM_DISC_STATUS = 0x5327
CDROM_LOCKDOOR = 0x5329
CDROM_TIMED_MEDIA_CHANGE = 0x5396  # two 64-bit numbers: time of the last change in ms, flags
CDSL_CURRENT = 0x7FFFFFFF

_CDROM_TYPE = "5"  # SCSI peripheral device type of drives, in sysfs


class Kernel:
    """The real one. Descriptors are plain numbers."""

    def drives(self) -> list[str]:
        """Device names of CD-ROM drives, in no order."""
        try:
            names = [name for name in os.listdir("/sys/block") if name.startswith("sr")]
        except OSError:
            return []
        return [name for name in names if self._text(f"/sys/block/{name}/device/type") == _CDROM_TYPE]

    def model(self, name: str) -> str:
        """Maker and model of a drive, "" where it does not tell."""
        words = [self._text(f"/sys/block/{name}/device/{part}") for part in ("vendor", "model")]
        return " ".join(" ".join(words).split())

    def _text(self, path: str) -> str:
        try:
            with open(path, encoding="ascii", errors="replace") as file:
                return file.read(256).strip()
        except OSError:
            return ""

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def device_name(self, path: str) -> str:
        """The kernel's name ("sr0", "loop3") of the block device at `path`, links followed; else ""."""
        try:
            status = os.stat(path)
            if stat.S_ISBLK(status.st_mode):
                number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
                return os.path.basename(os.readlink(f"/sys/dev/block/{number}"))
        except (OSError, ValueError):
            pass
        return ""

    def open(self, path: str, *, claim: bool = False) -> int:
        """For reading and without waiting: works with an empty drive and leaves its tray alone.
        claim: not while it is mounted or claimed by somebody else (EBUSY)."""
        flags = os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0)
        return os.open(path, flags | (os.O_EXCL if claim else 0))

    def close(self, fd: int) -> None:
        os.close(fd)

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        """A buffer is filled in place."""
        if fcntl is None:
            raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))
        answer: int
        if isinstance(argument, int):
            answer = fcntl.ioctl(fd, request, argument)
        else:
            answer = fcntl.ioctl(fd, request, argument, True)
        return answer

    def size(self, fd: int) -> int:
        """What the kernel takes for the device's size in bytes. Of a drive only true when it has a disc."""
        return os.lseek(fd, 0, os.SEEK_END)

    @interruptible
    def read_into(self, fd: int, view: memoryview, offset: int) -> int:
        return host.read_into(fd, view, offset)


KERNEL = Kernel()


def number(kernel: Kernel, fd: int, request: int, width: int = 4) -> int:
    """An ioctl that answers with one number of `width` bytes."""
    import sys

    buffer = bytearray(width)
    kernel.ioctl(fd, request, buffer)
    return int.from_bytes(buffer, sys.byteorder)
