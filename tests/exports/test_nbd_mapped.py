"""Reads sent from mapped memory: the same bytes as by any other way, whatever happens to the file below."""

from __future__ import annotations

import errno
import gc
import os
import random
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.door import Door
from enban.block.runtime import drive
from enban.busy_poll import BusyPoll
from enban.exports.nbd import ServedExport, quick, reader
from enban.exports.nbd import mapped as mapped_reads
from enban.exports.nbd.mapped import MappedReads
from enban.exports.nbd.places import Places
from enban.exports.nbd.reader import Reader
from enban.storage import host
from enban.wire.nbd import constants as c
from tests.exports.nbd_peer import KIB, MIB, Peer, Running, open_disk, serving
from tests.support import make_qcow2, pattern

STYLES = (c.SIMPLE, c.STRUCTURED, c.EXTENDED)

pytestmark = pytest.mark.skipif(
    not (host.HAVE_FAULTS and host.HAVE_NOWAIT), reason="this host does not tell what is cached (Linux does)"
)


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have connections take part at once; how many reads of each batch were answered from mapped memory."""
    batches: list[int] = []
    make = MappedReads._replies

    def make_watched(self: MappedReads, reader: Reader) -> Any:
        replies = make(self, reader)

        def watched(start: int, end: int) -> tuple[list[bytes | memoryview], int, int]:
            found = replies(start, end)
            if found[0]:
                batches.append(len(found[0]) // 2)
            return found

        return watched

    monkeypatch.setattr(quick, "CALM", 1)
    monkeypatch.setattr(quick, "_MOST_CALM", 2)
    monkeypatch.setattr(MappedReads, "_replies", make_watched)
    return batches


def image(folder: Path, content: bytes) -> Path:
    """A qcow2 image of that content, 1 MiB of nothing, and 1 MiB of compressed "p" in its backing file."""
    plain = make_qcow2(folder / "plain.qcow2", len(content) + 2 * MIB)
    with enban.open(plain, writable=True) as disk:
        disk.pwrite(b"p" * MIB, len(content) + MIB)
    enban.convert(plain, folder / "packed.qcow2", target_format="qcow2", compress=True)
    path = make_qcow2(
        folder / "d.qcow2", len(content) + 2 * MIB, backing_file="packed.qcow2", backing_fmt="qcow2"
    )
    with enban.open(path, writable=True) as disk:
        disk.pwrite(content, 0)
    return path


def raw_disk(folder: Path, content: bytes) -> Door:
    path = folder / "d.raw"
    path.write_bytes(content)
    return open_disk(path, format="raw", writable=False)


def until_it_waits(server: Running) -> None:
    """Until a client has no room for more replies."""
    deadline = time.monotonic() + 20
    while "waiting for the client" not in server.server.status():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_mapped_reads_give_what_the_disk_holds(
    tmp_path: Path, format: str, style: int, mapped: list[int]
) -> None:
    """Among large reads, holes, compressed clusters, bad requests, and writes to a raw disk."""
    content = bytearray(pattern(2 * MIB, seed=9))
    if format == "raw":
        content += bytes(MIB) + b"p" * MIB
        path = tmp_path / "d.raw"
        path.write_bytes(content)
    else:
        path = image(tmp_path, bytes(content))
        content += bytes(MIB) + b"p" * MIB
    chance = random.Random(style)
    door = open_disk(path, format=format, writable=format == "raw")
    with serving(door, folder=tmp_path) as server, server.peer(style=style) as peer:
        for _ in range(150):
            odd = chance.random() < 0.5
            lengths = (512, 4 * KIB, 20 * KIB, 40 * KIB) if odd else (512, 4 * KIB, 4 * KIB, 20 * KIB)
            room = len(content) if odd else 2 * MIB
            ranges = []
            for _ in range(chance.choice((1, 1, 3, 20, 600))):
                length = chance.choice(lengths)
                ranges.append((chance.randrange(room - length) // 512 * 512, length))
            transactions = peer.send_reads(ranges)
            bad = peer.send_raw(0, c.CMD_READ, len(content) - 1, 2) if odd else None
            for (offset, length), transaction in zip(ranges, transactions, strict=True):
                assert peer.collect(transaction).data == content[offset : offset + length]
            if bad:
                assert peer.collect(bad).error == c.EINVAL
            if odd and format == "raw":
                offset = chance.randrange(len(content) - 8 * KIB)
                content[offset : offset + 5000] = chance.randbytes(5000)
                peer.write(offset, bytes(content[offset : offset + 5000]))
    assert sum(mapped) > 1000 and max(mapped) > 16


def test_a_client_that_takes_its_time_gets_every_byte(tmp_path: Path, mapped: list[int]) -> None:
    """More replies than the socket holds: what is left is sent as the client reads, once."""
    content = pattern(2 * MIB)
    door = raw_disk(tmp_path, content)
    chance = random.Random(1)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        peer.read_together([(0, 4096), (4096, 4096)])
        ranges = [(chance.randrange(480) * 4096, 28 * KIB) for _ in range(400)]
        transactions = peer.send_reads(ranges)
        until_it_waits(server)
        for (offset, length), transaction in zip(ranges, transactions, strict=True):
            assert peer.collect(transaction).data == content[offset : offset + length]
        deadline = time.monotonic() + 20
        while "402 requests answered, idle" not in server.server.status():
            assert time.monotonic() < deadline, server.server.status()
            time.sleep(0.001)
        assert not server.server.threads.busy
        ((connection, _),) = server.server._connections.values()
        assert connection.transmission is not None and not connection.transmission.sending
    assert max(mapped) > 64


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_slice_is_all_that_is_shown(tmp_path: Path, format: str, mapped: list[int]) -> None:
    content = pattern(MIB)
    path = tmp_path / "d.raw" if format == "raw" else make_qcow2(tmp_path / "d.qcow2", MIB)
    if format == "raw":
        path.write_bytes(content)
    else:
        with enban.open(path, writable=True) as disk:
            disk.pwrite(content, 0)
    door = open_disk(path, format=format, writable=False)
    running = Running([ServedExport(door, offset=64 * KIB, size=128 * KIB)], tmp_path)
    try:
        with running.peer() as peer:
            for offset, length in ((124 * KIB, 4 * KIB + 1), (128 * KIB, 512), (1 << 62, 512)) * 4:
                for _ in range(4):
                    assert peer.read(124 * KIB, 4 * KIB) == content[188 * KIB : 192 * KIB]
                assert peer.collect(peer.send_raw(0, c.CMD_READ, offset, length)).error == c.EINVAL
    finally:
        running.stop()
        drive(door.close())
    assert len(mapped) > 2


def test_a_read_that_is_too_large_is_refused(tmp_path: Path, mapped: list[int]) -> None:
    path = tmp_path / "d.raw"
    with path.open("wb") as file:
        file.truncate(c.DEFAULT_MAX_PAYLOAD + MIB)
    door = open_disk(path, format="raw", writable=False)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        for _ in range(4):
            peer.read(0, 4096)
        assert mapped
        assert peer.collect(peer.send_raw(0, c.CMD_READ, 0, c.DEFAULT_MAX_PAYLOAD + 512)).error


def test_clusters_that_do_not_lie_in_order(tmp_path: Path, mapped: list[int]) -> None:
    """Reads across the border of two of them."""
    content = pattern(MIB, seed=5)
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        for n in (*range(15, 0, -2), *range(0, 16, 2)):
            disk.pwrite(content[n * 64 * KIB : (n + 1) * 64 * KIB], n * 64 * KIB)
    door = open_disk(path, writable=False)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        for _ in range(4):
            for border in range(64 * KIB, MIB, 64 * KIB):
                for _ in range(4):
                    peer.read(border, 4096)
                assert peer.read(border - 2048, 4096) == content[border - 2048 : border + 2048]
    assert len(mapped) > 16


@pytest.mark.parametrize("slow", [False, True])
def test_a_file_that_is_cut_short_while_it_is_mapped(tmp_path: Path, slow: bool, mapped: list[int]) -> None:
    """What is gone reads as zeros, also in the middle of replies, and the server lives."""
    content = pattern(4 * MIB)
    path = tmp_path / "d.raw"
    path.write_bytes(content)
    door = open_disk(path, format="raw", writable=False)
    left = content[:MIB] + bytes(3 * MIB)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        assert peer.read_together([(n * 4096, 4096) for n in range(8)])[3] == content[12288:16384]
        peer.read(0, 4096)
        assert mapped
        if slow:  # the first of many replies are in the socket when it happens
            ranges = [(n * 16 * KIB, 16 * KIB) for n in range(256)]
            transactions = peer.send_reads(ranges)
            until_it_waits(server)
            os.truncate(path, MIB)
            answers = [bytes(peer.collect(transaction).data) for transaction in transactions]
            assert answers[:64] == [content[at : at + n] for at, n in ranges[:64]]
            assert answers[-1] == bytes(16 * KIB)
        else:
            os.truncate(path, MIB)
        ranges = [(n * 64 * KIB, 4096) for n in range(64)]
        assert peer.read_together(ranges) == [left[at : at + n] for at, n in ranges]
        used = len(mapped)
        assert peer.read(2 * MIB, 4096) == bytes(4096)
        assert len(mapped) == used  # this client is not sent mapped memory again


def test_mapped_memory_ends_where_the_file_does(tmp_path: Path, mapped: list[int]) -> None:
    """A last cluster that was cut short reads as zeros behind the end."""
    path = make_qcow2(tmp_path / "d.qcow2", 128 * KIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(64 * KIB), 0)
    os.truncate(path, path.stat().st_size - 32 * KIB - 100)
    door = open_disk(path, writable=False)
    left = pattern(64 * KIB)[: 32 * KIB - 100] + bytes(32 * KIB + 100)
    ranges = [(n * 4096, 8192) for n in range(14)]
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        assert peer.read(0, 4096) == peer.read(0, 4096) == left[:4096]
        for _ in range(4):
            assert peer.read_together(ranges) == [left[at : at + n] for at, n in ranges]
    assert sum(mapped) > 6


def test_what_cannot_be_sent_from_memory_is_read_the_other_way(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host cannot read what it shall send. It is asked once, not again."""
    tried = 0

    def fails(fd: int, parts: list[Any]) -> int:
        nonlocal tried
        tried += 1
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        monkeypatch.setattr(os, "writev", fails)
        for _ in range(3):
            assert peer.read_together([(0, 512), (512, 512)]) == [pattern(MIB)[:512], pattern(MIB)[512:1024]]
    assert tried == len(mapped) == 1
    assert door.ledger.started == door.ledger.done == 6


