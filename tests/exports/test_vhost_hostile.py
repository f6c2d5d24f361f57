"""A driver that writes anything into its rings: the queue answers or stops with a line, and touches nothing
outside the guest's memory."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enban
from enban.block.disk import Disk
from enban.errors import PeerError
from enban.exports.vhost.queue import Queue
from enban.exports.vhost.requests import Device
from enban.exports.vhost.session import Session
from enban.wire import vhost_user as vu
from enban.wire import virtio_blk as blk
from enban.wire.virtqueue import Memory, Ring, part_sizes

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="vhost-user needs Linux (eventfd)")
SIZE, ROOM, GUARD, GUEST = 8, 1 << 16, 4096, 0x1000
DISK = 256 << 10
PLACES = (0, 256, 512)  # of the ring's parts
HEADERS, DATA = 0x1000, 0x4000
addresses = st.one_of(
    st.integers(GUEST + HEADERS, GUEST + HEADERS + 128),
    st.integers(GUEST + DATA, GUEST + ROOM + 2),
    st.sampled_from([0, GUEST - 1, GUEST, GUEST + ROOM - 1, GUEST + ROOM, (1 << 64) - 1, GUEST + 0x400]),
)
lengths = st.sampled_from([0, 1, 1, 15, 16, 16, 17, 32, 48, 512, 4096, 65536, 1 << 31, (1 << 32) - 1])
descriptors = st.builds(
    lambda *fields: struct.pack("<QIHH", *fields),
    addresses,
    lengths,
    st.sampled_from([0, 1, 1, 1, 2, 2, 3, 3, 4, 5, 0xFFFF]),
    st.integers(0, SIZE),
)
tables = st.lists(descriptors, min_size=SIZE, max_size=SIZE).map(b"".join)
headers = st.lists(
    st.builds(
        lambda *fields: struct.pack("<IIQ", *fields),
        st.sampled_from([blk.IN, blk.OUT, blk.FLUSH, blk.GET_ID, blk.DISCARD, blk.WRITE_ZEROES, 77]),
        st.just(0),
        st.sampled_from([0, 1, 8, DISK // 512 - 1, DISK // 512, (1 << 64) - 1]),
    ),
    min_size=8,
    max_size=8,
).map(b"".join)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    path = tmp_path_factory.mktemp("hostile") / "disk"
    enban.create(path, "qcow2", size=DISK)
    with enban.open(path, writable=True) as opened:
        yield opened


@settings(max_examples=150, deadline=None)
@given(
    table=tables,
    inner=tables,
    headers=headers,
    heads=st.lists(st.integers(0, SIZE), min_size=SIZE, max_size=SIZE),
    count=st.integers(0, SIZE + 1),
    form=st.booleans(),
)
def test_anything_in_a_ring(
    disk: Disk, table: bytes, inner: bytes, headers: bytes, heads: list[int], count: int, form: bool
) -> None:
    everything = memoryview(bytearray(b"\xa5" * (ROOM + 2 * GUARD)))
    memory = everything[GUARD : GUARD + ROOM]
    memory[:HEADERS] = bytes(HEADERS)
    memory[0 : len(table)] = table
    memory[0x400 : 0x400 + len(inner)] = inner
    memory[HEADERS : HEADERS + len(headers)] = headers
    if form:  # the form that drivers use, so that the short cuts are met too
        for number in range(2):
            at = 48 * number
            memory[at : at + 16] = struct.pack("<QIHH", GUEST + HEADERS + 16 * number, 16, 1, 3 * number + 1)
            status = struct.pack("<QIHH", GUEST + DATA - 1 - number, 1, 2, 0)
            memory[at + 32 : at + 48] = status
            flags = struct.unpack_from("<H", memory, at + 28)[0] & 2 | 1
            memory[at + 28 : at + 32] = struct.pack("<HH", flags, 3 * number + 2)
    memory[256 : 256 + 4 + 2 * SIZE] = struct.pack(f"<{2 + SIZE}H", 0, count, *heads)
    parts = [memory[at : at + size] for at, size in zip(PLACES, part_sizes(SIZE), strict=True)]
    lines: list[str] = []
    device = Device(disk.door, "x", log=lines.append)
    device.features = blk.F_FLUSH
    queue = Queue(0, device, 0)
    ring = Ring(SIZE, Memory([(GUEST, GUEST + ROOM, memory)]), *parts, event_idx=True, indirect=True)
    try:
        queue.resume(ring, None, -1)
        until = time.monotonic() + 20
        while queue.position != ring.available_index and not queue.broken and time.monotonic() < until:
            time.sleep(0.0005)
    finally:
        queue.close()
    assert queue.broken or queue.position == ring.available_index
    assert not any("bug" in line for line in lines), lines
    assert everything[:GUARD] == everything[GUARD + ROOM :] == b"\xa5" * GUARD
    ledger = disk.door.ledger
    assert not ledger.in_flight
    assert ledger.started == ledger.done + ledger.failed + ledger.cancelled


messages = st.lists(
    st.tuples(
        st.one_of(st.sampled_from(sorted(vu.NAMES)), st.integers(0, 50)),
        st.one_of(
            st.binary(max_size=80),
            st.builds(lambda a, b: struct.pack("<II", a, b), st.integers(0, 3), st.integers(0, 1 << 16)),
            st.integers(0, 1 << 9).map(vu.U64.pack),
            st.just(vu.pack_regions([vu.Region(GUEST, ROOM, 1 << 40, 0)])[12:]),
            st.just(vu.pack_address(vu.RingAddress(0, 1, 1 << 40, (1 << 40) + 512, (1 << 40) + 256, 0))[12:]),
            st.just(vu.pack_log(4096, 0)[12:]),
        ),
        st.integers(0, 2),
        st.booleans(),
    ),
    max_size=25,
)


@settings(max_examples=200, deadline=None)
@given(messages)
def test_any_messages_in_any_order(disk: Disk, said: list[tuple[int, bytes, int, bool]]) -> None:
    """The session answers or ends, with an error of the peer's kind, and leaves no descriptor behind."""
    before = len(os.listdir("/proc/self/fd"))
    ours, theirs = socket.socketpair()
    fd = os.memfd_create("any")
    os.ftruncate(fd, ROOM)
    device = Device(disk.door, "x", log=lambda text: None)
    session = Session(ours, device, queues=2, spin_us=0)
    try:
        for request, payload, fds, wanted in said:
            flags = vu.VERSION | (vu.NEED_REPLY if wanted else 0)
            message = vu.HEADER.pack(request, flags, len(payload)) + payload
            socket.send_fds(theirs, [message], [fd] * fds)
            try:
                assert session.serve_one()
            except PeerError as error:
                assert str(error).isprintable()
                break
    finally:
        session.close()
        theirs.close()
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) == before
    assert not disk.door.ledger.in_flight


def test_the_disk_is_sound_afterwards(disk: Disk) -> None:
    disk.flush()
    result = enban.check(disk.name, force_share=True)
    assert not result.corruptions
