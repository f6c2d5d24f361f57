"""Two disks are equal or they are not, and the first difference is the first."""

from __future__ import annotations

import random
import threading
from pathlib import Path

import pytest

import enban
from enban.block.disk import Disk
from enban.errors import CorruptDataError, CorruptImageError, HostError
from enban.jobs.compare import CONTENT, PIECE, SIZE, STATUS, WORKERS, compare
from enban.storage import host
from tests.support import KIB, MIB, make_qcow2, pattern


def raw(path: Path, content: bytes | bytearray) -> Path:
    path.write_bytes(content)
    return path


def opened(path: Path) -> Disk:
    return enban.open(path, format="raw" if path.suffix == ".raw" else "qcow2")


def qcow2(path: Path, content: bytes | bytearray, **options: int) -> Path:
    make_qcow2(path, len(content), **options)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(content, 0)
    return path


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("seed", range(3))
def test_the_first_difference(tmp_path: Path, workers: int, seed: int) -> None:
    some = random.Random(seed)
    content = bytearray(pattern(9 * PIECE + 1536))
    one = raw(tmp_path / "one.raw", content)
    for _ in range(8):
        changed = bytearray(content)
        places = sorted(some.sample(range(len(content)), some.choice([1, 2, 20])))
        for place in places:
            changed[place] ^= 0x40
        other = raw(tmp_path / "other.raw", changed)
        with opened(one) as left, opened(other) as right:
            result = compare(left, right, workers=workers)
        assert (result.equal, result.reason) == (False, CONTENT)
        assert result.offset == places[0] // 512 * 512


def test_equal_across_formats(tmp_path: Path) -> None:
    content = bytearray(pattern(3 * MIB))
    content[MIB : MIB + 300 * KIB] = bytes(300 * KIB)
    one = raw(tmp_path / "one.raw", content)
    for number, options in enumerate(({}, {"cluster_size": 512}, {"cluster_size": 2 * MIB})):
        other = qcow2(tmp_path / f"{number}.qcow2", content, **options)
        with opened(one) as left, opened(other) as right:
            assert compare(left, right).equal
            assert compare(right, left).equal


def test_zeros_need_no_space_to_be_equal(tmp_path: Path) -> None:
    """Holes, zero clusters and written zeros are all the same."""
    size = 6 * PIECE
    one = make_qcow2(tmp_path / "one.qcow2", size)
    other = raw(tmp_path / "other.raw", bytes(size))
    with enban.open(one, writable=True) as disk:
        disk.write_zeroes(0, PIECE)
        disk.pwrite(bytes(PIECE), 2 * PIECE)
    with opened(one) as left, opened(other) as right:
        assert compare(left, right).equal
    with enban.open(one, writable=True) as disk:
        disk.pwrite(b"\1", size - 1)
    with opened(one) as left, opened(other) as right:
        assert compare(left, right).offset == size - 512
        assert compare(right, left).offset == size - 512


def test_sizes(tmp_path: Path) -> None:
    short = raw(tmp_path / "short.raw", b"a" * 4096)
    same = raw(tmp_path / "same.raw", b"a" * 4096 + bytes(5000))
    longer = raw(tmp_path / "longer.raw", b"a" * 4096 + bytes(5000) + b"b")
    with opened(short) as left, opened(same) as right:
        result = compare(left, right)
        assert result.equal
        assert result.sizes_differ
        strict = compare(left, right, strict=True)
        assert (strict.equal, strict.reason) == (False, SIZE)
    with opened(short) as left, opened(longer) as right:
        result = compare(left, right)
        assert (result.equal, result.offset) == (False, 8704)


def test_strict(tmp_path: Path) -> None:
    content = bytes(4 * MIB)
    one = make_qcow2(tmp_path / "one.qcow2", len(content))
    other = qcow2(tmp_path / "other.qcow2", content)
    with opened(one) as left, opened(other) as right:
        assert compare(left, right).equal
        result = compare(left, right, strict=True)
        assert (result.equal, result.reason, result.offset) == (False, STATUS, 0)
    with enban.open(one, writable=True) as disk:
        disk.pwrite(content, 0)
    with opened(one) as left, opened(other) as right:
        assert compare(left, right, strict=True).equal


def test_what_both_share_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two overlays of one base: only what they hold themselves is read."""
    qcow2(tmp_path / "base.qcow2", pattern(8 * MIB))
    for name in ("one", "other"):
        path = make_qcow2(tmp_path / f"{name}.qcow2", 8 * MIB, backing_file="base.qcow2", backing_fmt="qcow2")
        with enban.open(path, writable=True) as disk:
            disk.pwrite(b"changed", 5 * MIB)
    read = 0
    real = host.read_into

    def read_into(fd: int, view: memoryview, offset: int) -> int:
        nonlocal read
        read += len(view)
        return real(fd, view, offset)

    with opened(tmp_path / "one.qcow2") as left, opened(tmp_path / "other.qcow2") as right:
        monkeypatch.setattr(host, "read_into", read_into)
        assert compare(left, right).equal
    assert read < 3 * PIECE + MIB


def test_an_error_while_reading_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = raw(tmp_path / "one.raw", pattern(20 * PIECE))
    other = raw(tmp_path / "other.raw", pattern(20 * PIECE))
    real = host.read_into

    def fail(fd: int, view: memoryview, offset: int) -> int:
        if offset >= 10 * PIECE:
            raise OSError(5, "Input/output error")
        return real(fd, view, offset)

    with opened(one) as left, opened(other) as right:
        monkeypatch.setattr(host, "read_into", fail)
        with pytest.raises(HostError, match="cannot read"):
            compare(left, right)
        monkeypatch.undo()
        assert compare(left, right).equal


def test_damaged_tables_come_out(tmp_path: Path) -> None:
    path = qcow2(tmp_path / "one.qcow2", pattern(MIB))
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    image[l2 + 6] ^= 0x02
    broken = tmp_path / "broken.qcow2"
    broken.write_bytes(image)
    with opened(path) as left, opened(broken) as right, pytest.raises((CorruptImageError, CorruptDataError)):
        compare(left, right)


def test_ctrl_c_waits_for_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When compare is interrupted no thread of it still reads from the disks."""
    one = raw(tmp_path / "one.raw", pattern(40 * PIECE))
    other = raw(tmp_path / "other.raw", pattern(40 * PIECE))
    real = threading.Thread.join
    joins = 0

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        nonlocal joins
        joins += 1
        if joins == 1:
            raise KeyboardInterrupt
        real(thread, timeout)

    threads = threading.active_count()
    with opened(one) as left, opened(other) as right:
        monkeypatch.setattr(threading.Thread, "join", join)
        with pytest.raises(KeyboardInterrupt):
            compare(left, right)
        assert joins == 1 + WORKERS
        assert left.door.ledger.in_flight == right.door.ledger.in_flight == []
        assert threading.active_count() == threads
