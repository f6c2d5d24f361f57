"""The transmission phase: every command in every style between the two machines, and broken peers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from enban.errors import OutOfRangeError, ReadOnlyError, UnsupportedOperationError, UsageError
from enban.wire.nbd import (
    ClientTransmission,
    Export,
    OutOfTurnError,
    ProtocolError,
    ServerTransmission,
    Session,
    TooLargeError,
    WrongMagicError,
)
from enban.wire.nbd import constants as c
from enban.wire.nbd.messages import (
    COMPACT_REQUEST,
    ERROR,
    EXTENDED_CHUNK,
    EXTENDED_REQUEST,
    HOLE,
    SIMPLE_REPLY,
    STRUCTURED_CHUNK,
)
from enban.wire.nbd.replies import Data, Done, Failed, Hole, Transaction
from enban.wire.nbd.server import Disconnect, Request
from tests.wire.nbd_helpers import (
    ALL_FLAGS,
    CONTEXTS,
    STYLES,
    Disk,
    Outcome,
    collect,
    connect,
    exchange,
    serve,
)

KIB = 1 << 10
CHUNKED = (c.STRUCTURED, c.EXTENDED)
HOLE_STATE = c.STATE_HOLE | c.STATE_ZERO


def patterned_disk(flags: int = ALL_FLAGS) -> Disk:
    disk = Disk(64 * KIB, flags)
    disk.data[4 * KIB : 12 * KIB] = bytes(i % 251 + 1 for i in range(8 * KIB))
    disk.data[32 * KIB : 33 * KIB] = b"\xa5" * KIB
    return disk


# ---- every command, both ways ----


@pytest.mark.parametrize("style", STYLES)
def test_every_command(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)

    got = exchange(client, server, disk, client.request(c.CMD_READ, 0, 64 * KIB))
    assert got.data == disk.data and not got.failures

    wrote = client.request(c.CMD_WRITE, 512, 3, c.CMD_FLAG_FUA)
    exchange(client, server, disk, wrote, b"abc")
    assert disk.data[510:517] == b"\0\0abc\0\0" and wrote.error == 0

    exchange(client, server, disk, client.request(c.CMD_FLUSH))
    assert disk.flushes == 1
    exchange(client, server, disk, client.request(c.CMD_TRIM, 512, 512))
    assert not any(disk.data[:1024])
    flags = c.CMD_FLAG_NO_HOLE | c.CMD_FLAG_FAST_ZERO | c.CMD_FLAG_FUA
    exchange(client, server, disk, client.request(c.CMD_WRITE_ZEROES, 4 * KIB, 4 * KIB, flags))
    assert not any(disk.data[4 * KIB : 8 * KIB]) and any(disk.data[8 * KIB :])
    exchange(client, server, disk, client.request(c.CMD_CACHE, 0, 4 * KIB))
    exchange(client, server, disk, client.request(c.CMD_RESIZE, 128 * KIB))
    assert len(disk.data) == 128 * KIB
    assert client.in_flight == 0


@pytest.mark.parametrize("style", CHUNKED)
def test_block_status(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)
    got = exchange(client, server, disk, client.request(c.CMD_BLOCK_STATUS, 2 * KIB, 62 * KIB))
    expected = [
        (2 * KIB, HOLE_STATE),
        (8 * KIB, 0),
        (20 * KIB, HOLE_STATE),
        (4 * KIB, 0),
        (28 * KIB, HOLE_STATE),
    ]
    assert got.status == {number: expected for number, _ in CONTEXTS}
    one = client.request(c.CMD_BLOCK_STATUS, 2 * KIB, 62 * KIB, c.CMD_FLAG_REQ_ONE)
    assert exchange(client, server, disk, one).status[1] == expected[:1]


def test_block_status_of_chosen_contexts() -> None:
    disk = patterned_disk()
    client, server = connect(disk, c.EXTENDED)
    got = exchange(client, server, disk, client.request(c.CMD_BLOCK_STATUS, 0, 4 * KIB, contexts=[7]))
    assert got.status == {7: [(4 * KIB, HOLE_STATE)]}
    with pytest.raises(OutOfTurnError):
        client.request(c.CMD_BLOCK_STATUS, 0, 4 * KIB, contexts=[8])
    with pytest.raises(OutOfTurnError):
        client.request(c.CMD_READ, 0, 4 * KIB, contexts=[7])


def test_extended_lengths_over_32_bits() -> None:
    size = 1 << 40
    session = Session(Export("big", size, ALL_FLAGS), c.EXTENDED, {1: c.BASE_ALLOCATION})
    client, server = ClientTransmission(session), ServerTransmission(session)
    outcomes: dict[Transaction, Outcome] = {}
    zeroes = client.request(c.CMD_WRITE_ZEROES, 0, size)
    status = client.request(c.CMD_BLOCK_STATUS, 0, size)
    server.receive(zeroes.header + status.header)
    first, second = server.next_event(), server.next_event()
    assert isinstance(first, Request) and isinstance(second, Request)
    assert (first.length, first.refusal, second.length) == (size, 0, size)
    replies = server.reply_done(first) + server.reply_status(second, 1, [(size, 3)], done=True)
    collect(client, replies, outcomes)
    assert zeroes.done and outcomes[status].status == {1: [(size, 3)]}


def test_compact_requests_end_at_32_bits() -> None:
    client = ClientTransmission(Session(Export("big", 1 << 40, ALL_FLAGS), c.STRUCTURED))
    with pytest.raises(OutOfRangeError, match="extended headers"):
        client.request(c.CMD_WRITE_ZEROES, 0, 1 << 32)
    client.request(c.CMD_WRITE_ZEROES, 0, (1 << 32) - 1)


@pytest.mark.parametrize("style", CHUNKED)
def test_read_without_fragments(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)
    got = exchange(client, server, disk, client.request(c.CMD_READ, 0, 8 * KIB, c.CMD_FLAG_DF))
    assert got.data == disk.data[: 8 * KIB]


@pytest.mark.parametrize("style", STYLES)
def test_many_in_flight_answered_backwards(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)
    wanted = [client.request(c.CMD_READ, i * KIB, KIB) for i in range(20)]
    server.receive(b"".join(transaction.header for transaction in wanted))
    requests = []
    while (event := server.next_event()) is not None:
        assert isinstance(event, Request)
        requests.append(event)
    assert client.in_flight == len(requests) == 20
    replies = b"".join(disk.answer(server, request) for request in reversed(requests))
    outcomes: dict[Transaction, Outcome] = {}
    collect(client, replies, outcomes)
    assert [transaction.offset for transaction in outcomes] == [i * KIB for i in reversed(range(20))]
    assert all(outcomes[t].data == disk.data[t.offset :][:KIB] for t in wanted)


@pytest.mark.parametrize("style", STYLES)
def test_errors_reach_the_client(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)
    transaction = client.request(c.CMD_WRITE, 0, 512)
    server.receive(transaction.header + bytes(512))
    request = server.next_event()
    assert isinstance(request, Request)
    outcomes: dict[Transaction, Outcome] = {}
    collect(client, server.reply_error(request, c.ENOSPC, "disk is full"), outcomes)
    message = "" if style == c.SIMPLE else "disk is full"
    assert outcomes[transaction].failures == [(c.ENOSPC, message, None)]
    assert (transaction.error, transaction.message, transaction.done) == (c.ENOSPC, message, True)


@pytest.mark.parametrize("style", CHUNKED)
def test_a_read_that_fails_halfway(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)
    transaction = client.request(c.CMD_READ, 4 * KIB, 2 * KIB)
    server.receive(transaction.header)
    request = server.next_event()
    assert isinstance(request, Request)
    replies = server.reply_piece(request, 4 * KIB, bytes(KIB))
    replies += server.reply_error_at(request, c.EIO, 5 * KIB, "bad sector", done=True)
    outcomes: dict[Transaction, Outcome] = {}
    collect(client, replies, outcomes)
    assert outcomes[transaction].data == bytes(KIB) and transaction.error == c.EIO
    assert outcomes[transaction].failures == [(c.EIO, "bad sector", 5 * KIB)]


def test_disconnect() -> None:
    disk = patterned_disk()
    client, server = connect(disk)
    last = client.request(c.CMD_READ, 0, 512)
    server.receive(last.header + client.disconnect() + b"rubbish behind it")
    request, goodbye = server.next_event(), server.next_event()
    assert isinstance(request, Request) and isinstance(goodbye, Disconnect)
    server.receive(b"and more")
    assert server.next_event() is None and server.state == "leaving"
    server.end_of_stream()
    outcomes: dict[Transaction, Outcome] = {}
    collect(client, disk.answer(server, request), outcomes)
    assert last.done
    client.end_of_stream()
    with pytest.raises(OutOfTurnError):
        client.request(c.CMD_READ, 0, 512)
    with pytest.raises(OutOfTurnError):
        client.disconnect()


@pytest.mark.parametrize("style", STYLES)
def test_data_received_in_place(style: int) -> None:
    disk = patterned_disk()
    client, server = connect(disk, style)
    transaction = client.request(c.CMD_READ, 4 * KIB, 4 * KIB)
    reply = serve(server, transaction.header, disk)
    start = len(reply) - 4 * KIB - (server.session.codec.done_size if style else 0) + 100
    client.receive(reply[:start])
    assert client.wanted() is None
    first = client.next_event()
    assert isinstance(first, Data) and len(first.data) == 100 and client.next_event() is None
    assert client.wanted() == (transaction, 4 * KIB + 100, 4 * KIB - 100)
    with pytest.raises(OutOfTurnError):
        client.filled(4 * KIB)
    client.filled(1000)
    assert client.wanted() == (transaction, 4 * KIB + 1100, 4 * KIB - 1100)
    client.filled(4 * KIB - 1100)
    assert client.wanted() is None
    client.receive(reply[start + 4 * KIB - 100 :])
    assert isinstance(client.next_event(), Done) and transaction.done


def test_receive_asks_for_the_events_first() -> None:
    client, server = connect(Disk())
    reply = serve(server, client.request(c.CMD_READ, 0, 512).header, Disk())
    client.receive(reply)
    with pytest.raises(OutOfTurnError):
        client.receive(b"more")


# ---- the rule book ----


def refusal(flags: int = 0, kind: int = c.CMD_READ, offset: int = 0, length: int = 512, **change: int) -> int:
    export = Export("e", 1 << 20, change.get("export_flags", ALL_FLAGS), min_block=512, max_block=1 << 18)
    return Session(export, c.STRUCTURED, {1: "base:allocation"} if change.get("contexts", 1) else {}).refusal(
        flags, kind, offset, length
    )


RANGED = (c.CMD_READ, c.CMD_WRITE, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, c.CMD_BLOCK_STATUS)


@pytest.mark.parametrize("kind", RANGED)
def test_rules_for_ranges(kind: int) -> None:
    beyond = c.ENOSPC if kind in (c.CMD_WRITE, c.CMD_WRITE_ZEROES) else c.EINVAL
    assert refusal(0, kind, (1 << 20) - 512, 512) == 0
    assert refusal(0, kind, (1 << 20) - 512, 1024) == beyond
    assert refusal(0, kind, 1 << 63, 512) == beyond
    assert refusal(0, kind, 0, 0) == c.EINVAL
    assert refusal(0, kind, 1, 512) == c.EINVAL
    assert refusal(0, kind, 512, 100) == c.EINVAL
    longest = refusal(0, kind, 0, (1 << 18) + 512)
    assert longest == (c.EINVAL if kind in (c.CMD_READ, c.CMD_WRITE) else 0)


def test_rules_for_flags() -> None:
    for kind in range(c.CMD_RESIZE + 1):
        length = 0 if kind in (c.CMD_DISC, c.CMD_FLUSH, c.CMD_RESIZE) else 512
        assert refusal(c.CMD_FLAG_FUA, kind, 0, length) == 0
        assert refusal(1 << 15, kind, 0, length) == c.EINVAL
    no_fua = ALL_FLAGS & ~c.FLAG_SEND_FUA
    assert refusal(c.CMD_FLAG_FUA, c.CMD_WRITE, export_flags=no_fua) == c.EINVAL
    assert refusal(c.CMD_FLAG_DF) == c.EINVAL
    assert refusal(c.CMD_FLAG_DF, export_flags=c.FLAG_SEND_DF) == 0
    assert refusal(c.CMD_FLAG_NO_HOLE, c.CMD_WRITE) == c.EINVAL
    assert refusal(c.CMD_FLAG_NO_HOLE, c.CMD_WRITE_ZEROES) == 0
    assert refusal(c.CMD_FLAG_FAST_ZERO, c.CMD_WRITE_ZEROES) == 0
    slow = ALL_FLAGS & ~c.FLAG_SEND_FAST_ZERO
    assert refusal(c.CMD_FLAG_FAST_ZERO, c.CMD_WRITE_ZEROES, export_flags=slow) == c.EINVAL
    assert refusal(c.CMD_FLAG_REQ_ONE, c.CMD_BLOCK_STATUS) == 0
    assert refusal(c.CMD_FLAG_PAYLOAD_LEN, c.CMD_WRITE) == c.EINVAL


def test_rules_for_commands_not_offered() -> None:
    for kind in (c.CMD_FLUSH, c.CMD_TRIM, c.CMD_CACHE, c.CMD_WRITE_ZEROES, c.CMD_RESIZE):
        length = 0 if kind in (c.CMD_FLUSH, c.CMD_RESIZE) else 512
        assert refusal(0, kind, 0, length) == 0
        assert refusal(0, kind, 0, length, export_flags=0) == c.EINVAL
    assert refusal(0, c.CMD_BLOCK_STATUS, contexts=0) == c.EINVAL
    assert refusal(0, 9) == refusal(0, 0xFFFF) == c.EINVAL
    assert refusal(0, c.CMD_FLUSH, 0, 512) == refusal(0, c.CMD_RESIZE, 0, 512) == c.EINVAL


def test_rules_for_read_only_exports() -> None:
    flags = ALL_FLAGS | c.FLAG_READ_ONLY
    for kind in (c.CMD_WRITE, c.CMD_TRIM, c.CMD_WRITE_ZEROES):
        assert refusal(0, kind, export_flags=flags) == c.EPERM
    assert refusal(0, c.CMD_READ, export_flags=flags) == 0


def test_the_client_keeps_the_rules_before_sending() -> None:
    client, _ = connect(Disk(64 * KIB, c.FLAG_READ_ONLY))
    for error, kind, offset, length, flags in (
        (ReadOnlyError, c.CMD_WRITE, 0, 512, 0),
        (OutOfRangeError, c.CMD_READ, 64 * KIB, 512, 0),
        (UnsupportedOperationError, c.CMD_FLUSH, 0, 0, 0),
        (UnsupportedOperationError, c.CMD_READ, 0, 512, c.CMD_FLAG_FUA),
        (UnsupportedOperationError, c.CMD_READ, 0, 0, 0),
        (UnsupportedOperationError, c.CMD_RESIZE, 1 << 50, 0, 0),
        (UnsupportedOperationError, 77, 0, 512, 0),
        (OutOfTurnError, c.CMD_DISC, 0, 0, 0),
    ):
        with pytest.raises(error) as caught:
            client.request(kind, offset, length, flags)
        assert isinstance(caught.value, UsageError)
    assert client.in_flight == 0


# ---- what the server refuses ----


def test_refused_requests_come_out_with_their_number() -> None:
    disk = Disk(64 * KIB)
    _, server = connect(disk, c.STRUCTURED)
    pack = COMPACT_REQUEST.pack
    data = pack(c.MAGIC_REQUEST, 0, c.CMD_READ, 1, 64 * KIB, 1)
    data += pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 2, 64 * KIB, 3) + b"abc"
    data += pack(c.MAGIC_REQUEST, 0, 99, 3, 0, 0)
    data += pack(c.MAGIC_REQUEST, 0, c.CMD_READ, 4, 0, 1)
    server.receive(data)
    requests = []
    while (event := server.next_event()) is not None:
        assert isinstance(event, Request)
        requests.append((event.name, event.refusal))
    assert requests == [("READ", c.EINVAL), ("WRITE", c.ENOSPC), ("command 99", c.EINVAL), ("READ", 0)]


def test_payloads_nobody_wanted_are_swallowed() -> None:
    disk = Disk(64 * KIB)
    _, server = connect(disk, c.EXTENDED)
    pack, flag = EXTENDED_REQUEST.pack, c.CMD_FLAG_PAYLOAD_LEN
    data = pack(c.MAGIC_EXTENDED_REQUEST, flag, c.CMD_READ, 1, 0, 5) + b"12345"
    for payload in (b"", b"1234567", bytes(8) + b"\0\0\0\x63", bytes(8) + b"\0\0\0\1" * 2):
        data += pack(c.MAGIC_EXTENDED_REQUEST, flag, c.CMD_BLOCK_STATUS, 2, 0, len(payload)) + payload
    data += pack(c.MAGIC_EXTENDED_REQUEST, 0, c.CMD_READ, 3, 0, 512)
    server.receive(data)
    refusals = []
    while (event := server.next_event()) is not None:
        assert isinstance(event, Request)
        refusals.append(event.refusal)
    assert refusals == [c.EINVAL] * 5 + [0]


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (b"\0" * 28, WrongMagicError),
        (COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 1, 0, (1 << 25) + 1), TooLargeError),
        (COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 1, 0, 0xFFFFFFFF), TooLargeError),
    ],
)
def test_the_server_hangs_up(data: bytes, error: type[Exception]) -> None:
    _, server = connect(Disk(), c.STRUCTURED)
    good = COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_READ, 1, 0, 512)
    server.receive(good + data)
    assert isinstance(server.next_event(), Request)
    with pytest.raises(error):
        server.next_event()
    assert server.state == "broken"
    server.receive(good)
    assert server.next_event() is None


def test_half_a_request_at_the_end_is_told() -> None:
    client, server = connect(Disk())
    server.end_of_stream()
    server.receive(client.request(c.CMD_READ, 0, 512).header[:5])
    with pytest.raises(ProtocolError, match="5 bytes into it"):
        server.end_of_stream()


def test_every_request_is_answered_once_and_fittingly() -> None:
    client, server = connect(Disk())
    server.receive(
        client.request(c.CMD_READ, 0, 512).header + client.request(c.CMD_BLOCK_STATUS, 0, 512).header
    )
    read, status = server.next_event(), server.next_event()
    assert isinstance(read, Request) and isinstance(status, Request)
    wrongs: list[Callable[[], bytes]] = [
        lambda: server.reply_done(read),
        lambda: server.reply_read(read, bytes(511)),
        lambda: server.reply_read(status, bytes(512)),
        lambda: server.reply_piece(read, 0, 513),
        lambda: server.reply_piece(read, 0, 0),
        lambda: server.reply_status(status, 99, [(512, 0)]),
        lambda: server.reply_status(status, 1, []),
        lambda: server.reply_error(read, 0),
    ]
    for wrong in wrongs:
        with pytest.raises(OutOfTurnError):
            wrong()
    server.reply_piece(read, 0, 512, done=True)
    agains: list[Callable[[], bytes]] = [
        lambda: server.reply_end(read),
        lambda: server.reply_error(read, c.EIO),
    ]
    for again in agains:
        with pytest.raises(OutOfTurnError, match="answered already"):
            again()


def test_no_pieces_in_simple_style() -> None:
    client, server = connect(Disk(), c.SIMPLE)
    server.receive(client.request(c.CMD_READ, 0, 512).header)
    request = server.next_event()
    assert isinstance(request, Request)
    with pytest.raises(OutOfTurnError, match="not agreed"):
        server.reply_piece(request, 0, 512)
    server.reply_read(request, bytes(512))


# ---- what the client refuses ----


def chunk(flags: int, kind: int, payload: bytes = b"", *, length: int = -1, cookie: int = 1) -> bytes:
    size = len(payload) if length < 0 else length
    return STRUCTURED_CHUNK.pack(c.MAGIC_STRUCTURED_REPLY, flags, kind, cookie, size) + payload


def data_chunk(flags: int, at: int, data: bytes) -> bytes:
    return chunk(flags, c.REPLY_TYPE_OFFSET_DATA, at.to_bytes(8) + data)


def hole_chunk(flags: int, at: int, length: int) -> bytes:
    return chunk(flags, c.REPLY_TYPE_OFFSET_HOLE, HOLE.pack(at, length))


def status_chunk(flags: int, context: int, *extents: tuple[int, int]) -> bytes:
    payload = context.to_bytes(4) + b"".join(a.to_bytes(4) + b.to_bytes(4) for a, b in extents)
    return chunk(flags, c.REPLY_TYPE_BLOCK_STATUS, payload)


def error_chunk(kind: int, error: int, message: bytes, rest: bytes = b"", *, size: int = -1) -> bytes:
    return chunk(1, kind, ERROR.pack(error, len(message) if size < 0 else size) + message + rest)


def simple(error: int, cookie: int = 1) -> bytes:
    return SIMPLE_REPLY.pack(c.MAGIC_SIMPLE_REPLY, error, cookie)


DONE = chunk(1, c.REPLY_TYPE_NONE)
READ = (c.CMD_READ, 4096, 1024, 0)
READ_DF = (c.CMD_READ, 4096, 1024, c.CMD_FLAG_DF)
FLUSH = (c.CMD_FLUSH, 0, 0, 0)
STATUS = (c.CMD_BLOCK_STATUS, 4096, 1024, 0)
STATUS_ONE = (c.CMD_BLOCK_STATUS, 4096, 1024, c.CMD_FLAG_REQ_ONE)
IS_ERROR = c.REPLY_TYPE_ERROR
AT_OFFSET = c.REPLY_TYPE_ERROR_OFFSET


def structured_client(*request: int) -> tuple[ClientTransmission, Transaction]:
    session = Session(Export("e", 1 << 20, ALL_FLAGS | c.FLAG_SEND_DF), c.STRUCTURED, {1: "a:b", 2: "c:d"})
    client = ClientTransmission(session)
    return client, client.request(*request)


@pytest.mark.parametrize(
    ("request_", "reply", "error"),
    [
        (READ, b"\0" * 16, WrongMagicError),
        (READ, EXTENDED_CHUNK.pack(c.MAGIC_EXTENDED_REPLY, 1, 0, 1, 4096, 0), WrongMagicError),
        (READ, chunk(1, 0, cookie=2), ProtocolError),
        (READ, simple(0), ProtocolError),
        (READ, simple(c.EIO), ProtocolError),
        (STATUS, simple(0), ProtocolError),
        (FLUSH, simple(0, cookie=9), ProtocolError),
        # chunks that do not fit the command
        (FLUSH, data_chunk(1, 0, b"x"), ProtocolError),
        (FLUSH, hole_chunk(1, 0, 1), ProtocolError),
        (FLUSH, status_chunk(1, 1, (512, 0)), ProtocolError),
        (READ, chunk(1, 3, bytes(12)), ProtocolError),
        (READ, chunk(1, 0x7FFF, bytes(12)), ProtocolError),
        (STATUS, chunk(1, c.REPLY_TYPE_BLOCK_STATUS_EXT, bytes(24)), ProtocolError),
        # empty chunks
        (READ, chunk(0, c.REPLY_TYPE_NONE), ProtocolError),
        (READ, chunk(1, c.REPLY_TYPE_NONE, b"x"), ProtocolError),
        # data
        (READ, DONE, ProtocolError),
        (READ, data_chunk(1, 4096, bytes(1023)), ProtocolError),
        (READ, data_chunk(0, 4096, bytes(512)) + DONE, ProtocolError),
        (READ, data_chunk(0, 4095, bytes(512)), ProtocolError),
        (READ, data_chunk(0, 5000, bytes(512)), ProtocolError),
        (READ, chunk(1, c.REPLY_TYPE_OFFSET_DATA, bytes(8)), ProtocolError),
        (READ, chunk(1, c.REPLY_TYPE_OFFSET_DATA, length=1024 + 9), TooLargeError),
        (READ, chunk(1, c.REPLY_TYPE_OFFSET_DATA, length=0xFFFFFFFF), TooLargeError),
        (READ, data_chunk(0, 4096, bytes(512)) + data_chunk(0, 4096, bytes(512)), ProtocolError),
        (READ, data_chunk(0, 4096, bytes(512)) + data_chunk(0, 4607, bytes(512)), ProtocolError),
        (READ, data_chunk(0, 4608, bytes(512)) + data_chunk(0, 4097, bytes(512)), ProtocolError),
        (READ, hole_chunk(0, 4096, 1024) + hole_chunk(0, 4200, 1), ProtocolError),
        (READ, hole_chunk(0, 4096, 0), ProtocolError),
        (READ, hole_chunk(0, 4096, 0xFFFFFFFF), ProtocolError),
        (READ, chunk(0, c.REPLY_TYPE_OFFSET_HOLE, bytes(11)), ProtocolError),
        (READ, chunk(0, c.REPLY_TYPE_OFFSET_HOLE, length=13), TooLargeError),
        (READ_DF, data_chunk(0, 4096, bytes(512)) + data_chunk(0, 4608, bytes(512)), ProtocolError),
        # block status
        (STATUS, DONE, ProtocolError),
        (STATUS, status_chunk(1, 1, (512, 0)), ProtocolError),
        (STATUS, status_chunk(0, 3, (512, 0)), ProtocolError),
        (STATUS, status_chunk(0, 1, (512, 0)) * 2, ProtocolError),
        (STATUS, status_chunk(0, 1), ProtocolError),
        (STATUS, status_chunk(0, 1, (0, 0)), ProtocolError),
        (STATUS, status_chunk(0, 1, (1024, 0), (1, 3)), ProtocolError),
        (STATUS, chunk(0, c.REPLY_TYPE_BLOCK_STATUS, bytes(16)), ProtocolError),
        (STATUS, chunk(0, c.REPLY_TYPE_BLOCK_STATUS, length=0x7FFFFFFF), TooLargeError),
        (STATUS_ONE, status_chunk(0, 1, (512, 0), (512, 3)), ProtocolError),
        (STATUS_ONE, status_chunk(0, 1, (1025, 0)), ProtocolError),
        # errors
        (READ, error_chunk(IS_ERROR, 0, b""), ProtocolError),
        (READ, error_chunk(IS_ERROR, 5, b"x", size=2), ProtocolError),
        (READ, error_chunk(IS_ERROR, 5, b"x" * 4097), ProtocolError),
        (READ, chunk(1, IS_ERROR, bytes(5)), ProtocolError),
        (READ, chunk(1, IS_ERROR, length=1 << 20), TooLargeError),
        (READ, error_chunk(AT_OFFSET, 5, b"x", bytes(7)), ProtocolError),
        (READ, error_chunk(AT_OFFSET, 5, b"x", (4095).to_bytes(8)), ProtocolError),
        (READ, error_chunk(AT_OFFSET, 5, b"x", (5120).to_bytes(8)), ProtocolError),
    ],
)
def test_the_client_hangs_up(request_: tuple[int, ...], reply: bytes, error: type[Exception]) -> None:
    client, _ = structured_client(*request_)
    client.receive(reply)
    with pytest.raises(error):
        while client.next_event() is not None:
            pass
    assert client.state == "broken" and client.next_event() is None
    with pytest.raises(OutOfTurnError):
        client.request(c.CMD_FLUSH)


@pytest.mark.parametrize(
    ("request_", "reply", "number"),
    [
        (FLUSH, simple(0), 0),
        (FLUSH, simple(c.EIO), c.EIO),
        (FLUSH, DONE, 0),
        (FLUSH, simple(9999), c.EINVAL),
        (STATUS, simple(c.EINVAL), c.EINVAL),
        (READ, data_chunk(0x8001, 4096, bytes(1024)), 0),
        (READ, hole_chunk(0, 4608, 512) + data_chunk(0, 4352, bytes(256)) + hole_chunk(1, 4096, 256), 0),
        (READ, data_chunk(0, 4097, b"x") + data_chunk(0, 4099, b"x") + error_chunk(IS_ERROR, 5, b""), c.EIO),
        (READ, error_chunk(AT_OFFSET, 5, b"x", (5119).to_bytes(8)), c.EIO),
        (READ, error_chunk(0x8123, 28, b"of a new kind", b"extra"), c.ENOSPC),
        (READ, error_chunk(IS_ERROR, 28, b"\xff not utf-8"), c.ENOSPC),
        (STATUS, status_chunk(0, 2, (512, 0)) + status_chunk(1, 1, (512, 0), (4096, 3)), 0),
        (STATUS, status_chunk(0, 2, (512, 0)) + error_chunk(IS_ERROR, 5, b""), c.EIO),
        (STATUS_ONE, status_chunk(0, 2, (512, 0)) + status_chunk(1, 1, (1024, 0)), 0),
    ],
)
def test_what_the_client_must_accept(request_: tuple[int, ...], reply: bytes, number: int) -> None:
    client, transaction = structured_client(*request_)
    client.receive(reply)
    events = []
    while (event := client.next_event()) is not None:
        events.append(event)
    assert isinstance(events[-1], Done) and transaction.done
    assert transaction.error == number
    assert any(isinstance(event, Failed) for event in events) == bool(number)


def test_extended_replies_name_their_request() -> None:
    session = Session(Export("e", 1 << 20, ALL_FLAGS), c.EXTENDED, {1: "a:b"})
    pack = EXTENDED_CHUNK.pack
    status = c.REPLY_TYPE_BLOCK_STATUS_EXT
    counted = (1).to_bytes(4) + (2).to_bytes(4) + bytes(16)
    for reply, error in (
        (pack(c.MAGIC_EXTENDED_REPLY, 1, 0, 1, 4097, 0), ProtocolError),
        (pack(c.MAGIC_EXTENDED_REPLY, 1, status, 1, 4096, 24) + counted, ProtocolError),
        (pack(c.MAGIC_EXTENDED_REPLY, 1, c.REPLY_TYPE_BLOCK_STATUS, 1, 4096, 12), ProtocolError),
        (pack(c.MAGIC_EXTENDED_REPLY, 1, status, 1, 4096, (1 << 64) - 1), TooLargeError),
        (simple(0) + bytes(16), WrongMagicError),
    ):
        client = ClientTransmission(session)
        client.request(c.CMD_BLOCK_STATUS, 4096, 512)
        client.receive(reply)
        with pytest.raises(error):
            client.next_event()


def test_a_reply_in_too_many_pieces_is_refused() -> None:
    session = Session(Export("e", 1 << 20, ALL_FLAGS), c.STRUCTURED)
    client = ClientTransmission(session)
    client.request(c.CMD_READ, 0, 1 << 20)
    for at in range(0, 2 * c.MAX_REPLY_PIECES, 2):
        client.receive(hole_chunk(0, at, 1))
        assert isinstance(client.next_event(), Hole) and client.next_event() is None
    client.receive(hole_chunk(0, 2 * c.MAX_REPLY_PIECES, 1))
    with pytest.raises(TooLargeError, match="scattering"):
        client.next_event()


def test_a_server_that_goes_away_is_told() -> None:
    client, _ = structured_client(*READ)
    with pytest.raises(ProtocolError, match="1 requests unanswered"):
        client.end_of_stream()
    for length in (7, 16, 19, 30, 100):
        client, _ = structured_client(*READ)
        client.receive(data_chunk(1, 4096, bytes(1024))[:length])
        while client.next_event() is not None:
            pass
        with pytest.raises(ProtocolError, match="middle"):
            client.end_of_stream()
        client.end_of_stream()
