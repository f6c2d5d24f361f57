"""Temporary snapshot mode: writes vanish at the end, unless they were committed."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
import enban.aio
from enban.errors import HostError, LockedError, NoSpaceError, ReadOnlyError, UsageError
from enban.storage import host
from tests.support import Face, check_file, make_qcow2, needs_qemu_io, nothing_remains, pattern, qemu_io

SIZE = 4 << 20


def make_base(path: Path, kind: str) -> Path:
    """An image of SIZE bytes with a pattern at its start."""
    if kind == "raw":
        path.write_bytes(pattern(300_000) + bytes(SIZE - 300_000))
        return path
    if kind == "qcow":
        enban.create(path, "qcow", size=SIZE)
    elif kind == "overlay":
        below = make_qcow2(path.with_suffix(".below"), SIZE)
        with enban.open(below, writable=True) as disk:
            disk.pwrite(pattern(SIZE // 2, 9), SIZE // 2)
        enban.create(path, "qcow2", {"backing_file": below.name, "backing_fmt": "qcow2"})
    elif kind == "v2":
        make_qcow2(path, SIZE, compat="0.10", cluster_size=4096)
    elif kind == "data-file":
        data = path.with_suffix(".data").name
        enban.create(path, "qcow2", {"data_file": data}, size=SIZE)
    else:
        make_qcow2(path, SIZE, cluster_size=4096)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(300_000), 0)
    return path


def content(path: Path | str) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size, 0)


KINDS = ("raw", "qcow", "qcow2", "overlay", "v2", "data-file")


def random_changes(random: Random, disk: Any, model: bytearray, count: int) -> None:
    for _ in range(count):
        offset = random.randrange(len(model))
        length = min(len(model) - offset, random.choice([1, 512, 5000, 70_000, 300_000]))
        action = random.random()
        if action < 0.7:
            data = random.randbytes(length)
            disk.pwrite(data, offset)
            model[offset : offset + length] = data
        else:
            disk.write_zeroes(offset, length, unmap=action < 0.85)
            model[offset : offset + length] = bytes(length)


@pytest.mark.parametrize("kind", KINDS)
def test_the_base_is_byte_for_byte_as_before(tmp_path: Path, face: Face, kind: str) -> None:
    base = make_base(tmp_path / "base", kind)
    files = {path: path.read_bytes() for path in tmp_path.iterdir()}
    before = content(base)

    async def scenario() -> None:
        disk = await face.open(base, snapshot=True)
        assert disk.size == SIZE
        await disk.pwrite(b"gone", 5000)
        await disk.pwrite(pattern(200_000, 3), SIZE - 200_000)
        await disk.write_zeroes(100_000, 50_000)
        await disk.discard(0, 4096)
        await disk.flush()
        expected = bytearray(before)
        expected[5000:5004] = b"gone"
        expected[SIZE - 200_000 :] = pattern(200_000, 3)
        expected[100_000:150_000] = bytes(50_000)
        found = await disk.pread(SIZE - 4096, 4096)
        assert found == expected[4096:]
        await disk.close()

    face.run(scenario())
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == files


@pytest.mark.parametrize("kind", KINDS)
def test_commit_keeps_the_changes_and_goes_on(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", kind)
    model = bytearray(content(base))
    random = Random(kind)
    with enban.open(base, snapshot=True) as disk:
        for _ in range(3):
            random_changes(random, disk, model, 20)
            disk.commit()
            assert disk.pread(SIZE, 0) == model
            assert content(base) == model  # others may read the image between commits
            assert not any(extent.depth == 0 for extent in disk.map() if extent.kind in (1, 2))
            if kind not in ("raw", "qcow", "data-file"):
                check_file(base)
        nothing_remains(disk.door)
        kept = bytes(model)
        random_changes(random, disk, model, 20)
    assert content(base) == kept
    assert enban.check(base).clean if kind not in ("raw",) else True


def test_commit_of_a_disk_that_grew(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qcow2")
    with enban.open(base, snapshot=True) as disk:
        disk.resize(SIZE * 2)
        disk.pwrite(b"end", SIZE * 2 - 3)
        disk.commit()
        assert disk.pread(3, SIZE * 2 - 3) == b"end"
    with enban.open(base) as disk:
        assert disk.size == SIZE * 2 and disk.pread(3, SIZE * 2 - 3) == b"end"


def test_commit_while_others_write(tmp_path: Path) -> None:
    """Threads write marks all the time; commits in between lose none and tear none."""
    base = make_base(tmp_path / "base", "qcow2")
    stop = threading.Event()
    slots = 6
    wrong: list[tuple[int, int]] = []
    last = [0] * slots

    def write(slot: int) -> None:
        number = 0
        while not stop.is_set():
            number += 1
            mark = (slot << 24 | number).to_bytes(8, "little") * 512
            place = slot * 131_072 + number % 31 * 4096
            disk.pwrite(mark, place)
            last[slot] = number
            if disk.pread(4096, place) != mark:
                wrong.append((slot, number))

    with enban.open(base, snapshot=True) as disk:
        threads = [threading.Thread(target=write, args=(slot,)) for slot in range(slots)]
        for thread in threads:
            thread.start()
        for _ in range(5):
            disk.commit()
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong
        expected = disk.pread(SIZE, 0)
        disk.commit()
        nothing_remains(disk.door)
    assert content(base) == expected
    check_file(base)
    for slot in range(slots):
        place = slot * 131_072 + last[slot] % 31 * 4096
        assert expected[place : place + 8] == (slot << 24 | last[slot]).to_bytes(8, "little")


def test_commit_in_an_event_loop(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "raw")

    async def scenario() -> None:
        async with await enban.aio.open(base, snapshot=True) as disk:
            await disk.pwrite(b"kept", 70_000)
            writes = [disk.pwrite(b"w" * 4096, place << 12) for place in range(100, 200)]
            results = await asyncio.gather(disk.commit(), *writes)
            assert results[0] >= 65_536
            await disk.commit()
            await disk.pwrite(b"gone", 70_000)

    asyncio.run(scenario())
    found = content(base)
    assert found[70_000:70_004] == b"kept" and found[100 << 12 : 200 << 12] == b"w" * 409_600


def test_many_overlays_of_one_base(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qcow2")
    before = base.read_bytes()
    disks = [enban.open(base, snapshot=True) for _ in range(8)]
    for number, disk in enumerate(disks):
        disk.pwrite(bytes([number]) * 100_000, 50_000)
    for number, disk in enumerate(disks):
        assert disk.pread(100_000, 50_000) == bytes([number]) * 100_000
    with pytest.raises(LockedError, match="another process is using the image"):
        disks[0].commit()
    assert base.read_bytes() == before
    for disk in disks[1:]:
        disk.close()
    disks[0].commit()
    with enban.open(base, snapshot=True) as other:  # between commits it is only read
        assert other.pread(1, 50_000) == b"\0"
        with pytest.raises(LockedError):
            disks[0].commit()
        assert disks[0].pread(1, 50_000) == b"\0"
    with pytest.raises(LockedError):
        enban.open(base, writable=True)  # an overlay stands on it
    disks[0].commit()
    disks[0].close()
    enban.open(base, writable=True).close()


def test_an_image_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "qcow2")
    really = os.open

    def no_writing(path: str, flags: int, mode: int = 0o777) -> int:
        if str(path) == str(base) and flags & os.O_RDWR:
            raise OSError(errno.EROFS, "Read-only file system", path)
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", no_writing)
    before = base.read_bytes()
    with enban.open(base, snapshot=True) as disk:
        disk.pwrite(b"changed", 4096)
        for _ in range(2):
            with pytest.raises(HostError, match="read-only") as caught:
                disk.commit()
            assert "\n" not in str(caught.value)
            assert disk.pread(7, 4096) == b"changed"
        # The locks of a reader came back.
        with pytest.raises(LockedError):
            subprocess_open_writable(base)
    assert base.read_bytes() == before


def subprocess_open_writable(path: Path) -> None:
    """Open in a new process; LockedError if that process was refused for that reason."""
    code = "import enban, sys\nenban.open(sys.argv[1], writable=True).close()"
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False
    )
    if "LockedError" in done.stderr:
        raise LockedError("refused")
    assert not done.returncode, done.stderr


def test_an_image_that_was_replaced_is_not_committed_to(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "raw")
    with enban.open(base, snapshot=True) as disk:
        disk.pwrite(b"changed", 4096)
        os.rename(base, tmp_path / "away")
        base.write_bytes(bytes(SIZE))
        with pytest.raises(HostError, match="is not the file any more"):
            disk.commit()
        assert disk.pread(7, 4096) == b"changed"
        os.replace(tmp_path / "away", base)
        disk.commit()
    assert content(base)[4096:4103] == b"changed"


def test_a_full_disk_under_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The guest gets ENOSPC; the base and what was written before stay, and writing goes on with room."""
    base = make_base(tmp_path / "base", "qcow2")
    before = base.read_bytes()
    really, room = host.write_all, [1 << 20]

    def write_all(fd: int, view: memoryview, offset: int) -> None:
        if not os.fstat(fd).st_nlink and offset + len(view) > room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(fd, view, offset)

    monkeypatch.setattr(host, "write_all", write_all)
    model = bytearray(content(base))
    with enban.open(base, snapshot=True) as disk:
        failures = 0
        for place in range(0, SIZE, 131_072):
            try:
                disk.pwrite(pattern(131_072, place), place)
            except NoSpaceError as error:
                failures += 1
                assert error.errno == errno.ENOSPC and "temporary overlay" in str(error)
            else:
                model[place : place + 131_072] = pattern(131_072, place)
        assert failures
        disk.flush()
        assert disk.pread(SIZE, 0) == model
        with pytest.raises(NoSpaceError):
            disk.pwrite(pattern(131_072, 5), SIZE - 131_072)
        room[0] = 1 << 40
        disk.pwrite(pattern(131_072, 5), SIZE - 131_072)
        model[SIZE - 131_072 :] = pattern(131_072, 5)
        assert disk.pread(SIZE, 0) == model
    assert base.read_bytes() == before


