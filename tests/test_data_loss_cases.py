"""How other disk-image code has lost data, one named test for each case that our engine could share.

The numbers are those of the list the project keeps. Each docstring says what went wrong elsewhere
and how the same situation is brought about here. What the tests look at is the storage itself,
through the independent reader, and what a reopened image shows.
"""

from __future__ import annotations

import asyncio
import errno
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest

import enban
import enban.aio
from enban.aio import AsyncDisk, AsyncioRuntime
from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.block.storage import Storage
from enban.cli import main
from enban.errors import (
    CorruptImageError,
    FlushFailedError,
    HostError,
    LockedError,
    UnsupportedFeatureError,
    UsageError,
)
from enban.filters import faults
from enban.filters.base import Filter
from enban.filters.delay import Delay
from enban.filters.faults import Call, Fault, Faults, fail_at
from enban.formats.qcow2.node import Qcow2Node
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage import host
from enban.storage.file import open_file
from enban.storage.memory import MemoryStorage
from enban.wire.qcow2_entries import unpack_compressed
from tests.support import (
    KIB,
    MIB,
    check_bytes,
    check_file,
    empty_image,
    make_qcow2,
    needs_qemu_img,
    needs_qemu_io,
    open_memory,
    pattern,
    qemu_check,
    qemu_img,
    qemu_io,
    raw_node,
)

if TYPE_CHECKING:
    from enban.block.storage import ReadBuffer

COPIED = 1 << 63
CHILD = {**os.environ, "PYTHONPATH": str(Path(enban.__file__).resolve().parent.parent)}
SPACE = (faults.WRITE, faults.ZERO, faults.TRUNCATE, faults.ALLOCATE)  # what a full file system refuses


def qcow2_node(disk: Disk | AsyncDisk) -> Qcow2Node:
    node = disk.door.node
    assert isinstance(node, Qcow2Node)
    return node


def open_disk(storage: Storage, backing: bytes = b"") -> Disk:
    return Disk(drive(open_memory(storage, backing=raw_node(backing) if backing else None)))


def in_threads(work: Callable[[int], None], count: int) -> None:
    """Run `work(0)`, `work(1)`, ... at once, switching as often as possible; the first error is raised."""
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            start.wait(30)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not any(thread.is_alive() for thread in threads), "a request never ended"
    if errors:
        raise errors[0]


@pytest.mark.parametrize("seed", range(4))
def test_case_01_discard_racing_an_allocating_write(seed: int) -> None:
    """Elsewhere a discard freed a cluster whose first write was still on its way; the write then linked
    the freed cluster: mapped, with refcount 0. Here partial writes that must allocate and discards of the
    same clusters overlap on a slow storage, with flushes between, so that all orders come up."""
    cluster, size = 4096, 64 * KIB

    async def scenario() -> None:
        random = Random(seed)
        runtime = AsyncioRuntime(threads=2)
        memory = MemoryStorage(runtime, empty_image(size, cluster_size=cluster))
        disk = AsyncDisk(await open_memory(Delay(memory, seed, most_s=0.0005, share=0.5)), runtime)
        sectors: dict[int, set[bytes]] = {}

        async def write(at: int, number: int) -> None:
            await asyncio.sleep(random.random() * 0.002)
            data = pattern(512, number)
            sectors.setdefault(at, {bytes(512)}).add(data)
            await disk.pwrite(data, at)

        async def discard(at: int) -> None:
            await asyncio.sleep(random.random() * 0.002)
            await disk.discard(at, cluster)

        for turn in range(12):
            work = []
            for number in range(24):
                at = random.randrange(size // cluster // 2) * cluster
                work.append(write(at + random.randrange(8) * 512, turn * 100 + number + 1))
                if number % 2:
                    work.append(discard(at))
            await asyncio.gather(*work, disk.flush())
            await disk.flush()
            report = Qcow2Reader(memory.content).check()
            assert not report.corruptions, report.corruptions[:4]
        content = await disk.pread(size, 0)
        for at in range(0, size, 512):
            assert content[at : at + 512] in sectors.get(at, {bytes(512)}), f"sector {at:#x}"
        await disk.close()
        check_bytes(memory.content)
        assert Qcow2Reader(memory.content).read() == content

    asyncio.run(scenario())


class Held(Filter):
    """Holds the calls that `which` names, "read" or "write" of guest data, until `go` is set."""

    def __init__(self, below: Storage) -> None:
        super().__init__(below)
        self.which = ""
        self.go = asyncio.Event()
        self.held = 0

    def read_now(self, buffer: bytearray | memoryview, offset: int) -> bool:
        return False

    async def _hold(self, what: str) -> None:
        if what == self.which:
            self.which = ""  # the first alone
            self.held += 1
            await self.go.wait()

    async def read_into(self, buffer: bytearray | memoryview, offset: int) -> None:
        await self._hold("read")
        await self.below.read_into(buffer, offset)

    def write_now(self, buffer: ReadBuffer, offset: int) -> bool:
        return False

    async def write(self, buffer: ReadBuffer, offset: int) -> None:
        await self._hold("write")
        await self.below.write(buffer, offset)


@pytest.mark.parametrize("way", ["first-write", "in-place", "read"])
def test_case_01_discard_of_a_cluster_that_a_request_still_uses(way: str) -> None:
    """The same race held still: a request stands before its storage call, its cluster is discarded, the
    discard is flushed, and others take what space is free; only then the call is made. It must neither
    reach the others' clusters nor leave its own uncounted."""
    cluster, size = 4096, 128 * KIB

    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=1)
        memory = MemoryStorage(runtime, empty_image(size, cluster_size=cluster))
        held = Held(memory)
        disk = AsyncDisk(await open_memory(held), runtime)
        old, new = pattern(cluster, 1), pattern(512, 2)
        await disk.pwrite(bytes([1]) * cluster, size - cluster)  # the table is there
        if way != "first-write":
            await disk.pwrite(old, 0)
        await disk.flush()
        held.which = "read" if way == "read" else "write"
        user: asyncio.Task[object] = asyncio.create_task(
            disk.pread(cluster, 0) if way == "read" else disk.pwrite(new, 1024)
        )
        await asyncio.sleep(0.01)
        assert held.held == 1

        async def discard() -> None:
            await disk.discard(0, cluster)
            await disk.flush()
            await disk.flush()

        side = asyncio.create_task(discard())  # may have to wait for the request
        await asyncio.wait([side], timeout=0.05)
        others = pattern(8 * cluster, 3)
        for at in range(0, len(others), cluster):
            await disk.pwrite(others[at : at + cluster], 4 * cluster + at)
        held.go.set()
        seen = await asyncio.wait_for(user, 30)
        await asyncio.wait_for(side, 30)
        assert await disk.pread(len(others), 4 * cluster) == others
        if way == "read":
            assert seen in (old, bytes(cluster))
        here = await disk.pread(cluster, 0)
        kept = (old if way == "in-place" else bytes(cluster))[:1024] + new
        assert here == bytes(cluster) or here[:1536] == kept or here == bytes(1024) + new + bytes(2560)
        await disk.close()
        check_bytes(memory.content)
        assert Qcow2Reader(memory.content).read()[4 * cluster :][: len(others)] == others

    asyncio.run(scenario())


