"""The plain-call road of the engine: batches in the ledger, locks without waiting, small writes at once."""

from __future__ import annotations

from pathlib import Path

import pytest

import enban
from enban.block import mover
from enban.block.locks import Mutex, RangeLocks
from enban.block.requests import Ledger
from enban.block.runtime import BLOCKING, drive
from enban.errors import InternalError
from enban.filters.faults import Call, Fault, Faults
from enban.storage.file import open_file
from tests.support import KIB, MIB, check_file, make_qcow2, open_memory, pattern


def test_a_batch_counts_what_it_did_and_ends_once() -> None:
    ledger = Ledger(BLOCKING)
    batch = ledger.begin_batch()
    inner = ledger.begin("read", 0, 1)
    assert ledger.oldest == batch.number and ledger.newest == inner.number
    assert len(ledger.in_flight) == 2 and ledger.started == 1
    ledger.end(inner)
    ledger.end_batch(batch, 30)
    assert (ledger.started, ledger.done, ledger.in_flight) == (31, 31, [])
    assert ledger.oldest > ledger.newest
    with pytest.raises(InternalError):
        ledger.end_batch(batch, 1)
    later = ledger.begin("read", 0, 1)
    assert later.number > inner.number


def test_locks_taken_only_if_free() -> None:
    ranges = RangeLocks(BLOCKING)
    held = ranges.try_acquire(0, 10)
    assert held is not None
    assert ranges.try_acquire(9, 11) is None
    beside = ranges.try_acquire(10, 20)
    assert beside is not None
    ranges.release(held)
    again = ranges.try_acquire(0, 10)
    assert again is not None and len(ranges) == 2
    mutex = Mutex(BLOCKING)
    assert mutex.try_acquire() and not mutex.try_acquire()
    mutex.release()
    assert mutex.try_acquire()


def test_space_named_in_a_batch_is_not_given_to_others(tmp_path: Path) -> None:
    """What `locate` said before a discard stays untouched until the batch has ended."""
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"a" * 65536, 0)
        batch = disk.door.ledger.begin_batch()
        place = disk.node.locate(0, 65536)
        assert place > 0
        disk.discard(0, 65536)
        disk.flush()
        disk.pwrite(b"b" * 65536, 65536)
        disk.flush()
        assert disk.node.locate(65536, 65536) != place
        assert drive(disk.node.data.read(place, 65536)) == b"a" * 65536
        disk.door.ledger.end_batch(batch, 1)
        disk.flush()
        disk.pwrite(b"c" * 65536, 131072)
        assert disk.node.locate(131072, 65536) == place
    check_file(path)


def test_a_small_write_at_once_or_not_at_all(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "d.qcow2", 4 * MIB)
    with enban.open(path, writable=True) as disk:
        data = memoryview(pattern(5000))
        assert not mover.write_now(disk.node, data, 0)  # the first change of an image is prepared elsewhere
        disk.pwrite(b"x", 0)
        assert mover.write_now(disk.node, data, 100 * KIB)
        assert not mover.write_now(disk.node, data, 100 * KIB)  # no new space is needed there
        assert not mover.write_now(disk.node, data, 192 * KIB - 10)  # two units
        held = disk.node.ranges.try_acquire(256 * KIB, 256 * KIB + 1)
        assert held is not None
        assert not mover.write_now(disk.node, data, 256 * KIB)
        disk.node.ranges.release(held)
        drive(disk.node.mutex.__aenter__())  # type: ignore[attr-defined]
        assert not mover.write_now(disk.node, data, 256 * KIB)
        disk.node.mutex.release()  # type: ignore[attr-defined]
        assert mover.write_now(disk.node, data, 256 * KIB)
        # A cluster that was used before is filled with zeros around the write.
        disk.pwrite(b"y" * 65536, 320 * KIB)
        disk.discard(320 * KIB, 65536)
        disk.flush()
        disk.flush()
        assert mover.write_now(disk.node, data, 512 * KIB + 1)
        assert disk.pread(65536, 512 * KIB) == b"\0" + pattern(5000) + bytes(65536 - 5001)
        assert disk.pread(5000, 100 * KIB) == disk.pread(5000, 256 * KIB) == pattern(5000)
        assert not disk.node.ranges.__len__()
    check_file(path)


def test_a_small_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "d.qcow2", MIB)
    file = open_file(str(path), BLOCKING, writable=True)
    failing: list[int] = []

    class NowFaults(Faults):
        def write_now(self, buffer: bytes | bytearray | memoryview, offset: int) -> bool:
            self._check("write", offset, len(buffer))
            return self.below.write_now(buffer, offset)

    def decide(call: Call) -> Fault | None:
        return Fault(28) if failing else None

    door = drive(open_memory(NowFaults(file, decide)))
    drive(door.write(b"x", 0))
    failing.append(1)
    assert not mover.write_now(door.node, memoryview(b"data"), 100 * KIB)
    assert not len(door.node.ranges)
    failing.clear()
    assert mover.write_now(door.node, memoryview(b"data"), 100 * KIB)
    drive(door.close())
    check_file(path)  # not even a leak
