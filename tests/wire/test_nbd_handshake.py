"""The handshake: every option between the two machines, the rules of the server, hostile peers."""

from __future__ import annotations

import pytest

from enban.wire.nbd import (
    ClientHandshake,
    Export,
    Negotiator,
    OutOfTurnError,
    ProtocolError,
    RefusedError,
    ServerHandshake,
    Session,
    TooLargeError,
    WrongMagicError,
)
from enban.wire.nbd import constants as c
from enban.wire.nbd.handshake_client import (
    Acknowledged,
    ContextListed,
    Declined,
    ExportListed,
    Greeted,
    string_bytes,
)
from enban.wire.nbd.handshake_server import (
    ContextsRequested,
    ExportRequested,
    HandshakeEnded,
    ListRequested,
    OptionRefused,
    TlsGranted,
)
from enban.wire.nbd.negotiator import NEED_BYTES, READY, START_TLS
from enban.wire.nbd.options import (
    GREETING_LAYOUT,
    pack_context,
    pack_context_query,
    pack_export_query,
    pack_option,
    pack_reply,
)
from tests.wire.nbd_helpers import (
    ALL_FLAGS,
    CONTEXTS,
    STYLES,
    Disk,
    answer_question,
    connect,
    serve_handshake,
)

FIXED = (3).to_bytes(4)  # client flags: fixed newstyle, no zeroes
GREETING = GREETING_LAYOUT.pack(c.MAGIC_NBD, c.MAGIC_OPTION, 3)


def client_events(client: ClientHandshake) -> list[object]:
    events: list[object] = []
    while (event := client.next_event()) is not None:
        events.append(event)
    return events


class Pair:
    """A client and a server past their greetings."""

    def __init__(self, disk: Disk | None = None, *, tls: int = c.TLS_OFF, style: int = c.EXTENDED) -> None:
        self.disk = disk or Disk()
        self.server = ServerHandshake(tls=tls, style=style)
        self.client = ClientHandshake()
        assert [type(event) for event in self.turn()] == [Greeted]

    def turn(self) -> list[object]:
        """Carry bytes both ways once; returns what the client hears."""
        self.server_events = serve_handshake(self.server, self.client.to_send(), self.disk)
        self.client.receive(self.server.to_send())
        return client_events(self.client)

    def sessions(self) -> tuple[Session | None, Session | None]:
        return self.client.session, self.server.session


def started_server(**options: int) -> ServerHandshake:
    server = ServerHandshake(**options)
    server.to_send()
    server.receive(FIXED)
    assert server.next_event() is None
    return server


def started_client(option: str = "", *arguments: object) -> ClientHandshake:
    client = ClientHandshake()
    client.receive(GREETING)
    assert isinstance(client.next_event(), Greeted)
    if option:
        getattr(client, option)(*arguments)
    client.to_send()
    return client


# ---- every option, both ways ----


def test_greeting_bytes() -> None:
    server, client = ServerHandshake(), ClientHandshake()
    assert server.to_send() == b"NBDMAGICIHAVEOPT\0\3"
    assert server.to_send() == b""
    client.receive(b"NBDMAGICIHAVEOPT\0\3")
    event = client.next_event()
    assert isinstance(event, Greeted) and event.fixed and client.fixed
    assert client.to_send() == b"\0\0\0\3"


def test_unknown_handshake_flags_are_ignored() -> None:
    client = ClientHandshake()
    client.receive(GREETING_LAYOUT.pack(c.MAGIC_NBD, c.MAGIC_OPTION, 0xFFFF))
    client.next_event()
    assert client.to_send() == b"\0\0\0\3"


def test_list() -> None:
    pair = Pair()
    pair.client.list_exports()
    listed, final = pair.turn()
    assert isinstance(listed, ExportListed) and isinstance(final, Acknowledged)
    assert (listed.name, listed.description) == ("disk", "a disk in memory")
    assert final.option == c.OPT_LIST


