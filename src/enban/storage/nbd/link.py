"""One connection to an NBD server, used by any number of threads at once.

Each thread sends its request and waits for its reply. One of those that wait, the leader,
receives for all: it puts data where it belongs, wakes whoever is served, and when its own
reply is complete hands the lead to another that still waits. So no thread of its own is
needed, and with one user nothing is handed over at all.

Rule kept: a thread has one request out at a time, and has sent all of it before it waits.
So whoever the server is waiting for is receiving, and nobody can block everybody.

A TLS stream must not be read and written at the same time, so there a request has the
connection for itself.
"""

from __future__ import annotations

import _thread
import socket

from ...block.runtime import interruptible
from ...errors import EnbanError, PeerError, from_oserror
from ...wire.nbd import ClientHandshake, ClientTransmission, Negotiator
from ...wire.nbd.constants import BASE_ALLOCATION, TLS_OFF, TLS_REQUIRED
from ...wire.nbd.negotiator import READY, START_TLS
from ...wire.nbd.replies import Data, Done, Hole, Status

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...wire.nbd import Session
    from ...wire.nbd.replies import ReplyEvent, Transaction
    from .address import Address

CONNECT_S = 10  # for connecting and the handshake
_BUFFER = 128 << 10


class LinkLostError(PeerError):
    """The connection is gone; what was in flight on it may or may not have been done."""


class Ticket:
    """A request on its way. buffer: where the data of a READ goes. extents: of the link's context."""

    __slots__ = ("buffer", "done", "error", "extents", "message", "wake")

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.done = False
        self.error = 0
        self.message = ""
        self.extents: list[tuple[int, int]] = []
        self.wake = _thread.allocate_lock()
        self.wake.acquire()


_NO_BUFFER = memoryview(b"")


class Link:
    def __init__(self, sock: socket.socket, session: Session, leftover: bytes) -> None:
        self.session = session
        self.lost: LinkLostError | None = None
        self._sock = sock
        self._machine = ClientTransmission(session, leftover)
        self._buffer = memoryview(bytearray(_BUFFER))
        self._sending = _thread.allocate_lock()
        self._guard = _thread.allocate_lock()  # over the three below, and `done` of tickets
        self._leading = False
        self._open: set[Ticket] = set()
        self._waiting: dict[Ticket, None] = {}  # those asleep, in order of arrival

    @property
    def in_flight(self) -> int:
        return len(self._open)

    def ask(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        *,
        payload: memoryview = _NO_BUFFER,
        buffer: memoryview = _NO_BUFFER,
    ) -> Ticket:
        """Send a request and wait for its reply. Raises LinkLostError, and UsageError for what the
        server does not offer; an error the server answers with is in the ticket."""
        ticket = Ticket(buffer)
        with self._sending:
            self._check()
            transaction = self._machine.request(kind, offset, length, flags)
            transaction.tag = ticket
            with self._guard:
                self._open.add(ticket)
            try:
                if len(payload) <= 1 << 16:
                    self._sock.sendall(transaction.header + payload)
                else:
                    self._sock.sendall(transaction.header)
                    self._sock.sendall(payload)
            except OSError as error:
                raise self.fail(error) from error
            if self.session.tls:
                self._await(ticket)
        if not self.session.tls:
            self._await(ticket)
        return ticket

    def _await(self, ticket: Ticket) -> None:
        with self._guard:
            if self._settled(ticket):
                return
            lead = not self._leading
            if lead:
                self._leading = True
            else:
                self._waiting[ticket] = None
        if not lead:
            ticket.wake.acquire()
            if self._settled(ticket):
                return
        # The lead is ours from here on.
        try:
            while not ticket.done:
                self._receive()
        except (OSError, PeerError) as error:
            raise self.fail(error) from error
        except KeyboardInterrupt:
            # Bytes of a reply may have been taken from the socket and are lost.
            self.fail(ConnectionAbortedError(103, "interrupted"))
            raise
        finally:
            with self._guard:
                if self._waiting and self.lost is None:
                    heir = next(iter(self._waiting))
                    del self._waiting[heir]
                    heir.wake.release()
                else:
                    self._leading = False

    def _settled(self, ticket: Ticket) -> bool:
        if not ticket.done:
            self._check()
        return ticket.done

    def _check(self) -> None:
        if self.lost is not None:
            raise self.lost

    @interruptible
    def _receive(self) -> None:
        machine = self._machine
        wanted = machine.wanted()
        if wanted is not None:  # the rest of a large piece goes straight to its place
            transaction, at, size = wanted
            start = at - transaction.offset
            n = self._sock.recv_into(_ticket(transaction).buffer[start : start + size])
            if n:
                machine.filled(n)
        else:
            n = self._sock.recv_into(self._buffer)
            if n:
                machine.receive(self._buffer[:n])
        if not n:
            raise ConnectionResetError(104, "the server hung up")
        while (event := machine.next_event()) is not None:
            self._take(event)

    def _take(self, event: ReplyEvent) -> None:
        transaction = event.transaction
        ticket = _ticket(transaction)
        if isinstance(event, Data):
            start = event.offset - transaction.offset
            ticket.buffer[start : start + len(event.data)] = event.data
        elif isinstance(event, Hole):
            start = event.offset - transaction.offset
            ticket.buffer[start : start + event.length] = bytes(event.length)
        elif isinstance(event, Status):
            ticket.extents = event.extents  # a link asks for one context
        elif isinstance(event, Done):
            ticket.error, ticket.message = transaction.error, transaction.message
            with self._guard:
                ticket.done = True
                self._open.discard(ticket)
                if ticket in self._waiting:
                    del self._waiting[ticket]
                    ticket.wake.release()

    def fail(self, error: Exception) -> LinkLostError:
        """The connection cannot be used any more: tell everybody."""
        with self._guard:
            if self.lost is None:
                if isinstance(error, EnbanError):
                    what = error.what
                else:
                    what = (getattr(error, "strerror", None) or str(error) or "connection lost").lower()
                self.lost = LinkLostError(what)
            lost = self.lost
            self._open.clear()
            for ticket in self._waiting:
                ticket.wake.release()
            self._waiting.clear()
        try:
            # A leader of another thread, blocked in a receive, must notice too.
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)
        except OSError:
            pass
        return lost

    def close(self) -> None:
        """Take leave, if nothing is in flight; never waits."""
        if self.lost is None and not self._open:
            try:
                self._sock.settimeout(1)
                self._sock.sendall(self._machine.disconnect())
            except (OSError, EnbanError):
                pass
        self.fail(ConnectionAbortedError(103, "closed"))
        self._sock.close()


