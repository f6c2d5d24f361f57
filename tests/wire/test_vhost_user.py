"""vhost-user messages, virtio block structures and split virtqueues as bytes, with numbers that lie."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.errors import PeerError
from enban.wire import vhost_user as vu
from enban.wire import virtio_blk as blk
from enban.wire.virtqueue import INDIRECT, MOST, NEXT, BrokenRing, Memory, Ring, check_size, part_sizes

u64 = st.integers(0, (1 << 64) - 1)
u32 = st.integers(0, (1 << 32) - 1)


# -- messages --------------------------------------------------------------------------------


@given(u32, st.binary(max_size=vu.MOST_PAYLOAD))
def test_a_message_is_read_as_it_was_made(request: int, payload: bytes) -> None:
    message = vu.pack(request, payload, vu.NEED_REPLY)
    assert vu.parse_header(message[:12]) == (request, vu.VERSION | vu.NEED_REPLY, len(payload))
    assert message[12:] == payload


@given(u32, u64, u64, u64, u64, u32)
def test_payloads_are_read_as_they_were_made(a: int, b: int, c: int, d: int, e: int, f: int) -> None:
    assert vu.parse_u64(vu.pack_u64(1, b)[12:]) == b
    assert vu.parse_state(vu.pack_state(1, a, f)[12:]) == (a, f)
    found = vu.parse_address(vu.pack_address(vu.RingAddress(a, f, b, c, d, e))[12:])
    assert (found.index, found.flags, found.descriptors, found.used) == (a, f, b, c)
    assert (found.available, found.log) == (d, e)


def test_a_memory_table_of_qemu() -> None:
    """As QEMU 7.2 sends it for a PC: two regions of one file, with room for none besides."""
    regions = [
        vu.Region(0, 0xA0000, 0x7F00_0000_0000, 0),
        vu.Region(1 << 20, 511 << 20, 0x7F00_0010_0000, 1 << 20),
    ]
    found = vu.parse_regions(vu.pack_regions(regions)[12:])
    assert [(one.guest, one.size, one.user, one.file_offset) for one in found] == [
        (0, 0xA0000, 0x7F00_0000_0000, 0),
        (1 << 20, 511 << 20, 0x7F00_0010_0000, 1 << 20),
    ]
    assert len(vu.parse_regions(vu.pack_regions(regions)[12:] + bytes(6 * 32))) == 2


@given(st.binary(max_size=300))
def test_payloads_of_strangers_are_read_or_refused(payload: bytes) -> None:
    for parse in (
        vu.parse_u64,
        vu.parse_state,
        vu.parse_address,
        vu.parse_regions,
        vu.parse_log,
        vu.parse_config,
    ):
        try:
            parse(payload)
        except PeerError as error:
            assert str(error).isprintable()


@given(st.integers(0, 300), st.integers(0, 300))
def test_parts_of_the_configuration(offset: int, size: int) -> None:
    payload = vu.pack_config(vu.GET_CONFIG, offset, bytes(size))[12:]
    if offset + size > vu.MOST_CONFIG:
        with pytest.raises(PeerError, match="of the configuration"):
            vu.parse_config(payload)
    else:
        assert vu.parse_config(payload) == (offset, bytes(size))


def test_the_configuration_of_a_disk() -> None:
    """Each field where VIRTIO 1.2, 5.2.4 has it."""
    config = blk.pack_config((1 << 30) + 511, segments=126, queues=4, grain=65536, writeback=True)
    assert len(config) == blk.CONFIG_SIZE == 60
    assert struct.unpack_from("<QII", config) == (1 << 21, 0, 126)
    assert struct.unpack_from("<IBBHI", config, 20) == (512, 3, 0, 8, 0)
    assert (config[blk.WRITEBACK_AT], struct.unpack_from("<H", config, 34)) == (1, (4,))
    assert struct.unpack_from("<III", config, 36) == (1 << 22, 16, 128)
    assert struct.unpack_from("<IIB", config, 48) == (1 << 22, 16, 1)
    closed = blk.pack_config(512, segments=1, queues=1, grain=1, writeback=False, read_only=True)
    assert not any(closed[36:]) and not closed[blk.WRITEBACK_AT]


# -- memory ----------------------------------------------------------------------------------


def test_a_range_is_in_memory_or_not() -> None:
    low, high = memoryview(bytearray(range(16))), memoryview(bytearray(range(16, 32)))
    memory = Memory([(100, 116, low), (116, 132, high)])
    assert memory.at(100, 16) == low and memory.at(116, 1) == high[:1]
    assert memory.at(110, 10) is None  # it is in two parts
    assert memory.pieces(110, 10) == [low[10:], high[:4]]
    for address, length in ((99, 2), (131, 2), (0, 4), (1 << 63, 1), (100, 33)):
        assert memory.at(address, length) is None and memory.pieces(address, length) is None
    assert memory.pieces(100, 0) == []


# -- rings -----------------------------------------------------------------------------------

SIZE = 8
ROOM = 4096


def ring(
    descriptors: bytes, available: bytes = b"", *, indirect: bool = True, event_idx: bool = True
) -> tuple[Ring, memoryview]:
    memory = memoryview(bytearray(ROOM))
    sizes = part_sizes(SIZE)
    views = [memory[at : at + size] for at, size in zip((0, 256, 512), sizes, strict=True)]
    views[0][: len(descriptors)] = descriptors
    views[1][: len(available)] = available
    room = Memory([(0x1000, 0x1000 + ROOM, memory)])
    return Ring(SIZE, room, *views, event_idx=event_idx, indirect=indirect), memory


def descriptor(address: int, length: int, flags: int, following: int) -> bytes:
    return struct.pack("<QIHH", address, length, flags, following)


hostile = st.lists(
    st.builds(
        descriptor,
        st.sampled_from([0, 0xFFF, 0x1000, 0x1400, 0x1FF0, 0x2000, (1 << 64) - 1]),
        st.sampled_from([0, 1, 16, 32, 48, 4096, 1 << 31, (1 << 32) - 1]),
        st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 0xFFFF]),
        st.integers(0, SIZE + 1),
    ),
    min_size=SIZE,
    max_size=SIZE,
)


@given(hostile, hostile, st.integers(0, SIZE + 1), st.booleans())
def test_a_chain_ends_or_is_refused(
    table: list[bytes], inner: list[bytes], head: int, indirect: bool
) -> None:
    found, memory = ring(b"".join(table), indirect=indirect)
    memory[0x400 : 0x400 + 16 * SIZE] = b"".join(inner)
    try:
        chain = found.chain(head)
    except BrokenRing as error:
        assert str(error).isprintable()
    else:
        assert 1 <= len(chain) <= SIZE + 256  # a table may have as many as fit the memory
        assert not chain[-1][2] & (NEXT | INDIRECT)
        assert all(flags & NEXT and not flags & INDIRECT for _, _, flags in chain[:-1])


@given(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF))
def test_no_more_requests_than_descriptors(position: int, index: int) -> None:
    found, _ = ring(b"", struct.pack("<HH", 0, index))
    count = index - position & 0xFFFF
    if count > SIZE:
        with pytest.raises(BrokenRing):
            found.waiting(position)
    else:
        assert found.waiting(position) == count


@given(st.integers(0, 0xFFFF), st.integers(0, SIZE), st.integers(0, 0xFFFF))
def test_the_driver_is_told_when_it_asked_for_it(before: int, count: int, event: int) -> None:
    found, _ = ring(b"", bytes(4 + 2 * SIZE) + struct.pack("<H", event))
    passed = [(before + n) & 0xFFFF for n in range(count)]
    assert found.wants_call(before, (before + count) & 0xFFFF) == (event in passed)


def test_flags_in_place_of_indices() -> None:
    found, memory = ring(b"", struct.pack("<HH", 1, 0), event_idx=False)
    assert not found.wants_call(0, 1)
    memory[256] = 0
    assert found.wants_call(0, 1)
    found.quiet()
    assert memory[512] == 1
    found.listen(7)
    assert memory[512] == 0


def test_what_is_given_back_is_where_the_driver_looks() -> None:
    found, memory = ring(b"")
    found.put(9, 5, 4097)
    found.publish(10)
    assert struct.unpack_from("<HH", memory, 512) == (0, 10)
    assert struct.unpack_from("<II", memory, 512 + 4 + 8) == (5, 4097)
    found.listen(10)
    assert struct.unpack_from("<H", memory, 512 + 4 + 8 * SIZE) == (10,)


@pytest.mark.parametrize("size", [0, 3, 12, MOST * 2, -1])
def test_sizes_a_ring_cannot_have(size: int) -> None:
    with pytest.raises(BrokenRing, match="power of two"):
        check_size(size)
