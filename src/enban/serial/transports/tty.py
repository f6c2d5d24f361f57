"""Terminals as lines: a pty that another program opens, and a real serial port.

A pty has a slave name that changes each time, so a link with a name of the user's choice points to it. Its
master is told when the last program has closed the slave, not when the first one opens it: that has to be
looked for. Meanwhile nothing is written, so who opens it finds no bytes of a former session.

A port is set to raw 8N1 without flow control (null-modem cables often leave CTS open) unless `rtscts` is
asked for, is locked against other programs that lock, and gets its settings back at the end.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import struct
import termios

from ...errors import HostError, UsageError, from_oserror
from .base import Link, Transport

_LOOK_S = 0.02
_GONE_S = 0.5
_PTS_NUMBER = 0x80045430  # TIOCGPTN
_LOCK_PTS = 0x40045431  # TIOCSPTLCK
BAUDS = {
    int(name[1:]): value for name, value in vars(termios).items() if name[0] == "B" and name[1:].isdigit()
}
del BAUDS[0]

_LINES = (("DTR", "TIOCM_DTR"), ("RTS", "TIOCM_RTS"), ("CTS", "TIOCM_CTS"), ("DSR", "TIOCM_DSR"))
_MODEM_LINES = (*_LINES, ("DCD", "TIOCM_CAR"), ("RI", "TIOCM_RI"))


def make_raw(fd: int, *, baud: int = 0, rtscts: bool = False) -> None:
    """Eight bits, no parity, one stop bit, nothing translated. baud 0 leaves the speed as it is."""
    _, _, cflag, _, ispeed, ospeed, cc = termios.tcgetattr(fd)
    cflag &= ~(termios.CSIZE | termios.PARENB | termios.CSTOPB | getattr(termios, "CRTSCTS", 0))
    cflag |= termios.CS8 | termios.CREAD | termios.CLOCAL
    if rtscts:
        cflag |= termios.CRTSCTS
    if baud:
        ispeed = ospeed = BAUDS[baud]
    cc = list(cc)
    cc[termios.VMIN], cc[termios.VTIME] = 1, 0
    termios.tcsetattr(fd, termios.TCSANOW, [0, 0, cflag, 0, ispeed, ospeed, cc])


class Pty(Transport):
    """link: the name to give the slave, "" for none."""

    def __init__(self, name: str, link: str) -> None:
        super().__init__(name)
        self._link = link
        self._master = -1
        self.slave = ""
        self._linked = False

    def open(self) -> None:
        try:
            self._master = os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            fcntl.ioctl(self._master, _LOCK_PTS, struct.pack("i", 0))
            (number,) = struct.unpack("i", fcntl.ioctl(self._master, _PTS_NUMBER, bytes(4)))
        except OSError as error:
            raise from_oserror(error, "make a pty", self.name) from error
        self.slave = f"/dev/pts/{number}"
        self._clear()
        if self._link:
            self._make_link()
        self.due = 0.0

    def _make_link(self) -> None:
        try:
            # A link of a bridge that died points to a pty that is not there, or is somebody else's by now.
            if os.path.islink(self._link) and os.readlink(self._link).startswith("/dev/pts/"):
                os.unlink(self._link)
            os.symlink(self.slave, self._link)
        except OSError as error:
            raise from_oserror(error, "make the link", self._link, hint="give another name") from error
        self._linked = True

    def _clear(self) -> None:
        """Raw, and without bytes that a former program left unread. Also makes the master see "closed"."""
        fd = os.open(self.slave, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            make_raw(fd)
            # More than the slave holds at once may lie behind it.
            with contextlib.suppress(BlockingIOError):
                while os.read(fd, 4096):
                    pass
            termios.tcflush(fd, termios.TCIOFLUSH)
        finally:
            os.close(fd)

    def address(self) -> str:
        return f"pty:{self._link or self.slave}"

    def advance(self) -> Link | None:
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        if any(events & select.POLLHUP for _, events in poll.poll(0)):
            self.retry("nobody has it open", _LOOK_S)
            return None
        self.due = None
        self.reason = ""
        return Link(self._master, self._master, self.address())

    def lost(self) -> None:
        with contextlib.suppress(OSError):
            self._clear()
        self.retry(after_s=_LOOK_S)

    def close(self) -> None:
        if self._master >= 0:
            os.close(self._master)
            self._master = -1
        if self._linked:
            with contextlib.suppress(OSError):
                if os.readlink(self._link) == self.slave:
                    os.unlink(self._link)
            self._linked = False


class SerialPort(Transport):
    """device: /dev/ttyS0 or the like. baud: 0 leaves the speed as it is."""

    knows_peer = False

    def __init__(self, name: str, device: str, *, baud: int = 115200, rtscts: bool = False) -> None:
        super().__init__(name)
        if baud not in BAUDS:
            known = ", ".join(str(rate) for rate in sorted(BAUDS) if rate >= 9600)
            raise UsageError(f"{baud} baud is no rate of a serial port here", path=name, hint=f"use {known}")
        self._device = device
        self._baud = baud
        self._rtscts = rtscts
        self._fd = -1
        self._lines = ""

    def open(self) -> None:
        self._fd = self._open()
        self.due = 0.0

    def _open(self) -> int:
        try:
            fd = os.open(self._device, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise from_oserror(error, "open", self._device) from error
        try:
            if not os.isatty(fd):
                raise UsageError("is not a serial line", path=self._device, hint="see: enban serial list")
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise HostError(
                    "another program has this line", path=self._device, errno=errno.EBUSY
                ) from None
            self._before = termios.tcgetattr(fd)
            make_raw(fd, baud=self._baud, rtscts=self._rtscts)
        except termios.error as error:
            os.close(fd)
            raise HostError(f"cannot be set up: {error.args[-1]}", path=self._device) from None
        except BaseException:
            os.close(fd)
            raise
        return fd

    def advance(self) -> Link | None:
        self.due = None
        if self._fd < 0:
            try:
                self._fd = self._open()
            except (HostError, UsageError) as error:
                self.retry(error.what, _GONE_S)
                return None
        self.reason = ""
        fd = self._fd
        return Link(fd, fd, self.name, self._close_port)

    def lost(self) -> None:
        self.retry(after_s=_GONE_S)

    def _close_port(self) -> None:
        if self._fd >= 0:
            with contextlib.suppress(termios.error, OSError):
                termios.tcsetattr(self._fd, termios.TCSANOW, self._before)
            os.close(self._fd)
            self._fd = -1

    def modem_lines(self) -> str:
        """The lines that are on, "" if there are none to tell of (a pty) or the port is closed."""
        try:
            (bits,) = struct.unpack("I", fcntl.ioctl(self._fd, termios.TIOCMGET, bytes(4)))
        except (OSError, ValueError):
            return ""
        return " ".join(name if bits & getattr(termios, bit) else f"({name})" for name, bit in _MODEM_LINES)

    def notice(self) -> str:
        lines = self.modem_lines()
        if lines == self._lines:
            return ""
        self._lines = lines
        return f"{self.name}: modem lines, off in brackets: {lines}" if lines else ""

    def close(self) -> None:
        self._close_port()
