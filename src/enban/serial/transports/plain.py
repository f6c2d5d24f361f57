"""This process's own standard input and output, and a file that records."""

from __future__ import annotations

import contextlib
import os
import stat
import sys

from ...errors import from_oserror
from .base import Link, LinkEnded, Transport

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ESCAPE = b"\x1d"  # Ctrl-]
# POLLOUT of a pipe promises room for so much without waiting (POSIX: PIPE_BUF is at least 512).
_SURE = 512


class Stdio(Transport):
    """On a terminal keys go through as they are typed, and Ctrl-] ends. The end of a piped input is only
    that: output goes on."""

    knows_peer = False

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._before: list[Any] | None = None
        self._fds: list[int] = []

    def open(self) -> None:
        self.due = 0.0

    def advance(self) -> Link | None:
        self.due = None
        if os.isatty(0):
            import termios

            from .tty import make_raw

            self._before = termios.tcgetattr(0)
            make_raw(0)
        read_fd, write_fd = self._own(0, os.O_RDONLY), self._own(1, os.O_WRONLY)
        return _StdioLink(read_fd, write_fd, self.name, escape=self._before is not None)

    def _own(self, fd: int, flags: int) -> int:
        """The same file with a description of its own, so that nobody else's becomes non-blocking."""
        sys.stdout.flush()
        try:
            if stat.S_ISSOCK(os.fstat(fd).st_mode) or stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            mine = os.open(f"/dev/fd/{fd}", flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        except OSError:
            return fd
        self._fds.append(mine)
        return mine

    def lost(self) -> None:
        self.finished = True
        self._restore()

    def _restore(self) -> None:
        if self._before is not None:
            import termios

            with contextlib.suppress(termios.error):
                termios.tcsetattr(0, termios.TCSADRAIN, self._before)
            self._before = None

    def close(self) -> None:
        self._restore()
        for fd in self._fds:
            os.close(fd)
        self._fds = []


class _StdioLink(Link):
    __slots__ = ("_escape",)

    def __init__(self, read_fd: int, write_fd: int, peer: str, *, escape: bool) -> None:
        super().__init__(read_fd, write_fd, peer)
        self._escape = escape

    def read(self, most: int = 4096) -> bytes:
        data = super().read(most)
        if self._escape and ESCAPE in data:
            raise LinkEnded("Ctrl-] was typed")
        return data

    def write(self, data: bytes | memoryview) -> int:
        return super().write(data if self.write_fd > 2 else data[:_SURE])

    def end_of_input(self) -> bytes:
        self.read_fd = -1
        return b""


class RecordFile(Transport):
    """A file that gets what the guest says, as raw bytes."""

    knows_peer = False

    def __init__(self, name: str, path: str, *, append: bool = False) -> None:
        super().__init__(name)
        self.watch = True
        self._path = path
        self._append = append
        self._fd = -1

    def open(self) -> None:
        how = os.O_APPEND if self._append else os.O_TRUNC
        try:
            self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | how, 0o666)
        except OSError as error:
            raise from_oserror(error, "write", self._path) from error
        self.due = 0.0

    def advance(self) -> Link | None:
        self.due = None
        return Link(-1, self._fd, self.name)

    def lost(self) -> None:
        self.finished = True

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
