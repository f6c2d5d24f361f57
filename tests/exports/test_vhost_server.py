"""The vhost-user server as a front-end has it, over a real socket, with memory and events passed to it."""

from __future__ import annotations

import errno
import os
import random
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.disk import Disk
from enban.errors import NoSpaceError
from enban.exports import sockets
from enban.exports.vhost import Server
from enban.wire import vhost_user as vu
from enban.wire import virtio_blk as blk
from tests.exports.vhost_driver import (
    AVAILABLE,
    GUEST,
    HEAP,
    MEMORY,
    USED,
    USER,
    WRITE,
    Driver,
    FrontEnd,
    request,
)
from tests.support import qemu_check

pytestmark = pytest.mark.skipif(not hasattr(os, "eventfd"), reason="vhost-user needs Linux (eventfd)")
SIZE = 8 << 20


class Served:
    def __init__(self, path: Path, disk: Disk, server: Server, lines: list[str]) -> None:
        self.path = str(path)
        self.disk = disk
        self.server = server
        self.lines = lines
        self.fronts: list[FrontEnd] = []

    def connect(self, **settings: Any) -> FrontEnd:
        front = FrontEnd(self.path, **settings)
        self.fronts.append(front)
        return front


@contextmanager
def served(tmp_path: Path, disk: Disk, **settings: Any) -> Iterator[Served]:
    lines: list[str] = []
    path = tmp_path / "vhost"
    settings.setdefault("spin_us", 0)
    server = Server(disk.door, sockets.listen_unix(str(path)), log=lines.append, **settings)
    thread = threading.Thread(target=server.run)
    thread.start()
    found = Served(path, disk, server, lines)
    try:
        yield found
    finally:
        for front in found.fronts:
            front.close()
        server.stop()
        thread.join(20)
        assert not thread.is_alive()
        disk.close()
        ledger = disk.door.ledger
        assert not ledger.in_flight
        assert ledger.started == ledger.done + ledger.failed + ledger.cancelled


def image(tmp_path: Path, format: str = "qcow2", size: int = SIZE, **options: Any) -> Disk:
    enban.create(tmp_path / "disk", format, size=size)
    return enban.open(tmp_path / "disk", format=format, writable=True, **options)


@pytest.fixture
def one(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path, image(tmp_path)) as found:
        yield found