def test_info_tells_and_stays() -> None:
    disk = Disk(1 << 20)
    disk.export.min_block, disk.export.preferred_block, disk.export.max_block = 512, 65536, 1 << 20
    pair = Pair(disk)
    pair.client.info("disk")
    (told,) = pair.turn()
    assert isinstance(told, Acknowledged) and told.export is not None
    export = told.export
    assert (export.name, export.description, export.size) == ("disk", "a disk in memory", 1 << 20)
    assert (export.min_block, export.preferred_block, export.max_block) == (512, 65536, 1 << 20)
    assert export.flags == ALL_FLAGS | c.FLAG_HAS_FLAGS
    assert pair.sessions() == (None, None)
    pair.client.go("disk")
    pair.turn()
    assert None not in pair.sessions()


def test_info_gives_the_canonical_name() -> None:
    pair = Pair()
    pair.client.info("")
    (told,) = pair.turn()
    assert isinstance(told, Acknowledged) and told.export is not None and told.export.name == "disk"


def test_unknown_export_can_be_tried_again() -> None:
    pair = Pair()
    pair.client.go("nothing")
    (declined,) = pair.turn()
    assert isinstance(declined, Declined) and declined.reply == c.REP_ERR_UNKNOWN
    assert declined.message == "no export 'nothing'"
    assert "no such export" in str(declined.error())
    pair.client.go("disk")
    pair.turn()
    assert pair.client.session is not None


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("server_style", STYLES)
def test_both_sides_end_in_the_same_session(style: int, server_style: int) -> None:
    client, server = connect(Disk(), style, server_style=server_style)
    agreed = min(style, server_style)
    assert client.session.style == server.session.style == agreed
    assert client.session.export.flags == server.session.export.flags
    assert client.session.contexts == server.session.contexts
    assert client.session.contexts == (dict(CONTEXTS) if agreed else {})
    assert bool(client.session.export.flags & c.FLAG_SEND_DF) == (agreed >= c.STRUCTURED)
    assert bool(client.session.export.flags & c.FLAG_BLOCK_STATUS_PAYLOAD) == (agreed == c.EXTENDED)


def test_list_meta_contexts() -> None:
    pair = Pair()
    pair.client.request_structured()
    pair.turn()
    pair.client.list_contexts("disk")
    first, second, final = pair.turn()
    assert isinstance(first, ContextListed) and isinstance(second, ContextListed)
    assert [(first.context, first.name), (second.context, second.name)] == [(0, name) for _, name in CONTEXTS]
    assert isinstance(final, Acknowledged)
    assert isinstance(pair.server_events[0], ContextsRequested)


def test_contexts_of_another_export_do_not_count() -> None:
    pair = Pair()
    pair.client.request_structured()
    pair.turn()
    pair.client.set_contexts("disk", [c.BASE_ALLOCATION])
    pair.turn()
    pair.client.go("")  # the same disk, by another name
    pair.turn()
    assert pair.client.session is not None and pair.server.session is not None
    assert pair.client.session.contexts == pair.server.session.contexts == {}


def test_a_later_choice_of_contexts_replaces_the_first_even_if_it_fails() -> None:
    pair = Pair()
    pair.client.request_structured()
    pair.turn()
    pair.client.set_contexts("disk", [c.BASE_ALLOCATION])
    pair.turn()
    # An empty name behind the count: does not parse.
    pair.server.receive(pack_option(c.OPT_SET_META_CONTEXT, b"\0\0\0\1"))
    assert isinstance(pair.server.next_event(), OptionRefused)
    pair.server.to_send()
    pair.client.go("disk")
    pair.turn()
    assert pair.server.session is not None and pair.server.session.contexts == {}


@pytest.mark.parametrize("flags", [0, c.FLAG_FIXED_NEWSTYLE, 3])
def test_export_name(flags: int) -> None:
    disk = Disk()
    server, client = ServerHandshake(), ClientHandshake()
    server.to_send()
    client.receive(GREETING_LAYOUT.pack(c.MAGIC_NBD, c.MAGIC_OPTION, flags))
    client.next_event()
    client.export_name("disk")
    serve_handshake(server, client.to_send(), disk)
    answer = server.to_send()
    assert len(answer) == 10 + (0 if flags & c.FLAG_NO_ZEROES else 124)
    client.receive(answer + b"more")
    (event,) = client_events(client)
    assert isinstance(event, Acknowledged) and client.session is not None
    assert client.session.export.size == len(disk.data)
    assert client.leftover() == b"more"


