"""Promise 1, by exploration: a power cut at any moment of a workload.

The record of all storage writes of a workload is replayed up to each point, states are made up
in which unflushed writes are missing, reordered and torn, and each is read by the independent
reader: at most leaks, every flushed sector there, every unflushed one old or new, never foreign
bytes; a snapshot's bytes never change. A sample is opened by enban, written to and closed again.
"""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import pytest

import enban
from enban.aio import AsyncDisk, AsyncioRuntime
from enban.block.runtime import BLOCKING
from enban.filters import faults, writelog
from enban.filters.delay import Delay
from enban.filters.faults import Faults
from enban.filters.writelog import WriteLog
from enban.storage.memory import MemoryStorage
from tests.crash_states import Replay
from tests.history import CELL, History
from tests.qcow2_reader import Qcow2Reader
from tests.support import (
    check_bytes,
    empty_image,
    open_memory,
    pattern,
    qemu_check,
    qemu_img,
    raw_node,
)
from tests.workload import IMAGES, Image, Operation, Oracle, open_door, operations, prepare, run_until_error

if TYPE_CHECKING:
    from enban.filters.faults import Decide

OPERATIONS = 40


class Explorer:
    """One recorded workload, and the states it is cut into. `decide` makes storage calls fail in it."""

    def __init__(
        self,
        image: Image,
        seed: int,
        start: bytes,
        guest: bytes,
        snapshot: bytes | None,
        decide: Decide | None = None,
    ) -> None:
        self.image = image
        self.seed = seed
        self.start = start
        self.guest = guest
        self.snapshot = snapshot  # what the snapshot "base" shows, if there is one
        self.random = Random(seed)
        self.decide = decide
        self.states = self.leaking = self.reopened = self.failures = 0
        self.record = self._run()

    def _run(self) -> list[writelog.Entry]:
        log = WriteLog(MemoryStorage(BLOCKING, self.start))
        faulty = Faults(log)
        disk = enban.Disk(open_door(self.image, faulty, None))
        faulty.decide = self.decide
        oracle = Oracle(self.guest)
        resizes = self.snapshot is None and self.decide is None
        for operation in [
            *operations(self.image, self.seed + 7, OPERATIONS, resizes=resizes),
            Operation("flush"),
        ]:
            log.mark(("begin", operation))
            error = run_until_error(disk, oracle, operation, may_fail=self.decide is not None)
            if error is not None:
                self.failures += 1
                oracle.observe(operation, disk.pread(disk.size, 0))
            if error is not None or operation.kind == "discard":  # what it did is known only now
                operation = Operation("seen", 0, 0, bytes(oracle.model))
            log.mark(("end", operation))
        log.mark(("close", None))
        faulty.decide = None
        disk.close()
        return log.entries

    def explore(self, *, subsets: int, scattered: int, reopen_every: int) -> None:
        oracle = Oracle(self.guest)
        replay = Replay(self.start, self.record)
        for number, entry in enumerate(replay.steps()):
            if entry.kind == writelog.MARK:
                self._follow(oracle, entry)
                continue
            what = f"{self.image}, seed {self.seed}, at entry {number} {entry}"
            states = [replay.everything()]
            if replay.pending:
                states.append(replay.torn(self.random))
                states.extend(replay.subsets(self.random, subsets))
                states.extend(replay.scattered(self.random) for _ in range(scattered))
            for state in states:
                self.states += 1
                self._check(oracle, state, what)
                if self.states % reopen_every == 0:
                    self._reopen(state, what)

    def _follow(self, oracle: Oracle, mark: writelog.Entry) -> None:
        assert isinstance(mark.note, tuple)
        moment, operation = mark.note
        if moment == "begin":
            oracle.begin(operation)
        elif moment == "end":
            if operation.kind == "seen":
                oracle.model[:] = operation.content
            oracle.done(operation)

    def _check(self, oracle: Oracle, state: bytearray, what: str) -> None:
        reader = Qcow2Reader(state)
        report = reader.check()
        assert not report.corruptions, f"{what}: {report.corruptions[:4]}"
        self.leaking += bool(report.leaks)
        oracle.check_crash(reader.read(backing=self.image.backing), what=what)
        if self.snapshot is not None:
            assert reader.read(backing=self.image.backing, snapshot="base") == self.snapshot, (
                f"{what}: snapshot"
            )

    def _reopen(self, state: bytearray, what: str) -> None:
        """The engine sees the same, and can go on from here."""
        self.reopened += 1
        expected = Qcow2Reader(state).read(backing=self.image.backing)
        memory = MemoryStorage(BLOCKING, state)
        disk = enban.Disk(open_door(self.image, memory, None))
        assert disk.pread(disk.size, 0) == expected, what
        oracle = Oracle(expected)
        for operation in operations(self.image, self.states, 5, size=disk.size, resizes=False):
            run_until_error(disk, oracle, operation, may_fail=False)
        disk.close()
        check_bytes(memory.content, leaks=True)
        assert Qcow2Reader(memory.content).read(backing=self.image.backing) == oracle.model, what


