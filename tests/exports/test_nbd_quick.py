"""Reads sent from mapped memory: the same bytes as by any other way, whatever happens to the file below."""

from __future__ import annotations

import errno
import os
import random
import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.runtime import drive
from enban.exports.nbd import export, quick
from enban.storage import host
from enban.wire.nbd import constants as c
from tests.exports.nbd_peer import KIB, MIB, Running, open_disk, serving
from tests.support import make_qcow2, pattern

STYLES = (c.SIMPLE, c.STRUCTURED, c.EXTENDED)

pytestmark = pytest.mark.skipif(
    not (host.HAVE_FAULTS and host.HAVE_NOWAIT), reason="this host does not tell what is cached (Linux does)"
)


class Watched:
    """A socket that counts the replies it is given in mapped memory, before it sends them."""

    def __init__(self, sock: socket.socket, sent: list[int]) -> None:
        self._sock = sock
        self._sent = sent

    def sendmsg(self, parts: list[Any], *rest: Any) -> int:
        if rest:  # not what is left of them
            self._sent.append(len(parts) // 2)
        return self._sock.sendmsg(parts, *rest)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sock, name)


def watch(monkeypatch: pytest.MonkeyPatch, kind: type[Watched]) -> list[int]:
    """Have files mapped at once; how many reads of each batch were sent from mapped memory."""
    sent: list[int] = []
    make: Any = quick.QuickAnswers.__init__

    def make_watched(self: quick.QuickAnswers, transmission: Any, sock: Any, *rest: Any) -> None:
        make(self, transmission, kind(sock, sent), *rest)

    monkeypatch.setattr(quick, "CALM", 1)
    monkeypatch.setattr(quick.QuickAnswers, "__init__", make_watched)
    return sent


@pytest.fixture
def mapped(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return watch(monkeypatch, Watched)


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
        for _ in range(60):
            ranges = []
            for _ in range(chance.choice((1, 1, 3, 20, 600))):
                length = chance.choice((512, 4 * KIB, 4 * KIB, 4 * KIB, 20 * KIB, 40 * KIB))
                ranges.append((chance.randrange(len(content) - length) // 512 * 512, length))
            transactions = peer.send_reads(ranges)
            bad = peer.send_raw(0, c.CMD_READ, len(content) - 1, 2)
            for (offset, length), transaction in zip(ranges, transactions, strict=True):
                assert peer.collect(transaction).data == content[offset : offset + length]
            assert peer.collect(bad).error == c.EINVAL
            if format == "raw":
                offset = chance.randrange(len(content) - 8 * KIB)
                content[offset : offset + 5000] = chance.randbytes(5000)
                peer.write(offset, bytes(content[offset : offset + 5000]))
    assert sum(mapped) > 1000 and max(mapped) > 16


def test_a_client_that_takes_its_time_gets_every_byte(tmp_path: Path, mapped: list[int]) -> None:
    """More replies than the socket holds: what is left is sent as the client reads, once."""
    content = pattern(2 * MIB)
    path = tmp_path / "d.raw"
    path.write_bytes(content)
    door = open_disk(path, format="raw", writable=False)
    chance = random.Random(1)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        peer.read_together([(0, 4096), (4096, 4096)])
        ranges = [(chance.randrange(480) * 4096, 28 * KIB) for _ in range(400)]
        transactions = peer.send_reads(ranges)
        while not any("waiting for the client" in line for line in server.server.status().splitlines()):
            time.sleep(0.001)
        for (offset, length), transaction in zip(ranges, transactions, strict=True):
            assert peer.collect(transaction).data == content[offset : offset + length]
    assert max(mapped) > 64


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
            while not any("waiting for the client" in line for line in server.server.status().splitlines()):
                time.sleep(0.001)
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


class Failing(Watched):
    """The host cannot read what it shall send from memory."""

    def sendmsg(self, parts: list[Any], *rest: Any) -> int:
        self._sent.append(len(parts) // 2)
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))


def test_what_cannot_be_sent_from_memory_is_read_the_other_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped = watch(monkeypatch, Failing)
    path = tmp_path / "d.raw"
    path.write_bytes(pattern(MIB))
    door = open_disk(path, format="raw", writable=False)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        for _ in range(3):
            assert peer.read_together([(0, 512), (512, 512)]) == [pattern(MIB)[:512], pattern(MIB)[512:1024]]
    assert mapped == [2]  # tried once, not again


def test_reads_go_the_other_way_while_they_wait_for_the_medium(
    tmp_path: Path, mapped: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page fault that had to wait ends it. Each time it takes twice as many cached reads to come back."""
    path = tmp_path / "d.raw"
    path.write_bytes(pattern(MIB))
    door = open_disk(path, format="raw", writable=False)
    faults = 0

    def told() -> int:
        nonlocal faults
        faults += 1  # the last read had to wait
        return faults

    monkeypatch.setattr(host, "page_faults", told)
    monkeypatch.setattr(quick, "_LOOK_EVERY", 1)
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
    served = export.ServedExport(door)
    assert served.pages() is served.pages() and served.pages() == pattern(MIB)
    served.release()
    assert not served.pages()
    monkeypatch.setattr(export, "MOST_MAPPED", MIB - 1)
    assert not export.ServedExport(door).pages()
    direct = open_disk(path, format="raw", writable=False, cache="none")
    assert not export.ServedExport(direct).pages()


def test_a_disk_that_was_closed_is_not_read(tmp_path: Path, mapped: list[int]) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(pattern(MIB))
    door = open_disk(path, format="raw", writable=False)
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
        monkeypatch.setattr(export, "MOST_RESIDENT", before // 2)
        contents = peer.read_together(everything)
        peer.read(0, 4096)
        assert contents == [content[at : at + n] for at, n in everything]
        assert resident(path) <= before // 2


def test_a_served_file_is_free_again_at_the_end(tmp_path: Path, mapped: list[int]) -> None:
    """A mapping keeps its file open; it must not keep the lock of the image beyond the server."""
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(64 * KIB), 0)
    running = Running([served := export.ServedExport(open_disk(path, writable=False))], tmp_path)
    with running.peer() as peer:
        for _ in range(4):
            peer.read(0, 4096)
    assert mapped
    running.stop()
    drive(served.door.close())
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x", 0)


def test_a_disk_whose_clusters_may_move_is_not_sent_from_memory(tmp_path: Path, mapped: list[int]) -> None:
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    door = open_disk(path)
    with serving(door, folder=tmp_path) as server, server.peer() as peer:
        peer.write(0, pattern(64 * KIB))
        for _ in range(8):
            assert peer.read_together([(0, 4096), (8192, 4096)])[1] == pattern(64 * KIB)[8192:12288]
    assert not mapped