def test_refused_export_name_hangs_up() -> None:
    server = started_server()
    server.receive(pack_option(c.OPT_EXPORT_NAME, b"nothing"))
    question = server.next_event()
    assert isinstance(question, ExportRequested)
    answer_question(server, question, Disk())
    assert server.state == "closed" and server.to_send() == b""
    client = started_client("export_name", "nothing")
    with pytest.raises(ProtocolError, match="instead of serving export 'nothing'"):
        client.end_of_stream()


def test_abort() -> None:
    pair = Pair()
    pair.client.abort()
    (final,) = pair.turn()
    assert isinstance(final, Acknowledged) and pair.client.state == "closed"
    assert isinstance(pair.server_events[0], HandshakeEnded) and pair.server.state == "closed"
    pair.client.end_of_stream()
    pair.server.end_of_stream()


def test_a_server_that_hangs_up_on_abort_is_fine() -> None:
    client = started_client("abort")
    client.end_of_stream()
    assert client.state == "closed"


def test_abort_ignores_data() -> None:
    server = started_server()
    server.receive(pack_option(c.OPT_ABORT, b"bye"))
    assert isinstance(server.next_event(), HandshakeEnded)
    assert server.to_send() == pack_reply(c.OPT_ABORT, c.REP_ACK)


def test_shutdown_turns_options_away() -> None:
    pair = Pair()
    pair.server.shutting_down = True
    pair.client.go("disk")
    (declined,) = pair.turn()
    assert isinstance(declined, Declined) and declined.reply == c.REP_ERR_SHUTDOWN
    pair.client.abort()
    (final,) = pair.turn()
    assert isinstance(final, Acknowledged)


# ---- TLS ----


def test_tls_forgets_what_was_agreed_in_plain() -> None:
    pair = Pair(tls=c.TLS_ALLOWED)
    pair.client.request_extended()
    pair.turn()
    pair.client.start_tls()
    (final,) = pair.turn()
    assert isinstance(final, Acknowledged) and final.option == c.OPT_STARTTLS
    assert isinstance(pair.server_events[0], TlsGranted)
    for side in (pair.client, pair.server):
        with pytest.raises(OutOfTurnError, match="belong to TLS"):
            side.receive(b"\x16\x03")
        side.tls_is_up()
    pair.client.go("disk")
    pair.turn()
    for side in (pair.client, pair.server):
        assert side.session is not None and side.session.tls and side.session.style == c.SIMPLE


def test_tls_required_answers_nothing_else_before() -> None:
    pair = Pair(tls=c.TLS_REQUIRED)
    for ask in (
        pair.client.list_exports,
        pair.client.request_structured,
        pair.client.request_extended,
        lambda: pair.client.go("disk"),
        lambda: pair.client.info("disk"),
    ):
        ask()
        (declined,) = pair.turn()
        assert isinstance(declined, Declined) and declined.reply == c.REP_ERR_TLS_REQD
    pair.server.receive(pack_option(99))
    refused = pair.server.next_event()
    assert isinstance(refused, OptionRefused) and refused.reply == c.REP_ERR_TLS_REQD
    pair.server.receive(pack_option(c.OPT_EXPORT_NAME, b"disk"))
    assert isinstance(pair.server.next_event(), HandshakeEnded)


def test_tls_twice_and_tls_off() -> None:
    pair = Pair()
    pair.client.start_tls()
    (declined,) = pair.turn()
    assert isinstance(declined, Declined) and declined.reply == c.REP_ERR_UNSUP
    server = started_server(tls=c.TLS_REQUIRED)
    server.receive(pack_option(c.OPT_STARTTLS))
    assert isinstance(server.next_event(), TlsGranted)
    server.to_send()
    server.tls_is_up()
    server.receive(pack_option(c.OPT_STARTTLS))
    refused = server.next_event()
    assert isinstance(refused, OptionRefused) and refused.reply == c.REP_ERR_INVALID