def start_of(image: Image, seed: int) -> tuple[bytes, bytes]:
    content, _, guest = prepare(image, seed)
    return content, guest


@pytest.mark.parametrize("image", IMAGES, ids=repr)
def test_power_cuts(image: Image) -> None:
    start, guest = start_of(image, 11)
    explorer = Explorer(image, 11, start, guest, None)
    explorer.explore(subsets=3, scattered=2, reopen_every=40)
    assert explorer.states > 300 and explorer.reopened > 5
    assert explorer.leaking, "no state shows a leak: the record has no unflushed writes in it"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 160))
@pytest.mark.parametrize("image", IMAGES, ids=repr)
def test_power_cuts_long(image: Image, seed: int) -> None:
    start, guest = start_of(image, seed)
    Explorer(image, seed, start, guest, None).explore(subsets=16, scattered=8, reopen_every=50)


FULL_OF_TABLES = Image("512-rc64", 96 * 1024, cluster_size=512, refcount_bits=64)


@pytest.mark.parametrize("operation", [faults.FLUSH, faults.WRITE])
@pytest.mark.parametrize("image", [FULL_OF_TABLES, IMAGES[3]], ids=repr)
def test_power_cuts_after_a_failed_barrier(image: Image, operation: str) -> None:
    """A flush or a write fails, enban goes on, and then the power is cut. What a failed barrier had
    written already must not be taken back or built upon."""
    start, guest = start_of(image, 14)
    explored = 0
    for number in range(1, 14, 2):
        decide = faults.fail_at(number, operations=(operation,))
        explorer = Explorer(image, 14, start, guest, None, decide)
        if explorer.failures:
            explored += 1
            explorer.explore(subsets=1, scattered=2, reopen_every=100)
    assert explored > 2


@pytest.mark.long
@pytest.mark.parametrize("operation", [faults.FLUSH, faults.WRITE])
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("image", [FULL_OF_TABLES, *IMAGES], ids=repr)
def test_power_cuts_after_a_failed_barrier_long(image: Image, seed: int, operation: str) -> None:
    start, guest = start_of(image, seed)
    for number in range(seed % 7 + 1, 60, 7):
        decide = faults.fail_at(number, operations=(operation,))
        explorer = Explorer(image, seed, start, guest, None, decide)
        if not explorer.failures:
            break
        explorer.explore(subsets=2, scattered=3, reopen_every=200)


SHARED = (
    Image("512", 24 * 1024, cluster_size=512),
    Image("4k-v2", 64 * 1024, cluster_size=4096, compat="0.10"),
    Image("16k-ext", 100 * 1024, cluster_size=16384, extended_l2=True),
)


@pytest.mark.interop
@pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is missing (Debian package qemu-utils)"
)
@pytest.mark.parametrize("image", SHARED, ids=repr)
def test_power_cuts_beside_a_snapshot(image: Image, tmp_path: Path) -> None:
    """Clusters and L2 tables are shared with a snapshot that QEMU made; its bytes stay."""
    start, guest = start_of(image, 12)
    path = tmp_path / "a.qcow2"
    path.write_bytes(start)
    qemu_img("snapshot", "-c", "base", path)
    qemu_check(path)
    explorer = Explorer(image, 12, path.read_bytes(), guest, guest)
    explorer.explore(subsets=3, scattered=2, reopen_every=40)
    assert explorer.states > 300


@pytest.mark.interop
@pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is missing (Debian package qemu-utils)"
)
def test_qemu_agrees_on_crash_states(tmp_path: Path) -> None:
    """A sample of states judged by qemu-img check: leaks only, as the independent check says."""
    image = Image("512-chain", 20 * 1024, cluster_size=512, backing=pattern(12 * 1024 + 512, 5))
    start, guest = start_of(image, 13)
    explorer = Explorer(image, 13, start, guest, None)
    replay, random = Replay(start, explorer.record), Random(13)
    path = tmp_path / "a.qcow2"
    (tmp_path / "below").write_bytes(image.backing)
    judged = 0
    for number, entry in enumerate(replay.steps()):
        if entry.kind != writelog.MARK and number % 5 == 0:
            path.write_bytes(replay.scattered(random))
            report = qemu_check(path, leaks=True)
            assert not report.get("corruptions") and not report["check-errors"]
            judged += 1
    assert judged > 8


def test_a_missing_flush_would_be_found() -> None:
    """The instrument itself: the same workload with its flushes ignored must fail somewhere."""
    image = IMAGES[0]
    start, guest = start_of(image, 11)
    explorer = Explorer(image, 11, start, guest, None)
    for entry in explorer.record:
        if entry.kind == writelog.FLUSH:
            entry.ended = 0
    with pytest.raises(AssertionError):
        explorer.explore(subsets=3, scattered=4, reopen_every=1 << 30)


