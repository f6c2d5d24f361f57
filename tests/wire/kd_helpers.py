"""KD packets for tests: one of every kind, and strategies for streams of them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from enban.wire.kd import constants as k
from enban.wire.kd import messages as m
from enban.wire.kd.parser import Event, Packet, Parser, control_packet, data_packet

PAYLOADS: dict[str, tuple[int, bytes]] = {
    "exception64": (
        k.STATE_CHANGE64,
        m.exception64(
            code=k.STATUS_BREAKPOINT,
            pc=0xFFFFF80000001234,
            address=0xFFFFF80000001234,
            instructions=b"\xcc\xc3",
        ),
    ),
    "exception32": (k.STATE_CHANGE32, m.exception32(code=k.STATUS_BREAKPOINT, pc=0x80401234, first_chance=1)),
    "load64": (
        k.STATE_CHANGE64,
        m.load_symbols64("\\SystemRoot\\nt.exe", base=0xFFFFF80000000000, process=7),
    ),
    "load32": (k.STATE_CHANGE32, m.load_symbols32("nt.exe", base=0x80400000)),
    "version": (k.MANIPULATE, m.manipulate(k.GET_VERSION, machine=0x8664, kernel_base=0xFFFFF80000000000)),
    "read": (k.MANIPULATE, m.manipulate(k.READ_VIRTUAL, b"data", address=0x1000, length=4, done=4)),
    "continue": (k.MANIPULATE, m.manipulate(k.CONTINUE2, go_status=k.DBG_CONTINUE)),
    "print": (k.DEBUG_IO, m.print_string(b"hello\n")),
    "prompt": (k.DEBUG_IO, m.prompt_string(b"Break or ignore? ", 2)),
    "trace": (k.TRACE_IO, m.print_trace(b"\x01\x02")),
    "request": (k.CONTROL_REQUEST, m.control_request(k.REQUEST_HARDWARE_BP, number=1)),
    "file": (k.FILE_IO, m.file_io(k.CREATE_FILE, "\\??\\C:\\a.sys", access=1)),
}


def packets() -> st.SearchStrategy[bytes]:
    ids = st.sampled_from([k.INITIAL_ID, k.INITIAL_ID ^ 1, k.INITIAL_ID | k.SYNC])
    data = st.builds(
        data_packet, st.sampled_from(k.DATA_TYPES), ids, st.binary(max_size=200) | st.just(b"b0i\xaa" * 30)
    )
    known = st.builds(
        lambda name, id: data_packet(PAYLOADS[name][0], id, PAYLOADS[name][1]),
        st.sampled_from(sorted(PAYLOADS)),
        ids,
    )
    control = st.builds(control_packet, st.sampled_from(k.CONTROL_TYPES), ids | st.just(0))
    return data | known | control


def read_all(parser: Parser, pieces: list[bytes]) -> list[Event]:
    return [event for piece in pieces for event in parser.receive(piece)]


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    """A stream in pieces, cut at these places (taken modulo its length)."""
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[a:b] for a, b in pairwise(edges)]


def packet_of(data: bytes) -> Packet:
    """The one packet these bytes are."""
    (event,) = Parser().receive(data)
    assert isinstance(event, Packet)
    return event