def walk_full_disk(start: bytes, old: bytes, snapshot: str, *, sticky: bool) -> int:
    """Write sectors under several L2 tables while each storage call in turn finds the disk full (with
    `sticky` all later ones too); look at the storage at once, after reopening, and after going on.
    Returns how many calls were made to fail."""
    step = 24 * KIB
    index = 0
    while True:
        index += 1
        memory = MemoryStorage(BLOCKING, start)
        storage = Faults(memory, fail_at(index, operations=SPACE, errno=errno.ENOSPC, sticky=sticky))
        disk = open_disk(storage)
        tried: dict[int, bytes] = {}
        acknowledged: set[int] = set()
        for at in range(0, len(old), step):
            tried[at] = pattern(512, at + 7)
            try:
                disk.pwrite(tried[at], at)
                disk.flush()
            except HostError:
                report = Qcow2Reader(memory.content).check()
                assert not report.corruptions, (index, report.corruptions[:4])
            else:
                acknowledged.add(at)
        before_close = storage.injected
        try:
            disk.close()
        except HostError:
            assert sticky or storage.injected > before_close
        failed = storage.injected
        check_bytes(memory.content, leaks=True)

        again = open_disk(MemoryStorage(BLOCKING, memory.content))  # the disk has room again
        seen = again.pread(len(old), 0)
        for at in range(0, len(old), 512):
            part = seen[at : at + 512]
            if at in acknowledged:
                assert part == tried[at], f"call {index}: flushed sector {at:#x} is lost"
            else:
                assert part in (old[at : at + 512], tried.get(at)), f"call {index}: sector {at:#x}"
        for at, data in tried.items():
            again.pwrite(data, at)
        again.close()
        final = again.door.node.file
        assert isinstance(final, MemoryStorage)
        check_bytes(final.content, leaks=True)
        reader = Qcow2Reader(final.content)
        new = bytearray(old)
        for at, data in tried.items():
            new[at : at + 512] = data
        assert reader.read() == new
        if snapshot:
            assert reader.read(snapshot=snapshot) == old, f"call {index}: the snapshot changed"
        if not failed:
            return index - 1


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for-good"])
def test_case_02_no_space_while_a_shared_table_is_copied(sticky: bool) -> None:
    """Elsewhere the old L2 table was put on the free list before there was a new one; no space for the
    new one, and the table in use was handed out as free. Here a snapshot shares all L2 tables, so each
    write must copy one, and every storage call of that fails in turn for want of space."""
    size = 128 * KIB
    memory = MemoryStorage(BLOCKING, empty_image(size, cluster_size=512))
    old = pattern(size, 2)
    with open_disk(memory) as disk:
        disk.pwrite(old, 0)
        disk.create_snapshot("s")
    image = memory.content  # our snapshots have tables of their own; QEMU's are shared until written
    (l1,) = struct.unpack_from(">Q", image, 40)
    (table,) = struct.unpack_from(">Q", image, 48)
    snapshot = Qcow2Reader(image).snapshots[0]
    for i in range(snapshot.l1_entries):
        (shared,) = struct.unpack_from(">Q", image, l1 + 8 * i)
        (own,) = struct.unpack_from(">Q", image, snapshot.l1_offset + 8 * i)
        shared &= ~COPIED
        struct.pack_into(">Q", image, l1 + 8 * i, shared)
        struct.pack_into(">Q", image, snapshot.l1_offset + 8 * i, shared)
        for offset, count in ((own & ~COPIED, 0), (shared, 2)):
            number = offset // 512  # a block of 512 bytes has 256 counts
            (block,) = struct.unpack_from(">Q", image, table + number // 256 * 8)
            struct.pack_into(">H", image, block + number % 256 * 2, count)
    check_bytes(image)
    assert walk_full_disk(bytes(image), old, "s", sticky=sticky) > 10


@pytest.mark.parametrize("sticky", [False, True], ids=["once", "for-good"])
def test_case_03_no_space_after_a_new_table_was_made(sticky: bool) -> None:
    """Elsewhere a new L2 table was entered in the L1 table before it was counted; then space ran out, and
    the damage showed only when the image was opened again. Here an empty image makes an L2 table for each
    write, every storage call of that fails in turn, and the image is reopened."""
    size = 128 * KIB
    start = bytes(empty_image(size, cluster_size=512))
    assert walk_full_disk(start, bytes(size), "", sticky=sticky) > 10


class LatePunch(Filter):
    """Holes are punched late. A write into a range whose punch is still to come is an error: it would
    be lost. punched: how many holes; overlapped: how many writes came while one was outstanding."""

    def __init__(self, below: Storage, seconds: float) -> None:
        super().__init__(below)
        self.seconds = seconds
        self.pending: list[tuple[int, int]] = []
        self.punched = 0
        self.overlapped = 0

    def _look(self, offset: int, length: int) -> None:
        self.overlapped += bool(self.pending)
        for start, end in self.pending:
            assert offset >= end or offset + length <= start, f"write at {offset:#x} before its punch"

    def write_now(self, buffer: ReadBuffer, offset: int) -> bool:
        self._look(offset, len(buffer))
        return self.below.write_now(buffer, offset)

    async def write(self, buffer: ReadBuffer, offset: int) -> None:
        self._look(offset, len(buffer))
        await self.below.write(buffer, offset)

    async def discard(self, offset: int, length: int) -> None:
        place = (offset, offset + length)
        self.pending.append(place)
        await asyncio.sleep(self.seconds)
        await self.below.write_zeroes(offset, length, unmap=True)  # the punch does happen
        self.pending.remove(place)
        self.punched += 1


def test_case_04_late_hole_punch_into_a_reused_cluster() -> None:
    """Elsewhere the hole for a freed cluster was punched late, when the cluster was an L2 table already.
    Here every punch waits, while other tasks write new clusters and make new tables from what was just
    freed: no write may land in a range whose punch is outstanding, and all content must stay."""
    cluster, region, tasks = 512, 64 * KIB, 6

    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=2)
        size = region * tasks * 2
        memory = MemoryStorage(runtime, empty_image(size, cluster_size=cluster))
        late = LatePunch(Delay(memory, 4, most_s=0.0003, share=0.3), 0.002)
        disk = AsyncDisk(await open_memory(late), runtime)

        async def work(number: int) -> None:
            random = Random(number)
            for turn in range(6):
                base = (number + (turn % 2) * tasks) * region  # moving on takes new L2 tables
                data = pattern(random.choice((8, 24, 48)) * KIB, number * 100 + turn + 1)
                at = base + random.randrange(16) * 512
                await disk.pwrite(data, at)
                await disk.flush()
                assert await disk.pread(len(data), at) == data
                if turn < 4:
                    await disk.discard(base, region)
                    await disk.flush()
                    assert not any(await disk.pread(region, base))

        await asyncio.gather(*(work(number) for number in range(tasks)))
        content = await disk.pread(size, 0)
        assert any(content)
        await disk.close()
        assert late.punched and late.overlapped
        check_bytes(memory.content)
        assert Qcow2Reader(memory.content).read() == content

    asyncio.run(scenario())


