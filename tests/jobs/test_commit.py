"""Commit: the overlay's disk reads the same before, between and after the steps."""

from __future__ import annotations

from pathlib import Path

import pytest

import enban
from enban.errors import GateError, HostError, LockedError, UsageError
from enban.jobs.commit import commit
from enban.storage import host
from tests.support import KIB, MIB, check_file, make_qcow2, pattern


def overlay(path: Path, base: str, size: int, format: str = "qcow2", **options: object) -> Path:
    return make_qcow2(path, size, backing_file=base, backing_fmt=format, **options)


def chain(folder: Path) -> tuple[Path, Path, Path]:
    base = make_qcow2(folder / "base.qcow2", 2 * MIB)
    with enban.open(base, writable=True) as disk:
        disk.pwrite(pattern(2 * MIB), 0)
    # Shorter than its base: what the base has beyond reads as zeros from here on.
    middle = overlay(folder / "middle.qcow2", "base.qcow2", MIB, cluster_size=4096)
    with enban.open(middle, writable=True) as disk:
        disk.pwrite(pattern(100 * KIB, 2), 300 * KIB)
        disk.write_zeroes(600 * KIB, 64 * KIB)
    top = overlay(folder / "top.qcow2", "middle.qcow2", 3 * MIB)
    with enban.open(top, writable=True) as disk:
        disk.pwrite(pattern(10 * KIB, 4), 350 * KIB)
        disk.pwrite(pattern(10 * KIB, 5), 2900 * KIB)
        disk.write_zeroes(0, 64 * KIB)
    return base, middle, top


def reads(path: Path, length: int | None = None) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size if length is None else length, 0)


def test_one_level(tmp_path: Path) -> None:
    base, middle, top = chain(tmp_path)
    content, under = reads(top), reads(base)
    commit(str(top))
    assert reads(top) == content
    assert reads(middle) == content
    assert reads(base) == under
    for path in (base, middle, top):
        check_file(path)
    with enban.open(top) as disk:
        assert {extent.depth for extent in disk.map()} == {1, 2} or not any(
            extent.depth == 0 and extent.kind == 1 for extent in disk.map()
        )


def test_down_to_the_base(tmp_path: Path) -> None:
    for number, name in enumerate(("base.qcow2", "@/base.qcow2")):
        folder = tmp_path / str(number)
        folder.mkdir()
        base, middle, top = chain(folder)
        content = reads(top)
        own = top.read_bytes(), middle.read_bytes()
        commit(str(top), name.replace("@", str(folder)))
        assert reads(base) == content
        assert (top.read_bytes(), middle.read_bytes()) == own
        assert reads(top) == content
        check_file(base)


def test_kept(tmp_path: Path) -> None:
    _, middle, top = chain(tmp_path)
    own = top.read_bytes()
    content = reads(top)
    commit(str(top), keep=True)
    assert top.read_bytes() == own
    assert reads(middle) == content


def test_into_raw(tmp_path: Path) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(pattern(MIB))
    top = overlay(tmp_path / "top.qcow2", "base.raw", 2 * MIB, "raw")
    with enban.open(top, writable=True) as disk:
        disk.pwrite(b"new", 100)
        disk.write_zeroes(64 * KIB, 64 * KIB)
        disk.pwrite(b"end", 2 * MIB - 3)
    content = reads(top)
    commit(str(top))
    assert base.read_bytes() == content
    assert reads(top) == content


def test_compressed_clusters_and_subclusters(tmp_path: Path) -> None:
    make_qcow2(tmp_path / "base.qcow2", MIB, extended_l2=True)
    top = overlay(tmp_path / "top.qcow2", "base.qcow2", MIB, extended_l2=True)
    from enban.block.codec import deflater
    from enban.block.runtime import drive

    with enban.open(top, writable=True) as disk:
        drive(disk.door.write_packed(deflater("zlib")(b"packed!!" * 8192), 128 * KIB))
        disk.pwrite(b"x" * 2048, 2048)
        disk.write_zeroes(8192, 2048)
    content = reads(top)
    commit(str(top))
    assert reads(tmp_path / "base.qcow2") == content == reads(top)
    check_file(top)


