"""VM state behind the disk: written, taken along by a snapshot, read back; against crashes and full disks."""

from __future__ import annotations

import errno
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
import enban.aio
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.errors import (
    EnbanError,
    NoSpaceError,
    OutOfRangeError,
    ReadOnlyError,
    UnsupportedOperationError,
    UsageError,
)
from enban.filters.faults import Call, Fault, Faults, fail_at
from enban.filters.writelog import WriteLog
from enban.lab.crash_states import Replay
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import check_bytes, check_file, empty_image, make_qcow2, open_memory, pattern

SHAPES: list[dict[str, Any]] = [
    {},
    {"cluster_size": 512},
    {"cluster_size": 4096, "refcount_bits": 8},
    {"cluster_size": 16384, "extended_l2": True},
    {"cluster_size": 4096, "compat": "0.10"},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("size", [0, 512, 1 << 20, (32 << 20) + 512])
def test_a_state_goes_with_its_snapshot(tmp_path: Path, shape: dict[str, Any], size: int) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", size, **shape)
    state, disk_bytes = pattern(700_001, 5), pattern(min(size, 300_000), 6)
    with enban.open(path, writable=True) as disk:
        assert disk.vm_state_size == 0
        disk.pwrite(disk_bytes, 0)
        for place in range(0, len(state), 99_999):
            disk.write_vm_state(state[place : place + 99_999], place)
        assert disk.vm_state_size == len(state)
        assert disk.read_vm_state(len(state), 0) == state
        entry = disk.create_snapshot("one", vm_clock_ns=5_000_000_123)
        assert repr(entry) == f"<SnapshotEntry 1 'one' {size} bytes, 700001 bytes of VM state>"
        assert (entry.vm_state_size, entry.vm_clock_ns) == (len(state), 5_000_000_123)
        assert disk.vm_state_size == 0
        disk.pwrite(bytes(len(disk_bytes)), 0)
        disk.write_vm_state(b"second", 0)
        disk.create_snapshot("two")
    check_file(path)
    with enban.open(path, snapshot_name="one") as disk:
        assert disk.vm_state_size == len(state)
        assert disk.read_vm_state(len(state), 0) == state
        assert disk.pread(len(disk_bytes), 0) == disk_bytes
    with enban.open(path, writable=True) as disk:
        assert [s.vm_state_size for s in disk.snapshots] == [len(state), 6]
        disk.apply_snapshot("two")
        assert disk.read_vm_state(6, 0) == b"second"
        disk.apply_snapshot("one")
        assert disk.vm_state_size == len(state)
        assert disk.read_vm_state(100_000, 600_001) == state[600_001:]
        assert disk.pread(len(disk_bytes), 0) == disk_bytes
        disk.delete_snapshot("two")
    check_file(path)
    with enban.open(path, writable=True) as disk:  # an image left with a state: whole clusters are known
        assert len(state) <= disk.vm_state_size < len(state) + (64 << 10)
        assert disk.read_vm_state(len(state), 0) == state
        disk.delete_snapshot("one")
        disk.write_vm_state(b"new", 0)  # a new state begins
        assert disk.vm_state_size == 3
    check_file(path)


def test_both_faces(tmp_path: Path) -> None:
    import asyncio

    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)

    async def scenario() -> None:
        async with await enban.aio.open(path, writable=True) as disk:
            parts = [disk.write_vm_state(pattern(300_000, n), n * 300_000) for n in range(8)]
            assert sum(await asyncio.gather(*parts)) == 2_400_000
            await disk.create_snapshot("one", vm_clock_ns=1)
            await disk.apply_snapshot("one")
            assert disk.vm_state_size == 2_400_000
            for n in range(8):
                assert await disk.read_vm_state(300_000, n * 300_000) == pattern(300_000, n)

    asyncio.run(scenario())
    check_file(path)


def test_state_that_was_read_back_is_not_taken_along(tmp_path: Path) -> None:
    """The disk may have changed since: memory and disk would not fit each other."""
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with enban.open(path, writable=True) as disk:
        disk.write_vm_state(b"state" * 100_000, 0)
        disk.create_snapshot("one")
        disk.apply_snapshot("one")
        disk.pwrite(b"changed", 0)
        assert disk.create_snapshot("two").vm_state_size == 0
        assert disk.vm_state_size == 0
        disk.apply_snapshot("one")
    with enban.open(path, writable=True) as disk:
        assert disk.create_snapshot("three").vm_state_size == 0
    check_file(path)