def test_reads_go_the_other_way_while_they_wait_for_the_medium(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page fault that had to wait ends it. Each time it takes twice as many cached reads to come back."""
    door = raw_disk(tmp_path, pattern(MIB))
    faults = 0

    def told() -> int:
        nonlocal faults
        faults += 1  # the last read had to wait
        return faults

    monkeypatch.setattr(host, "page_faults", told)
    monkeypatch.setattr(mapped_reads, "_LOOK_EVERY", 1)
    monkeypatch.setattr(quick, "_MOST_CALM", 1 << 16)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        for round in range(4):
            ordinary = 0
            while sum(mapped) <= round:
                before = sum(mapped)
                peer.read(4096, 4096)
                ordinary += sum(mapped) == before
            assert ordinary == 2**round


def test_what_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regular files up to a size, for exports in which a place in the file keeps its meaning."""
    path = tmp_path / "d.raw"
    path.write_bytes(pattern(MIB))
    with open(path, "rb") as file:
        assert host.map_file(file.fileno(), MIB) == pattern(MIB)
        assert host.map_file(file.fileno(), MIB).readonly
        assert not host.map_file(file.fileno(), MIB - 1)
    empty = tmp_path / "empty"
    empty.touch()
    for other in (os.devnull, empty):
        with open(other, "rb") as file:
            assert not host.map_file(file.fileno(), MIB)
    door = open_disk(path, format="raw", writable=False)
    served = ServedExport(door).mapped
    assert served.pages() is served.pages() and served.pages() == pattern(MIB)
    served.release()
    assert not served.pages()
    monkeypatch.setattr(mapped_reads, "MOST_MAPPED", MIB - 1)
    assert not ServedExport(door).mapped.pages()
    direct = open_disk(path, format="raw", writable=False, cache="none")
    assert not ServedExport(direct).mapped.pages()


def test_a_disk_that_was_closed_is_not_read(tmp_path: Path, mapped: list[int]) -> None:
    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        for _ in range(4):
            peer.read(0, 4096)
        assert mapped
        drive(door.close())
        done = door.ledger.done
        assert peer.try_ask(c.CMD_READ, 0, 4096).error
        assert door.ledger.done == done


def resident(path: Path) -> int:
    """Bytes of a mapped file that count as memory of this process."""
    entries = re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())
    sizes = [re.search(r"Rss: +(\d+) kB", entry) for entry in entries if str(path) in entry]
    return sum(int(size[1]) * KIB for size in sizes if size)