def test_plain_bytes_behind_starttls_are_an_attack() -> None:
    server = started_server(tls=c.TLS_REQUIRED)
    server.receive(pack_option(c.OPT_STARTTLS) + pack_option(c.OPT_LIST))
    with pytest.raises(ProtocolError, match="plain bytes"):
        server.next_event()
    assert server.to_send() == b"" and server.next_event() is None
    client = started_client("start_tls")
    client.receive(pack_reply(c.OPT_STARTTLS, c.REP_ACK) + pack_reply(c.OPT_GO, c.REP_ACK))
    with pytest.raises(ProtocolError, match="plain bytes"):
        client.next_event()


# ---- the negotiator ----


def negotiate(negotiator: Negotiator, server: ServerHandshake, disk: Disk) -> list[int]:
    """Run it to the end; returns the options the server saw."""
    client = negotiator.handshake
    options = []
    while (step := negotiator.advance()) != READY:
        sent = client.to_send()
        if b"IHAVEOPT" in sent:
            options.append(int.from_bytes(sent[sent.index(b"IHAVEOPT") + 8 :][:4]))
        serve_handshake(server, sent, disk)
        client.receive(server.to_send())
        if step == START_TLS:
            client.tls_is_up()
            server.tls_is_up()
        else:
            assert step == NEED_BYTES
    return options


def test_negotiator_order() -> None:
    client, server = ClientHandshake(), ServerHandshake(tls=c.TLS_REQUIRED)
    negotiator = Negotiator(client, "disk", contexts=[c.BASE_ALLOCATION], tls=c.TLS_ALLOWED)
    client.receive(server.to_send())
    assert negotiator.advance() == NEED_BYTES
    server.receive(client.to_send())
    assert isinstance(server.next_event(), TlsGranted)
    client.receive(server.to_send())
    assert negotiator.advance() == START_TLS
    client.tls_is_up()
    server.tls_is_up()
    options = negotiate(negotiator, server, Disk())
    assert options == [c.OPT_EXTENDED_HEADERS, c.OPT_SET_META_CONTEXT, c.OPT_GO]
    assert client.session is not None and client.session.tls and client.session.style == c.EXTENDED


def test_negotiator_falls_back_to_structured() -> None:
    client = ClientHandshake()
    options = negotiate(
        Negotiator(client, "disk", contexts=["none:such"]), ServerHandshake(style=c.STRUCTURED), Disk()
    )
    assert options == [
        c.OPT_EXTENDED_HEADERS,
        c.OPT_STRUCTURED_REPLY,
        c.OPT_SET_META_CONTEXT,
        c.OPT_GO,
    ]
    assert client.session is not None and client.session.contexts == {}


def test_negotiator_falls_back_to_export_name() -> None:
    client = started_client()
    negotiator = Negotiator(client, "disk", style=c.SIMPLE)
    assert negotiator.advance() == NEED_BYTES
    client.to_send()
    client.receive(pack_reply(c.OPT_GO, c.REP_ERR_UNSUP))
    assert negotiator.advance() == NEED_BYTES
    assert client.to_send() == pack_option(c.OPT_EXPORT_NAME, b"disk")
    client.receive((512).to_bytes(8) + (1).to_bytes(2))
    assert negotiator.advance() == READY


def test_negotiator_gives_up_where_it_must() -> None:
    with pytest.raises(RefusedError, match="no such export") as caught:
        negotiate(Negotiator(ClientHandshake(), "nothing"), ServerHandshake(), Disk())
    assert caught.value.reply == c.REP_ERR_UNKNOWN and caught.value.hint
    with pytest.raises(RefusedError, match="without TLS"):
        negotiate(Negotiator(ClientHandshake(), "disk"), ServerHandshake(tls=c.TLS_REQUIRED), Disk())
    with pytest.raises(RefusedError, match="STARTTLS"):
        negotiate(Negotiator(ClientHandshake(), "disk", tls=c.TLS_REQUIRED), ServerHandshake(), Disk())
    client = ClientHandshake()
    client.receive(GREETING_LAYOUT.pack(c.MAGIC_NBD, c.MAGIC_OPTION, 0))
    with pytest.raises(RefusedError, match="STARTTLS"):
        Negotiator(client, "disk", tls=c.TLS_REQUIRED).advance()


