"""The KD packet layer: builders and decoders agree, and the parser takes any bytes whatsoever."""

from __future__ import annotations

import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.wire.kd import constants as k
from enban.wire.kd import layouts
from enban.wire.kd import messages as m
from enban.wire.kd.parser import (
    BAD_HEADER,
    CHECKSUM,
    CUT_OFF,
    MOST_NOISE,
    TRAILING,
    BreakIn,
    Broken,
    Noise,
    Packet,
    Parser,
    ack_id,
    checksum,
    control_packet,
    data_packet,
    next_id,
)
from tests.wire.kd_helpers import PAYLOADS, cut, packet_of, packets, read_all

ACK = control_packet(k.ACK, k.INITIAL_ID)
PRINT = data_packet(k.DEBUG_IO, k.INITIAL_ID, m.print_string(b"hello"))


# -- bytes -------------------------------------------------------------------------------------


def test_packets_have_the_bytes_that_they_should() -> None:
    assert control_packet(k.ACK, 0x80800001).hex() == "69696969040000000100808000000000"
    assert data_packet(k.DEBUG_IO, 0x80800800, b"\x01\xff").hex() == (
        "3030303003000200000880800001000001ffaa"
    )
    assert checksum(b"\xff" * 4000) == 4000 * 255
    with pytest.raises(ValueError, match="4000"):
        data_packet(k.DEBUG_IO, 0, bytes(4001))


def test_ids_flip_and_lose_sync() -> None:
    first = k.INITIAL_ID | k.SYNC
    assert ack_id(first) == k.INITIAL_ID
    assert next_id(first) == k.INITIAL_ID ^ 1
    assert next_id(next_id(first)) == k.INITIAL_ID


# Size of the structure, and the offsets that other programs rely on (see docs/formats/kd.md).
SIZES = [
    (layouts.HEADER, 16, {"type": 4, "count": 6, "id": 8, "checksum": 12}),
    (
        layouts.EXCEPTION64,
        240,
        {
            "processor": 6,
            "processors": 8,
            "thread": 16,
            "pc": 24,
            "code": 32,
            "address": 48,
            "first_chance": 184,
            "dr6": 192,
            "fs": 238,
        },
    ),
    (
        layouts.LOAD_SYMBOLS64,
        240,
        {"path_length": 32, "base": 40, "process": 48, "image_checksum": 56, "image_size": 60, "unload": 64},
    ),
    (layouts.EXCEPTION32, 104, {"thread": 12, "pc": 16, "code": 20, "address": 32, "first_chance": 100}),
    (
        layouts.VERSION,
        56,
        {
            "api": 0,
            "processor": 6,
            "status": 8,
            "major": 16,
            "machine": 24,
            "kernel_base": 32,
            "debugger_data": 48,
        },
    ),
    (layouts.MEMORY, 56, {"address": 16, "length": 24, "done": 28}),
    (layouts.GO2, 56, {"go_status": 16, "trace": 20, "dr7": 24, "symbol_end": 40}),
    (layouts.PRINT, 16, {"api": 0, "length": 8}),
    (layouts.FILE_OPEN, 64, {"status": 4, "handle": 32, "length": 40}),
]


@pytest.mark.parametrize(("layout", "size", "offsets"), SIZES, ids=[layout.name for layout, _, _ in SIZES])
def test_structures_have_their_sizes_and_offsets(
    layout: layouts.Layout, size: int, offsets: dict[str, int]
) -> None:
    assert layout.size == size
    places = {field: offset for field, offset, _ in layout.rows}
    assert {field: places[field] for field in offsets} == offsets
    rows = sorted(
        (offset, offset + {"B": 1, "H": 2, "I": 4, "Q": 8}[code]) for _, offset, code in layout.rows
    )
    assert all(end <= start for (_, end), (start, _) in pairwise(rows))
    assert rows[-1][1] <= size