def test_what_is_mapped_does_not_count_for_ever(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, content = tmp_path / "d.raw", pattern(16 * MIB)
    path.write_bytes(content)
    door = open_disk(path, format="raw", writable=False)
    everything = [(n * 64 * KIB, 4096) for n in range(256)]
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        for _ in range(3):
            peer.read_together(everything)
        before = resident(path)
        assert mapped and before >= 8 * MIB and host.resident_pages() > before
        monkeypatch.setattr(mapped_reads, "MOST_RESIDENT", before // 2)
        monkeypatch.setattr(mapped_reads, "_MEASURE_EVERY", MIB)
        contents = peer.read_together(everything)
        peer.read(0, 4096)
        assert contents == [content[at : at + n] for at, n in everything]
        assert resident(path) <= before // 2


def test_memory_is_not_measured_for_every_read(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = 0

    def watched() -> int:
        nonlocal measured
        measured += 1
        return 0

    monkeypatch.setattr(host, "resident_pages", watched)
    monkeypatch.setattr(mapped_reads, "_LOOK_EVERY", 1)
    monkeypatch.setattr(mapped_reads, "_MEASURE_EVERY", MIB)
    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        while sum(mapped) < 800:
            peer.read(4096, 4096)
    assert measured == 3  # once a MiB


def test_requests_of_a_deep_queue_are_gathered(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is in flight is found, and a part of it is waited for."""
    monkeypatch.setattr(reader, "_NEXT_COUNT", 0)
    monkeypatch.setattr(MappedReads, "_may_gather", lambda self, reader: True)
    content = pattern(MIB)
    door = raw_disk(tmp_path, content)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        join(server, [peer])
        (one,) = server.server.exports[""].mapped._readers.values()
        assert one._enough == 0
        assert peer.read_together([(at * 4096, 4096) for at in range(40)]) == [
            content[at * 4096 : at * 4096 + 4096] for at in range(40)
        ]
        assert one._enough == 10


@pytest.mark.parametrize("vanishes", [False, True])
def test_a_served_file_is_free_again_at_the_end(tmp_path: Path, mapped: list[int], vanishes: bool) -> None:
    """A mapping keeps its file open; it must not keep the lock of the image beyond the server, whether or not
    a client went in the middle of its replies."""
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(64 * KIB), 0)
    descriptors = len(os.listdir("/proc/self/fd"))
    running = Running([served := ServedExport(open_disk(path, writable=False))], tmp_path)
    gc.disable()
    try:
        with running.peer() as peer:
            for _ in range(4):
                peer.read(0, 4096)
            if vanishes:
                peer.send_reads([(0, 28 * KIB)] * 400)
                until_it_waits(running)
        assert mapped
        running.stop()
        drive(served.door.close())
        assert len(os.listdir("/proc/self/fd")) == descriptors
        with enban.open(path, writable=True) as disk:
            disk.pwrite(b"x", 0)
    finally:
        gc.enable()


def test_a_disk_whose_clusters_may_move_is_not_sent_from_memory(tmp_path: Path, mapped: list[int]) -> None:
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    door = open_disk(path)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        peer.write(0, pattern(64 * KIB))
        for _ in range(8):
            assert peer.read_together([(0, 4096), (8192, 4096)])[1] == pattern(64 * KIB)[8192:12288]
    assert not mapped


# -- several clients -------------------------------------------------------------------------


def taking_part(server: Running) -> int:
    return len(server.server.exports[""].mapped._readers)


def until_left(server: Running, number: int) -> None:
    """Until no more than so many take part."""
    deadline = time.monotonic() + 20
    while taking_part(server) > number:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def join(server: Running, peers: list[Peer]) -> None:
    """Have all of them take part."""
    deadline = time.monotonic() + 20
    while taking_part(server) < len(peers):
        assert time.monotonic() < deadline
        for peer in peers:
            peer.read(0, 4096)


def test_several_clients_are_served_by_one_thread(tmp_path: Path, mapped: list[int]) -> None:
    """They come, ask for all sorts of things, and go, some of them without a word; every reply is right,
    and every request is in the books once."""
    content = pattern(4 * MIB, seed=3)
    path = image(tmp_path, content)
    content += bytes(MIB) + b"p" * MIB
    door = open_disk(path, writable=False)
    asked: list[int] = []

    def client(number: int, server: Running) -> None:
        chance = random.Random(number)
        for style in (c.STRUCTURED, c.EXTENDED, c.SIMPLE):
            with server.peer(style=style) as peer:
                for _ in range(40):
                    room = chance.choice((4 * MIB, 4 * MIB, 4 * MIB, 6 * MIB))
                    lengths = (512, 4 * KIB, 28 * KIB) if room == 4 * MIB else (4 * KIB, 64 * KIB)
                    ranges = [
                        (chance.randrange(room // 512 - 128) * 512, chance.choice(lengths))
                        for _ in range(chance.choice((1, 1, 4, 32)))
                    ]
                    expected = [content[offset : offset + length] for offset, length in ranges]
                    assert peer.read_together(ranges) == expected
                    asked.append(len(ranges))
                    if chance.random() < 0.1:
                        peer.ask(c.CMD_FLUSH)
                if number % 2:
                    peer.close()

    with serving(door, folder=tmp_path) as server:
        with ThreadPoolExecutor(6) as pool:
            for future in [pool.submit(client, number, server) for number in range(6)]:
                future.result()
        while server.server.clients:
            time.sleep(0.001)
        assert not taking_part(server)
    assert sum(mapped) > 2000
    ledger = door.ledger
    assert ledger.started == ledger.done == sum(asked) and not ledger.in_flight


def test_one_thread_leads_until_its_client_goes(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    leading: list[int] = []
    lead = MappedReads._lead

    def watched(self: MappedReads, leader: Reader) -> None:
        leading.append(threading.get_ident())
        lead(self, leader)
        leading.append(0)

    monkeypatch.setattr(MappedReads, "_lead", watched)
    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path) as server:
        peers = [server.peer() for _ in range(4)]
        for number in range(4):
            join(server, peers[: number + 1])  # one after the other: the first leads
        while peers:
            for peer in peers:
                assert peer.read_together([(512, 4096)] * 4) == [pattern(MIB)[512:4608]] * 4
            assert len([thread for thread in leading if thread]) == leading.count(0) + 1
            peers.pop(0).socket.close()
            until_left(server, len(peers))
    assert leading[1::2] == [0] * (len(leading) // 2) and len(set(leading)) > 2


@pytest.mark.parametrize("first", [True, False])
def test_nobody_waits_for_a_client_that_takes_its_time(
    tmp_path: Path, mapped: list[int], first: bool
) -> None:
    """Whether it is the one whose thread leads or not."""
    content = pattern(2 * MIB)
    door = raw_disk(tmp_path, content)
    with serving(door, folder=tmp_path) as server, server.peer() as one, server.peer() as two:
        join(server, [one, two])
        slow, quick = (one, two) if first else (two, one)
        ranges = [(n % 70 * 28 * KIB, 28 * KIB) for n in range(400)]
        transactions = slow.send_reads(ranges)
        until_it_waits(server)
        used = len(mapped)
        for offset in range(0, MIB, 4096):
            assert quick.read(offset, 4096) == content[offset : offset + 4096]
        assert len(mapped) == used + 256 and taking_part(server) == 2
        for (offset, length), transaction in zip(ranges, transactions, strict=True):
            assert slow.collect(transaction).data == content[offset : offset + length]


def test_all_leave_when_the_file_is_cut_short(tmp_path: Path, mapped: list[int]) -> None:
    content = pattern(4 * MIB)
    path = tmp_path / "d.raw"
    path.write_bytes(content)
    door = open_disk(path, format="raw", writable=False)
    with serving(door, folder=tmp_path) as server:
        peers = [server.peer() for _ in range(3)]
        join(server, peers)
        ranges = [(n * 16 * KIB, 16 * KIB) for n in range(256)]
        slow = peers[0].send_reads(ranges)
        until_it_waits(server)
        os.truncate(path, MIB)
        assert peers[1].read(2 * MIB, 4096) == bytes(4096)
        assert [bytes(peers[0].collect(transaction).data) for transaction in slow][-1] == bytes(16 * KIB)
        used = len(mapped)
        for peer in peers:
            assert peer.read(0, 4096) == content[:4096] and peer.read(3 * MIB, 4096) == bytes(4096)
        assert len(mapped) == used and not taking_part(server)
        for peer in peers:
            peer.close()


def test_a_server_ends_while_clients_take_part(tmp_path: Path, mapped: list[int]) -> None:
    """What was sent is answered; who does not take replies is cut off."""
    door = raw_disk(tmp_path, pattern(2 * MIB))
    with serving(door, folder=tmp_path, grace_s=0.2) as server:
        peers = [server.peer() for _ in range(4)]
        join(server, peers)
        peers[0].send_reads([(0, 28 * KIB)] * 400)
        until_it_waits(server)
        last = peers[3].send_reads([(4096, 4096)] * 16)
        server.stop()
        assert [peers[3].collect(one).data for one in last] == [pattern(2 * MIB)[4096:8192]] * 16
        for peer in peers[1:]:
            assert peer.socket.recv(1) == b""
            peer.socket.close()
        assert any("cut off" in line for line in server.log)
        peers[0].socket.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["_look", "_answer"])
def test_an_unforeseen_error_ends_one_connection_only(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path) as server:
        peers = [server.peer() for _ in range(3)]
        join(server, peers)
        method = getattr(MappedReads, where)

        def fails(self: MappedReads, reader: Reader) -> Any:
            monkeypatch.setattr(MappedReads, where, method)
            raise RuntimeError("unforeseen")

        monkeypatch.setattr(MappedReads, where, fails)
        ended: list[Peer] = []
        while not ended:  # where it happens its client may have been answered before
            for peer in peers:
                try:
                    assert peer.read(512, 4096) == pattern(MIB)[512:4608]
                except (AssertionError, OSError):
                    ended.append(peer)
        assert len(ended) == 1
        for peer in peers:
            if peer not in ended:
                assert peer.read(1024, 4096) == pattern(MIB)[1024:5120]
            peer.socket.close()


def test_at_rest_it_costs_nothing(tmp_path: Path, mapped: list[int]) -> None:
    """After replies that had to wait for room, and when somebody has gone."""
    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path) as server:
        peers = [server.peer() for _ in range(3)]
        join(server, peers)
        transactions = peers[0].send_reads([(0, 28 * KIB)] * 400)
        until_it_waits(server)
        for transaction in transactions:
            assert peers[0].collect(transaction).data == pattern(MIB)[: 28 * KIB]
        join(server, peers)
        while peers:
            time.sleep(0.1)
            before = time.process_time()
            time.sleep(0.3)
            assert time.process_time() - before < 0.1
            peers.pop().socket.close()
            until_left(server, len(peers))


def test_who_leads_does_not_look_while_clients_may_need_the_processor(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    spin = MappedReads._spin

    def watched(self: MappedReads, leader: Reader, looks: BusyPoll) -> bool:
        looked.append(len(self._readers))
        return spin(self, leader, looks)

    monkeypatch.setattr(MappedReads, "_spin", watched)
    monkeypatch.setattr(BusyPoll, "pays", lambda self: True)
    door = raw_disk(tmp_path, pattern(MIB))
    with serving(door, folder=tmp_path, spin_us=20_000) as server:
        server.server.threads.most = 1
        peers = [server.peer() for _ in range(2)]
        join(server, peers)
        for peer in peers:
            peer.read(0, 4096)
        looked.clear()
        for peer in peers * 20:
            peer.read(0, 4096)
            time.sleep(0.002)  # the server has nothing to do
        assert not looked
        peers.pop().socket.close()
        while not looked:
            peers[0].read(0, 4096)
            time.sleep(0.002)
        peers[0].close()


# -- places ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"cluster_size": 4096}, {"extended_l2": True}])
def test_places_are_those_of_the_node(tmp_path: Path, options: dict[str, Any]) -> None:
    """For every sort of cluster, in any order of asking."""
    path = make_qcow2(tmp_path / "d.qcow2", MIB + 5 * 512, **options)
    chance = random.Random(5)
    with enban.open(path, writable=True) as disk:
        for _ in range(40):
            offset = chance.randrange(MIB)
            disk.pwrite(b"x" * min(chance.randrange(1, 9000), disk.size - offset), offset)
            disk.write_zeroes(chance.randrange(MIB // 4096 - 20) * 4096, 16 * KIB)
    door = open_disk(path, writable=False)
    node, places = door.node, Places(door)
    for offset in range(0, node.size, 256 * KIB):
        drive(node.load(offset))
    some = 0
    for _ in range(4000):
        length = chance.choice((1, 512, 4096, 30000))
        offset = chance.randrange(node.size - length)
        known = places.known[offset >> places.shift]
        inside = offset & places.unit - 1
        place = (
            known + inside if known >= 0 and inside + length <= places.unit else places.find(offset, length)
        )
        assert place == node.locate(offset, length)
        some += place >= 0
    assert some > 100
