"""The transmission messages byte by byte, against layouts written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from enban.errors import (
    ClosedError,
    HostError,
    InternalError,
    NoSpaceError,
    OutOfRangeError,
    PeerError,
    ReadOnlyError,
)
from enban.wire.nbd import CODECS, Codec, OutOfTurnError, ProtocolError, TooLargeError, WrongMagicError
from enban.wire.nbd import constants as c
from enban.wire.nbd.errors import known_number, message_bytes, number_for
from enban.wire.nbd.messages import (
    COMPACT_REQUEST,
    EXTENDED_REQUEST,
    MAX_ERROR_REPLY,
    MAX_STATUS_LENGTH,
    pack_extended_request_into,
    pack_request_into,
    pack_simple_reply_into,
    pack_status_payload,
    parse_extended_requests,
    parse_requests,
    parse_status_payload,
)

SIMPLE, STRUCTURED, EXTENDED = CODECS
COOKIE = 0x1122334455667788
MIB = 1 << 20


def packed(function: Callable[..., int], *args: object) -> bytes:
    """What a pack_..._into function writes, checked against the index it returns."""
    buffer = bytearray(b"\xee" * (MAX_ERROR_REPLY + 8))
    end = function(buffer, 3, *args)
    assert buffer[:3] == b"\xee" * 3 and buffer[end:] == b"\xee" * (len(buffer) - end)
    return bytes(buffer[3:end])


def test_request_layouts() -> None:
    assert packed(pack_request_into, 0x0001, c.CMD_WRITE, COOKIE, 0x10, 0x20) == bytes.fromhex(
        "25609513 0001 0001 1122334455667788 0000000000000010 00000020"
    )
    assert packed(pack_extended_request_into, 0x21, c.CMD_WRITE, COOKIE, 0x10, 1 << 40) == bytes.fromhex(
        "21e41c71 0021 0001 1122334455667788 0000000000000010 0000010000000000"
    )
    assert pack_status_payload(1 << 33, [1, 0x0A0B]) == bytes.fromhex("0000000200000000 00000001 00000a0b")


def test_simple_reply_layouts() -> None:
    assert packed(pack_simple_reply_into, 5, COOKIE) == bytes.fromhex("67446698 00000005 1122334455667788")
    ok = bytes.fromhex("67446698 00000000 1122334455667788")
    assert packed(SIMPLE.pack_read_header_into, COOKIE, 0x10, 4) == ok
    assert packed(SIMPLE.pack_done_into, COOKIE, 0x10) == ok
    assert packed(SIMPLE.pack_error_into, COOKIE, 0x10, 28, b"dropped") == bytes.fromhex(
        "67446698 0000001c 1122334455667788"
    )


def test_structured_chunk_layouts() -> None:
    head = "668e33ef %s 1122334455667788 "
    assert packed(STRUCTURED.pack_read_header_into, COOKIE, 0x10, 4) == bytes.fromhex(
        head % "0001 0001" + "0000000c 0000000000000010"
    )
    assert packed(STRUCTURED.pack_done_into, COOKIE, 0x10) == bytes.fromhex(head % "0001 0000" + "00000000")
    assert packed(STRUCTURED.pack_data_header_into, 0, COOKIE, 0x10, 0x12, 2) == bytes.fromhex(
        head % "0000 0001" + "0000000a 0000000000000012"
    )
    assert packed(STRUCTURED.pack_hole_into, 1, COOKIE, 0x10, 0x12, 2) == bytes.fromhex(
        head % "0001 0002" + "0000000c 0000000000000012 00000002"
    )
    assert packed(STRUCTURED.pack_error_into, COOKIE, 0x10, 5, b"no") == bytes.fromhex(
        head % "0001 8001" + "00000008 00000005 0002 6e6f"
    )
    assert packed(STRUCTURED.pack_error_at_into, 0, COOKIE, 0x10, 5, 0x12, b"no") == bytes.fromhex(
        head % "0000 8002" + "00000010 00000005 0002 6e6f 0000000000000012"
    )
    assert STRUCTURED.pack_status(1, COOKIE, 0x10, 7, [(0x1000, 3), (0x2000, 0)]) == bytes.fromhex(
        head % "0001 0005" + "00000014 00000007 00001000 00000003 00002000 00000000"
    )


def test_extended_chunk_layouts() -> None:
    head = "6e8a278c %s 1122334455667788 0000000000000010 "
    assert packed(EXTENDED.pack_read_header_into, COOKIE, 0x10, 4) == bytes.fromhex(
        head % "0001 0001" + "000000000000000c 0000000000000010"
    )
    assert packed(EXTENDED.pack_done_into, COOKIE, 0x10) == bytes.fromhex(
        head % "0001 0000" + "0000000000000000"
    )
    assert packed(EXTENDED.pack_data_header_into, 0, COOKIE, 0x10, 0x12, 2) == bytes.fromhex(
        head % "0000 0001" + "000000000000000a 0000000000000012"
    )
    assert packed(EXTENDED.pack_hole_into, 1, COOKIE, 0x10, 0x12, 2) == bytes.fromhex(
        head % "0001 0002" + "000000000000000c 0000000000000012 00000002"
    )
    assert packed(EXTENDED.pack_error_into, COOKIE, 0x10, 5, b"no") == bytes.fromhex(
        head % "0001 8001" + "0000000000000008 00000005 0002 6e6f"
    )
    assert packed(EXTENDED.pack_error_at_into, 1, COOKIE, 0x10, 5, 0x12, b"") == bytes.fromhex(
        head % "0001 8002" + "000000000000000e 00000005 0000 0000000000000012"
    )
    assert EXTENDED.pack_status(0, COOKIE, 0x10, 7, [(1 << 33, 3)]) == bytes.fromhex(
        head % "0000 0006" + "0000000000000018 00000007 00000001 0000000200000000 0000000000000003"
    )


@pytest.mark.parametrize("codec", CODECS)
def test_stated_sizes_are_the_packed_ones(codec: Codec) -> None:
    assert len(packed(codec.pack_read_header_into, 1, 0, 512)) == codec.read_header_size
    assert len(packed(codec.pack_done_into, 1, 0)) == codec.done_size
    assert len(packed(codec.pack_request_into, 0, 0, 1, 0, 512)) == codec.request_size
    assert len(packed(codec.pack_error_into, 1, 0, 5, b"x" * c.MAX_STRING)) <= MAX_ERROR_REPLY


def test_simple_style_has_no_chunks() -> None:
    buffer = bytearray(100)
    with pytest.raises(OutOfTurnError):
        SIMPLE.pack_hole_into(buffer, 0, 0, COOKIE, 0, 0, 512)
    with pytest.raises(OutOfTurnError):
        SIMPLE.pack_status(0, COOKIE, 0, 1, [(512, 0)])
    assert buffer == bytes(100)


def test_an_extent_over_32_bits_is_told_in_part_and_last() -> None:
    told = STRUCTURED.pack_status(1, COOKIE, 0, 1, [(512, 0), (1 << 40, 3), (512, 0)])
    assert told[20 + 4 :] == (512).to_bytes(4) + bytes(4) + MAX_STATUS_LENGTH.to_bytes(4) + (3).to_bytes(4)
    assert MAX_STATUS_LENGTH % c.MAX_MIN_BLOCK == 0


# ---- parsing requests ----


def read(cookie: int, offset: int = 0, length: int = 512) -> bytes:
    return COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_READ, cookie, offset, length)


def write(cookie: int, payload: bytes) -> bytes:
    return COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 1, c.CMD_WRITE, cookie, 4096, len(payload)) + payload


def test_all_requests_of_one_receive_are_found_in_place() -> None:
    data = b"junk" + read(1) + write(2, b"abcd") + read(3) + write(4, b"") + b"later"
    requests, rest, need = parse_requests(memoryview(data), 4, len(data) - 5, MIB)
    assert [request[2] for request in requests] == [1, 2, 3, 4]
    assert requests[0] == (0, c.CMD_READ, 1, 0, 512, 4 + 28)
    flags, kind, cookie, offset, length, at = requests[1]
    assert (flags, kind, cookie, offset, length) == (1, c.CMD_WRITE, 2, 4096, 4)
    assert data[at : at + length] == b"abcd"
    assert (rest, need) == (len(data) - 5, 28)


@pytest.mark.parametrize("cut", range(1, 28 + 4))
def test_an_incomplete_request_stays_and_says_what_it_needs(cut: int) -> None:
    data = read(1) + write(2, b"abcd")
    requests, rest, need = parse_requests(data, 0, len(data) - cut, MIB)
    assert [request[2] for request in requests] == [1]
    assert rest == 28
    assert need == (28 + 4 if cut <= 4 else 28)


def test_extended_payload_follows_the_flag() -> None:
    flag = c.CMD_FLAG_PAYLOAD_LEN
    data = EXTENDED_REQUEST.pack(c.MAGIC_EXTENDED_REQUEST, flag, c.CMD_WRITE, 1, 0, 3) + b"abc"
    data += EXTENDED_REQUEST.pack(c.MAGIC_EXTENDED_REQUEST, 0, c.CMD_WRITE_ZEROES, 2, 0, 1 << 40)
    data += EXTENDED_REQUEST.pack(c.MAGIC_EXTENDED_REQUEST, flag, c.CMD_READ, 3, 0, 2) + b"no"
    requests, rest, need = parse_extended_requests(data, 0, len(data), MIB)
    assert [(kind, length) for _, kind, _, _, length, _ in requests] == [
        (c.CMD_WRITE, 3),
        (c.CMD_WRITE_ZEROES, 1 << 40),
        (c.CMD_READ, 2),
    ]
    assert (rest, need) == (len(data), 32)


def test_extended_write_without_payload_length_is_refused() -> None:
    data = EXTENDED_REQUEST.pack(c.MAGIC_EXTENDED_REQUEST, 0, c.CMD_WRITE, 1, 0, 3) + b"abc"
    with pytest.raises(ProtocolError, match="PAYLOAD_LEN"):
        parse_extended_requests(data, 0, len(data), MIB)


def test_a_bad_request_stops_after_the_good_ones() -> None:
    oversize = COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 2, 0, MIB + 1)
    for bad, error in ((b"\0" * 28, WrongMagicError), (oversize, TooLargeError)):
        data = read(1) + bad
        requests, rest, need = parse_requests(data, 0, len(data), MIB)
        assert ([request[2] for request in requests], rest, need) == ([1], 28, 0)
        with pytest.raises(error):
            parse_requests(data, rest, len(data), MIB)


def test_the_longest_payload_passes_and_one_byte_more_does_not() -> None:
    header = COMPACT_REQUEST.pack(c.MAGIC_REQUEST, 0, c.CMD_WRITE, 2, 0, MIB)
    assert parse_requests(header, 0, 28, MIB) == ([], 0, 28 + MIB)
    with pytest.raises(TooLargeError) as caught:
        parse_requests(header, 0, 28, MIB - 1)
    assert (caught.value.announced, caught.value.limit) == (MIB, MIB - 1)
    extended = EXTENDED_REQUEST.pack(c.MAGIC_EXTENDED_REQUEST, 0x20, c.CMD_READ, 2, 0, (1 << 64) - 1)
    with pytest.raises(TooLargeError):
        parse_extended_requests(extended, 0, 32, MIB)


def test_the_other_styles_magic_is_refused() -> None:
    extended = EXTENDED_REQUEST.pack(c.MAGIC_EXTENDED_REQUEST, 0, c.CMD_READ, 2, 0, 512)
    with pytest.raises(WrongMagicError):
        parse_requests(extended, 0, 32, MIB)
    with pytest.raises(WrongMagicError):
        parse_extended_requests(read(1) + bytes(4), 0, 32, MIB)


@pytest.mark.parametrize(
    ("length", "result"), [(8, (99, [])), (16, (99, [1, 2])), (7, None), (10, None), (0, None)]
)
def test_status_payload(length: int, result: object) -> None:
    data = b"##" + pack_status_payload(99, [1, 2])
    assert parse_status_payload(data, 2, length) == result


# ---- error numbers and messages ----


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (ReadOnlyError("x"), c.EPERM),
        (NoSpaceError("x", errno=28), c.ENOSPC),
        (HostError("x", errno=27), c.ENOSPC),
        (HostError("x", errno=30), c.EPERM),
        (HostError("x", errno=5), c.EIO),
        (HostError("x", errno=110), c.EIO),
        (OutOfRangeError("x"), c.EINVAL),
        (ClosedError("x"), c.ESHUTDOWN),
        (PeerError("x"), c.EIO),
        (InternalError("x"), c.EIO),
        (MemoryError(), c.ENOMEM),
        (OSError(122, "quota"), c.ENOSPC),
        (OSError("no number"), c.EIO),
    ],
)
def test_numbers_for_errors(error: BaseException, number: int) -> None:
    assert number_for(error) == number


def test_unknown_error_numbers_count_as_invalid() -> None:
    assert known_number(c.ENOSPC) == c.ENOSPC
    assert known_number(9999) == c.EINVAL


def test_messages_fit_the_protocol() -> None:
    assert message_bytes("a\0b") == b"ab"
    long = message_bytes("円" * 2000)
    assert len(long) <= c.MAX_STRING and long.decode() == "円" * (c.MAX_STRING // 3)