def _ticket(transaction: Transaction) -> Ticket:
    ticket = transaction.tag
    assert isinstance(ticket, Ticket)
    return ticket


def connect(address: Address, speaks_of: str = BASE_ALLOCATION) -> Link:
    """Connect and go through the handshake. speaks_of: the metadata context that block status tells.
    Raises HostError, PeerError (RefusedError, ProtocolError)."""
    try:
        if address.path:
            sock = socket.socket(socket.AF_UNIX)
            sock.settimeout(CONNECT_S)
            try:
                sock.connect(address.path)
            except BaseException:
                sock.close()
                raise
        else:
            sock = socket.create_connection((address.host, address.port), CONNECT_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    except OSError as error:
        if isinstance(error, TimeoutError) or not error.errno or isinstance(error, socket.gaierror):
            words = error.strerror or ("no answer" if isinstance(error, TimeoutError) else str(error))
            raise PeerError(f"cannot connect: {words.lower()}", path=address.uri) from error
        raise from_oserror(error, "connect", address.uri, hint="is the server running?") from error
    try:
        return _handshake(address, sock, speaks_of)
    except (OSError, EnbanError) as error:
        sock.close()
        if isinstance(error, EnbanError):
            error.path = address.uri
            raise
        words = (
            "no answer in time" if isinstance(error, TimeoutError) else (error.strerror or str(error)).lower()
        )
        raise PeerError(f"handshake failed: {words}", path=address.uri) from error
    except BaseException:
        sock.close()
        raise


def _handshake(address: Address, sock: socket.socket, speaks_of: str) -> Link:
    handshake = ClientHandshake()
    negotiator = Negotiator(
        handshake,
        address.export,
        contexts=(speaks_of,),
        tls=TLS_REQUIRED if address.tls else TLS_OFF,
    )
    while (step := negotiator.advance()) is not READY:
        said = handshake.to_send()
        if said:
            sock.sendall(said)
        if step is START_TLS:
            from ..tls import client_context

            verify_host = address.verify and (not address.path or bool(address.tls_hostname))
            context = client_context(address.tls_dir, verify_host=verify_host)
            if not address.verify:
                import ssl

                context.verify_mode = ssl.CERT_NONE
            sock = context.wrap_socket(sock, server_hostname=address.tls_hostname or address.host)
            handshake.tls_is_up()
            continue
        data = sock.recv(1 << 16)
        if not data:
            handshake.end_of_stream()
        handshake.receive(data)
    assert handshake.session is not None
    sock.settimeout(None)
    return Link(sock, handshake.session, handshake.leftover())
