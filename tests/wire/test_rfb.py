"""RFB as bytes: handshakes of all versions, client messages in any pieces, lengths that lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.wire.rfb import (
    MAX_CUT_TEXT,
    MAX_ENCODINGS,
    MAX_NAME,
    ClientHandshake,
    ClientMessages,
    KeyMessage,
    Message,
    RfbError,
    ServerHandshake,
    ServerInit,
    extended_key_event,
    key_event,
    set_encodings,
    update_request,
)

INIT = ServerInit(720, 400, bytes(range(16)), b"a guest")


def pieces(data: bytes, sizes: list[int]) -> list[bytes]:
    out = []
    for size in sizes:
        out.append(data[:size])
        data = data[size:]
    return [*out, data]


@pytest.mark.parametrize("line", [b"RFB 003.003\n", b"RFB 003.007\n", b"RFB 003.008\n", b"RFB 003.889\n"])
@given(st.lists(st.integers(0, 5), max_size=30))
def test_a_handshake_with_both_our_sides(line: bytes, sizes: list[int]) -> None:
    """A client of any version, its bytes in any pieces; what follows the handshake is kept."""
    server = ServerHandshake()
    assert server.to_send() == b"RFB 003.008\n"
    client = ClientHandshake(shared=False)
    client.receive(line)
    said = client.to_send()
    while not server.done:
        for piece in pieces(said, sizes):
            server.receive(piece)
        answer = server.to_send()
        for piece in pieces(answer, sizes):
            client.receive(piece)
        said = client.to_send()
        assert said or answer or server.done
    assert not server.shared
    for piece in pieces(INIT.to_bytes() + b"more", sizes):
        client.receive(piece)
    assert client.done and client.init is not None
    assert client.init.to_bytes() == INIT.to_bytes()
    assert client.rest == b"more"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"HTTP/1.1 400", "not the VNC protocol"),
        (b"RFB 002.000\n", "version 2.0 is too old"),
        (b"RFB 003.008\n\x01\x02", "wants a password or more"),
        (b"RFB 003.003\n\0\0\0\x02", "wants a password or more"),
        (b"RFB 003.008\n\0\0\0\0\x04busy", "refuses: busy"),
        (b"RFB 003.003\n\0\0\0\0\0\0\0\x04busy", "refuses: busy"),
        (b"RFB 003.008\n\x01\x01\0\0\0\x01\0\0\0\x03no\n", "refuses: no"),
        (b"RFB 003.008\n\0\xff\xff\xff\xff", "over the limit"),
        (
            b"RFB 003.008\n\x01\x01\0\0\0\0" + struct.pack(">HH16sI", 1, 1, bytes(16), MAX_NAME + 1),
            "over the limit",
        ),
    ],
)
def test_servers_that_are_refused(data: bytes, words: str) -> None:
    with pytest.raises(RfbError, match=words):
        ClientHandshake().receive(data)


def test_clients_that_are_refused() -> None:
    with pytest.raises(RfbError, match="not the VNC protocol"):
        ServerHandshake().receive(b"GET / HTTP/1.1\r\n")
    with pytest.raises(RfbError, match="security type 2, which was not offered"):
        ServerHandshake().receive(b"RFB 003.008\n\x02")


PLAIN = [
    b"\x00" + bytes(19),
    set_encodings([0, -258, 7]),
    set_encodings([]),
    update_request(1, 2, 3, 4, incremental=True),
    b"\x05\x01\0\x0a\0\x0b",
    b"\x06\0\0\0" + struct.pack(">i", 5) + b"hello",
    b"\x06\0\0\0" + struct.pack(">i", -8) + bytes(8),
    b"\x96" + bytes(9),
    b"\xf8" + bytes(7) + b"\x03abc",
    b"\xfa\0\x01\x02",
    b"\xfb\0" + struct.pack(">HHBx", 800, 600, 2) + bytes(32),
    b"\xff\x01\0\0",
    b"\xff\x01\0\x02" + bytes(6),
]
KEYS = st.tuples(st.booleans(), st.integers(0, 0xFFFFFFFF), st.one_of(st.none(), st.integers(0, 0xFFFFFFFF)))


@given(
    st.lists(st.one_of(st.sampled_from(PLAIN), KEYS), max_size=12), st.lists(st.integers(0, 40), max_size=30)
)
def test_messages_in_any_pieces(sent: list[bytes | tuple[bool, int, int | None]], sizes: list[int]) -> None:
    raw = []
    for item in sent:
        if isinstance(item, bytes):
            raw.append(item)
        else:
            down, keysym, keycode = item
            raw.append(
                key_event(down, keysym) if keycode is None else extended_key_event(down, keysym, keycode)
            )
    machine = ClientMessages()
    got: list[Message] = []
    for piece in pieces(b"".join(raw), sizes):
        machine.receive(piece)
        while (message := machine.next_event()) is not None:
            got.append(message)
    assert [message.raw for message in got] == raw
    assert machine.rest == b""
    for message, item in zip(got, sent, strict=True):
        if isinstance(message, KeyMessage):
            assert (message.down, message.keysym, message.keycode) == item


@pytest.mark.parametrize(
    "data",
    [
        b"\x01",
        b"\x2a",
        b"\xff\x07",
        b"\x02\0" + struct.pack(">H", MAX_ENCODINGS + 1),
        b"\x06\0\0\0" + struct.pack(">i", MAX_CUT_TEXT + 1),
        b"\x06\0\0\0" + struct.pack(">i", -(1 << 31)),
        b"\xf8" + bytes(7) + b"\x41",
    ],
)
def test_messages_that_are_refused(data: bytes) -> None:
    """At once: nothing waits for the bytes that are announced."""
    machine = ClientMessages()
    with pytest.raises(RfbError, match=r"not known|over the limit"):
        machine.receive(key_event(True, 65) + data)
    event = machine.next_event()
    assert isinstance(event, KeyMessage), "what was whole before it still counts"


@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    """Whatever arrives is understood or refused, and never buffered beyond a message."""
    for machine in (ServerHandshake(), ClientHandshake(), ClientMessages()):
        try:
            machine.receive(data)
        except RfbError:
            pass
