"""One link of a bridge, and what waits to be written to it."""

from __future__ import annotations

from collections import deque
from time import monotonic

from .pace import Pace

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .transports.base import Link, Transport

QUEUE_BYTES = 1 << 18


class Peer:
    """See the module. dropped: bytes from the guest that it was too slow for. unheard: bytes of a watcher."""

    __slots__ = (
        "dropped", "fds", "is_guest", "limit", "link", "queue", "queued", "received",
        "sent", "spoke", "spoken", "stalled", "stuck_since", "transport", "unheard",
    )  # fmt: skip

    def __init__(self, link: Link, transport: Transport, *, is_guest: bool) -> None:
        self.link = link
        self.transport = transport
        self.is_guest = is_guest
        self.queue: deque[memoryview] = deque()
        self.queued = 0
        self.limit = QUEUE_BYTES
        if transport.pace_baud:
            link.pace_in, link.pace_out = Pace(transport.pace_baud), Pace(transport.pace_baud)
            self.limit = link.pace_out.most
        self.fds = tuple({link.read_fd, link.write_fd} - {-1})
        self.stuck_since = 0.0  # when it last took bytes, while some are queued
        self.stalled = False
        self.spoke = False
        self.spoken = 0.0
        self.received = self.sent = self.dropped = self.unheard = 0

    def send(self, data: bytes) -> None:
        """Write what can be written now and queue the rest. Raises LinkEnded."""
        taken = 0
        if not self.queue and self.link.pace_out is None:
            taken = self.link.write(data)
            self.sent += taken
            if taken == len(data):
                return
        view = memoryview(data)[taken:]
        if not self.queued:
            self.stuck_since = monotonic()
            if self.link.pace_out is not None:
                self.link.pace_out.begin(self.stuck_since)
        self.queue.append(view)
        self.queued += len(view)

    def flush(self) -> None:
        """Write what is queued, as far as there is room and the pace allows. Raises LinkEnded."""
        pace = self.link.pace_out
        while self.queue:
            view = self.queue[0]
            if pace is not None:
                now = monotonic()
                view = view[: pace.room(now)]
                if not view:
                    return
            taken = self.link.write(view)
            if not taken:
                return
            if pace is not None:
                pace.passed(taken, now)
            self.sent += taken
            self.queued -= taken
            self.stuck_since = monotonic()
            self.stalled = False
            if taken == len(self.queue[0]):
                self.queue.popleft()
            else:
                self.queue[0] = self.queue[0][taken:]
        if pace is not None:
            pace.rest()

    def room(self) -> int:
        return self.limit - self.queued

    def read(self, most: int) -> bytes:
        """Bytes that are there, as far as the pace allows. Raises LinkEnded."""
        pace = self.link.pace_in
        if pace is None:
            return self.link.read(most)
        now = monotonic()
        pace.begin(now)
        most = min(most, pace.room(now))
        if most <= 0:
            return b""
        data = self.link.read(most)
        pace.passed(len(data), now)
        if len(data) < most:
            pace.rest()
        return data

    def may_write(self, now: float) -> bool:
        pace = self.link.pace_out
        return bool(self.queue) and (pace is None or pace.room(now) > 0)

    def due(self, now: float) -> float | None:
        """When a paced line that is busy now may carry more; None if there is nothing to wait for."""
        due = [
            pace.due()
            for pace in (self.link.pace_out, self.link.pace_in)
            if pace is not None and not pace.idle and pace.room(now) <= 0
        ]
        return min(due, default=None)


def role(peer: Peer) -> str:
    """What it is, for people."""
    return "guest" if peer.is_guest else "watcher" if peer.transport.watch else "debugger"


def state(peer: Peer | None, side: Transport) -> str:
    if peer is None:
        return side.reason or "not connected"
    text = f"{peer.received} bytes from it, {peer.sent} to it"
    for count, what in (
        (peer.queued, "queued"),
        (peer.dropped, "lost to it"),
        (peer.unheard, "not passed on"),
    ):
        if count:
            text += f", {count} {what}"
    return text
