"""`stream`: the disk reads the same before, during and after, and the images below are needed no more."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
import enban.aio
from enban.block.door import Door
from enban.block.runtime import BLOCKING, drive
from enban.errors import CancelledError, ClosedError, CorruptImageError, UsageError
from enban.filters.writelog import WriteLog
from enban.formats.qcow2.create import Qcow2Options, write_empty
from enban.lab.crash_states import Replay
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.cli.command import enban as command
from tests.support import (
    check_bytes,
    check_file,
    make_qcow2,
    needs_qemu_img,
    nothing_remains,
    open_memory,
    pattern,
    qemu_check,
    qemu_img,
    raw_node,
)

CLUSTER = 4096


def content(path: Path) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size, 0)


def fill(path: Path, random: Random, count: int) -> None:
    with enban.open(path, writable=True) as disk:
        for _ in range(count):
            offset = random.randrange(max(1, disk.size))
            length = min(disk.size - offset, random.choice([512, 3000, 40_000, 150_000]))
            if random.random() < 0.7:
                disk.pwrite(random.randbytes(length), offset)
            else:
                disk.write_zeroes(offset, length)


def make_chain(directory: Path, random: Random, sizes: list[int], **shape: Any) -> list[Path]:
    """A raw image and overlays of it, of these sizes; the last is the top."""
    base = directory / "l0"
    base.write_bytes(random.randbytes(sizes[0] // 2) + bytes(sizes[0] - sizes[0] // 2))
    paths = [base]
    for number, size in enumerate(sizes[1:], 1):
        path = directory / f"l{number}"
        make_qcow2(
            path,
            size,
            cluster_size=CLUSTER,
            backing_file=f"l{number - 1}",
            backing_fmt="raw" if number == 1 else "qcow2",
            **shape,
        )
        fill(path, random, 5)
        paths.append(path)
    return paths


SHAPES: list[dict[str, Any]] = [{}, {"compat": "0.10"}, {"extended_l2": True, "cluster_size": 16384}]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("deep", range(5))
def test_every_base_of_chains_of_every_shape(tmp_path: Path, seed: int, deep: int) -> None:
    """Layers shorter and longer than each other; `deep` 0 is the whole chain."""
    random = Random(seed)
    sizes = [random.randrange(1, 9) << 17 for _ in range(5)]
    paths = make_chain(tmp_path, random, sizes, compat=random.choice(["0.10", "1.1"]))
    before = content(paths[-1])
    others = {path: path.read_bytes() for path in paths[:-1]}
    base = paths[deep - 1] if deep else None
    enban.stream(str(paths[-1]), str(base or ""))
    assert {path: path.read_bytes() for path in paths[:-1]} == others
    for path in paths[:-1]:
        if base is None or path.name > base.name:
            path.unlink()  # they are not needed
    assert content(paths[-1]) == before
    check_file(paths[-1])
    name = enban.image_info(str(paths[-1]))[0].get("backing-filename", "")
    assert name == (base.name if base else "")
    assert enban.stream(str(paths[-1]), str(base or "")) == 0  # nothing is left to do


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_formats_of_the_top(tmp_path: Path, shape: dict[str, Any]) -> None:
    base = tmp_path / "base"
    base.write_bytes(pattern(600_000) + bytes(400_000 - 400_000 % 512))
    top = make_qcow2(
        tmp_path / "top",
        1 << 20,
        backing_file="base",
        backing_fmt="raw",
        **{"cluster_size": CLUSTER, **shape},
    )
    fill(top, Random(1), 8)
    before = content(top)
    enban.stream(str(top))
    base.unlink()
    assert content(top) == before
    check_file(top)


def test_live_under_load(tmp_path: Path) -> None:
    """Threads write while the backing data comes in; none of their writes is lost."""
    base = tmp_path / "base"
    base.write_bytes(pattern(8 << 20))
    top = make_qcow2(tmp_path / "top", 8 << 20, cluster_size=CLUSTER, backing_file="base", backing_fmt="raw")
    model = bytearray(pattern(8 << 20))
    with enban.open(top, writable=True) as disk:
        stop = threading.Event()

        def write(lane: int) -> None:
            random = Random(lane)
            while not stop.is_set():
                place = random.randrange(2048) * CLUSTER + lane * 1024
                data = random.randbytes(1024)
                disk.pwrite(data, place)
                model[place : place + 1024] = data
                assert disk.pread(1024, place) == data

        threads = [threading.Thread(target=write, args=(lane,)) for lane in range(4)]
        for thread in threads:
            thread.start()
        disk.pull()
        stop.set()
        for thread in threads:
            thread.join()
        assert disk.node.backing is None
        assert disk.pread(8 << 20, 0) == model
        nothing_remains(disk.door)
    base.unlink()
    assert content(top) == model
    check_file(top)


def test_in_an_event_loop_cancelled_and_begun_again(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(pattern(16 << 20))
    top = make_qcow2(tmp_path / "top", 16 << 20, backing_file="base", backing_fmt="raw")

    async def scenario() -> None:
        async with await enban.aio.open(top, writable=True) as disk:
            some = asyncio.Event()
            task = asyncio.create_task(disk.pull(progress=lambda done, total: some.set()))
            await some.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await disk.pread(16 << 20, 0) == pattern(16 << 20)
            again = await disk.pull()
            assert 0 < again < 16 << 20
            nothing_remains(disk.door)

    asyncio.run(scenario())
    base.unlink()
    assert content(top) == pattern(16 << 20)


def test_a_job_that_is_stopped_can_be_begun_again(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(pattern(8 << 20))
    top = make_qcow2(tmp_path / "top", 8 << 20, backing_file="base", backing_fmt="raw")

    def stop(done: int, total: int) -> None:
        if done >= total // 2:
            raise CancelledError("enough")

    with pytest.raises(CancelledError):
        enban.stream(str(top), progress=stop)
    assert content(top) == pattern(8 << 20)
    assert enban.stream(str(top)) == 4 << 20
    base.unlink()
    assert content(top) == pattern(8 << 20)


def test_closing_ends_it(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(pattern(8 << 20))
    top = make_qcow2(tmp_path / "top", 8 << 20, backing_file="base", backing_fmt="raw")
    disk = enban.open(top, writable=True)
    closers: list[threading.Thread] = []

    def close(done: int, total: int) -> None:
        if not closers:
            closers.append(threading.Thread(target=disk.close))
            closers[0].start()
            while not disk.door.closed:
                pass

    with pytest.raises(ClosedError):
        disk.pull(progress=close)
    closers[0].join()
    assert content(top) == pattern(8 << 20)


def test_a_crash_leaves_a_disk_that_reads_the_same() -> None:
    below = pattern(60 * 512, 3)
    storage = MemoryStorage(BLOCKING, _overlay(below))
    image = bytes(storage.content)
    log = WriteLog(MemoryStorage(BLOCKING, image))
    door: Door = drive(open_memory(log, backing=raw_node(below)))
    expected = drive(_all(door))
    drive(door.pull())
    drive(door.close())
    replay, random, names = Replay(image, log.entries), Random(1), set()
    for _ in replay.steps():
        for state in (replay.everything(), *replay.subsets(random, 4)):
            check_bytes(state, leaks=True)
            named = bool(int.from_bytes(state[8:16], "big"))
            assert Qcow2Reader(state).read(backing=below if named else b"") == expected
            names.add(named)
    assert names == {True, False}


def _overlay(below: bytes) -> bytes:
    storage = MemoryStorage(BLOCKING)
    options = Qcow2Options(64 * 512, cluster_size=512, backing_file="below", backing_fmt="raw")
    drive(write_empty(storage, options.header()))
    door = drive(open_memory(storage, backing=raw_node(below)))
    drive(door.write(b"o" * 2000, 3000))
    drive(door.write_zeroes(9000, 3000))
    drive(door.close())
    return bytes(storage.content)


async def _all(door: Door) -> bytes:
    buffer = bytearray(door.node.size)
    await door.read_into(buffer, 0)
    return bytes(buffer)


def test_what_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.write_bytes(pattern(1 << 20))
    top = make_qcow2(tmp_path / "top", 1 << 20, backing_file="base", backing_fmt="raw")
    with pytest.raises(UsageError, match="'nothing' is not in the backing chain"):
        enban.stream(str(top), "nothing")
    with enban.open(top, writable=True) as disk:
        disk.create_snapshot("kept")
    with pytest.raises(UsageError, match="internal snapshots, which need its backing file"):
        enban.stream(str(top))
    with pytest.raises(UsageError, match="internal snapshots of the image need"):
        enban.rebase(str(top), "")
    with enban.open(top, writable=True) as disk:
        disk.delete_snapshot("kept")
    with enban.open(top, snapshot=True) as disk, pytest.raises(UsageError, match="temporary overlay"):
        disk.pull()
    with enban.open(top) as disk, pytest.raises(UsageError, match="read-only"):
        disk.pull()
    enban.rebase(str(top), "top", "qcow2", unsafe=True)
    with pytest.raises(CorruptImageError, match="comes back to this file"):
        enban.stream(str(top))


def test_a_chain_of_a_hundred(tmp_path: Path) -> None:
    previous, fmt = tmp_path / "000", "raw"
    previous.write_bytes(pattern(100 * 4096))
    for number in range(1, 101):
        path = make_qcow2(
            tmp_path / f"{number:03}",
            100 * 4096,
            cluster_size=CLUSTER,
            backing_file=previous.name,
            backing_fmt=fmt,
        )
        with enban.open(path, writable=True, backing=False) as disk:
            disk.pwrite(bytes([number]) * 4096, (number - 1) * 4096)
        previous, fmt = path, "qcow2"
    expected = b"".join(bytes([number]) * 4096 for number in range(1, 101))
    assert content(previous) == expected
    assert len(enban.image_info(str(previous), chain=True)) == 101
    enban.stream(str(previous), str(tmp_path / "050"))
    assert enban.image_info(str(previous))[0]["backing-filename"] == "050"
    assert content(previous) == expected
    enban.stream(str(previous))
    for number in range(100):
        (tmp_path / f"{number:03}").unlink()
    assert content(previous) == expected


def test_the_name_of_the_base_is_right_from_where_the_image_is(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    base = tmp_path / "base"
    base.write_bytes(pattern(1 << 20))
    make_qcow2(tmp_path / "a" / "middle", 1 << 20, backing_file="../base", backing_fmt="raw")
    top = make_qcow2(tmp_path / "a" / "b" / "top", 1 << 20, backing_file="../middle", backing_fmt="qcow2")
    enban.stream(str(top), str(base))
    assert enban.image_info(str(top))[0]["backing-filename"] == "../../base"
    (tmp_path / "a" / "middle").unlink()
    with enban.open(top, gate=enban.TRUSTED) as disk:
        assert disk.pread(1 << 20, 0) == pattern(1 << 20)


@needs_qemu_img
def test_the_command_on_a_chain_of_qemu(tmp_path: Path) -> None:
    base, middle, top = (tmp_path / name for name in ("base", "middle", "top"))
    base.write_bytes(pattern(3 << 20))
    qemu_img("create", "-q", "-f", "qcow2", "-b", "base", "-F", "raw", middle, "4M")
    qemu_img("create", "-q", "-f", "qcow2", "-b", "middle", "-F", "qcow2", top, "5M")
    fill(middle, Random(1), 6)
    fill(top, Random(2), 6)
    flat = tmp_path / "flat"
    qemu_img("convert", "-O", "raw", top, flat)
    command("stream", "-p", top, "-b", base)
    qemu_check(top)
    assert "backing file: base" in qemu_img("info", top)
    qemu_img("compare", top, flat)
    command("stream", top)
    base.unlink()
    middle.unlink()
    qemu_check(top)
    qemu_img("compare", top, flat)