@pytest.mark.parametrize("name", sorted(PAYLOADS))
def test_what_is_built_is_understood(name: str) -> None:
    kind, payload = PAYLOADS[name]
    packet = packet_of(data_packet(kind, k.INITIAL_ID, payload))
    assert (packet.type, packet.payload) == (kind, payload)
    message = m.decode(packet)
    assert message.kind == kind
    assert message.words()
    words = {
        "exception64": "exception 0x80000003 at 0xfffff80000001234, processor 0",
        "load64": "load symbols of \\SystemRoot\\nt.exe at 0xfffff80000000000",
        "read": "ReadVirtualMemory at 0x1000, 4 bytes",
        "print": "print 'hello'",
        "prompt": "prompt 'Break or ignore?'",
    }
    if name in words:
        assert message.words() == words[name]
    if name == "read":
        assert message.data == b"data"
    if name == "file":
        assert message.text == "\\??\\C:\\a.sys"


def test_a_prompt_is_answered_in_its_own_form() -> None:
    prompt = m.decode(
        packet_of(data_packet(k.DEBUG_IO, k.INITIAL_ID, m.prompt_string(b"? ", 2, processor=3)))
    )
    answer = m.decode(packet_of(data_packet(k.DEBUG_IO, k.INITIAL_ID, m.prompt_answer(prompt, b"g"))))
    assert (answer.code, answer["processor"], answer["answer_length"], answer.data) == (
        k.GET_STRING,
        3,
        1,
        b"g",
    )


@given(st.sampled_from(k.DATA_TYPES), st.binary(max_size=300))
def test_any_payload_is_decoded(kind: int, payload: bytes) -> None:
    message = m.decode(Packet(0, 0, kind, 0, payload))
    assert len(message.words().splitlines()) == 1
    assert len(message.words()) < 200


# -- the parser --------------------------------------------------------------------------------


