"""One connection whose plain reads are answered by `mapped`: what it has received, and what is left to send.

Its own thread and the thread that leads have it by turns, never both.
"""

from __future__ import annotations

import _thread
import errno
import io
import os
import struct
from time import perf_counter_ns

from ...block.runtime import drive
from ...busy_poll import give_way
from ...wire.nbd import ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from ...block.requests import Request
    from ...wire.nbd.messages import Codec, ParsedRequest
    from .export import ServedExport
    from .incoming import Incoming, Threads
    from .transmission import Transmission

    # Of (start, end), indices in the buffer: (what to send, two parts for each request; where the first
    # request begins that is not answered so, or is not all there; bytes to send).
    Replies = Callable[[int, int], tuple[list[bytes | memoryview], int, int]]

_MOST_REQUESTS = 512  # received at a time; their replies are sent by one call (IOV_MAX is twice that)

# Of `Reader.gather`. A quarter of what is in flight: its replies are sent before the client has run dry.
_LOOK_NS = 10_000  # between two looks
_DEEP, _SHARE = 16, 4  # requests in flight that make it worth it, and which part of them is enough
_NEXT_COUNT = 1024  # batches to the next count of what is in flight ...
_IN_VAIN = 64  # ... each one where less came than expected brings it nearer by so many


def nothing(start: int, end: int) -> tuple[list[bytes | memoryview], int, int]:
    return [], start, 0


class Reader:
    """One connection that may take part; its own thread and the leader have it by turns.

    answered: reads, since it came. cold: whether it left because data had to be waited for.
    error: what ended it, to be raised in its own thread. parts: what is left to send.
    """

    def __init__(
        self,
        transmission: Transmission,
        sock: socket.socket,
        codec: Codec,
        incoming: Incoming,
        threads: Threads,
        *,
        most: int,
        spin_us: int,
    ) -> None:
        self.transmission = transmission
        self.codec = codec
        self.incoming = incoming
        self.threads = threads
        self.most = most  # bytes of a read
        self.spin_us = spin_us
        self.fd = sock.fileno()
        # Says None if there is nothing, which takes less time than an exception.
        self.read_into = io.FileIO(self.fd, closefd=False).readinto
        self.turn = _thread.allocate_lock()  # held, but for the moment in which a follower is called
        self.turn.acquire()
        self.taking_part = False
        self.cold = False
        self.error: Exception | None = None
        self.entry: Request | None = None  # of the last batch in the ledger
        self.parts: list[bytes | memoryview] = []
        self.room = memoryview(b"")  # where the next requests are received
        self.replies: Replies = nothing
        self.first = self.past = 0  # buffer[first:past] are the requests that are being answered
        self._came = 0
        self._enough = 0  # requests; `gather` wants so many
        self._to_count = 0  # batches until it counts

    @property
    def answered(self) -> int:
        return self.transmission.answered - self._came

    def come(self) -> bool:
        """Be ready to take part; False if there is a request already."""
        self._came = self.transmission.answered
        self.cold, self.error = False, None
        return self.make_room()

    def leave(self) -> None:
        """Keep no memory that others would have to wait for."""
        self.replies, self.room = nothing, memoryview(b"")

    def release(self) -> None:
        """The connection has ended. What is left, and the frames of an error, would keep mapped memory."""
        self.parts, self.error = [], None

    def make_room(self) -> bool:
        """Be ready to receive; False if there is a request already, which is not for us."""
        incoming, width = self.incoming, self.codec.request_size
        rest = incoming.end - incoming.start
        if rest >= width:
            return False
        if rest and incoming.start:
            incoming.buffer[:rest] = bytes(incoming.buffer[incoming.start : incoming.end])
        incoming.start, incoming.end = 0, rest
        self.room = incoming.buffer[rest : _MOST_REQUESTS * width]
        return True

    def gather(self) -> None:
        """Receive what comes in the next moments too, up to a part of what the client has in flight.

        A client with many requests in flight sends the next ones while it takes its replies. If each is
        answered at once, both sides make more calls, and get into each other's way at the socket. If all are
        waited for, the client runs dry and falls asleep. How many it has is counted now and then: those
        that have come when no more come.
        """
        self._to_count -= 1
        counting = self._to_count < 0
        enough = _MOST_REQUESTS if counting else self._enough
        incoming, width = self.incoming, self.codec.request_size
        more = True
        while more and incoming.end < enough * width:
            until = perf_counter_ns() + _LOOK_NS
            while perf_counter_ns() < until:
                give_way()
            n = self.read_into(incoming.buffer[incoming.end : _MOST_REQUESTS * width])
            incoming.end += n or 0
            more = bool(n)
        if counting:
            in_flight = incoming.end // width
            self._enough = in_flight // _SHARE if in_flight >= _DEEP else 0
            self._to_count = _NEXT_COUNT
        elif not more:
            self._to_count -= _IN_VAIN

    def in_flight(self) -> list[ParsedRequest]:
        """What is being answered. From any thread."""
        try:
            return self.codec.parse_requests(self.incoming.buffer, self.first, self.past, 0)[0]
        except (ProtocolError, struct.error):
            return []  # they have been answered meanwhile

    def drop(self, sent: int) -> None:
        """So many bytes of the parts are gone."""
        parts, whole = self.parts, 0
        while whole < len(parts) and sent >= len(parts[whole]):
            sent -= len(parts[whole])
            whole += 1
        del parts[:whole]
        if sent:
            parts[0] = memoryview(parts[0])[sent:]

    def send_rest(self, export: ServedExport) -> None:
        """In its own thread: send what is left, as fast as the client takes it.
        Raises OSError, and EnbanError."""
        while self.parts:
            try:
                self.drop(os.writev(self.fd, self.parts))
            except OSError as error:
                if error.errno != errno.EFAULT:
                    raise
                self._fetch(export)
        self.transmission.sending = False
        self.past = self.first

    def _fetch(self, export: ServedExport) -> None:
        """Replace mapped memory in what is left to send by data that are read now. Raises EnbanError."""
        for back, (_, _, _, offset, length, _) in enumerate(reversed(self.in_flight())):
            index = len(self.parts) - 1 - 2 * back
            if index < 0:
                break
            data = bytearray(len(self.parts[index]))
            drive(export.door.read_into(data, export.base + offset + length - len(data)))
            self.parts[index] = memoryview(data)
