"""CD-ROM drives that are not there: a kernel layer with any number of them, in any state.

They behave as real `sr` drives were seen to (QEMU's ide-cd on Linux 6.1): an open tray keeps the
size of its last disc, a drive that never had one says 1073741312 bytes, and a descriptor goes on
showing the size of the disc that was there when it was opened.
"""

from __future__ import annotations

import errno
import os
import sys

from enban.storage import kernel as k
from enban.storage.cdrom import DISC, EMPTY, NOT_READY, OPEN

BOGUS_SIZE = 1073741312
SECTOR = 2048


def fail(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def iso(volume: str, size: int, seed: int = 1) -> bytes:
    """Bytes that a reader of volume descriptors takes for an ISO 9660 disc."""
    out = bytearray((number * seed * 2654435761 >> 7 & 0xFF) for number in range(size))
    out[16 * SECTOR : 17 * SECTOR] = (
        b"\x01CD001\x01\0" + b"LINUX".ljust(32) + volume.encode().ljust(32)
    ).ljust(SECTOR, b"\0")
    out[17 * SECTOR : 18 * SECTOR] = b"\xffCD001\x01".ljust(SECTOR, b"\0")
    return bytes(out)


class FakeDrive:
    """state: what the drive says. disc: what lies in it, None for nothing. errors: by ioctl request or
    "read", errnos to fail with. timed: whether the kernel tells when the disc was changed."""

    def __init__(self, disc: bytes | None = None, *, timed: bool = True) -> None:
        self.disc = disc
        self.state = EMPTY if disc is None else DISC
        self.size = BOGUS_SIZE if disc is None else len(disc)
        self.changed_ms = 0 if disc is None else 1000
        self.timed = timed
        self.locked = False
        self.mounted = False
        self.kind = 101
        self.lead_out: int | None = None  # sectors; None is what the size says
        self.errors: dict[int | str, int] = {}
        self.stale: list[int] = []  # sizes that the next descriptors show instead of the disc's
        self.spin_up = 0  # so many questions are answered with "not ready" after the tray was closed

    # -- what hands do

    def open_tray(self) -> None:
        self.state = OPEN

    def put(self, disc: bytes | None) -> None:
        """Open the tray, lay something in it or take it out, and close it."""
        self.disc = disc
        self.state = EMPTY if disc is None else DISC
        if disc is not None:
            self.size = len(disc)
        self.changed_ms += 1000


class FakeKernel(k.Kernel):
    """drives: by name, "sr0", ... links: other paths of theirs. A path not known does not exist."""

    def __init__(self, drives: dict[str, FakeDrive], *, links: dict[str, str] | None = None) -> None:
        self.all = drives
        self.links = links or {}
        self.opened: dict[int, tuple[FakeDrive, int]] = {}  # descriptor -> (drive, size when opened)
        self.number = 1000
        self.calls: list[tuple[str, int]] = []

    def drives(self) -> list[str]:
        return list(self.all)[::-1]  # the kernel has its own order

    def model(self, name: str) -> str:
        return f"FAKE {name.upper()}" if name in self.all else ""

    def exists(self, path: str) -> bool:
        return bool(self.device_name(path)) or os.path.exists(path)

    def device_name(self, path: str) -> str:
        name = self.links.get(path, path).removeprefix("/dev/")
        return name if name in self.all else ""

    def open(self, path: str, *, claim: bool = False) -> int:
        name = self.device_name(path)
        if not name:
            raise fail(errno.ENOENT)
        drive = self.all[name]
        if number := drive.errors.get("open"):
            raise fail(number)
        if claim and drive.mounted:
            raise fail(errno.EBUSY)
        self.number += 1
        self.opened[self.number] = (drive, drive.stale.pop(0) if drive.stale else drive.size)
        return self.number

    def close(self, fd: int) -> None:
        del self.opened[fd]  # twice is a KeyError

    def ioctl(self, fd: int, request: int, argument: int | bytearray = 0) -> int:
        drive, _ = self.opened[fd]
        self.calls.append(("ioctl", request))
        if number := drive.errors.get(request):
            raise fail(number)
        if request == k.CDROM_DRIVE_STATUS:
            if drive.spin_up and drive.state == DISC:
                drive.spin_up -= 1
                return NOT_READY
            return drive.state
        if request == k.CDROM_TIMED_MEDIA_CHANGE:
            if not drive.timed:
                raise fail(errno.ENOSYS)
            assert isinstance(argument, bytearray)
            argument[:8] = drive.changed_ms.to_bytes(8, sys.byteorder)
            return 0
        if request == k.CDROMEJECT:
            if drive.locked:
                return 0x8000002  # no error, but the sense of the drive: it did not open
            drive.open_tray()
            return 0
        if request == k.CDROMCLOSETRAY:
            drive.state = EMPTY if drive.disc is None else DISC
            return 0
        if request == k.CDROM_LOCKDOOR:
            drive.locked = bool(argument)
            return 0
        if drive.state != DISC or drive.disc is None:
            raise fail(errno.ENOMEDIUM)
        if request == k.CDROM_DISC_STATUS:
            return drive.kind
        if request == k.CDROMREADTOCHDR:
            assert isinstance(argument, bytearray)
            argument[:] = b"\x01\x01"
            return 0
        if request == k.CDROMREADTOCENTRY:
            assert isinstance(argument, bytearray) and argument[0] == 0xAA and argument[2] == 1
            end = len(drive.disc) // SECTOR if drive.lead_out is None else drive.lead_out
            argument[4:8] = end.to_bytes(4, sys.byteorder)
            return 0
        raise fail(errno.ENOTTY)

    def size(self, fd: int) -> int:
        return self.opened[fd][1]

    def read_into(self, fd: int, view: memoryview, offset: int) -> int:
        drive, _ = self.opened[fd]
        if number := drive.errors.get("read"):
            raise fail(number)
        if drive.state != DISC or drive.disc is None:
            raise fail(errno.EIO)
        data = drive.disc[offset : offset + len(view)]
        view[: len(data)] = data
        return len(data)