def test_the_space_of_a_state_comes_back(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with enban.open(path, writable=True) as disk:
        for number in range(6):
            disk.write_vm_state(bytes([number + 1]) * 4_000_000, 0)
            disk.create_snapshot(f"s{number}")
            disk.delete_snapshot(f"s{number}")
    check_file(path)
    assert path.stat().st_size < 10_000_000


def test_another_size_ends_a_state(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20, cluster_size=512)
    for size in (2 << 20, 1 << 19):
        with enban.open(path, writable=True) as disk:
            disk.write_vm_state(b"x" * 200_000, 0)
            disk.resize(size)
            assert disk.vm_state_size == 0
            assert disk.pread(size, 0) == bytes(size)
            disk.write_vm_state(b"y" * 5, 0)
            disk.create_snapshot(str(size))
        check_file(path)


def test_what_is_refused(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20, cluster_size=512)
    with enban.open(path, writable=True) as disk:
        disk.write_vm_state(b"12345", 0)
        for length, offset in ((6, 0), (1, 5), (1, -1), (1 << 50, 0)):
            with pytest.raises(OutOfRangeError):
                disk.read_vm_state(length, offset)
        with pytest.raises(OutOfRangeError):
            disk.write_vm_state(b"1", -1)
        with pytest.raises(UnsupportedOperationError, match="cannot hold so much VM state"):
            disk.write_vm_state(b"1", 1 << 50)
        with pytest.raises(UsageError, match="needs a name"):
            disk.create_snapshot("")
        with pytest.raises(UsageError, match="VM clock"):
            disk.create_snapshot("x", vm_clock_ns=-1)
        assert disk.read_vm_state(5, 0) == b"12345" and not disk.snapshots
    with enban.open(path) as disk, pytest.raises(ReadOnlyError):
        disk.write_vm_state(b"1", 0)
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(512))
    with enban.open(raw, writable=True, format="raw") as disk:
        assert disk.vm_state_size == 0
        with pytest.raises(UnsupportedOperationError, match="raw has no place for VM state"):
            disk.write_vm_state(b"1", 0)
    enban.create(tmp_path / "e.qcow2", "qcow2", {"data_file": "e.data"}, size=1 << 20)
    with (
        enban.open(tmp_path / "e.qcow2", writable=True) as disk,
        pytest.raises(UnsupportedOperationError, match="external data file"),
    ):
        disk.write_vm_state(b"1", 0)


def _prepared() -> tuple[bytes, bytes]:
    storage = MemoryStorage(BLOCKING, empty_image(96 * 512, cluster_size=512))
    disk = Disk(drive(open_memory(storage)))
    disk.pwrite(b"a" * 9000, 0)
    disk.write_vm_state(pattern(3000, 1), 0)
    disk.create_snapshot("old")
    disk.pwrite(b"b" * 9000, 5000)
    active = disk.pread(disk.size, 0)
    disk.close()
    return bytes(storage.content), active


def _work(disk: Disk, state: bytes) -> None:
    disk.apply_snapshot("old")
    disk.pwrite(b"n" * 3000, 0)
    for place in range(0, len(state), 5000):
        disk.write_vm_state(state[place : place + 5000], place)
    disk.create_snapshot("new")
    disk.close()


def _shown(image: bytes | bytearray, state: bytes, disk_bytes: bytes) -> bool:
    """Whether the image has the snapshot `new`, which then is whole; `old` always is."""
    check_bytes(image, leaks=True)
    storage = MemoryStorage(BLOCKING, image)
    with Disk(drive(open_memory(storage, writable=False))) as disk:
        del disk
    reader = Qcow2Reader(image)
    names = [snapshot.name for snapshot in reader.snapshots]
    for name, expected in (("old", pattern(3000, 1)), ("new", state)):
        if name in names:
            door = drive(open_memory(storage, writable=False))
            drive(door.node.show_snapshot(name))
            disk = Disk(door)
            assert disk.read_vm_state(disk.vm_state_size, 0) == expected
            if name == "new":
                assert disk.pread(disk.size, 0) == disk_bytes
    assert "old" in names
    return "new" in names


def test_a_crash_leaves_the_snapshot_with_its_state_or_none() -> None:
    image, _ = _prepared()
    state = pattern(60_000, 2)  # several L2 tables, so the L1 table moves
    log = WriteLog(MemoryStorage(BLOCKING, image))
    _work(Disk(drive(open_memory(log))), state)
    disk_bytes = b"n" * 3000 + b"a" * 6000 + bytes(96 * 512 - 9000)
    replay, random, seen, states = Replay(image, log.entries), Random(3), set(), 0
    for _ in replay.steps():
        for content in (replay.everything(), *replay.subsets(random, 3)):
            seen.add(_shown(content, state, disk_bytes))
            states += 1
    assert seen == {False, True} and states > 50


class Watched:
    """A decision to fail the n-th change that remembers whether it did."""

    def __init__(self, index: int, number: int) -> None:
        self.decide = fail_at(index, errno=number)
        self.hit = False

    def __call__(self, call: Call) -> Fault | None:
        fault = self.decide(call)
        self.hit = self.hit or fault is not None
        return fault


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_failing_call_leaves_it_whole(number: int) -> None:
    image, _ = _prepared()
    state = pattern(60_000, 2)
    disk_bytes = b"n" * 3000 + b"a" * 6000 + bytes(96 * 512 - 9000)
    index, step, hits = 0, 1, 0
    while True:
        index += step
        storage, fault = MemoryStorage(BLOCKING, image), Watched(index, number)
        disk = Disk(drive(open_memory(Faults(storage, fault))))
        try:
            _work(disk, state)
        except EnbanError:
            try:
                disk.close()
            except EnbanError:
                pass
        _shown(storage.content, state, disk_bytes)
        hits += fault.hit
        if not fault.hit:
            break
        step = 1 if index < 40 else 5
    assert hits > 20


def test_a_full_disk_is_met_by_the_write_and_writing_goes_on(tmp_path: Path) -> None:
    storage = MemoryStorage(BLOCKING, empty_image(1 << 20, cluster_size=4096), limit=400_000)
    disk = Disk(drive(open_memory(storage)))
    with pytest.raises(NoSpaceError):
        for place in range(0, 1_000_000, 50_000):
            disk.write_vm_state(b"s" * 50_000, place)
    written = disk.vm_state_size
    assert 0 < written < 400_000
    storage.limit = 1 << 30
    disk.write_vm_state(b"s" * 50_000, written)
    assert disk.create_snapshot("x").vm_state_size == written + 50_000
    disk.close()
    check_bytes(storage.content)