@given(st.lists(packets(), max_size=12), st.lists(st.integers(0, 5000), max_size=20))
def test_a_clean_stream_is_read_whole_however_it_is_cut(stream: list[bytes], places: list[int]) -> None:
    events = read_all(Parser(), cut(b"".join(stream), places))
    assert all(isinstance(event, Packet) for event in events)
    assert [event.length for event in events] == [len(packet) for packet in stream]
    assert [event.offset for event in events] == [sum(map(len, stream[:n])) for n in range(len(stream))]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A stream of packets, break-ins and junk, with bytes changed, lost and put in."""
    junk = st.binary(max_size=20) | st.sampled_from([b"b", b"bb", b"0000", b"iiii", b"000", b"00000000"])
    stream = bytearray(b"".join(draw(st.lists(packets() | junk, max_size=10))))
    for place, what, byte in draw(
        st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 3), st.integers(0, 255)), max_size=6)
    ):
        if stream:
            place %= len(stream)
            if what == 0:
                stream[place] = byte
            elif what == 1:
                del stream[place]
            elif what == 2:
                stream.insert(place, byte)
            else:
                del stream[place : place + byte]
    return bytes(stream)


@given(damaged() | st.binary(max_size=600), st.lists(st.integers(0, 5000), max_size=20), st.booleans())
def test_any_stream_gives_the_same_events_however_it_is_cut(
    stream: bytes, places: list[int], break_ins: bool
) -> None:
    whole = Parser(break_ins=break_ins)
    events = whole.receive(stream) + whole.idle()
    pieces = Parser(break_ins=break_ins)
    assert read_all(pieces, cut(stream, places)) + pieces.idle() == events
    assert whole.offset == len(stream)
    assert whole.pending == whole.noise == 0
    # Every byte is in an event, none in two; a broken packet may claim more than there is of it.
    reached = 0
    for event in events:
        assert event.offset >= reached or isinstance(event, Packet)
        if not isinstance(event, Broken):
            assert event.offset >= reached
            reached = event.offset + event.length
        else:
            reached = event.offset + 1
    assert reached <= len(stream)


@given(damaged())
def test_a_packet_after_any_damage_is_found(before: bytes) -> None:
    """After a pause the next packet is read, whatever there was before it."""
    parser = Parser()
    parser.receive(before)
    parser.idle()
    (event,) = parser.receive(PRINT)
    assert isinstance(event, Packet)
    assert event.payload == m.print_string(b"hello")


def test_garbage_before_and_between_packets_is_noise() -> None:
    events = Parser().receive(b"garbage" + PRINT + b"xy" + ACK)
    assert events == [
        Noise(0, 7, b"garbage"),
        packet_at(7, PRINT),
        Noise(7 + len(PRINT), 2, b"xy"),
        packet_at(9 + len(PRINT), ACK),
    ]


def packet_at(offset: int, data: bytes) -> Packet:
    packet = packet_of(data)
    packet.offset = offset
    return packet


def test_a_break_in_is_a_byte_between_packets_only() -> None:
    with_b = data_packet(k.DEBUG_IO, k.INITIAL_ID, m.print_string(b"bbb"))
    events = Parser().receive(b"b" + with_b + b"bb" + ACK + b"xb" + ACK)
    kinds = [type(event).__name__ for event in events]
    assert kinds == ["BreakIn", "Packet", "BreakIn", "BreakIn", "Packet", "Noise", "Packet"]
    assert Parser(break_ins=False).receive(b"b" + ACK) == [Noise(0, 1, b"b"), packet_at(1, ACK)]


def test_a_break_in_after_noise_and_a_pause_is_one() -> None:
    parser = Parser()
    assert parser.receive(b"xyz") == []
    assert parser.idle() == [Noise(0, 3, b"xyz")]
    assert parser.receive(b"b") == [BreakIn(3, 1)]


@pytest.mark.parametrize(
    ("place", "reason"),
    [(20, CHECKSUM), (13, CHECKSUM), (len(PRINT) - 1, TRAILING)],
    ids=["payload", "sum", "trailer"],
)
def test_a_changed_byte_breaks_one_packet(place: int, reason: str) -> None:
    bad = bytearray(PRINT)
    bad[place] ^= 0x55
    events = Parser().receive(bytes(bad) + PRINT)
    assert events == [Broken(0, len(PRINT), reason, k.DEBUG_IO, k.INITIAL_ID), packet_at(len(PRINT), PRINT)]


@pytest.mark.parametrize("lost", range(1, len(PRINT), 3))
def test_after_a_truncated_packet_the_next_is_found(lost: int) -> None:
    """The rest of the first is filled with bytes of the second, which must not be lost with it."""
    events = Parser().receive(PRINT[:-lost] + PRINT + PRINT)
    found = [event for event in events if isinstance(event, Packet)]
    assert [event.offset for event in found] == [len(PRINT) - lost, 2 * len(PRINT) - lost]


def test_a_header_that_lies_is_told_and_passed_over() -> None:
    header = bytes(layouts.HEADER.build(leader=k.DATA_LEADER, type=k.DEBUG_IO, count=4001, id=k.INITIAL_ID))
    events = Parser().receive(header + PRINT)
    assert events == [Broken(0, 16, BAD_HEADER, k.DEBUG_IO, k.INITIAL_ID), packet_at(16, PRINT)]
    text = b"version 0000\x30\x30 of something" + ACK
    assert [type(event).__name__ for event in Parser().receive(text)] == ["Noise", "Packet"]


def test_what_stays_unfinished_is_told_after_a_pause() -> None:
    parser = Parser()
    assert parser.receive(PRINT[:30]) == []
    assert parser.pending == 30
    assert parser.idle() == [Broken(0, 30, CUT_OFF, k.DEBUG_IO, k.INITIAL_ID)]
    assert parser.receive(PRINT) == [packet_at(30, PRINT)]


def test_noise_is_told_in_bounded_portions() -> None:
    parser = Parser()
    events = parser.receive(b"\xff" * (3 * MOST_NOISE + 5))
    assert [event.length for event in events] == [MOST_NOISE] * 3
    assert parser.noise == 5
    assert parser.idle() == [Noise(3 * MOST_NOISE, 5, b"\xff" * 5)]


@pytest.mark.parametrize(
    "junk",
    [
        b"\xff" * 16,
        b"0" * 16,
        b"i" * 16,
        b"b" * 16,
        PRINT[:15],
        bytes(layouts.HEADER.build(leader=k.DATA_LEADER, type=2, count=4000, id=k.INITIAL_ID)),
    ],
    ids=["noise", "zeros", "control", "break-ins", "cut", "longest"],
)
def test_memory_does_not_grow(junk: bytes) -> None:
    parser = Parser()
    most = 0
    piece = junk * 64
    tracemalloc.start()
    try:
        for _ in range(40):
            parser.receive(piece)
            most = max(most, parser.pending)
        assert tracemalloc.get_traced_memory()[0] < 200_000
    finally:
        tracemalloc.stop()
    assert most < k.MAX_PACKET