def test_negotiator_goes_on_in_plain_where_it_may() -> None:
    client = ClientHandshake()
    negotiate(Negotiator(client, "disk", tls=c.TLS_ALLOWED), ServerHandshake(), Disk())
    assert client.session is not None and not client.session.tls


# ---- what the server refuses ----


@pytest.mark.parametrize(
    ("option", "data", "reply"),
    [
        (99, b"whatever", c.REP_ERR_UNSUP),
        (4, b"", c.REP_ERR_UNSUP),
        (c.OPT_LIST, b"x", c.REP_ERR_INVALID),
        (c.OPT_STARTTLS, b"x", c.REP_ERR_INVALID),
        (c.OPT_STRUCTURED_REPLY, b"x", c.REP_ERR_INVALID),
        (c.OPT_EXTENDED_HEADERS, b"x", c.REP_ERR_INVALID),
        (c.OPT_GO, b"", c.REP_ERR_INVALID),
        (c.OPT_GO, b"\0\0\0\4disk", c.REP_ERR_INVALID),
        (c.OPT_GO, b"\xff\xff\xff\xffdisk\0\0", c.REP_ERR_INVALID),
        (c.OPT_GO, b"\0\0\0\4disk\0\1", c.REP_ERR_INVALID),
        (c.OPT_INFO, b"\0\0\0\4disk\0\0more", c.REP_ERR_INVALID),
        (c.OPT_INFO, pack_export_query(b"a\0b", []), c.REP_ERR_INVALID),
        (c.OPT_INFO, pack_export_query(b"\xff", []), c.REP_ERR_INVALID),
        (c.OPT_INFO, pack_export_query(b"x" * 4097, []), c.REP_ERR_TOO_BIG),
        (c.OPT_SET_META_CONTEXT, pack_context_query(b"disk", []), c.REP_ERR_INVALID),
        (c.OPT_LIST_META_CONTEXT, pack_context_query(b"disk", []), c.REP_ERR_INVALID),
    ],
)
def test_bad_options_are_answered_and_the_next_works(option: int, data: bytes, reply: int) -> None:
    server = started_server(tls=c.TLS_ALLOWED)
    server.receive(pack_option(option, data) + pack_option(c.OPT_LIST))
    refused = server.next_event()
    assert isinstance(refused, OptionRefused)
    assert (refused.option, refused.reply) == (option, reply)
    assert server.to_send() == pack_reply(option, reply, refused.message.encode())
    assert isinstance(server.next_event(), ListRequested)


@pytest.mark.parametrize(
    ("data", "reply"),
    [
        (b"\0\0\0\4disk", c.REP_ERR_INVALID),
        (b"\0\0\0\4disk\0\0\0\1", c.REP_ERR_INVALID),
        (b"\0\0\0\4disk\0\0\0\1\0\0\0\7base", c.REP_ERR_INVALID),
        (b"\0\0\0\4disk\xff\xff\xff\xff", c.REP_ERR_TOO_BIG),
        (pack_context_query(b"disk", [b"x" * 4097]), c.REP_ERR_TOO_BIG),
        (pack_context_query(b"disk", [b"base:"]) + b"x", c.REP_ERR_INVALID),
    ],
)
def test_bad_context_queries_are_answered(data: bytes, reply: int) -> None:
    server = started_server()
    server.receive(pack_option(c.OPT_STRUCTURED_REPLY) + pack_option(c.OPT_SET_META_CONTEXT, data))
    refused = server.next_event()
    assert isinstance(refused, OptionRefused) and refused.reply == reply


