"""What comes in on one connection: a buffer that is used again, and how more of it is waited for.

A wait that follows a short one asks the kernel again and again for up to `spin_us` before it sleeps: being
woken takes longer than many a request. One processor is always left to others, and nobody spins while another
thread could use the time.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
from time import perf_counter_ns

from ...busy_poll import BusyPoll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...storage.awake import KeepAwake
    from ...wire.nbd import Session

# Holds the largest request most clients make (2 MiB) with what goes around it. Memory that is never used is
# never touched; a larger request gets a larger buffer for its time.
BUFFER = (2 << 20) + (256 << 10)
SPIN_US = 50
_ROOM = 256 << 10  # what there always is for the next receive
_MUCH = 32 << 10
_WAITALL = getattr(socket, "MSG_WAITALL", 0)


def new_buffer(size: int) -> memoryview:
    """Memory of its own pages: only what is used of it takes room, and all of it goes back at the end."""
    return memoryview(mmap.mmap(-1, size))


class Threads:
    """What the threads of one server know of each other: which spin, and which are answering."""

    __slots__ = ("awake", "busy", "most", "spinning")

    def __init__(self, awake: KeepAwake | None = None) -> None:
        self.awake = awake  # is used while looking before sleeping finds something
        self.spinning: set[object] = set()
        self.busy: set[object] = set()
        self.most = max(0, (os.cpu_count() or 1) - 1)

    def may_spin(self) -> bool:
        return not self.busy and len(self.spinning) < self.most


class Incoming:
    """buffer[start:end] is what was received and not taken yet."""

    def __init__(
        self, sock: socket.socket, session: Session, leftover: bytes, spin_us: int, threads: Threads
    ) -> None:
        self._sock = sock
        self._threads = threads
        may_look = hasattr(select, "poll") and not session.tls
        self._waitall = 0 if session.tls else _WAITALL
        self._busy_poll = BusyPoll(spin_us if may_look else 0, short_wait=4)
        if self._busy_poll.length_ns:
            poller = select.poll()
            poller.register(sock.fileno(), select.POLLIN)
            self._poll = poller.poll
        self.buffer = new_buffer(max(BUFFER, len(leftover)))
        self.buffer[: len(leftover)] = leftover
        self.start, self.end = 0, len(leftover)

    def receive(self, need: int) -> int:
        """Receive something more, with room for `need` bytes in one piece from `start` on; 0 if there will
        be no more. Nothing can be done before `need` bytes are there. Raises OSError."""
        self._make_room(need)
        view = self.buffer[self.end :]
        missing = need - (self.end - self.start)
        flags = 0
        if missing >= _MUCH:  # the rest of a large write, and no more, so that the next begins in front
            view, flags = view[:missing], self._waitall
        if self._busy_poll.length_ns:
            n = self._spin(view, flags)
        else:
            n = self._sock.recv_into(view, 0, flags)
        self.end += n
        return n

    def _make_room(self, need: int) -> None:
        rest = self.end - self.start
        if not rest:
            self.start = self.end = 0
        size = max(BUFFER, need)
        if len(self.buffer) != size and (need > len(self.buffer) or not rest):
            grown = new_buffer(size)
        elif len(self.buffer) - self.start < max(need, _ROOM):
            grown = self.buffer
        else:
            return
        grown[:rest] = bytes(self.buffer[self.start : self.end])
        self.buffer, self.start, self.end = grown, 0, rest

    def _spin(self, view: memoryview, flags: int) -> int:
        """Receive, with looking first if that pays. flags: for the case that it does not."""
        threads, busy_poll = self._threads, self._busy_poll
        if busy_poll.pays() and threads.may_spin():
            threads.spinning.add(self)
            poll, busy = self._poll, threads.busy
            until = perf_counter_ns() + busy_poll.length_ns
            try:
                while not busy and perf_counter_ns() < until:
                    if poll(0):
                        busy_poll.looked(True)
                        if threads.awake is not None:
                            threads.awake.use()
                        return self._sock.recv_into(view)
            finally:
                threads.spinning.discard(self)
            busy_poll.looked(False)
        before = perf_counter_ns()
        n = self._sock.recv_into(view, 0, flags)
        busy_poll.waited(perf_counter_ns() - before)
        return n
