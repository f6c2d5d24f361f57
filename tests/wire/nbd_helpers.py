"""Both ends of an NBD connection in memory, for the tests of wire.nbd."""

from __future__ import annotations

from enban.wire.nbd import (
    ClientHandshake,
    ClientTransmission,
    Export,
    Negotiator,
    ServerHandshake,
    ServerTransmission,
)
from enban.wire.nbd import constants as c
from enban.wire.nbd.handshake_server import ContextsRequested, ExportRequested, ListRequested
from enban.wire.nbd.negotiator import NEED_BYTES, READY
from enban.wire.nbd.replies import Data, Done, Failed, Hole, Status, Transaction
from enban.wire.nbd.server import Disconnect, Request

ALL_FLAGS = (
    c.FLAG_SEND_FLUSH
    | c.FLAG_SEND_FUA
    | c.FLAG_SEND_TRIM
    | c.FLAG_SEND_WRITE_ZEROES
    | c.FLAG_CAN_MULTI_CONN
    | c.FLAG_SEND_RESIZE
    | c.FLAG_SEND_CACHE
    | c.FLAG_SEND_FAST_ZERO
)
STYLES = (c.SIMPLE, c.STRUCTURED, c.EXTENDED)
CONTEXTS = [(1, c.BASE_ALLOCATION), (7, "qemu:allocation-depth")]


class Disk:
    """A disk in memory and the server's answers for it. Zero blocks of 4 KiB are its holes."""

    BLOCK = 4096

    def __init__(self, size: int = 1 << 20, flags: int = ALL_FLAGS) -> None:
        self.data = bytearray(size)
        self.export = Export("disk", size, flags, description="a disk in memory")
        self.flushes = 0

    def is_hole(self, block: int) -> bool:
        return not any(self.data[block * self.BLOCK : (block + 1) * self.BLOCK])

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        end = offset + length
        while offset < end:
            stop = min(end, (offset // self.BLOCK + 1) * self.BLOCK)
            status = c.STATE_HOLE | c.STATE_ZERO if self.is_hole(offset // self.BLOCK) else 0
            if found and found[-1][1] == status:
                found[-1] = (found[-1][0] + stop - offset, status)
            else:
                found.append((stop - offset, status))
            offset = stop
        return found

    def answer(self, server: ServerTransmission, request: Request) -> bytes:
        if request.refusal:
            return server.reply_error(request, request.refusal, "against the rules")
        start, end = request.offset, request.offset + request.length
        if request.kind == c.CMD_READ:
            if server.session.style == c.SIMPLE or request.flags & c.CMD_FLAG_DF:
                return server.reply_read(request, self.data[start:end])
            parts = []
            for length, status in self.extents(start, request.length):
                piece = length if status else bytes(self.data[start : start + length])
                parts.append(server.reply_piece(request, start, piece))
                start += length
            return b"".join(parts) + server.reply_end(request)
        if request.kind == c.CMD_BLOCK_STATUS:
            extents = self.extents(start, request.length)
            if request.flags & c.CMD_FLAG_REQ_ONE:
                extents = extents[:1]
            replies = [server.reply_status(request, context, extents) for context in request.contexts]
            return b"".join(replies) + server.reply_end(request)
        if request.kind == c.CMD_WRITE:
            self.data[start:end] = request.payload
        elif request.kind in (c.CMD_TRIM, c.CMD_WRITE_ZEROES):
            self.data[start:end] = bytes(request.length)
        elif request.kind == c.CMD_FLUSH:
            self.flushes += 1
        elif request.kind == c.CMD_RESIZE:
            del self.data[request.offset :]
            self.data += bytes(request.offset - len(self.data))
        return server.reply_done(request)


def answer_question(hs: ServerHandshake, event: object, disk: Disk) -> None:
    """What a server with one export says to the questions of its handshake."""
    if isinstance(event, ListRequested):
        hs.answer_list([(disk.export.name, disk.export.description)])
    elif isinstance(event, ContextsRequested):
        wanted = event.queries
        if event.option == c.OPT_LIST_META_CONTEXT and not wanted:
            wanted = [name for _, name in CONTEXTS]
        hs.answer_contexts([(number, name) for number, name in CONTEXTS if name in wanted])
    elif isinstance(event, ExportRequested):
        if event.name in ("", disk.export.name):
            hs.accept(disk.export)
        else:
            hs.refuse(c.REP_ERR_UNKNOWN, f"no export '{event.name}'")


def serve_handshake(hs: ServerHandshake, data: bytes, disk: Disk) -> list[object]:
    """Feed the server and answer everything it asks; returns its events."""
    hs.receive(data)
    events: list[object] = []
    while (event := hs.next_event()) is not None:
        events.append(event)
        answer_question(hs, event, disk)
    return events


def connect(
    disk: Disk,
    style: int = c.EXTENDED,
    *,
    server_style: int = c.EXTENDED,
    contexts: tuple[str, ...] = (c.BASE_ALLOCATION, "qemu:allocation-depth"),
    max_payload: int = c.DEFAULT_MAX_PAYLOAD,
) -> tuple[ClientTransmission, ServerTransmission]:
    """A whole handshake in memory; the two ends of the transmission phase."""
    server = ServerHandshake(style=server_style, max_payload=max_payload)
    client = ClientHandshake()
    negotiator = Negotiator(client, disk.export.name, style=style, contexts=contexts)
    while True:
        step = negotiator.advance()
        serve_handshake(server, client.to_send(), disk)
        client.receive(server.to_send())
        if step == READY:
            break
        assert step == NEED_BYTES
    assert client.session is not None and server.session is not None
    return ClientTransmission(client.session), ServerTransmission(server.session, server.leftover())


class Outcome:
    """What a client learned about one transaction."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.status: dict[int, list[tuple[int, int]]] = {}
        self.failures: list[tuple[int, str, int | None]] = []
        self.done = False


def collect(client: ClientTransmission, received: bytes, into: dict[Transaction, Outcome]) -> None:
    """Feed the client and enter what it says."""
    client.receive(received)
    while (event := client.next_event()) is not None:
        outcome = into.setdefault(event.transaction, Outcome())
        assert not outcome.done
        if isinstance(event, Data | Hole):
            place = event.offset - event.transaction.offset
            data = bytes(event.data) if isinstance(event, Data) else bytes(event.length)
            outcome.data += bytes(max(0, place + len(data) - len(outcome.data)))
            outcome.data[place : place + len(data)] = data
        elif isinstance(event, Status):
            outcome.status[event.context] = event.extents
        elif isinstance(event, Failed):
            outcome.failures.append((event.error, event.message, event.offset))
        elif isinstance(event, Done):
            outcome.done = True


def serve(server: ServerTransmission, received: bytes, disk: Disk) -> bytes:
    """Feed the server, answer all requests; returns the replies."""
    server.receive(received)
    out = bytearray()
    while (event := server.next_event()) is not None:
        if not isinstance(event, Disconnect):
            out += disk.answer(server, event)
    return bytes(out)


def exchange(
    client: ClientTransmission,
    server: ServerTransmission,
    disk: Disk,
    transaction: Transaction,
    payload: bytes = b"",
) -> Outcome:
    """One request there and its answer back."""
    outcomes: dict[Transaction, Outcome] = {}
    collect(client, serve(server, transaction.header + payload, disk), outcomes)
    assert transaction.done and outcomes[transaction].done
    return outcomes[transaction]
