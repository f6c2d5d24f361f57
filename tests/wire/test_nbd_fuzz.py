"""The byte stream cut anywhere, damaged anywhere, and with hostile lengths: no crash, no hang, no memory.

The yardstick for a damaged stream is the same stream in one piece: however it is cut, the
machines must say the same and fail in the same words.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable, Iterator
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enban.wire.nbd import (
    ClientHandshake,
    ClientTransmission,
    Export,
    Negotiator,
    ProtocolError,
    RefusedError,
    ServerHandshake,
    ServerTransmission,
    Session,
    TooLargeError,
)
from enban.wire.nbd import constants as c
from enban.wire.nbd.messages import COMPACT_REQUEST, EXTENDED_CHUNK, EXTENDED_REQUEST, STRUCTURED_CHUNK
from enban.wire.nbd.negotiator import READY
from enban.wire.nbd.options import (
    GREETING_LAYOUT,
    OPTION,
    OPTION_REPLY,
    pack_context_query,
    pack_export_query,
    pack_option,
)
from enban.wire.nbd.replies import Data, Done, Failed, Hole, Status
from enban.wire.nbd.server import Disconnect, Request
from tests.wire.nbd_helpers import ALL_FLAGS, STYLES, Disk, answer_question, connect, serve, serve_handshake

KIB = 1 << 10
Told = list[tuple[object, ...]]

quick = settings(max_examples=150, deadline=None)


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """`data` in pieces of the lengths given, over and over; the lengths may be 0."""
    pos = turn = 0
    while pos < len(data):
        length = cuts[turn % len(cuts)] if turn < 10_000 else len(data)
        yield data[pos : pos + length]
        pos += length
        turn += 1


def damage(data: bytes, hurts: list[tuple[int, int, int]]) -> bytes:
    """`data` with bytes changed, cut out or doubled."""
    out = bytearray(data)
    for place, kind, value in hurts:
        at = place % max(1, len(out))
        if kind == 0:
            out[at : at + 1] = bytes([value])
        elif kind == 1:
            del out[at : at + 1 + value % 40]
        elif kind == 2:
            out[at:at] = out[at : at + value % 40]
        else:  # a length field likes these
            out[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\x7f\xff\xff\xff", b"\0\0\0\1")[value % 4]
    return bytes(out)


cuts = st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(any)
hurts = st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 3), st.integers(0, 255)), max_size=4)


# ---- the four machines, each told a stream in pieces and asked what it made of it ----


def server_handshake_says(stream: Iterator[bytes]) -> Told:
    hs, disk = ServerHandshake(tls=c.TLS_ALLOWED), Disk(64 * KIB)
    told: Told = []
    try:
        for piece in stream:
            hs.receive(piece)
            while (event := hs.next_event()) is not None:
                told.append((type(event).__name__, getattr(event, "option", 0), getattr(event, "name", "")))
                answer_question(hs, event, disk)
                if hs.state == "starting TLS":
                    return [*told, (hs.to_send(),)]
            if hs.session is not None:
                break
            assert len(hs._in) < OPTION.size + c.MAX_OPTION
        hs.end_of_stream()
    except ProtocolError as error:
        told.append((type(error).__name__, str(error)))
    return [*told, (hs.state, hs.to_send())]


def client_handshake_says(stream: Iterator[bytes]) -> Told:
    """A negotiating client against the recorded half of a server."""
    hs = ClientHandshake()
    negotiator = Negotiator(hs, "disk", contexts=[c.BASE_ALLOCATION])
    told: Told = []
    try:
        for piece in stream:
            hs.receive(piece)
            if negotiator.advance() == READY:
                assert hs.session is not None
                break
            assert len(hs._in) < OPTION_REPLY.size + c.MAX_OPTION
        hs.end_of_stream()
    except (ProtocolError, RefusedError) as error:
        told.append((type(error).__name__, str(error)))
    return [*told, (hs.state, hs.to_send(), repr(hs.session))]


def server_says(session: Session) -> Callable[[Iterator[bytes]], Told]:
    def says(stream: Iterator[bytes]) -> Told:
        server = ServerTransmission(session)
        told: Told = []
        try:
            for piece in stream:
                server.receive(piece)
                while (event := server.next_event()) is not None:
                    if isinstance(event, Disconnect):
                        told.append(("goodbye",))
                    else:
                        told.append((event.kind, event.flags, event.cookie, event.offset, event.length))
                        told.append((event.payload, tuple(event.contexts), event.refusal))
                        assert len(event.payload) <= session.max_payload
                assert len(server._in) < 32 + session.max_payload
            server.end_of_stream()
        except ProtocolError as error:
            told.append((type(error).__name__, str(error)))
        return [*told, (server.state,)]

    return says


def client_says(session: Session) -> Callable[[Iterator[bytes]], Told]:
    def says(stream: Iterator[bytes]) -> Told:
        client = script_client(session)
        told: Told = []
        data: dict[int, int] = {}
        try:
            for piece in stream:
                client.receive(piece)
                while (event := client.next_event()) is not None:
                    cookie = event.transaction.cookie
                    if isinstance(event, Data):
                        data[cookie] = data.get(cookie, 0) + len(event.data)
                        assert data[cookie] <= event.transaction.length
                        continue
                    told.append((type(event).__name__, cookie))
                    if isinstance(event, Hole):
                        told.append((event.offset, event.length))
                    elif isinstance(event, Status):
                        told.append((event.context, tuple(event.extents)))
                    elif isinstance(event, Failed):
                        told.append((event.error, event.message, event.offset))
                    elif isinstance(event, Done):
                        told.append((data.get(cookie, 0), event.transaction.error))
            client.end_of_stream()
        except ProtocolError as error:
            told.append((type(error).__name__, str(error)))
        return [*told, (client.state, client.in_flight)]

    return says


# ---- recorded halves of conversations ----


def client_options() -> bytes:
    """What a talkative client sends in a handshake."""
    return b"".join(
        (
            (3).to_bytes(4),
            pack_option(c.OPT_LIST),
            pack_option(99, b"of the future"),
            pack_option(c.OPT_STRUCTURED_REPLY),
            pack_option(c.OPT_LIST_META_CONTEXT, pack_context_query(b"disk", [])),
            pack_option(c.OPT_EXTENDED_HEADERS),
            pack_option(c.OPT_SET_META_CONTEXT, pack_context_query(b"disk", [b"base:allocation", b"x:y"])),
            pack_option(c.OPT_INFO, pack_export_query(b"nothing", [c.INFO_NAME])),
            pack_option(c.OPT_GO, pack_export_query(b"disk", [1, 2, 3, 77])),
        )
    )


def server_replies() -> bytes:
    """What a server sends to the negotiating client."""
    disk, hs, client = Disk(64 * KIB), ServerHandshake(), ClientHandshake()
    negotiator = Negotiator(client, "disk", contexts=[c.BASE_ALLOCATION])
    stream = b""
    while negotiator.advance() != READY:
        serve_handshake(hs, client.to_send(), disk)
        sent = hs.to_send()
        client.receive(sent)
        stream += sent
    return stream


def script_client(session: Session) -> ClientTransmission:
    """A client that has asked a little of everything; its requests are in `script_requests`."""
    client = ClientTransmission(session)
    flags = session.export.flags
    client.request(c.CMD_READ, 0, 64 * KIB)
    client.request(c.CMD_WRITE, 4096, 700)
    client.request(c.CMD_READ, 4000, 2000, c.CMD_FLAG_DF if flags & c.FLAG_SEND_DF else 0)
    client.request(c.CMD_WRITE_ZEROES, 4100, 100, c.CMD_FLAG_FUA)
    if session.contexts:
        client.request(c.CMD_BLOCK_STATUS, 0, 64 * KIB)
        client.request(c.CMD_BLOCK_STATUS, 100, 5000, c.CMD_FLAG_REQ_ONE)
        if flags & c.FLAG_BLOCK_STATUS_PAYLOAD:
            client.request(c.CMD_BLOCK_STATUS, 100, 5000, contexts=[7])
    client.request(c.CMD_TRIM, 8192, 4096)
    client.request(c.CMD_FLUSH)
    client.request(c.CMD_READ, 4096, 512)
    return client


def script_requests(session: Session) -> bytes:
    """The bytes of those requests."""
    client = script_client(session)
    sent = b""
    for transaction in client._open.values():
        sent += transaction.header
        if transaction.kind == c.CMD_WRITE:
            sent += bytes(i % 251 for i in range(transaction.length))
    return sent + client.disconnect()


def streams() -> dict[str, tuple[bytes, Callable[[Iterator[bytes]], Told]]]:
    found: dict[str, tuple[bytes, Callable[[Iterator[bytes]], Told]]] = {
        "server handshake": (client_options(), server_handshake_says),
        "client handshake": (server_replies(), client_handshake_says),
    }
    for style in STYLES:
        disk = Disk(64 * KIB)
        client, server = connect(disk, style, max_payload=64 * KIB)
        session = server.session
        requests = script_requests(session)
        # A refused request and one of the future, in front of the goodbye.
        pack = (EXTENDED_REQUEST if style == c.EXTENDED else COMPACT_REQUEST).pack
        magic = c.MAGIC_EXTENDED_REQUEST if style == c.EXTENDED else c.MAGIC_REQUEST
        strange = pack(magic, 0, c.CMD_READ, 77, 1 << 60, 5) + pack(magic, 0, 99, 78, 0, 0)
        goodbye = len(requests) - session.codec.request_size
        found[f"server, style {style}"] = (
            requests[:goodbye] + strange + requests[goodbye:],
            server_says(session),
        )
        found[f"client, style {style}"] = (serve(server, requests, disk), client_says(client.session))
    return found


STREAMS = streams()


@pytest.mark.parametrize("name", STREAMS)
def test_the_recorded_streams_are_sound(name: str) -> None:
    stream, says = STREAMS[name]
    told = says(iter([stream]))
    assert not any("Error" in str(entry[0]) for entry in told)
    assert len(told) >= (1 if name == "client handshake" else 7)


@pytest.mark.parametrize("name", STREAMS)
def test_byte_by_byte(name: str) -> None:
    stream, says = STREAMS[name]
    assert says(stream[i : i + 1] for i in range(len(stream))) == says(iter([stream]))


@pytest.mark.parametrize("name", STREAMS)
@quick
@given(cuts=cuts)
def test_cut_anywhere(name: str, cuts: list[int]) -> None:
    stream, says = STREAMS[name]
    assert says(pieces(stream, cuts)) == says(iter([stream]))


@pytest.mark.parametrize("name", STREAMS)
@quick
@given(cuts=cuts, hurts=hurts)
def test_damaged_anywhere(name: str, cuts: list[int], hurts: list[tuple[int, int, int]]) -> None:
    stream, says = STREAMS[name]
    damaged = damage(stream, hurts)
    assert says(pieces(damaged, cuts)) == says(iter([damaged]))


@pytest.mark.parametrize("name", STREAMS)
@quick
@given(noise=st.binary(max_size=300), keep=st.integers(0, 400))
def test_noise_behind_a_good_beginning(name: str, noise: bytes, keep: int) -> None:
    stream, says = STREAMS[name]
    damaged = stream[:keep] + noise
    assert says(pieces(damaged, [7, 1, 30])) == says(iter([damaged]))


# ---- memory ----


def peak_bytes(work: Callable[[], None]) -> int:
    work()  # whatever is allocated once
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HUGE = 0x7FFFFFFF
LIMIT = 64 * KIB
EXPORT = Export("e", 1 << 40, ALL_FLAGS)


class Machine(Protocol):
    def receive(self, data: bytes) -> None: ...

    def next_event(self) -> object: ...


def hostile(machine: Callable[[], Machine], stream: bytes) -> Callable[[], None]:
    """Announce a huge length, send a little of it, and see it refused."""

    def work() -> None:
        target = machine()
        with pytest.raises(TooLargeError):
            target.receive(stream + bytes(KIB))
            while target.next_event() is not None:
                pass

    return work


def server_of(style: int) -> Callable[[], Machine]:
    return lambda: ServerTransmission(Session(EXPORT, style, {1: "a:b"}, max_payload=LIMIT))


def client_of(style: int, *request: int) -> Callable[[], Machine]:
    def make() -> Machine:
        client = ClientTransmission(Session(EXPORT, style, {1: "a:b"}, max_payload=LIMIT))
        client.request(*request)
        return client

    return make


def greeted_client() -> ClientHandshake:
    client = ClientHandshake()
    client.receive(GREETING_LAYOUT.pack(c.MAGIC_NBD, c.MAGIC_OPTION, 3))
    client.next_event()
    client.list_exports()
    return client


STATUS = (c.CMD_BLOCK_STATUS, 0, 512)


@pytest.mark.parametrize(
    "work",
    [
        hostile(ServerHandshake, (3).to_bytes(4) + OPTION.pack(c.MAGIC_OPTION, c.OPT_GO, HUGE)),
        hostile(greeted_client, OPTION_REPLY.pack(c.MAGIC_OPTION_REPLY, c.OPT_LIST, c.REP_SERVER, HUGE)),
        hostile(server_of(c.SIMPLE), COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 1, 0, HUGE)),
        hostile(
            server_of(c.EXTENDED),
            EXTENDED_REQUEST.pack(
                c.MAGIC_EXTENDED_REQUEST, c.CMD_FLAG_PAYLOAD_LEN, c.CMD_READ, 1, 0, 1 << 62
            ),
        ),
        hostile(
            client_of(c.STRUCTURED, c.CMD_READ, 0, 512),
            STRUCTURED_CHUNK.pack(c.MAGIC_STRUCTURED_REPLY, 1, c.REPLY_TYPE_OFFSET_DATA, 1, HUGE),
        ),
        hostile(
            client_of(c.STRUCTURED, *STATUS),
            STRUCTURED_CHUNK.pack(c.MAGIC_STRUCTURED_REPLY, 1, c.REPLY_TYPE_BLOCK_STATUS, 1, HUGE),
        ),
        hostile(
            client_of(c.EXTENDED, *STATUS),
            EXTENDED_CHUNK.pack(c.MAGIC_EXTENDED_REPLY, 1, c.REPLY_TYPE_ERROR, 1, 0, 1 << 62),
        ),
    ],
)
def test_a_huge_length_costs_nothing(work: Callable[[], None]) -> None:
    assert peak_bytes(work) < 64 * KIB


def test_a_long_write_in_small_pieces_costs_itself() -> None:
    header = COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 1, 0, LIMIT)

    def work() -> None:
        server = ServerTransmission(Session(EXPORT, max_payload=LIMIT))
        server.receive(header)
        for _ in range(LIMIT // KIB):
            assert server.next_event() is None
            server.receive(bytes(KIB))
        event = server.next_event()
        assert isinstance(event, Request) and len(event.payload) == LIMIT

    # The buffer (which grows by an eighth ahead) and the payload taken out of it.
    assert peak_bytes(work) < LIMIT * 9 // 8 + LIMIT + 16 * KIB


def test_a_long_read_is_never_gathered() -> None:
    size = 1 << 20
    session = Session(EXPORT, c.STRUCTURED, max_payload=size)
    header = STRUCTURED_CHUNK.pack(c.MAGIC_STRUCTURED_REPLY, 1, c.REPLY_TYPE_OFFSET_DATA, 1, size + 8)

    def work() -> None:
        client = ClientTransmission(session)
        client.request(c.CMD_READ, 0, size)
        client.receive(header + bytes(8))
        assert client.next_event() is None
        got = 0
        for _ in range(size // KIB):
            client.receive(bytes(KIB))
            while (event := client.next_event()) is not None:
                got += len(event.data) if isinstance(event, Data) else 0
        assert got == size and client.in_flight == 0

    assert peak_bytes(work) < 32 * KIB


def test_a_long_list_of_exports_is_never_gathered() -> None:
    entry = OPTION_REPLY.pack(c.MAGIC_OPTION_REPLY, c.OPT_LIST, c.REP_SERVER, 4 + 4000)
    entry += (4000).to_bytes(4) + b"x" * 4000

    def work() -> None:
        client = greeted_client()
        for _ in range(200):
            client.receive(entry)
            assert client.next_event() is not None

    assert peak_bytes(work) < 64 * KIB