def test_what_is_refused(tmp_path: Path) -> None:
    base, _, top = chain(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UsageError, match="no backing file"):
        commit(str(base))
    with pytest.raises(UsageError, match="not in the backing chain"):
        commit(str(top), "other.qcow2")
    with pytest.raises(UsageError, match="not in the backing chain"):
        commit(str(top), "top.qcow2")
    with pytest.raises(UsageError, match="goes by the backing files named"):
        commit({"driver": "qcow2", "file": {"filename": str(top)}, "backing": {"filename": str(base)}})
    with pytest.raises(GateError):
        commit(str(top), gate=enban.CLOSED)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("name", ["top.qcow2", "middle.qcow2", "base.qcow2"])
def test_files_in_use_are_refused(tmp_path: Path, name: str) -> None:
    """Data-loss case 17: neither the overlay nor anything it is based on may be open for writing elsewhere,
    and the base not even for reading."""
    _, _, top = chain(tmp_path)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with enban.open(tmp_path / name, writable=True, backing=False), pytest.raises(LockedError):
        commit(str(top))
    if name == "middle.qcow2":
        with enban.open(tmp_path / name, backing=False), pytest.raises(LockedError):
            commit(str(top))
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("after", [0, 1, 3, 6, 10, 15, 25])
def test_a_full_disk_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Whatever step fails, the overlay reads as before, and a second commit completes."""
    _, middle, top = chain(tmp_path)
    content = reads(top)
    real = host.write_all
    writes = 0

    def full(fd: int, view: memoryview, offset: int) -> None:
        nonlocal writes
        writes += 1
        if writes > after:
            raise OSError(28, "No space left on device")
        real(fd, view, offset)

    monkeypatch.setattr(host, "write_all", full)
    try:
        commit(str(top))
    except HostError:
        pass
    else:
        assert writes <= after
    monkeypatch.undo()
    assert reads(top) == content
    for path in (middle, top):
        check_file(path, leaks=True)
    commit(str(top))
    assert reads(top) == reads(middle) == content


def test_flushed_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base is durable before anything of the overlay changes."""
    _, middle, top = chain(tmp_path)
    inodes = {path.stat().st_ino: path.name for path in (middle, top)}
    events: list[tuple[str, str]] = []
    real_write, real_sync = host.write_all, host.sync

    import os

    def write_all(fd: int, view: memoryview, offset: int) -> None:
        events.append(("write", inodes[os.fstat(fd).st_ino]))
        real_write(fd, view, offset)

    def sync(fd: int) -> None:
        events.append(("sync", inodes[os.fstat(fd).st_ino]))
        real_sync(fd)

    monkeypatch.setattr(host, "write_all", write_all)
    monkeypatch.setattr(host, "sync", sync)
    commit(str(top))
    first = events.index(("write", "top.qcow2"))
    last = max(place for place, event in enumerate(events) if event == ("write", "middle.qcow2"))
    assert last < first
    assert ("sync", "middle.qcow2") in events[last:first]


def test_emptying_keeps_many_tables_bounded(tmp_path: Path) -> None:
    """An overlay with thousands of L2 tables is emptied in steps and comes out clean."""
    make_qcow2(tmp_path / "base.qcow2", 64 * MIB)
    top = overlay(tmp_path / "top.qcow2", "base.qcow2", 64 * MIB, cluster_size=512)
    with enban.open(top, writable=True) as disk:
        for offset in range(0, 64 * MIB, 32 * KIB):
            disk.pwrite(b"x", offset)
    content = reads(top)
    commit(str(top))
    assert reads(top) == content
    report = check_file(top)
    assert report is not None
    with enban.open(top) as disk:
        assert all(extent.depth for extent in disk.map())