def test_structured_after_extended_is_refused() -> None:
    server = started_server()
    server.receive(pack_option(c.OPT_EXTENDED_HEADERS) + pack_option(c.OPT_STRUCTURED_REPLY))
    refused = server.next_event()
    assert isinstance(refused, OptionRefused) and refused.reply == c.REP_ERR_EXT_HEADER_REQD
    assert server.to_send().startswith(pack_reply(c.OPT_EXTENDED_HEADERS, c.REP_ACK))


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ((4).to_bytes(4), ProtocolError),
        (FIXED + b"GET / HTTP/1.1\r\n", WrongMagicError),
        (FIXED + pack_option(c.OPT_EXPORT_NAME, b"x" * 4097), ProtocolError),
        (FIXED + pack_option(c.OPT_EXPORT_NAME, b"\xff"), ProtocolError),
        (
            FIXED + pack_option(c.OPT_EXTENDED_HEADERS) + pack_option(c.OPT_EXPORT_NAME, b"disk"),
            ProtocolError,
        ),
        ((2).to_bytes(4) + pack_option(c.OPT_LIST), ProtocolError),
        (FIXED + pack_option(c.OPT_GO)[:12] + (c.MAX_OPTION + 1).to_bytes(4), TooLargeError),
        (FIXED + pack_option(99)[:12] + b"\xff\xff\xff\xff", TooLargeError),
    ],
)
def test_the_server_hangs_up_where_no_answer_is_possible(sent: bytes, error: type[Exception]) -> None:
    server = ServerHandshake()
    server.receive(sent)
    with pytest.raises(error):
        while server.next_event() is not None:
            pass
    assert server.state == "broken"
    server.receive(b"more")
    assert server.next_event() is None


def test_half_a_message_at_the_end_is_told() -> None:
    server = started_server()
    server.end_of_stream()
    server.receive(pack_option(c.OPT_LIST)[:7])
    with pytest.raises(ProtocolError, match="middle"):
        server.end_of_stream()


def test_one_question_at_a_time() -> None:
    server = started_server()
    server.receive(pack_option(c.OPT_LIST) + pack_option(c.OPT_LIST))
    assert isinstance(server.next_event(), ListRequested)
    with pytest.raises(OutOfTurnError, match="not answered"):
        server.next_event()
    with pytest.raises(OutOfTurnError):
        server.accept(Export("disk", 512))
    with pytest.raises(OutOfTurnError):
        server.answer_contexts([])
    server.refuse(c.REP_ERR_POLICY, "no lists here")
    with pytest.raises(OutOfTurnError):
        server.refuse(c.REP_ERR_POLICY)
    with pytest.raises(OutOfTurnError):
        server.answer_list([])
    with pytest.raises(OutOfTurnError):
        server.tls_is_up()
    with pytest.raises(OutOfTurnError):
        server.leftover()
    assert isinstance(server.next_event(), ListRequested)


# ---- what the client refuses ----


def info(kind: int, body: bytes) -> bytes:
    return pack_reply(c.OPT_GO, c.REP_INFO, kind.to_bytes(2) + body)


EXPORT_INFO = info(c.INFO_EXPORT, (1 << 20).to_bytes(8) + b"\0\1")
GO_ACK = pack_reply(c.OPT_GO, c.REP_ACK)


def sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    body = minimum.to_bytes(4) + preferred.to_bytes(4) + maximum.to_bytes(4)
    return info(c.INFO_BLOCK_SIZE, body)


