"""What every transport of a serial line has in common.

A `Transport` is one end of a cable that somebody may plug in: it makes `Link`s, now or later, one after the
other or several at once. A `Link` is one connection that is up: bytes in and out through descriptors, never
waiting. Neither knows what the bytes mean, and nothing here runs by itself: whoever owns a transport (the
bridge) polls the descriptor of `wait`, looks at `due`, and calls `advance`.

    open -> advance ... -> Link -> (read | write)* -> LinkEnded -> lost -> advance ... -> close
"""

from __future__ import annotations

import os
from time import monotonic

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..pace import Pace

READ_SIZE = 1 << 16
# How long between looks at what cannot be waited for: a peer that does not answer, a pty nobody has open.
RETRY_S = 0.1


class LinkEnded(Exception):
    """The other side is gone, or the device is; str() says how, for people."""


class Link:
    """One connection that is up.

    read_fd, write_fd: non-blocking, -1 if this direction does not exist. peer: who it is, for people.
    pace_in, pace_out: how fast bytes may come and go, None for as fast as they can.
    """

    __slots__ = ("_on_close", "pace_in", "pace_out", "peer", "read_fd", "write_fd")

    def __init__(
        self, read_fd: int, write_fd: int, peer: str, on_close: Callable[[], None] = lambda: None
    ) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.peer = peer
        self.pace_in: Pace | None = None
        self.pace_out: Pace | None = None
        self._on_close = on_close

    def read(self, most: int = READ_SIZE) -> bytes:
        """Bytes that are there, b"" if there are none now. Raises LinkEnded."""
        try:
            data = os.read(self.read_fd, most)
        except (BlockingIOError, InterruptedError):
            return b""
        except OSError as error:
            raise LinkEnded(_how(error)) from None
        if not data:
            return self.end_of_input()
        return data

    def end_of_input(self) -> bytes:
        """The other side will send no more. A serial line has no half that stays open."""
        raise LinkEnded("closed by the other side")

    def write(self, data: bytes | memoryview) -> int:
        """How many bytes were taken, 0 if there is no room now. Raises LinkEnded."""
        try:
            return os.write(self.write_fd, data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as error:
            raise LinkEnded(_how(error)) from None

    def close(self) -> None:
        self._on_close()


def _how(error: OSError) -> str:
    import errno

    if error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
        return "closed by the other side"
    return (os.strerror(error.errno) if error.errno else str(error)).lower()


class Transport:
    """One end of a line.

    name: its text as the user gave it, for messages. many: several links may be up at once. knows_peer:
    a link is up only while somebody is at the other end (a socket; not a cable). watch: whoever is here may
    only look on. pace_baud: model a line of this speed, 0 for none. small: keep the kernel's buffers small,
    for with a paced line what lies in them is late already.
    finished: no link will ever come again. reason: why there is none now, "" if nothing is wrong.
    """

    many = False
    knows_peer = True

    def __init__(self, name: str) -> None:
        self.name = name
        self.watch = False
        self.pace_baud = 0
        self.small = False
        self.finished = False
        self.reason = ""
        # monotonic() time at which `advance` is worth a call although `wait` saw nothing; None: never.
        self.due: float | None = None

    def open(self) -> None:
        """Takes names, ports and devices. Raises UsageError and HostError for what waiting cannot heal."""
        raise NotImplementedError

    def wait(self) -> tuple[int, int] | None:
        """A descriptor and the poll events after which `advance` is worth a call."""
        return None

    def advance(self) -> Link | None:
        """A new link, if there is one to be had now."""
        raise NotImplementedError

    def lost(self) -> None:
        """A link was closed. Prepares for the next."""
        self.retry()

    def notice(self) -> str:
        """What changed that people should know, "" if nothing. Called about once a second."""
        return ""

    def close(self) -> None:
        """Gives names back. Links are closed by their owner."""

    def address(self) -> str:
        """Where the other side finds it; differs from `name` where a number was picked."""
        return self.name

    def retry(self, reason: str = "", after_s: float = RETRY_S) -> None:
        self.reason = reason
        self.due = monotonic() + after_s
