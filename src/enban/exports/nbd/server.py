"""An NBD server: listens, gives every client a thread, and ends in good order.

    run -> clients come and go ... stop() from anywhere, or idle -> drain -> run returns

Draining: nobody new is let in; what clients have sent is answered; then their connections
end. Who does not take its replies within `grace_s` is cut off. Closing the disks afterwards,
which flushes them, is up to the caller.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from time import monotonic

from ...wire.nbd.constants import EXTENDED
from .connection import Connection
from .incoming import SPIN_US, Threads

TYPE_CHECKING = False
if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Iterable

    from ...storage.awake import KeepAwake
    from .export import ServedExport
    from .trace import Trace

HANDSHAKE_S = 10
GRACE_S = 10
_STATUS, _WAKE = b"s", b"w"


class Server:
    """exports: by name. shared: how many clients at once; others wait to be let in.

    idle_s: end when there has been no client for so long; 0 is never. style: the best message style that
    clients are offered (`ServerHandshake`). awake: keeps processors from sleeping while clients are quick.
    """

    def __init__(
        self,
        exports: Iterable[ServedExport],
        listeners: Iterable[socket.socket],
        *,
        shared: int = 64,
        tls: ssl.SSLContext | None = None,
        handshake_s: float = HANDSHAKE_S,
        idle_s: float = 0,
        grace_s: float = GRACE_S,
        spin_us: int = SPIN_US,
        style: int = EXTENDED,
        awake: KeepAwake | None = None,
        trace: Trace | None = None,
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.exports = {export.name: export for export in exports}
        self.listeners = list(listeners)
        self.shared = shared
        self.tls = tls
        self.handshake_s = handshake_s
        self.idle_s = idle_s
        self.grace_s = grace_s
        self.spin_us = spin_us
        self.style = style
        self.threads = Threads(awake)
        self.trace = trace
        self.log = log
        self.stopping = False
        self.accepted = 0
        self._connections: dict[int, tuple[Connection, threading.Thread]] = {}
        self._guard = threading.Lock()
        self._started = monotonic()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)

    # -- from any thread or a signal handler -------------------------------------------------

    def stop(self) -> None:
        """Begin to end. May be called from a signal handler, and more than once."""
        self.stopping = True
        self._wake(_WAKE)

    def request_status(self) -> None:
        """Have `status` written to the log. May be called from a signal handler."""
        self._wake(_STATUS)

    def _wake(self, what: bytes) -> None:
        try:
            self._wake_sender.send(what)
        except OSError:
            pass  # full: it will wake up anyway; closed: it has ended

    @property
    def clients(self) -> int:
        return len(self._connections)

    def status(self) -> str:
        """Who is connected and what is in flight, for how long; lines for a person."""
        with self._guard:
            connections = [connection for connection, _ in self._connections.values()]
        lines = [
            f"serving {len(self.exports)} export(s) for {monotonic() - self._started:.0f} s, "
            f"{len(connections)} client(s) now, {self.accepted} ever"
        ]
        for connection in connections:
            lines += connection.status()
        doors = {id(export.door): export.door for export in self.exports.values()}
        for door in doors.values():
            ledger = door.ledger
            lines.append(
                f"{door.node.name}: {ledger.started} requests begun, {ledger.done} done, "
                f"{ledger.failed} failed, {ledger.cancelled} cancelled"
            )
            lines += [
                f"    #{request.number} {request.operation} {request.offset:#x}+{request.length:#x} "
                f"{request.state} for {request.age_ns / 1e6:.1f} ms"
                for request in ledger.in_flight
            ]
        return "\n".join(lines)

    def end_clients(self, export: ServedExport) -> None:
        """Disconnect who uses an export: what they have sent is answered, then they are gone. Returns when
        all of them are. From any thread but those of connections."""
        with self._guard:
            users = [pair for pair in self._connections.values() if pair[0].export is export]
        self._end(users)

    # -- the main loop -----------------------------------------------------------------------

    def run(self) -> None:
        """Serve until `stop` or until idle; every connection has ended when this returns."""
        idle_since = monotonic()
        paused_until = 0.0
        for listener in self.listeners:
            listener.setblocking(False)
        try:
            while not self.stopping:
                now = monotonic()
                if self.clients:
                    idle_since = now
                elif self.idle_s and now - idle_since >= self.idle_s:
                    self.log(f"no client for {self.idle_s:g} s, ending")
                    break
                poll = select.poll()
                poll.register(self._wake_receiver, select.POLLIN)
                waits = []
                if now < paused_until:
                    waits.append(paused_until - now)
                elif not self.shared or self.clients < self.shared:
                    for listener in self.listeners:
                        poll.register(listener, select.POLLIN)
                if self.idle_s and not self.clients:
                    waits.append(self.idle_s - (now - idle_since))
                ready = {fd for fd, _ in poll.poll(min(waits) * 1000 + 1 if waits else None)}
                if self._wake_receiver.fileno() in ready:
                    self._woken()
                for listener in self.listeners:
                    if listener.fileno() in ready and not self._accept(listener):
                        paused_until = monotonic() + 1
        finally:
            self.stopping = True
            for listener in self.listeners:
                listener.close()
            self._drain()
            for export in self.exports.values():
                export.mapped.release()
            self._wake_receiver.close()
            self._wake_sender.close()

    def _woken(self) -> None:
        try:
            said = self._wake_receiver.recv(4096)
        except BlockingIOError:
            return
        if _STATUS in said:
            for line in self.status().splitlines():
                self.log(line)

    def _accept(self, listener: socket.socket) -> bool:
        """Let one client in; False if this machine cannot take more now."""
        if self.shared and self.clients >= self.shared:
            return True
        try:
            sock, address = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                self.log(f"cannot accept a client: {os.strerror(error.errno).lower()}")
                return False
            return True  # it went away before we looked
        self.accepted += 1
        number = self.accepted
        connection = Connection(self, sock, _name_of(sock, address, number), number)
        thread = threading.Thread(target=self._live, args=(connection,), name=f"nbd-{number}", daemon=True)
        with self._guard:
            self._connections[number] = connection, thread
        try:
            thread.start()
        except RuntimeError as error:
            with self._guard:
                del self._connections[number]
            sock.close()
            self.log(f"cannot serve a client: {error}")
            return False
        return True

    def _live(self, connection: Connection) -> None:
        try:
            connection.run()
        finally:
            with self._guard:
                del self._connections[connection.number]
            self._wake(_WAKE)

    def _drain(self) -> None:
        with self._guard:
            living = list(self._connections.values())
        self._end(living)

    def _end(self, connections: list[tuple[Connection, threading.Thread]]) -> None:
        for connection, _ in connections:
            connection.stop_receiving()
        deadline = monotonic() + self.grace_s
        for _, thread in connections:
            thread.join(max(0.0, deadline - monotonic()))
        for connection, thread in connections:
            if thread.is_alive():
                self.log(f"{connection.peer}: cut off, it does not take its replies")
                connection.cut()
        for _, thread in connections:
            thread.join()


def _name_of(sock: socket.socket, address: object, number: int) -> str:
    if sock.family == socket.AF_UNIX:
        return f"client {number}"
    assert isinstance(address, tuple)
    return f"client {number} ({address[0]}:{address[1]})"