@pytest.mark.parametrize("format", ["raw", "qcow", "qcow2"])
@pytest.mark.parametrize("spin_us", [0, 2000])
@pytest.mark.parametrize("event_idx", [True, False])
def test_a_guest_reads_what_it_wrote(tmp_path: Path, format: str, spin_us: int, event_idx: bool) -> None:
    """Random requests, in pieces and by indirect tables, against a model; then the image, by its reader."""
    chance = random.Random(f"{format} {spin_us} {event_idx}")
    model = bytearray(SIZE)
    with served(tmp_path, image(tmp_path, format), spin_us=spin_us) as one:
        features = blk.F_CONFIG_WCE
        front = one.connect(event_idx=event_idx, features=features).begin()
        for _ in range(150):
            length = 512 * chance.choice((1, 8, 8, 8, 63, 200))
            sector = chance.randrange((SIZE - length) // 512 + 1)
            how: Any = {"indirect": chance.random() < 0.5, "pieces": chance.choice((1, 1, 2, 7))}
            if chance.random() < 0.5:
                data = chance.randbytes(length)
                assert front.run(blk.OUT, sector, data, **how)[0] == blk.OK
                model[sector * 512 : sector * 512 + length] = data
            else:
                status, found = front.run(blk.IN, sector, length, **how)
                assert status == blk.OK and found == model[sector * 512 : sector * 512 + length]
        assert front.run(blk.FLUSH, 0)[0] == blk.OK
        assert front.run(blk.GET_ID, 0, 20)[1] == b"enban".ljust(20, b"\0")
        with enban.open(tmp_path / "disk", format=format, force_share=True) as other:
            assert other.pread(SIZE, 0) == model  # a flush has made it visible to everybody
        assert one.lines == []
    if format == "qcow2":
        qemu_check(tmp_path / "disk")


def test_discard_and_zeroes(one: Served) -> None:
    front = one.connect(features=blk.F_DISCARD | blk.F_WRITE_ZEROES).begin()
    data = random.Random(1).randbytes(256 << 10)
    assert front.run(blk.OUT, 0, data)[0] == blk.OK
    assert front.run(blk.DISCARD, 0, struct.pack("<QII", 0, 128, 0))[0] == blk.OK
    ranges = struct.pack("<QIIQII", 130, 2, 1, 256, 128, 0)
    assert front.run(blk.WRITE_ZEROES, 0, ranges)[0] == blk.OK
    model = bytearray(data)
    for start, length in ((0, 65536), (130 * 512, 1024), (256 * 512, 65536)):
        model[start : start + length] = bytes(length)
    assert front.run(blk.IN, 0, len(data))[1] == model
    for kind, wrong, status in (
        (blk.DISCARD, struct.pack("<QII", 0, 8, 1), blk.UNSUPP),
        (blk.WRITE_ZEROES, struct.pack("<QII", 0, 8, 2), blk.UNSUPP),
        (blk.DISCARD, struct.pack("<QII", SIZE // 512, 1, 0), blk.IOERR),
        (blk.DISCARD, struct.pack("<QII", (1 << 64) - 1, 1, 0), blk.IOERR),
        (blk.DISCARD, struct.pack("<QII", 0, 0, 0), blk.IOERR),
        (blk.DISCARD, struct.pack("<QII", 0, 8, 0)[:12], blk.IOERR),
        (blk.DISCARD, struct.pack("<QII", 0, 8, 0) * 17, blk.IOERR),
        (99, b"", blk.UNSUPP),
    ):
        assert front.run(kind, 0, wrong)[0] == status


def test_the_configuration_and_a_disk_that_cannot_be_written(tmp_path: Path) -> None:
    enban.create(tmp_path / "disk", "qcow2", size=SIZE)
    with served(tmp_path, enban.open(tmp_path / "disk"), queues=3) as one:
        front = one.connect()
        features = front.number(vu.GET_FEATURES)
        assert features & blk.F_RO and not features & (blk.F_DISCARD | blk.F_CONFIG_WCE)
        assert front.number(vu.GET_QUEUE_NUM) == 3
        front.begin()
        answer = front.ask(vu.pack_config(vu.GET_CONFIG, 0, bytes(60)))
        offset, config = vu.parse_config(answer)
        assert offset == 0 and len(config) == 60
        assert struct.unpack_from("<Q", config)[0] == SIZE // 512
        assert struct.unpack_from("<I", config, 20)[0] == 512
        assert struct.unpack_from("<H", config, 34)[0] == 3
        assert front.run(blk.OUT, 0, bytes(512))[0] == blk.IOERR
        assert front.run(blk.DISCARD, 0, struct.pack("<QII", 0, 8, 0))[0] == blk.UNSUPP
        assert front.run(blk.IN, 0, 512) == (blk.OK, bytes(512))
        assert any("read-only" in line for line in one.lines)


@pytest.mark.parametrize(
    ("sector", "length"),
    [(SIZE // 512, 512), (SIZE // 512 - 1, 1024), ((1 << 64) - 1, 512), (1 << 55, 512), (0, 100), (0, 0)],
)
def test_requests_that_cannot_be_fail_alone(one: Served, sector: int, length: int) -> None:
    front = one.connect().begin()
    assert front.run(blk.IN, sector, length)[0] == blk.IOERR
    assert front.run(blk.OUT, sector, bytes(length))[0] == blk.IOERR
    assert front.run(blk.OUT, 0, b"x" * 512)[0] == blk.OK
    assert front.run(blk.IN, 0, 512) == (blk.OK, b"x" * 512)


@pytest.mark.parametrize("what", ["outside", "empty", "direction", "header"])
def test_chains_that_cannot_be_fail_alone(one: Served, what: str) -> None:
    front = one.connect().begin()
    driver = front.drivers[0]
    driver.heap = HEAP
    header, status = driver.store(struct.pack("<IIQ", blk.IN, 0, 0)), driver.store(b"\xff")
    data = driver.room(512)
    middle = {"outside": (MEMORY - 256, 512, WRITE), "empty": (data, 0, WRITE)}.get(what, (data, 512, WRITE))
    pieces = [(header, 16, 0), middle, (status, 1, WRITE)]
    if what == "direction":
        pieces[0], pieces[1] = pieces[1], pieces[0]
    elif what == "header":
        pieces[0] = (header, 15, 0)
    driver.offer(driver.chain(pieces))
    front.kick()
    front.wait_call()
    assert driver.take() == (0, 1) and driver.memory[status] == blk.IOERR
    assert front.run(blk.IN, 0, 512) == (blk.OK, bytes(512))


def test_data_of_any_form_is_taken(one: Served) -> None:
    """Header and data in pieces that ignore each other's borders, the status behind the data."""
    front = one.connect().begin()
    assert front.run(blk.OUT, 3, bytes(range(256)) * 2)[0] == blk.OK
    driver = front.drivers[0]
    driver.heap = HEAP
    header, data = driver.store(struct.pack("<IIQ", blk.IN, 0, 3)), driver.room(513)
    parts = [(header, 5, 0), (header + 5, 11, 0), (data, 100, WRITE), (data + 100, 413, WRITE)]
    driver.offer(driver.chain(parts))
    front.kick()
    front.wait_call()
    assert driver.take() == (0, 513)
    assert driver.memory[data : data + 513] == bytes(range(256)) * 2 + b"\0"


@pytest.mark.parametrize("what", ["loop", "index", "count", "status", "no status", "table"])
def test_a_broken_ring_is_stopped_with_a_line_and_begins_anew(one: Served, what: str) -> None:
    front = one.connect().begin()
    driver = front.drivers[0]
    head, _, status = request(driver, blk.IN, 0, 512)
    if what == "loop":
        driver.describe(16, GUEST + HEAP, 16, 1, 0)
    elif what == "index":
        head = 16
    elif what == "status":
        driver.describe(32, GUEST + MEMORY, 1, WRITE, 0)
    elif what == "no status":
        driver.describe(32, GUEST + status, 1, 0, 0)
    elif what == "table":
        driver.describe(0, GUEST + HEAP, 17, 4, 0)
    driver.offer(head)
    if what == "count":
        driver.put_u16(AVAILABLE + 2, 17)
    front.kick()
    for _ in range(500):
        if one.lines:
            break
        time.sleep(0.01)
    assert len(one.lines) == 1 and "queue 0 is stopped" in one.lines[0]
    assert driver.take() is None
    front.stop()  # the guest resets its device
    front.drivers[0] = Driver(front.memory)
    front.start()
    assert front.run(blk.IN, 0, 512) == (blk.OK, bytes(512))


def test_many_requests_at_once_on_several_rings(tmp_path: Path) -> None:
    with served(tmp_path, image(tmp_path), queues=3) as one:
        front = one.connect(queues=3, size=64).begin()
        expected = {}
        for index, driver in enumerate(front.drivers):
            for number in range(20):
                sector = (index * 20 + number) * 8
                data = bytes([index, number]) * 2048
                head, _, status = request(driver, blk.OUT, sector, data, first=number * 3)
                expected[index, head] = status
                driver.offer(head)
            front.kick(index)
        for index, driver in enumerate(front.drivers):
            for _ in range(20):
                while (back := driver.take()) is None:
                    front.wait_call(index)
                place = expected.pop((index, back[0]))
                assert front.memory[place] == blk.OK
        assert not expected
        for index in range(3):
            for number in range(20):
                found = front.run(blk.IN, (index * 20 + number) * 8, 4096, index=index)[1]
                assert found == bytes([index, number]) * 2048
        assert [front.stop(index) for index in range(3)] == [40, 40, 40]


def test_a_stopped_ring_goes_on_where_it_was_in_other_memory_too(one: Served) -> None:
    front = one.connect().begin()
    assert front.run(blk.OUT, 0, b"a" * 512)[0] == blk.OK
    front.share()  # while it runs
    assert front.run(blk.IN, 0, 512)[1] == b"a" * 512
    assert front.stop() == 2
    head, place, status = request(front.drivers[0], blk.IN, 0, 512)
    front.drivers[0].offer(head)
    front.kick()
    time.sleep(0.05)
    assert front.drivers[0].take() is None  # it does stand still
    front.start(base=2)
    front.kick()
    front.wait_call()
    assert front.drivers[0].take() is not None and front.memory[status] == blk.OK
    assert front.memory[place : place + 512] == b"a" * 512


def test_the_next_front_end_begins_anew_and_a_second_is_turned_away(tmp_path: Path) -> None:
    with served(tmp_path, image(tmp_path), patience_s=0.2) as one:
        first = one.connect().begin()
        assert first.run(blk.OUT, 0, b"a" * 512)[0] == blk.OK
        second = one.connect()
        second.send(vu.pack(vu.GET_FEATURES))
        with pytest.raises(ConnectionError):
            second.receive()
        assert any("turned away" in line for line in one.lines)
        first.sock.close()
        third = one.connect().begin()
        assert third.run(blk.IN, 0, 512)[1] == b"a" * 512


def test_one_that_just_left_is_waited_for(one: Served) -> None:
    first = one.connect().begin()
    second = one.connect()
    time.sleep(0.1)
    first.sock.close()
    assert second.begin().run(blk.IN, 0, 512)[0] == blk.OK


def test_the_size_changes_under_the_guest(one: Served) -> None:
    front = one.connect().begin()
    front.ask(vu.pack_config(vu.GET_CONFIG, 0, bytes(60)))
    assert front.run(blk.IN, SIZE // 512, 512)[0] == blk.IOERR
    one.disk.resize(2 * SIZE)
    assert one.server.resized()
    front.backend.settimeout(10)
    assert vu.parse_header(front.backend.recv(12))[0] == vu.BACKEND_CONFIG_CHANGE
    _, config = vu.parse_config(front.ask(vu.pack_config(vu.GET_CONFIG, 0, bytes(8))))
    assert int.from_bytes(config, "little") == 2 * SIZE // 512
    assert front.run(blk.IN, SIZE // 512, 512)[0] == blk.OK
    front.stop()
    one.disk.resize(3 * SIZE)
    front.start(base=2)
    assert vu.parse_header(front.backend.recv(12))[0] == vu.BACKEND_CONFIG_CHANGE


def test_writes_are_durable_when_the_guest_cannot_flush(tmp_path: Path, monkeypatch: Any) -> None:
    disk = image(tmp_path)
    flushes = []
    real = disk.door.node.flush

    async def flush() -> None:
        flushes.append(1)
        await real()

    monkeypatch.setattr(disk.door.node, "flush", flush)
    with served(tmp_path, disk) as one:
        front = one.connect(features=blk.F_CONFIG_WCE).begin()
        front.run(blk.OUT, 0, bytes(512))
        assert not flushes
        front.told(vu.pack_config(vu.SET_CONFIG, blk.WRITEBACK_AT, b"\0"))
        front.run(blk.OUT, 0, bytes(512))
        assert len(flushes) == 1
        _, config = vu.parse_config(front.ask(vu.pack_config(vu.GET_CONFIG, 0, bytes(60))))
        assert config[blk.WRITEBACK_AT] == 0
        front.told(vu.pack_config(vu.SET_CONFIG, blk.WRITEBACK_AT, b"\1"))
        front.run(blk.OUT, 0, bytes(512))
        assert len(flushes) == 1
        front.wanted &= ~(blk.F_FLUSH | blk.F_CONFIG_WCE)
        front.told(vu.pack_u64(vu.SET_FEATURES, front.wanted))
        front.run(blk.OUT, 0, bytes(512))
        assert len(flushes) == 2


def test_pages_that_are_written_are_logged(one: Served) -> None:
    front = one.connect().begin()
    log = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(log, 4096)
    front.ask(vu.pack_log(2048, 1024), [log])
    front.start(log=0)
    front.wanted |= vu.F_LOG_ALL
    front.told(vu.pack_u64(vu.SET_FEATURES, front.wanted))
    driver = front.drivers[0]
    driver.heap = HEAP + (512 << 10)
    head, place, status = request(driver, blk.IN, 0, 64 << 10)
    driver.offer(head)
    front.kick()
    front.wait_call()
    bits = os.pread(log, 2048, 1024)
    for start, length in ((place, 64 << 10), (status, 1), (USED, 12)):
        for page in range((GUEST + start) // 4096, (GUEST + start + length - 1) // 4096 + 1):
            assert bits[page // 8] >> page % 8 & 1, hex(page)
    assert not bits[(GUEST + (2 << 20)) // 4096 // 8]
    assert not any(os.pread(log, 1024, 0)) and not any(os.pread(log, 1024, 3072))
    os.close(log)


def test_a_failing_disk_fails_single_requests(tmp_path: Path, monkeypatch: Any) -> None:
    disk = image(tmp_path)
    with served(tmp_path, disk) as one:
        front = one.connect().begin()
        assert front.run(blk.OUT, 0, b"a" * 4096)[0] == blk.OK
        monkeypatch.setattr(os, "preadv", _fail)
        assert front.run(blk.IN, 0, 4096)[0] == blk.IOERR
        monkeypatch.undo()
        assert front.run(blk.IN, 0, 4096) == (blk.OK, b"a" * 4096)
        assert len(one.lines) == 1 and "read at sector 0 failed" in one.lines[0]


def _fail(*_: object) -> int:
    raise OSError(errno.EIO, "broken")


def test_a_write_without_room_waits_until_there_is_some(tmp_path: Path, monkeypatch: Any) -> None:
    """The ring stands still at that request; when it is started again the request is done, and only once."""
    disk = image(tmp_path)
    full = threading.Event()
    reasons: list[str] = []

    def on_full(reason: str) -> None:
        reasons.append(reason)
        full.set()

    with served(tmp_path, disk, on_full=on_full) as one:
        front = one.connect().begin()
        assert front.run(blk.OUT, 0, b"a" * 512)[0] == blk.OK
        real = type(disk.door).write

        async def no_room(*_: object, **__: object) -> None:
            raise NoSpaceError("cannot write: no space left", path="disk")

        monkeypatch.setattr(type(disk.door), "write", no_room)
        driver = front.drivers[0]
        head, _, status = request(driver, blk.OUT, 4096, b"b" * 1024, pieces=2)
        driver.offer(head)
        front.kick()
        assert full.wait(10) and driver.take() is None and "no space left" in reasons[0]
        assert front.stop() == 1  # the machine is paused
        monkeypatch.setattr(type(disk.door), "write", real)
        front.start(base=1)
        front.kick()
        front.wait_call()
        assert driver.take() is not None and front.memory[status] == blk.OK
        assert front.run(blk.IN, 4096, 1024)[1] == b"b" * 1024
        assert front.stop() == 3


SAID = [
    (b"\0" * 12, "version"),
    (vu.HEADER.pack(vu.GET_FEATURES, 1, 1 << 20), "over the limit"),
    (vu.pack(vu.SET_FEATURES, b"123"), "one number"),
    (vu.pack_u64(vu.SET_FEATURES, 1 << 63), "not offered"),
    (vu.pack_u64(vu.SET_PROTOCOL_FEATURES, 1 << 40), "not offered"),
    (vu.pack_state(vu.SET_VRING_NUM, 0, 3), "power of two"),
    (vu.pack_state(vu.SET_VRING_NUM, 0, 1 << 20), "power of two"),
    (vu.pack_state(vu.SET_VRING_NUM, 200, 16), "ring 200"),
    (vu.pack_u64(vu.SET_VRING_KICK, 0), "0 descriptors"),
    (vu.pack_regions([vu.Region(0, 4096, 0, 0)]), "with 0 descriptors"),
    (vu.pack_regions([vu.Region(0, 0, 0, 0)]), "not possible"),
    (vu.pack_regions([vu.Region(0, 1 << 63, 0, 1 << 40)]), "not possible"),
    (vu.pack_regions([vu.Region(0, 4096, 0, 0), vu.Region(4095, 4096, 1 << 20, 0)]), "overlap"),
    (vu.pack(vu.SET_MEM_TABLE, struct.pack("<II", 1000, 0)), "1000 regions"),
    (vu.pack(vu.SET_LOG_BASE, struct.pack("<QQ", 1 << 60, 0)), "not possible"),
    (vu.pack_log(4096, 0), "without its memory"),
    (vu.pack_config(vu.GET_CONFIG, 250, bytes(60)), "of the configuration"),
    (vu.pack(vu.GET_CONFIG, struct.pack("<III", 0, 200, 0)), "of the configuration"),
]


@pytest.mark.parametrize(("message", "line"), SAID)
def test_messages_that_cannot_be_end_the_connection_with_a_line(
    one: Served, message: bytes, line: str
) -> None:
    front = one.connect()
    front.send(message)
    assert front.sock.recv(100) == b""
    for _ in range(200):
        if one.lines:
            break
        time.sleep(0.01)
    assert len(one.lines) == 1 and line in one.lines[0], one.lines
    assert one.connect().begin().run(blk.IN, 0, 512)[0] == blk.OK


def test_memory_and_rings_that_are_not_there_are_refused(one: Served) -> None:
    front = one.connect()
    front.negotiate()
    front.send(vu.pack_regions([vu.Region(GUEST, MEMORY + 4096, USER, 0)]), [front.fd])
    assert front.sock.recv(100) == b""
    for place in (USER + MEMORY - 16, USER + 8, 0):
        front = one.connect()
        front.negotiate()
        front.share()
        front.told(vu.pack_state(vu.SET_VRING_NUM, 0, 16))
        front.told(vu.pack_address(vu.RingAddress(0, 0, place, USER + USED, USER + AVAILABLE, 0)))
        front.told(vu.pack_u64(vu.SET_VRING_KICK, 0), [front.kicks[0]])
        front.send(vu.pack_state(vu.SET_VRING_ENABLE, 0, 1))
        assert front.sock.recv(100) == b""
    assert sum("not in the guest's memory" in line for line in one.lines) == 3
    assert "in a file of" in one.lines[0]


def test_no_descriptor_is_left_behind(one: Served) -> None:
    def begin_and_end() -> None:
        front = one.connect().begin()
        assert front.run(blk.IN, 0, 512)[0] == blk.OK
        front.send(vu.pack_u64(vu.SET_FEATURES, 0), [front.fd, front.fd])  # with what nobody asked for
        front.stop()
        front.start(base=1)
        front.close()
        one.fronts.remove(front)

    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    before = count()
    for _ in range(3):
        begin_and_end()
    for _ in range(500):
        if count() == before:
            break
        time.sleep(0.01)
    assert count() == before
