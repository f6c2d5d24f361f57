"""One client, from its first byte to its last.

A client has `handshake_s` seconds to finish the handshake, TLS included; afterwards it may
take all the time it wants. Whatever it does, only its own connection ends.
"""

from __future__ import annotations

import socket
from time import monotonic, perf_counter_ns

from ...errors import EnbanError
from ...wire.nbd import ProtocolError, ServerHandshake
from ...wire.nbd.constants import (
    COMMAND_NAMES,
    OPT_GO,
    OPT_INFO,
    OPT_LIST_META_CONTEXT,
    REP_ERR_UNKNOWN,
    TLS_OFF,
    TLS_REQUIRED,
)
from ...wire.nbd.handshake import TLS, TRANSMISSION
from ...wire.nbd.handshake_server import (
    ContextsRequested,
    ExportRequested,
    HandshakeEnded,
    ListRequested,
)
from .. import sockets
from .transmission import Transmission

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...wire.nbd.handshake_server import ServerEvent
    from .export import ServedExport
    from .server import Server


class Connection:
    """peer: who it is, for messages. number: counts connections. export: None during the handshake."""

    def __init__(self, server: Server, sock: socket.socket, peer: str, number: int) -> None:
        self.server = server
        self.peer = peer
        self.number = number
        self.export: ServedExport | None = None
        self.transmission: Transmission | None = None
        self.since = monotonic()
        self._sock = sock

    def run(self) -> None:
        """The life of the connection; raises nothing a peer can cause."""
        try:
            self._run()
        except (OSError, EnbanError) as error:
            text = str(error) if isinstance(error, EnbanError) else (error.strerror or str(error)).lower()
            self.server.log(f"{self.peer}: {text}")
        finally:
            self._sock.close()

    def _run(self) -> None:
        sockets.tune(self._sock)
        handshake = self._handshake()
        session = handshake.session
        if session is None or self.export is None:
            return
        self._sock.settimeout(None)
        server = self.server
        self.transmission = Transmission(
            self._sock,
            session,
            self.export,
            handshake.leftover(),
            spin_us=server.spin_us,
            threads=server.threads,
            log=lambda text: server.log(f"{self.peer}: {text}"),
            trace=server.trace,
        )
        try:
            self.transmission.run()
        finally:
            self.transmission.release()
            self.transmission = None

    def stop_receiving(self) -> None:
        """From another thread: answer what was received, then end."""
        self._shut(socket.SHUT_RD)

    def cut(self) -> None:
        """From another thread: end now, whatever the client is doing."""
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        try:
            # Not the method of a TLS socket, which would also change what the other thread is using.
            socket.socket.shutdown(self._sock, how)
        except OSError:
            pass  # it has ended by itself

    # -- handshake -------------------------------------------------------------------------

    def _handshake(self) -> ServerHandshake:
        server = self.server
        deadline = monotonic() + server.handshake_s
        tls = TLS_REQUIRED if server.tls is not None else TLS_OFF
        handshake = ServerHandshake(tls=tls, style=server.style)
        while True:
            try:
                event = handshake.next_event()
            except ProtocolError:
                self._send(handshake, deadline)
                raise
            if event is not None:
                self._decide(handshake, event)
            self._send(handshake, deadline)
            if handshake.state == TLS:
                assert server.tls is not None
                self._remain(deadline)
                self._sock = server.tls.wrap_socket(self._sock, server_side=True)
                handshake.tls_is_up()
            elif handshake.state == TRANSMISSION or isinstance(event, HandshakeEnded):
                return handshake
            elif event is None:
                self._remain(deadline)
                data = self._sock.recv(1 << 16)
                if not data:
                    handshake.end_of_stream()
                    return handshake
                handshake.receive(data)

    def _remain(self, deadline: float) -> None:
        remaining = deadline - monotonic()
        if remaining <= 0:
            raise TimeoutError(110, "the handshake took too long")
        self._sock.settimeout(remaining)

    def _send(self, handshake: ServerHandshake, deadline: float) -> None:
        data = handshake.to_send()
        if data:
            self._remain(deadline)
            self._sock.sendall(data)

    def _decide(self, handshake: ServerHandshake, event: ServerEvent) -> None:
        exports = self.server.exports
        if self.server.stopping:
            handshake.shutting_down = True
        if isinstance(event, ListRequested):
            handshake.answer_list([(export.name, export.description) for export in exports.values()])
        elif isinstance(event, ContextsRequested):
            if event.name not in exports:
                handshake.refuse(REP_ERR_UNKNOWN, self._unknown(event.name))
                return
            everything = event.option == OPT_LIST_META_CONTEXT and not event.queries
            handshake.answer_contexts(
                [
                    (number, name)
                    for number, name in exports[event.name].contexts.items()
                    if everything
                    or _matches(name, event.queries, listing=event.option == OPT_LIST_META_CONTEXT)
                ]
            )
        elif isinstance(event, ExportRequested):
            export = exports.get(event.name)
            if export is None:
                text = self._unknown(event.name)
                if event.option not in (OPT_INFO, OPT_GO):
                    self.server.log(f"{self.peer}: {text}")
                handshake.refuse(REP_ERR_UNKNOWN, text)
            else:
                self.export = export  # before its size is told: `Server.end_clients` must not overlook us
                if handshake.accept(export.offer()) is None:
                    self.export = None

    def _unknown(self, name: str) -> str:
        return f"there is no export '{name}'"

    # -- status ----------------------------------------------------------------------------

    def status(self) -> list[str]:
        """Lines for a person: the connection, and what it has in flight."""
        transmission = self.transmission
        if transmission is None or self.export is None:
            return [f"{self.peer}: in the handshake for {monotonic() - self.since:.1f} s"]
        batch, current = transmission.in_flight(), transmission.current
        line = f"{self.peer}: export '{self.export.name}', {transmission.answered} requests answered"
        if not batch:
            return [f"{line}, idle"]
        age_ms = (perf_counter_ns() - transmission.since_ns) / 1e6
        state = "waiting for the client to take replies" if transmission.sending else "in flight"
        lines = [f"{line}, {len(batch)} {state} for {age_ms:.1f} ms"]
        for request in batch:
            flags, kind, _, offset, length, _ = request
            name = COMMAND_NAMES[kind] if kind < len(COMMAND_NAMES) else f"command {kind}"
            mark = " <- at the disk" if request is current else ""
            lines.append(f"    {name} {offset:#x}+{length:#x} flags {flags:#x}{mark}")
        return lines


def _matches(name: str, queries: list[str], *, listing: bool) -> bool:
    """Whether a context was asked for: by name, or, when listing, by how it begins ("base:")."""
    return any(
        query == name or (listing and query.endswith(":") and name.startswith(query)) for query in queries
    )