def test_a_base_without_room_keeps_the_disk_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base", "qcow2")
    really, full = host.write_all, [True]

    def write_all(fd: int, view: memoryview, offset: int) -> None:
        if full[0] and os.fstat(fd).st_nlink and offset > base.stat().st_size:
            raise OSError(errno.ENOSPC, "No space left on device")
        really(fd, view, offset)

    model = bytearray(content(base))
    with enban.open(base, snapshot=True) as disk:
        random_changes(Random(4), disk, model, 40)
        with monkeypatch.context() as patched:
            patched.setattr(host, "write_all", write_all)
            with pytest.raises(NoSpaceError):
                disk.commit()
            assert disk.pread(SIZE, 0) == model
            random_changes(Random(5), disk, model, 10)
        check_file(base, leaks=True)
        assert disk.pread(SIZE, 0) == model
        assert not disk.snapshots
        disk.commit()
    assert content(base) == model
    check_file(base)


KILLED = """
import enban, os, signal, sys
disk = enban.open(sys.argv[1], snapshot=True, snapshot_dir=sys.argv[2])
disk.pwrite(b"x" * 1_000_000, 100_000)
disk.write_zeroes(0, 65536)
disk.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("kind", ["raw", "qcow2"])
def test_after_kill_9_nothing_remains(tmp_path: Path, kind: str) -> None:
    base = make_base(tmp_path / "base", kind)
    before, room = base.read_bytes(), tmp_path / "room"
    room.mkdir()
    done = subprocess.run([sys.executable, "-c", KILLED, base, room], check=False)
    assert done.returncode == -signal.SIGKILL
    assert base.read_bytes() == before
    assert not list(room.iterdir())
    enban.open(base, writable=True).close()  # no lock is left


def test_hosts_that_cannot_make_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "raw")
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    room = tmp_path / "room"
    room.mkdir()
    with enban.open(base, snapshot=True, snapshot_dir=room) as disk:
        disk.pwrite(b"here", 0)
        assert disk.pread(4, 0) == b"here"
        assert not list(room.iterdir())


def test_file_systems_that_cannot_make_a_file_without_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_base(tmp_path / "base", "raw")
    really, asked = os.open, []

    def refuse(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            asked.append(path)
            raise OSError(errno.EOPNOTSUPP, "Operation not supported")
        return really(path, flags, mode)

    monkeypatch.setattr(os, "open", refuse)
    with enban.open(base, snapshot=True, snapshot_dir=tmp_path) as disk:
        disk.pwrite(b"here", 0)
        assert disk.pread(4, 0) == b"here"
    assert asked == [str(tmp_path)]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_what_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qcow2")
    with pytest.raises(HostError, match="cannot make a temporary file: no such file"):
        enban.open(base, snapshot=True, snapshot_dir=tmp_path / "nowhere")
    with pytest.raises(UsageError, match="goes with snapshot=True"):
        enban.open(base, snapshot_dir=tmp_path)
    with enban.open(base) as disk, pytest.raises(UsageError, match="no temporary overlay"):
        disk.commit()
    with enban.open(base, snapshot=True) as disk:
        disk.create_snapshot("inside")
        with pytest.raises(UsageError, match="delete them first"):
            disk.commit()
        disk.delete_snapshot("inside")
        disk.commit()
    with (
        enban.open(base, snapshot=True, force_share=True) as disk,
        pytest.raises(ReadOnlyError, match="force_share is for reading only"),
    ):
        disk.commit()
    disk = enban.open(base, snapshot=True)
    disk.close()
    with pytest.raises(UsageError, match="closed"):
        disk.commit()


def test_an_overlay_over_an_internal_snapshot(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qcow2")
    with enban.open(base, writable=True) as disk:
        disk.create_snapshot("then")
        disk.pwrite(b"now", 0)
    with enban.open(base, snapshot=True, snapshot_name="then") as disk:
        assert disk.pread(8, 0) == pattern(8)
        disk.pwrite(b"other", 0)
        assert disk.pread(8, 0) == b"other" + pattern(8)[5:]
        with pytest.raises(ReadOnlyError, match="an internal snapshot can only be read"):
            disk.commit()
    assert content(base)[:3] == b"now"


@pytest.mark.parametrize("size", [0, 512, 1000, 1 << 45, (1 << 55) - 512])
def test_bases_of_every_size(tmp_path: Path, size: int) -> None:
    if size < 1 << 40:
        base = tmp_path / "base.raw"
        base.write_bytes(b"b" * size)
    else:  # larger than files of most file systems
        base = make_qcow2(tmp_path / "base.qcow2", size, cluster_size=2 << 20)
    with enban.open(base, snapshot=True) as disk:
        assert disk.size == size
        if size:
            disk.pwrite(b"end", size - 3)
            assert disk.pread(3, size - 3) == b"end"
            disk.commit()
        assert disk.node.file.size() < 64 << 20
    with enban.open(base) as disk:
        assert disk.size == size
        assert not size or disk.pread(3, size - 3) == b"end"


@needs_qemu_io
def test_serve_with_snapshot(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base.qcow2", "qcow2")
    before = base.read_bytes()
    socket = tmp_path / "s"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "enban",
            "serve",
            "--snapshot",
            "--snapshot-dir",
            tmp_path,
            "-k",
            socket,
            base,
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    uri = server.stdout.readline().strip()
    try:
        qemu_io(uri, "write -P 7 1M 64k", "read -P 7 1M 64k", "flush", options=("-f", "raw"))
        qemu_io(uri, "read -P 7 1M 64k", options=("-f", "raw"))
    finally:
        server.terminate()
        assert server.wait(30) == 0
    assert base.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.qcow2"]


def test_serve_refuses_contradictions(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "raw")
    for flags, text in ((["--snapshot", "-r"], "leave out -r"), (["--snapshot-dir", "."], "--snapshot")):
        done = subprocess.run(
            [sys.executable, "-m", "enban", "serve", *flags, str(base)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and text in done.stderr and done.stderr.count("\n") == 1
