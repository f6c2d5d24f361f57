"""A pair of FIFOs by QEMU's convention (`-serial pipe:PATH`).

    PATH.in   what goes into the guest     we write, QEMU reads
    PATH.out  what comes out of the guest  QEMU writes, we read

(`swap` is the other side: reads PATH.in, writes PATH.out.) QEMU opens both for reading and writing and so
never sees anybody come or go. We open one end of each, which the kernel tells when the other is gone:
somebody is there while the FIFO we write to has a reader. FIFOs that are not there yet are made, and those
are removed again.

A FIFO keeps its bytes while anybody has it open. What lies in them when we come is from a session that is
over, and is thrown away; `keep` takes it as the start of this one.
"""

from __future__ import annotations

import errno
import os
import select
import stat

from ...errors import UsageError, from_oserror
from .base import READ_SIZE, Link, Transport

SMALL_PIPE = 4096
_LOOK_S = 0.02


class FifoPair(Transport):
    def __init__(self, name: str, path: str, *, swap: bool = False, keep: bool = False) -> None:
        super().__init__(name)
        ours, theirs = (path + ".out", path + ".in")
        self._read_path, self._write_path = (theirs, ours) if swap else (ours, theirs)
        self._keep = keep
        self._made: list[str] = []
        self._read_fd = -1
        self.dropped = 0

    def open(self) -> None:
        for path in (self._read_path, self._write_path):
            self._make(path)
        self._read_fd = self._open_reader()
        if not self._keep:
            self.dropped = _drain(self._read_fd)
            # The other FIFO: what an earlier user of our side left there, unread.
            fd = self._open_path(self._write_path)
            self.dropped += _drain(fd)
            os.close(fd)
        if self.small:
            _shrink(self._read_fd)
        self.due = 0.0

    def _make(self, path: str) -> None:
        try:
            if not stat.S_ISFIFO(os.stat(path).st_mode):
                raise UsageError("is not a FIFO", path=path, hint="give another path; the pair is made by us")
        except FileNotFoundError:
            try:
                os.mkfifo(path, 0o600)
            except OSError as error:
                raise from_oserror(error, "make the FIFO", path) from error
            self._made.append(path)

    def _open_path(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, "open the FIFO", path) from error

    def _open_reader(self) -> int:
        return self._open_path(self._read_path)

    def advance(self) -> Link | None:
        self.due = None
        try:
            write_fd = os.open(self._write_path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            self.retry("nobody has the pair open" if error.errno == errno.ENXIO else _text(error), _LOOK_S)
            return None
        self.reason = ""
        if self.small:
            _shrink(write_fd)
        return _FifoLink(self._read_fd, write_fd, self.name, lambda: os.close(write_fd))

    def lost(self) -> None:
        # A descriptor that saw its writers go says so for ever; a new one, opened before the old one is
        # closed, so that bytes of who comes next stay, begins anew.
        try:
            fresh = self._open_reader()
        except OSError as error:
            self.retry(str(error), 1.0)
            return
        os.close(self._read_fd)
        self._read_fd = fresh
        self.retry(after_s=_LOOK_S)

    def close(self) -> None:
        if self._read_fd >= 0:
            os.close(self._read_fd)
            self._read_fd = -1
        for path in self._made:
            try:
                os.unlink(path)
            except OSError:
                pass
        self._made = []


class _FifoLink(Link):
    __slots__ = ()

    def end_of_input(self) -> bytes:
        """A FIFO without writers reads as ended; if nobody has opened it yet, it only has not begun."""
        poll = select.poll()
        poll.register(self.read_fd, select.POLLIN)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            return super().end_of_input()
        return b""


def _drain(fd: int) -> int:
    count = 0
    try:
        while data := os.read(fd, READ_SIZE):
            count += len(data)
    except BlockingIOError:
        pass
    return count


def _shrink(fd: int) -> None:
    import fcntl

    try:
        fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    except (AttributeError, OSError):
        pass  # not everywhere, and not while more than that lies in it


def _text(error: OSError) -> str:
    return os.strerror(error.errno or errno.EIO).lower()
