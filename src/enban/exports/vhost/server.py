"""A socket at which one front-end at a time may have a disk.

One thread (`run`) waits for a front-end and for its messages; the queues have threads of their own. A guest
has its disk alone, so who comes while another one is connected waits shortly (a monitor that was just
replaced may still be leaving) and is turned away with a line. Nothing of a session outlives it.
"""

from __future__ import annotations

import select
import socket
import threading
from time import monotonic

from ...errors import PeerError
from .requests import Device
from .session import Session
from .spin import SPIN_US

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...block.door import Door

QUEUES = 8
PATIENCE_S = 3.0
_STATUS, _WAKE = b"s", b"w"


class Server:
    """listener: a listening unix socket, closed at the end. id: what the guest gets as the disk's serial
    number. queues: how many a front-end may use. patience_s: how long a second one waits. on_full: see
    `requests.Device`."""

    def __init__(
        self,
        door: Door,
        listener: socket.socket,
        *,
        id: str = "enban",
        queues: int = QUEUES,
        spin_us: int = SPIN_US,
        patience_s: float = PATIENCE_S,
        log: Callable[[str], None] = lambda text: None,
        on_full: Callable[[str], None] | None = None,
    ) -> None:
        self.device = Device(door, id, log=log, on_full=on_full)
        self.log = log
        self._listener = listener
        self._queues = queues
        self._spin_us = spin_us
        self._session: Session | None = None
        self._waiting: socket.socket | None = None
        self._patience_s = patience_s
        self._patience = 0.0  # the moment when it ends
        self._stopping = False
        self._guard = threading.Lock()
        self._wake_receiver, self._wake_sender = socket.socketpair()

    def stop(self) -> None:
        """Begin to end. May be called from a signal handler, and more than once."""
        self._stopping = True
        try:
            self._wake_sender.send(_WAKE, socket.MSG_DONTWAIT)
        except OSError:
            pass  # it has ended

    def request_status(self) -> None:
        """Have `status` written to the log. May be called from a signal handler."""
        try:
            self._wake_sender.send(_STATUS, socket.MSG_DONTWAIT)
        except OSError:
            pass  # it has ended, or is being woken already

    def status(self) -> str:
        """Who is connected and what is in flight, for how long; lines for a person."""
        ledger = self.device.door.ledger
        session = self._session
        lines = [
            f"a front-end is connected, {session.answered} requests answered" if session else "no front-end",
            f"{self.device.door.node.name}: {ledger.started} requests begun, {ledger.done} done, "
            f"{ledger.failed} failed",
        ]
        lines += [f"    {one!r} for {one.age_ns / 1e6:.1f} ms" for one in ledger.in_flight]
        return "\n".join(lines)

    def resized(self) -> bool:
        """Tell the guest that the disk has another size; whether there is one that can be told."""
        with self._guard:
            return self._session is not None and self._session.notify_size()

    def run(self) -> None:
        """Serve until `stop`; what the guest has asked for is answered when this returns."""
        self._listener.setblocking(False)
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._end_session()
            if self._waiting is not None:
                self._waiting.close()
            self._listener.close()
            self._wake_receiver.close()
            self._wake_sender.close()

    def _turn(self) -> None:
        if self._session is None and self._waiting is not None:
            sock, self._waiting = self._waiting, None
            self._begin(sock)
        poll = select.poll()
        poll.register(self._wake_receiver, select.POLLIN)
        session = self._session
        if session is not None:
            poll.register(session.fileno, select.POLLIN)
        timeout_s = None
        if self._waiting is None:
            poll.register(self._listener, select.POLLIN)
        else:
            timeout_s = max(0.0, self._patience - monotonic())
        ready = {fd for fd, _ in poll.poll(None if timeout_s is None else timeout_s * 1000 + 1)}
        if self._wake_receiver.fileno() in ready and _STATUS in self._wake_receiver.recv(4096):
            for line in self.status().splitlines():
                self.log(line)
        if self._listener.fileno() in ready:
            self._accept()
        elif self._waiting is not None and monotonic() >= self._patience:
            self.log("another front-end was turned away: the disk has one already")
            self._waiting.close()
            self._waiting = None
        if session is not None and session.fileno in ready:
            self._serve(session)

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return  # it went away before we looked
        if self._session is None:
            self._begin(sock)
        else:
            self._waiting, self._patience = sock, monotonic() + self._patience_s

    def _begin(self, sock: socket.socket) -> None:
        self.device.features, self.device.writeback = 0, True
        try:
            session = Session(sock, self.device, queues=self._queues, spin_us=self._spin_us)
        except (OSError, PeerError) as error:
            self.log(f"a front-end cannot be served: {error}")
            sock.close()
            return
        with self._guard:
            self._session = session

    def _serve(self, session: Session) -> None:
        try:
            if session.serve_one():
                return
        except (PeerError, OSError, MemoryError, RuntimeError) as error:  # the last one: no more threads
            self.log(f"the front-end is disconnected: {error}")
        self._end_session()

    def _end_session(self) -> None:
        with self._guard:
            session, self._session = self._session, None
        if session is not None:
            session.close()