def cold_threads(backing: bytes, seed: int) -> None:
    """Threads write and read their own sectors, which lie between those of others in the same clusters
    and L2 tables, while hardly any table fits into memory."""
    size, threads, cluster = 512 * KIB, 6, 1024
    memory = MemoryStorage(
        BLOCKING, empty_image(size, cluster_size=cluster, **({"backing_file": "b"} if backing else {}))
    )
    model = bytearray(backing.ljust(size, b"\0"))
    for turn in range(2):  # the second time the tables are there and must be loaded
        disk = open_disk(Delay(memory, seed, most_s=0.0005, share=0.2), backing)
        cache = qcow2_node(disk).cache
        cache.most, cache.most_dirty = 2, 1
        drawn: list[dict[int, bytes]] = [{} for _ in range(threads)]

        def work(
            number: int, disk: Disk = disk, turn: int = turn, drawn: list[dict[int, bytes]] = drawn
        ) -> None:
            random = Random(f"{seed} {turn} {number}")
            mine = drawn[number]
            for _ in range(60):
                at = random.randrange(size // 512 // threads) * threads * 512 + number * 512
                before = mine.get(at, bytes(model[at : at + 512]))
                assert disk.pread(512, at) == before, f"sector {at:#x} before"
                mine[at] = pattern(512, random.randrange(1, 1 << 20))
                disk.pwrite(mine[at], at)
                assert disk.pread(512, at) == mine[at], f"sector {at:#x} after"

        in_threads(work, threads)
        for mine in drawn:
            for at, data in mine.items():
                model[at : at + 512] = data
        assert disk.pread(size, 0) == model
        disk.close()
        check_bytes(memory.content)
        assert Qcow2Reader(memory.content).read(backing=backing) == model


@pytest.mark.parametrize("seed", range(2))
def test_case_05_table_cache_shared_by_threads(seed: int) -> None:
    """Elsewhere several queues changed one cache of tables without a lock. Here many threads use one disk
    whose cache holds two tables, so that loading, evicting, writing out and changing overlap."""
    cold_threads(b"", seed)


@pytest.mark.parametrize("portable", [False, True], ids=["positioned", "portable"])
def test_case_06_one_descriptor_many_offsets(
    portable: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Elsewhere "seek, then write" on a duplicated descriptor put data at another thread's offset. Here
    threads read and write one file at different offsets, and look for its holes. With positioned calls a
    further thread keeps moving the cursor of the descriptor; without them the cursor is ours to guard."""
    if portable:
        monkeypatch.setattr(host, "HAVE_PREADV", False)
        monkeypatch.setattr(host, "HAVE_NOWAIT", False)
    threads, block, blocks = 6, 4096, 24
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(threads * blocks * block))
    storage = open_file(str(path), BLOCKING, writable=True)
    fd = storage.fileno()
    if not portable:
        fd = os.dup(fd)  # shares the cursor

    def work(number: int) -> None:
        random = Random(number)
        if number == threads:
            for _ in range(3000):
                if portable:
                    host.data_or_hole(
                        fd, random.randrange(threads * blocks) * block, threads * blocks * block
                    )
                else:
                    os.lseek(fd, random.randrange(threads * blocks) * block, os.SEEK_SET)
            return
        for turn in range(3):
            for index in range(blocks):
                at = (index * threads + number) * block
                data = pattern(block, number * 1000 + turn * 100 + index + 1)
                drive(storage.write(data, at))
                assert drive(storage.read(at, block)) == data, f"block at {at:#x}"

    in_threads(work, threads + 1)
    drive(storage.close())
    if not portable:
        os.close(fd)
    content = path.read_bytes()
    for number in range(threads):
        for index in range(blocks):
            at = (index * threads + number) * block
            assert content[at : at + block] == pattern(block, number * 1000 + 200 + index + 1)


@pytest.mark.parametrize("seed", range(2))
def test_case_07_threads_over_a_backing_file_with_cold_tables(seed: int) -> None:
    """Elsewhere several queues over a backing file were right only as long as the L2 tables were in
    memory. Here threads copy up from a backing file, sector by sector into shared clusters, with a cache
    of two tables, once while the tables are made and once over tables that must be loaded."""
    cold_threads(pattern(300 * KIB + 512, 9), seed)


def entry_places(image: bytearray) -> tuple[int, int]:
    """(offset of the first L1 entry, offset of the first L2 table)."""
    (l1,) = struct.unpack_from(">Q", image, 40)
    (entry,) = struct.unpack_from(">Q", image, l1)
    return l1, entry & 0x00FFFFFFFFFFFE00


@pytest.mark.parametrize(
    "target", ["header", "header-l1", "header-uncounted", "refcount-table", "refcount-block", "l1", "l2"]
)
def test_case_08_guest_write_onto_metadata(target: str) -> None:
    """Elsewhere a damaged entry led a guest write onto the header cluster. Here an L2 entry names the
    header, or a table, as guest data; or an L1 entry names the header as an L2 table; or the header counts
    as free. A write must not touch that cluster (the corrupt bit aside)."""
    cluster, size = 4096, 256 * KIB
    memory = MemoryStorage(BLOCKING, empty_image(size, cluster_size=cluster))
    with open_disk(memory) as disk:
        disk.pwrite(pattern(8192, 5), 0)
    image = memory.content
    l1, l2 = entry_places(image)
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    place = {"refcount-table": table, "refcount-block": block, "l1": l1, "l2": l2}.get(target, 0)
    if target == "header-l1":
        struct.pack_into(">Q", image, l1, COPIED)
    elif target == "header-uncounted":
        struct.pack_into(">H", image, block, 0)
    else:
        struct.pack_into(">Q", image, l2, COPIED | place)
    before = bytes(image)
    disk = open_disk(memory)
    refused = 0
    for offset, length in ((100, 50), (0, cluster), (cluster * 20 + 5, 1000)):
        try:
            disk.pwrite(b"\xee" * length, offset)
            disk.flush()
        except CorruptImageError:
            refused += 1
    try:
        disk.close()
    except CorruptImageError:
        refused += 1
    after = bytearray(memory.content)
    assert after[:72] + after[80:cluster] == before[:72] + before[80:cluster], "the header was overwritten"
    if target in ("header", "header-l1"):  # offset 0 says "no cluster": new space is as good as a refusal
        assert refused or Qcow2Reader(after).read()[100:150] == b"\xee" * 50
    else:
        assert refused
        assert after[place + 80 : place + cluster] == before[place + 80 : place + cluster]
        if target != "header-uncounted":  # there writes in place are right, only new space is refused
            assert b"\xee" * 16 not in after


def test_case_09_failing_flush_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere a buffer was dropped and its failing flush with it, unseen. Here the flush fails on both
    faces, in `flush`, `close` and at the end of `with`; and below the command, which must not exit with 0."""
    for step in ("flush", "close", "with"):
        storage = Faults(MemoryStorage(BLOCKING, empty_image(MIB)))
        disk = open_disk(storage)
        disk.pwrite(b"x" * 5000, 100)
        storage.decide = fail_at(1, operations=(faults.FLUSH,), sticky=True)
        with pytest.raises(FlushFailedError):
            if step == "flush":
                disk.flush()
            elif step == "close":
                disk.close()
            else:
                with disk:
                    pass
        if step == "flush":
            with pytest.raises(HostError):
                disk.close()

    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=1)
        storage = Faults(MemoryStorage(runtime, empty_image(MIB)))
        disk = AsyncDisk(await open_memory(storage), runtime)
        await disk.pwrite(b"x" * 5000, 100)
        storage.decide = fail_at(1, operations=(faults.FLUSH,), sticky=True)
        with pytest.raises(FlushFailedError):
            await disk.close()

    asyncio.run(scenario())

    source = tmp_path / "a.raw"
    source.write_bytes(pattern(MIB))
    overlay = make_qcow2(tmp_path / "o.qcow2", MIB, backing_file="a.raw", backing_fmt="raw")
    with enban.open(overlay, writable=True) as top:
        top.pwrite(b"y" * 4096, 0)

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(host, "sync", broken)
    for words in (
        ["convert", "-q", "-O", "qcow2", str(source), str(tmp_path / "b.qcow2")],
        ["convert", "-q", "-O", "raw", str(overlay), str(tmp_path / "b.raw")],
        ["commit", "-q", str(overlay)],
    ):
        assert main(words) != 0, words
        assert "flush failed" in capsys.readouterr().err, words
    with pytest.raises(FlushFailedError), enban.open(overlay, writable=True) as top:
        top.pwrite(b"z", 0)


def pack_random(seed: int) -> bytes:
    """A cluster of 4 KiB packed into somewhat more than 3000 bytes."""
    packed = deflater("zlib")(Random(seed).randbytes(3000) + bytes(1096))
    assert packed is not None and 3000 <= len(packed) < 3400
    return packed


@pytest.mark.parametrize("way", ["write", "part", "zero", "discard", "packed"])
@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_case_10_overwritten_packed_cluster_frees_all_it_touched(version: str, way: str) -> None:
    """Elsewhere the overwriting of a compressed cluster that lay in two host clusters gave back only one
    of them. Here several such are overwritten, zeroed, discarded or packed anew: nothing may leak, and the
    space is used again."""
    cluster = 4096
    memory = MemoryStorage(BLOCKING, empty_image(128 * KIB, cluster_size=cluster, compat=version))
    disk = open_disk(memory)
    count = 9
    for i in range(count):
        disk.write_packed(pack_random(i), i * cluster)
    disk.flush()
    spans = 0
    for entry in qcow2_node(disk).cache.tables[0].entries[:count]:
        at, length = unpack_compressed(entry, 12)
        spans += at // cluster != (at + length - 1) // cluster
    assert spans >= 3
    new = {i: Random(i).randbytes(3000) + bytes(1096) for i in range(count)}
    for i in range(count):
        at = i * cluster
        if way == "write":
            disk.pwrite(pattern(cluster, i + 1), at)
            new[i] = pattern(cluster, i + 1)
        elif way == "part":
            disk.pwrite(b"part", at + 10)
            new[i] = new[i][:10] + b"part" + new[i][14:]
        elif way == "packed":
            disk.write_packed(pack_random(i + 50), at)
            new[i] = Random(i + 50).randbytes(3000) + bytes(1096)
        else:
            (disk.write_zeroes if way == "zero" else disk.discard)(at, cluster)
            new[i] = bytes(cluster)
        disk.flush()
    disk.close()
    check_bytes(memory.content)
    assert Qcow2Reader(memory.content).read()[: count * cluster] == b"".join(new.values())
    grown = len(memory.content)
    with open_disk(memory) as disk:
        disk.pwrite(pattern(6 * cluster, 3), 64 * KIB)  # fits into what the packed clusters had
    check_bytes(memory.content)
    if way in ("zero", "discard"):
        assert len(memory.content) <= grown


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_case_11_fill_and_discard_do_not_grow_the_file(refcount_bits: int) -> None:
    """Elsewhere freed clusters of refcount blocks were never used again: the file doubled while a check
    found nothing. Here a small-cluster image with many refcount blocks is filled and discarded again and
    again, within one opening and over several: after the first rounds the file stays as long as it is."""
    size = 256 * KIB
    memory = MemoryStorage(BLOCKING, empty_image(size, cluster_size=512, refcount_bits=refcount_bits))
    lengths = []
    for turn in range(5):
        disk = open_disk(memory)
        for again in range(2):
            data = pattern(size, turn * 2 + again + 1)
            disk.pwrite(data, 0)
            disk.flush()
            assert disk.pread(size, 0) == data
            disk.discard(0, size)
            disk.flush()
        disk.close()
        check_bytes(memory.content)
        lengths.append(len(memory.content))
    assert lengths[0] < 2 * size
    assert lengths[-1] == lengths[0], lengths


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_case_13_no_write_between_two_bitmaps(seed: int) -> None:
    """Elsewhere the bitmap of a mirror was disabled before its replacement recorded writes: what came in
    between was copied by neither. Here bitmaps take turns while threads write: the next one is added, then
    the old one disabled. Every write that was acknowledged is in one of the two; each that ended before the
    first call is in the old one, each that began after the second in the new one."""
    size, grain = 4 * MIB, 4096
    memory = MemoryStorage(BLOCKING, empty_image(size, cluster_size=grain))
    disk = open_disk(memory)
    disk.add_bitmap("0", granularity=grain)
    turns, places = 6, size // grain
    stop = threading.Event()
    # (when it began, when it ended, place): the hands of one clock for all threads
    written: list[list[tuple[int, int, int]]] = [[] for _ in range(4)]
    handed: list[tuple[int, int]] = []

    def work(number: int) -> None:
        random = Random(seed * 10 + number)
        if number == 4:
            for turn in range(1, turns):
                time.sleep(0.02)
                before = time.monotonic_ns()
                disk.add_bitmap(str(turn), granularity=grain)
                disk.disable_bitmap(str(turn - 1))
                handed.append((before, time.monotonic_ns()))
            time.sleep(0.02)
            stop.set()
            return
        while not stop.is_set():
            place = random.randrange(places)
            began = time.monotonic_ns()
            disk.pwrite(b"%d" % number, place * grain)
            written[number].append((began, time.monotonic_ns(), place))

    in_threads(work, 5)
    found = [
        {start // grain + n for start, k in disk.dirty(str(t)) for n in range(k // grain)}
        for t in range(turns)
    ]
    disk.close()
    check_bytes(memory.content)
    seen = 0
    for began, ended, place in chain.from_iterable(written):
        first = sum(after <= began for _, after in handed)  # this one was enabled all along
        last = sum(before < ended for before, _ in handed)
        assert any(place in found[turn] for turn in range(first, last + 1)), (began, ended, place)
        if first == last:
            seen += 1
            assert place in found[first]
    assert seen > 100


@pytest.mark.parametrize("face", ["blocking", "asyncio"])
def test_case_14_short_reads_and_writes(face: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a read that came back short was gone on with at the wrong offset. Here the system's reads
    and writes move only a part of what they are asked for, each time another one."""
    random = Random(14)
    shortened = []

    def short_read(fd: int, buffers: tuple[memoryview], offset: int, flags: int = 0) -> int:
        view = buffers[0]
        shortened.append(len(view))
        return preadv(fd, (view[: random.randrange(1, len(view) + 1)],), offset, flags)

    def short_write(fd: int, data: memoryview, offset: int) -> int:
        shortened.append(len(data))
        return pwrite(fd, memoryview(data)[: random.randrange(1, len(data) + 1)], offset)

    preadv, pwrite = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", short_read)
    monkeypatch.setattr(os, "pwrite", short_write)
    size = MIB
    qcow2 = make_qcow2(tmp_path / "a.qcow2", size, cluster_size=4096)
    raw = tmp_path / "a.raw"
    raw.write_bytes(bytes(size))
    data = pattern(600 * KIB, 14)

    async def scenario(path: Path) -> None:
        disk = await enban.aio.open(path, writable=True)
        await disk.pwrite(data, 12345)
        await disk.flush()
        assert await disk.pread(len(data), 12345) == data
        await disk.close()

    for path in (qcow2, raw):
        if face == "asyncio":
            asyncio.run(scenario(path))
        else:
            with enban.open(path, writable=True) as disk:
                disk.pwrite(data, 12345)
                disk.flush()
                assert disk.pread(len(data), 12345) == data
        with enban.open(path) as disk:
            content = disk.pread(size, 0)
            assert content == bytes(12345) + data + bytes(size - 12345 - len(data))
    assert len(shortened) > 50
    check_file(qcow2)


def child(code: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env=CHILD,
        timeout=60,
        check=False,
    )


TRY_OPEN = """
import sys, enban
from enban.errors import LockedError
for options in ({"writable": True}, {}, {"force_share": True}):
    try:
        enban.open(sys.argv[1], **options).close()
        print("opened")
    except LockedError:
        print("locked")
"""


@pytest.mark.skipif(not host.HAVE_LOCKS, reason="this host has no open-file-description locks")
def test_case_17_second_writer_is_refused(tmp_path: Path) -> None:
    """Elsewhere a snapshot was deleted, or a disk resized, in an image that a guest was writing. Here an
    image is open for writing: another process, the command and this process itself get neither a writer
    nor a plain reader; a reader that says it wants to share does. Afterwards the image is free."""
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"mine", 0)
        disk.flush()
        before = path.read_bytes()
        assert child(TRY_OPEN, path).stdout.split() == ["locked", "locked", "opened"]
        for words in (["snapshot", "-c", "s", str(path)], ["resize", str(path), "2M"], ["check", str(path)]):
            assert main(words) != 0, words
        with pytest.raises(LockedError):
            enban.open(path, writable=True)
        assert path.read_bytes() == before
        disk.pwrite(b"still mine", 0)
    assert child(TRY_OPEN, path).stdout.split() == ["opened"] * 3
    check_file(path)


@needs_qemu_img
@needs_qemu_io
def test_case_17_second_writer_is_refused_between_qemu_and_us(tmp_path: Path) -> None:
    """The same with QEMU: it is refused what we write, and we are refused what it writes."""
    path = make_qcow2(tmp_path / "a.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"mine", 0)
        disk.flush()
        before = path.read_bytes()
        for words in (["snapshot", "-c", "s"], ["resize"], ["check"]):
            tail = ["2M"] if words[0] == "resize" else []
            qemu_img(*words, path, *tail, ok=(1,))
        assert path.read_bytes() == before
    with subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as peer:
        assert peer.stdin is not None and peer.stdout is not None
        peer.stdin.write("write -P 7 0 512\n")
        peer.stdin.flush()
        while "wrote 512" not in peer.stdout.readline():
            assert peer.poll() is None
        for writable in (True, False):
            with pytest.raises(LockedError):
                enban.open(path, writable=writable)
        enban.open(path, force_share=True).close()
        peer.communicate("quit\n", timeout=30)
    with enban.open(path) as disk:
        assert disk.pread(512, 0) == b"\7" * 512


TIB = 1 << 40


def test_case_18_a_mixed_chain_keeps_its_base(tmp_path: Path) -> None:
    """Elsewhere deleting an overlay of a chain with internal and external snapshots deleted the base.
    Here both layers have internal snapshots; those of the overlay are made, applied and deleted, the overlay
    is streamed, written in snapshot mode and removed: the base and its snapshots stay, to the byte."""
    base = make_qcow2(tmp_path / "base", MIB, cluster_size=4096)
    with enban.open(base, writable=True) as disk:
        disk.pwrite(pattern(300_000, 1), 0)
        disk.create_snapshot("shared name")
        disk.pwrite(pattern(300_000, 2), 100_000)
    kept = base.read_bytes()
    overlay = make_qcow2(
        tmp_path / "overlay", MIB, cluster_size=4096, backing_file="base", backing_fmt="qcow2"
    )
    with enban.open(overlay, writable=True) as disk:
        disk.create_snapshot("shared name")
        disk.pwrite(pattern(200_000, 3), 50_000)
        disk.create_snapshot("other")
        disk.apply_snapshot("shared name")
        before = disk.pread(MIB, 0)
        disk.delete_snapshot("other")
        disk.delete_snapshot("shared name")
        disk.pull()
        assert disk.pread(MIB, 0) == before
    with enban.open(overlay, snapshot=True) as disk:
        disk.write_zeroes(0, MIB)
    assert base.read_bytes() == kept
    overlay.unlink()
    assert base.read_bytes() == kept and sorted(p.name for p in tmp_path.iterdir()) == ["base"]
    with enban.open(base, snapshot_name="shared name") as disk:
        assert disk.pread(300_000, 0) == pattern(300_000, 1)
    check_file(base)


@pytest.mark.parametrize("damage", ["L1 outside the file", "L2 outside the file", "no such name"])
@pytest.mark.parametrize("action", ["delete", "apply"])
def test_case_19_nothing_is_done_before_all_was_checked(tmp_path: Path, damage: str, action: str) -> None:
    """Elsewhere a snapshot was partly removed before it was found that it could not be. Here the tables of a
    snapshot are broken, or it does not exist: the image stays as it is, to the byte."""
    path = make_qcow2(tmp_path / "disk", MIB, cluster_size=4096)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(600_000, 1), 0)
        disk.create_snapshot("good")
        disk.pwrite(pattern(600_000, 2), 200_000)
        disk.create_snapshot("bad")
        disk.pwrite(pattern(600_000, 3), 400_000)
        bad = disk.snapshots[1]
    image = bytearray(path.read_bytes())
    snapshots = int.from_bytes(image[64:72], "big")
    place = image.index(bad.l1_offset.to_bytes(8, "big") + bad.l1_entries.to_bytes(4, "big"), snapshots)
    if damage == "L1 outside the file":
        image[place : place + 8] = (1 << 40).to_bytes(8, "big")
    elif damage == "L2 outside the file":  # not the first of its tables
        last = max(n for n in range(bad.l1_entries) if any(image[bad.l1_offset + 8 * n :][:8]))
        image[bad.l1_offset + 8 * last : bad.l1_offset + 8 * last + 8] = (1 << 40).to_bytes(8, "big")
    path.write_bytes(image)
    name = "missing" if damage == "no such name" else "bad"
    try:
        with enban.open(path, writable=True) as disk:
            call = disk.delete_snapshot if action == "delete" else disk.apply_snapshot
            with pytest.raises((CorruptImageError, UsageError)) as caught:
                call(name)
            assert "\n" not in str(caught.value)
            assert disk.pread(200_000, 0) == pattern(600_000, 1)[:200_000]
            assert disk.pread(600_000, 400_000) == pattern(600_000, 3)
    except CorruptImageError:
        assert damage != "no such name"  # refused when it is opened for writing, or for the first change
    assert path.read_bytes() == image


@pytest.mark.parametrize("room", [0, 3, 9, 40])
def test_case_20_commit_onto_a_full_volume_keeps_the_bitmaps(room: int) -> None:
    """Elsewhere a commit into a base on a full volume lost the base's bitmaps. Here the volume of a base
    with an enabled and a disabled bitmap gets full while an overlay's clusters are written down, and stays
    so while the base is closed: its bitmaps are there, believed, and hide nothing that changed."""
    size = 256 * KIB
    memory = MemoryStorage(BLOCKING, empty_image(size, cluster_size=512))
    with open_disk(memory) as disk:
        disk.pwrite(pattern(size // 2, 1), 0)
        disk.add_bitmap("on", granularity=512)
        disk.pwrite(b"x" * 512, 1024)
        disk.add_bitmap("off", granularity=512)
        disk.pwrite(b"y" * 512, 4096)
        disk.disable_bitmap("off")
    before = Qcow2Reader(memory.content).read()
    limit = memory.size() + room * 512
    faulty = Faults(memory)
    faulty.decide = lambda call: (
        Fault(errno.ENOSPC) if call.operation in SPACE and call.offset + call.length > limit else None
    )
    base, failed = open_disk(faulty), 0
    for place in range(0, size, 4096):
        try:
            base.pwrite(pattern(700, place + 2), place)
        except HostError:
            failed += 1
    assert failed, "the volume was not full"
    base.close()
    check_bytes(memory.content, leaks=True)
    reader = Qcow2Reader(memory.content)
    after = reader.read()
    dirty = {bitmap.name: None if bitmap.in_use else reader.dirty(bitmap) for bitmap in reader.bitmaps()}
    changed = {n for n in range(size // 512) if before[n * 512 :][:512] != after[n * 512 :][:512]}
    assert dirty["on"] is not None and dirty["on"] >= changed | {2, 8} and dirty["off"] == {8}


@pytest.fixture
def vast_image(tmp_path: Path) -> Iterator[tuple[Path, dict[int, bytes]]]:
    """A disk of 8 TiB with data on both sides of 2 and 4 TiB, some of it also over 2 TiB in the file."""
    path = make_qcow2(tmp_path / "a.qcow2", 8 * TIB)
    places = (0, 1 << 32, 2 * TIB - 4096, 2 * TIB + 65541, 4 * TIB, 6 * TIB + 12345, 8 * TIB - 9000)
    content = {at: pattern(9000, number + 1) for number, at in enumerate(places)}
    with enban.open(path, writable=True) as disk:
        for number, (at, data) in enumerate(content.items()):
            if number == 4:
                qcow2_node(disk).refcounts.hint = (5 * TIB >> 1) >> 16  # go on at 2.5 TiB of the file
            disk.pwrite(data, at)
        disk.discard(6 * TIB + (1 << 20), 1 << 20)
    yield path, content
    path.unlink()


def test_case_22_offsets_beyond_two_tib(vast_image: tuple[Path, dict[int, bytes]]) -> None:
    """Elsewhere offsets were cut to 32 bits (of sectors) on images over 2 TiB. Here a sparse disk of 8 TiB
    is written around 2, 4, 6 and 8 TiB, partly into clusters at 2.5 TiB of the file: each place has its
    bytes, the places that a cut offset would mean have none, and the same holds for a raw file."""
    path, content = vast_image
    assert path.stat().st_size > 5 * TIB >> 1
    with enban.open(path) as disk:
        for at, data in (*content.items(), *content.items()):  # the tables cold, then warm
            assert disk.pread(len(data), at) == data, f"at {at:#x}"
            assert disk.pread(100, at) == data[:100], f"at {at:#x}"
        for at in (6 * TIB + 12345, 4 * TIB):
            for cut in (1 << 40, 1 << 41):
                alias = at % cut + (1 << 20)
                assert not any(disk.pread(9000, alias))
        assert sum(extent.length for extent in disk.map(5 * TIB, TIB)) == TIB
    result = enban.check(path)
    assert not result.corruptions and not result.leaks
    raw = path.with_suffix(".raw")
    with raw.open("wb") as file:
        file.truncate(8 * TIB)
    with enban.open(raw, format="raw", writable=True) as disk:
        for at, data in content.items():
            disk.pwrite(data, at)
    with enban.open(raw, format="raw") as disk:
        assert all(disk.pread(len(data), at) == data for at, data in content.items())
    raw.unlink()


@needs_qemu_img
@needs_qemu_io
def test_case_22_offsets_beyond_two_tib_seen_by_qemu(vast_image: tuple[Path, dict[int, bytes]]) -> None:
    """The same image, as QEMU sees it."""
    path, content = vast_image
    qemu_check(path)
    with enban.open(path, writable=True) as disk:
        for number, at in enumerate(content):
            disk.pwrite(bytes([number + 1]) * 512, at // 512 * 512)
    qemu_io(path, *(f"read -P {n + 1} {at // 512 * 512} 512" for n, at in enumerate(content)))


@pytest.mark.parametrize("attached", [True, False], ids=["attached", "not-opened"])
@pytest.mark.parametrize("version", ["0.10", "1.1"])
def test_case_23_discard_never_shows_the_backing_file(version: str, attached: bool) -> None:
    """Elsewhere a discard in a version 2 overlay unlinked a cluster, and the stale bytes of the backing
    file came to light. Here overlays of both versions, with their backing file opened or not, are written
    and discarded: each sector afterwards reads as it was or as zeros, also when opened again."""
    cluster, size = 4096, 64 * KIB
    stale = b"\xbb" * size
    fresh = pattern(size, 23)
    memory = MemoryStorage(
        BLOCKING, empty_image(size, cluster_size=cluster, compat=version, backing_file="b")
    )
    disk = open_disk(memory, stale if attached else b"")
    disk.pwrite(fresh, 0)
    disk.discard(0, 4 * cluster)
    disk.discard(5 * cluster + 100, 2 * cluster)
    disk.flush()
    disk.discard(8 * cluster, cluster)
    disk.write_zeroes(10 * cluster, cluster)
    disk.write_zeroes(12 * cluster + 512, 2 * cluster)
    seen = disk.pread(size, 0)
    disk.close()
    assert not any(seen[10 * cluster : 11 * cluster]) and not any(seen[12 * cluster + 512 :][: 2 * cluster])
    for at in range(0, size, 512):
        assert seen[at : at + 512] in (fresh[at : at + 512], bytes(512)), f"sector {at:#x}"
    check_bytes(memory.content)
    assert Qcow2Reader(memory.content).read(backing=stale) == seen
    assert open_disk(memory, stale).pread(size, 0) == seen


NAMES = ("base.qcow2", "b", "a/longer/name/of/another/base.qcow2", "n" * 400, "")


@pytest.mark.parametrize("version", ["0.10", "1.1"])
@pytest.mark.parametrize("new", NAMES[1:])
def test_case_24_backing_name_is_old_or_new(version: str, new: str) -> None:
    """Elsewhere a parent pointer that was out of date was written back after a coalesce. Here each storage
    call of naming another backing file fails in turn, whole or torn at a sector; on the storage there is
    the old name or the new one. What is done afterwards, such as a flush or a new snapshot, must not bring
    the other back."""
    options = {"cluster_size": 4096, "compat": version, "backing_file": NAMES[0], "backing_fmt": "qcow2"}
    start = bytes(empty_image(MIB, **options))
    index = 0
    while True:
        index += 1
        for torn in (0, 512):
            memory = MemoryStorage(BLOCKING, start)
            storage = Faults(memory)
            disk = open_disk(storage)
            node = qcow2_node(disk)
            disk.pwrite(b"x" * 5000, 0)
            disk.flush()
            count = 0

            def decide(call: Call, index: int = index, torn: int = torn) -> Fault | None:
                nonlocal count
                count += call.operation in faults.CHANGES
                if call.operation not in faults.CHANGES or count != index:
                    return None
                partly = torn if call.operation == faults.WRITE and call.length > torn else 0
                return Fault(errno.EIO, done=partly)

            storage.decide = decide
            failed = False
            try:
                drive(node.set_backing(new, "raw" if new else ""))
            except HostError:
                failed = True
            storage.decide = None
            on_disk = Qcow2Reader(memory.content).backing_name
            assert on_disk in (NAMES[0], new), (index, torn, on_disk)
            if not failed:
                assert on_disk == new == node.backing_name
                disk.pwrite(b"y" * 5000, 40000)
                disk.resize(2 * MIB)
                disk.create_snapshot("s")
                disk.close()
                assert Qcow2Reader(memory.content).backing_name == new
                check_bytes(memory.content)
            else:
                drive(node.set_backing(new, "raw" if new else ""))
                disk.close()
                assert Qcow2Reader(memory.content).backing_name == new
                check_bytes(memory.content, leaks=True)
        if count < index:
            break
    assert index > 3


def test_case_24_rebase_and_commit_leave_the_right_name(tmp_path: Path) -> None:
    """The jobs that change what an overlay stands on: afterwards the name in the file is the one asked
    for, and committing changes neither the name nor what is read."""
    size = MIB
    for name in ("old", "new"):
        make_qcow2(tmp_path / f"{name}.qcow2", size)
        with enban.open(tmp_path / f"{name}.qcow2", writable=True) as disk:
            disk.pwrite(pattern(size // 2, len(name) + ord(name[0])), 0)
    top = make_qcow2(tmp_path / "top.qcow2", size, backing_file="old.qcow2", backing_fmt="qcow2")
    with enban.open(top, writable=True) as disk:
        disk.pwrite(b"top" * 1000, 1000)
        content = disk.pread(size, 0)
    enban.rebase(str(top), "new.qcow2", backing_format="qcow2")
    assert Qcow2Reader(top.read_bytes()).backing_name == "new.qcow2"
    with enban.open(top) as disk:
        assert disk.pread(size, 0) == content
    enban.commit(str(top))
    assert Qcow2Reader(top.read_bytes()).backing_name == "new.qcow2"
    for path in (top, tmp_path / "new.qcow2"):
        check_file(path)
        with enban.open(path) as disk:
            assert disk.pread(size, 0) == content


@pytest.mark.parametrize("bit", [3, 17, 63])
def test_case_26_repair_keeps_unknown_feature_bits(bit: int, tmp_path: Path) -> None:
    """Elsewhere a repair cleared a feature bit that it did not know. Here an image with a leak and a wrong
    flag has an unknown compatible bit, and is repaired with the bit kept; with an unknown incompatible bit
    it is refused to the check, the repair and to writers, and no byte of it changes."""
    memory = MemoryStorage(BLOCKING, empty_image(256 * KIB, cluster_size=4096))
    with open_disk(memory) as disk:
        disk.pwrite(pattern(20000, 5), 0)
    image = memory.content
    _, l2 = entry_places(image)
    (table,) = struct.unpack_from(">Q", image, 48)
    (block,) = struct.unpack_from(">Q", image, table)
    struct.pack_into(">H", image, block + 2 * (len(image) // 4096 - 1), 2)  # counted once too often
    (entry,) = struct.unpack_from(">Q", image, l2)
    struct.pack_into(">Q", image, l2, entry & ~COPIED)
    assert not Qcow2Reader(image).check().clean
    path = tmp_path / "a.qcow2"

    kept = bytearray(image)
    (features,) = struct.unpack_from(">Q", kept, 80)
    struct.pack_into(">Q", kept, 80, features | 1 << bit)
    path.write_bytes(kept)
    enban.check(path, "all")
    assert struct.unpack_from(">Q", path.read_bytes(), 80) == (features | 1 << bit,)
    check_file(path)
    with enban.open(path, writable=True) as disk:
        assert disk.pread(20000, 0) == pattern(20000, 5)
        disk.pwrite(b"more", 100000)
        disk.create_snapshot("s")
    assert struct.unpack_from(">Q", path.read_bytes(), 80) == (features | 1 << bit,)

    refused = bytearray(image)
    unknown = bit if bit > 4 else bit + 2  # bits 0 to 4 have meanings
    struct.pack_into(">Q", refused, 72, 1 << unknown)
    path.write_bytes(refused)
    for repair in (None, "leaks", "all"):
        with pytest.raises(UnsupportedFeatureError):
            enban.check(path, repair)
    with pytest.raises(UnsupportedFeatureError):
        enban.open(path, writable=True)
    assert path.read_bytes() == refused


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("cluster", ["16k", "64k"])
def test_case_27_extended_l2_made_by_qemu(cluster: str, tmp_path: Path) -> None:
    """Elsewhere a reader of images with extended L2 entries gave wrong subclusters or went round for
    ever. Here QEMU mixes written, zero, discarded and backing subclusters inside clusters; QEMU, the
    independent reader and we must see the same bytes, and our map must come to its end."""
    size = 512 * KIB
    base, top = tmp_path / "base.raw", tmp_path / "top.qcow2"
    base.write_bytes(pattern(size - 3000, 27))
    qemu_img(
        *("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "raw"),
        *("-o", f"extended_l2=on,cluster_size={cluster}", top, str(size)),
        cwd=tmp_path,
    )
    random = Random(cluster)
    commands = []
    for number in range(120):
        at = random.randrange(size // 512) * 512
        length = min(random.choice((512, 1024, 2048, 4096, 10240, 40960)), size - at)
        command = random.choice(("write -P", "write -P", "write -z", "write -z -u", "discard"))
        value = f" {number % 250 + 1}" if command.endswith("-P") else ""
        commands.append(f"{command}{value} {at} {length}")
    qemu_io(top, *commands, cwd=tmp_path)
    qemu_img("convert", "-O", "raw", top, tmp_path / "qemu.raw", cwd=tmp_path)
    expected = (tmp_path / "qemu.raw").read_bytes()
    assert Qcow2Reader(top.read_bytes()).read(backing=base.read_bytes()) == expected
    done = child(
        "import sys, enban\n"
        "with enban.open(sys.argv[1]) as disk, open(sys.argv[2], 'wb') as out:\n"
        "    extents = list(disk.map())\n"
        "    for extent in extents:\n"
        "        assert extent.length > 0\n"
        "        out.write(disk.pread(extent.length, extent.start))\n"
        "    whole = disk.pread(disk.size, 0)\n"
        "    assert all(whole[at : at + 512] == disk.pread(512, at) for at in range(0, disk.size, 512))\n"
        "    print(len(extents))\n",
        top,
        tmp_path / "ours.raw",
    )  # a time limit stands on it
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 32
    assert (tmp_path / "ours.raw").read_bytes() == expected
    check_file(top)