@pytest.mark.parametrize(
    ("reply", "error"),
    [
        (b"\0" * 20, WrongMagicError),
        (pack_reply(c.OPT_LIST, c.REP_ACK), ProtocolError),
        (pack_reply(c.OPT_GO, c.REP_SERVER, b"\0\0\0\0"), ProtocolError),
        (pack_reply(c.OPT_GO, 77), ProtocolError),
        (pack_reply(c.OPT_GO, c.REP_ACK, b"x"), ProtocolError),
        (GO_ACK, ProtocolError),
        (pack_reply(c.OPT_GO, c.REP_INFO)[:16] + b"\0\1\0\1", TooLargeError),
        (pack_reply(c.OPT_GO, c.REP_INFO, b"\0"), ProtocolError),
        (info(c.INFO_EXPORT, b"short"), ProtocolError),
        (info(c.INFO_EXPORT, (1 << 63).to_bytes(8) + b"\0\1"), ProtocolError),
        (info(c.INFO_EXPORT, (1 << 20).to_bytes(8) + b"\0\0"), ProtocolError),
        (info(c.INFO_NAME, b"\xff"), ProtocolError),
        (info(c.INFO_NAME, b"x" * 4097), ProtocolError),
        (info(c.INFO_BLOCK_SIZE, b"short"), ProtocolError),
        (sizes(0, 4096, 1 << 20), ProtocolError),
        (sizes(3, 4096, 1 << 20), ProtocolError),
        (sizes(1 << 17, 1 << 17, 1 << 20), ProtocolError),
        (sizes(512, 256, 1 << 20), ProtocolError),
        (sizes(512, 5000, 1 << 20), ProtocolError),
        (sizes(512, 4096, 1000), ProtocolError),
        (pack_reply(c.OPT_GO, c.REP_ERR_UNKNOWN, b"x" * 4097), ProtocolError),
    ],
)
def test_replies_a_client_hangs_up_on(reply: bytes, error: type[Exception]) -> None:
    client = started_client("go", "disk")
    client.receive(reply)
    with pytest.raises(error):
        while client.next_event() is not None:
            pass
    assert client.state == "broken" and client.session is None


def test_block_sizes_bound_the_session() -> None:
    client = started_client("go", "disk")
    unknown_kind = info(999, b"whatever")
    client.receive(EXPORT_INFO + unknown_kind + sizes(512, 4096, 65536) + GO_ACK + b"left")
    assert isinstance(client.next_event(), Acknowledged)
    assert client.session is not None and client.session.max_payload == 65536
    assert client.leftover() == b"left"
    client = started_client("go", "disk")
    client.receive(EXPORT_INFO + sizes(1, 4096, c.UNLIMITED_BLOCK) + GO_ACK)
    client.next_event()
    assert client.session is not None and client.session.max_payload == c.DEFAULT_MAX_PAYLOAD


def test_a_context_id_given_twice_is_refused() -> None:
    client = started_client("request_structured")
    client.receive(pack_reply(c.OPT_STRUCTURED_REPLY, c.REP_ACK))
    client.next_event()
    client.set_contexts("disk", ["base:allocation", "x:y"])
    twice = pack_context(1, b"base:allocation"), pack_context(1, b"x:y")
    client.receive(b"".join(pack_reply(c.OPT_SET_META_CONTEXT, c.REP_META_CONTEXT, data) for data in twice))
    assert isinstance(client.next_event(), ContextListed)
    with pytest.raises(ProtocolError, match="twice"):
        client.next_event()


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH_9.2", "instead of NBDMAGIC"),
        (b"NBDMAGIC" + c.MAGIC_OLDSTYLE.to_bytes(8) + bytes(10), "oldstyle"),
        (b"NBDMAGIC" + bytes(10), "IHAVEOPT"),
    ],
)
def test_other_greetings(greeting: bytes, words: str) -> None:
    client = ClientHandshake()
    client.receive(greeting)
    with pytest.raises(WrongMagicError, match=words):
        client.next_event()


def test_the_client_speaks_in_turn() -> None:
    client = ClientHandshake()
    with pytest.raises(OutOfTurnError):
        client.go("disk")
    client = started_client()
    with pytest.raises(OutOfTurnError, match="structured"):
        client.list_contexts("disk")
    for name in ("x" * 4097, "a\0b", "\udcff"):
        with pytest.raises(OutOfTurnError):
            client.go(name)
    client.list_exports()
    with pytest.raises(OutOfTurnError):
        client.list_exports()
    with pytest.raises(ProtocolError, match="hung up during"):
        client.end_of_stream()
    client = started_client("request_extended")
    client.receive(pack_reply(c.OPT_EXTENDED_HEADERS, c.REP_ACK))
    client.next_event()
    with pytest.raises(OutOfTurnError, match="EXPORT_NAME"):
        client.export_name("disk")
    assert string_bytes("円盤", "export name") == "円盤".encode()