def test_freed_clusters_in_time(tmp_path: Path) -> None:
    """Every way a cluster leaves the mapping, each followed at once by a write that wants space:
    the image is so full of small clusters that early reuse would be seen."""
    image = Image("512-full", 8 * 1024, cluster_size=512)
    memory = MemoryStorage(BLOCKING, prepare(image, 0)[0])
    guest = Qcow2Reader(memory.content).read()
    log = WriteLog(memory)
    disk, oracle = enban.Disk(open_door(image, log, None)), Oracle(guest)
    start = bytes(memory.content)
    random = Random(3)
    for number in range(60):
        at = random.randrange(16) * 512
        kind = random.choice(("zero", "discard", "packed", "write"))
        content = bytes([number + 1]) * 512
        history = [
            Operation(kind, at, 512, content),
            Operation("write", (at + 512) % 8192, 512, content[::-1]),
        ]
        if number % 9 == 8:
            history.append(Operation("flush"))
        for operation in history:
            log.mark(("begin", operation))
            run_until_error(disk, oracle, operation, may_fail=False)
            if operation.kind == "discard":
                operation = Operation("seen", 0, 0, bytes(oracle.model))
            log.mark(("end", operation))
    explorer = Explorer(image, 3, start, guest, None)
    explorer.record = log.entries
    explorer.explore(subsets=3, scattered=2, reopen_every=60)
    assert explorer.states > 500


# -- many requests at once -------------------------------------------------------------------

CROWDED = [image for image in IMAGES if image.name in ("512", "4k-v2-chain", "16k-ext-chain")]


def crowd(image: Image, seed: int) -> tuple[bytes, list[writelog.Entry], History, list[tuple[int, int]]]:
    """Overlapping requests, some cancelled, on a slow recorded storage: (the image at the start, the
    record, the history, the flushes as (began, ended) moments)."""
    size = 48 * 1024
    start = bytes(empty_image(size, **image.options))
    history = History(image.backing[:size].ljust(size, b"\0"))
    flushes: list[tuple[int, int]] = []

    async def request(disk: AsyncDisk, kind: str, offset: int, length: int) -> None:
        if kind == "flush":
            began = history.now()
            await disk.flush()
            flushes.append((began, history.now()))
            return
        value = history.stamp() if kind == "write" else bytes(CELL)
        event = history.begin(offset, length, value)
        certain = False
        try:
            if kind == "write":
                await disk.pwrite(value * (length // CELL), offset)
            elif kind == "zero":
                await disk.write_zeroes(offset, length)
            else:
                await disk.discard(offset, length)
            certain = kind != "discard"
        finally:
            history.end(event, certain=certain)

    async def scenario() -> list[writelog.Entry]:
        runtime, random = AsyncioRuntime(2), Random(seed)
        log = WriteLog(Delay(MemoryStorage(runtime, start), seed, most_s=0.0005, share=0.3))
        history.tick = log.mark
        below = raw_node(image.backing, runtime) if image.backing else None
        disk = AsyncDisk(await open_memory(log, backing=below), runtime)
        for _ in range(4):
            tasks = []
            for _ in range(30):
                kind = random.choices(("write", "zero", "discard", "flush"), (60, 12, 12, 10))[0]
                length = random.choice((CELL, 512, 1024, 4096, 6 * 1024))
                offset = random.randrange((size - length) // CELL) * CELL
                tasks.append(asyncio.create_task(request(disk, kind, offset, length)))
            for task in tasks[::6]:
                asyncio.get_running_loop().call_later(random.random() ** 2 * 0.02, task.cancel)
            await asyncio.gather(*tasks, return_exceptions=True)
        await request(disk, "flush", 0, 0)
        await disk.close()
        return log.entries

    return start, asyncio.run(scenario()), history, flushes


@pytest.mark.parametrize("image", CROWDED, ids=repr)
def test_power_cuts_in_a_crowd(image: Image) -> None:
    explore_crowd(image, 1)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 40))
@pytest.mark.parametrize("image", CROWDED, ids=repr)
def test_power_cuts_in_a_crowd_long(image: Image, seed: int) -> None:
    explore_crowd(image, seed)


def explore_crowd(image: Image, seed: int) -> None:
    start, record, history, flushes = crowd(image, seed)
    history.tick = None
    cells, random = history.by_cell(), Random(seed)
    replay, now, states = Replay(start, record), 0, 0
    for number, entry in enumerate(replay.steps()):
        if entry.kind == writelog.MARK:
            assert isinstance(entry.note, int)
            now = entry.note
            continue
        flushed = max((began for began, ended in flushes if ended <= now), default=0)
        for state in (replay.everything(), *replay.subsets(random, 2), replay.scattered(random)):
            reader = Qcow2Reader(state)
            report = reader.check()
            assert not report.corruptions, f"entry {number}: {report.corruptions[:4]}"
            history.check_crash(reader.read(backing=image.backing), flushed, now, cells)
            states += 1
    assert states > 300 and len(flushes) > 5
