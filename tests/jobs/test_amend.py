"""`amend`: another compatibility level, refcount width, flags; the disk reads the same, crashes included."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError, UnsupportedOperationError, UsageError
from enban.filters.faults import Faults, fail_at
from enban.filters.writelog import WriteLog
from enban.formats.qcow2 import amend as steps
from enban.formats.qcow2.create import Qcow2Options, write_empty
from enban.formats.qcow2.node import Qcow2Node
from enban.lab.crash_states import Replay
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.cli.command import enban as command
from tests.cli.command import refused
from tests.support import (
    check_bytes,
    check_file,
    make_qcow2,
    needs_qemu_img,
    open_memory,
    pattern,
    qemu_check,
    qemu_img,
    raw_node,
)

SIZE = 1 << 20


def fill(disk: Disk, seed: int = 1, count: int = 12) -> None:
    random = Random(seed)
    for _ in range(count):
        offset = random.randrange(disk.size)
        length = min(disk.size - offset, random.choice([512, 3000, 40_000, 150_000]))
        if random.random() < 0.5:
            disk.pwrite(random.randbytes(length), offset)
        else:
            disk.write_zeroes(offset, length, unmap=random.random() < 0.5)


def content(path: Path) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size, 0)


def facts(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = enban.image_info(str(path))[0]["format-specific"]["data"]
    return found


@pytest.mark.parametrize("cluster", [512, 4096, 65536])
@pytest.mark.parametrize("backed", [False, True])
def test_down_and_up_again(tmp_path: Path, cluster: int, backed: bool) -> None:
    extra = {"backing_file": "base", "backing_fmt": "raw"} if backed else {}
    (tmp_path / "base").write_bytes(pattern(SIZE // 2 + 512))
    path = make_qcow2(tmp_path / "disk.qcow2", SIZE, cluster_size=cluster, lazy_refcounts=True, **extra)
    with enban.open(path, writable=True) as disk:
        fill(disk)
    before = content(path)
    enban.amend(str(path), {"compat": "0.10"})
    assert facts(path)["compat"] == "0.10"
    reader = Qcow2Reader(path.read_bytes())
    assert reader.read(backing=(tmp_path / "base").read_bytes() if backed else b"") == before
    check_file(path)
    with enban.open(path, writable=True) as disk:
        assert disk.pread(SIZE, 0) == before
        fill(disk, 2)
    before = content(path)
    enban.amend(str(path), {"compat": "1.1", "lazy_refcounts": "on"})
    assert facts(path)["compat"] == "1.1" and facts(path)["lazy-refcounts"]
    assert content(path) == before
    with enban.open(path, writable=True) as disk:
        fill(disk, 3)
    check_file(path)
    if backed:
        assert enban.image_info(str(path))[0]["backing-filename"] == "base"


@pytest.mark.parametrize("cluster", [512, 4096])
def test_every_refcount_width_to_every_other(tmp_path: Path, cluster: int) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", SIZE, cluster_size=cluster)
    with enban.open(path, writable=True) as disk:
        fill(disk)
    before = content(path)
    for width in (1, 64, 2, 32, 4, 16, 8, 1, 8):
        enban.amend(str(path), {"refcount_bits": str(width)})
        assert facts(path)["refcount-bits"] == width
        check_file(path)
        with enban.open(path, writable=True) as disk:
            assert disk.pread(SIZE, 0) == before
            disk.pwrite(width.to_bytes(2, "big"), SIZE - 2)
            before = before[:-2] + width.to_bytes(2, "big")
        check_file(path)
    with enban.open(path, writable=True) as disk:
        for number in range(20):
            disk.create_snapshot(str(number + 100))
    with pytest.raises(UnsupportedOperationError, match="more references than 4 bits"):
        enban.amend(str(path), {"refcount_bits": "4"})
    check_file(path)
    enban.amend(str(path), {"refcount_bits": "16", "size": str(2 * SIZE)})
    check_file(path)
    assert content(path) == before + bytes(SIZE)


def test_other_options(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    enban.create(path, "qcow2", {"data_file": "one.data", "data_file_raw": "on"}, size=SIZE)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"data", 0)
    (tmp_path / "one.data").rename(tmp_path / "two.data")
    with pytest.raises(EnbanError):
        content(path)
    with pytest.raises(EnbanError):  # it has to be there to be checked
        enban.amend(str(path), {"data_file_raw": "off"})
    (tmp_path / "two.data").rename(tmp_path / "one.data")
    enban.amend(str(path), {"data_file_raw": "off"})
    assert not facts(path)["data-file-raw"]
    enban.amend(str(path), {"data_file": "two.data"})
    assert facts(path)["data-file"] == "two.data"
    (tmp_path / "one.data").rename(tmp_path / "two.data")
    assert content(path)[:4] == b"data"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"cluster_size": "4k"}, "counts only when an image is created"),
        ({"backing_file": "x"}, "enban rebase"),
        ({"compat": "0.9"}, "is not known"),
        ({"refcount_bits": "3"}, "is not possible"),
        ({"compat": "0.10", "lazy_refcounts": "on"}, "needs compat level 1.1"),
        ({"compat": "0.10", "refcount_bits": "8"}, "needs 16-bit refcounts"),
        ({"size": "512"}, "shrink"),
        ({"data_file_raw": "on"}, "counts only for new images"),
        ({"data_file": "x"}, "no data file"),
        ({"nonsense": "x"}, "no option 'nonsense'"),
    ],
)
def test_what_is_refused_changes_nothing(tmp_path: Path, options: dict[str, str], text: str) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", SIZE)
    before = path.read_bytes()
    with pytest.raises(UsageError, match=text):
        enban.amend(str(path), options)
    assert path.read_bytes() == before


def test_what_version_2_has_not(tmp_path: Path) -> None:
    for number, (extra, text) in enumerate(
        (
            ({"extended_l2": "on"}, "features that version 2 has not"),
            ({"compression_type": "zstd"}, "features that version 2 has not"),
            ({"refcount_bits": "8"}, "needs 16-bit"),
        )
    ):
        path = tmp_path / f"{number}.qcow2"
        enban.create(path, "qcow2", extra, size=SIZE)
        with pytest.raises(UnsupportedOperationError if number < 2 else UsageError, match=text):
            enban.amend(str(path), {"compat": "0.10"})
        check_file(path)
    path = make_qcow2(tmp_path / "disk.qcow2", SIZE, cluster_size=4096)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x" * 8192, 0)
        disk.write_zeroes(0, 4096, unmap=False)
        disk.create_snapshot("zeroes")
    with pytest.raises(UnsupportedOperationError, match="'zeroes' has zero clusters"):
        enban.amend(str(path), {"compat": "0.10"})
    with enban.open(path, writable=True) as disk:
        disk.delete_snapshot("zeroes")
        disk.write_zeroes(0, 4096)
        disk.pwrite(b"y" * 4096, 0)
        disk.create_snapshot("plain")
    enban.amend(str(path), {"compat": "0.10"})
    with enban.open(path, snapshot_name="plain") as disk:
        assert disk.pread(8192, 0) == b"y" * 4096 + b"x" * 4096
    check_file(path)
    raw = tmp_path / "raw"
    raw.write_bytes(bytes(512))
    with pytest.raises(UsageError, match="nothing can be amended in an image of format raw"):
        enban.amend(str(raw), {"compat": "0.10"}, format="raw")


async def _down(node: Qcow2Node) -> None:
    await steps.downgrade(node, None)


async def _up(node: Qcow2Node) -> None:
    await steps.upgrade(node)


async def _wider(node: Qcow2Node) -> None:
    await steps.set_refcount_bits(node, 32, None)


CHANGES = [("1.1", _down), ("0.10", _up), ("1.1", _wider)]


def _image(compat: str) -> tuple[bytes, bytes, bytes]:
    """(image, backing content, content)"""
    below = pattern(40 * 512, 8)
    storage = MemoryStorage(BLOCKING)
    options = Qcow2Options(
        96 * 512, cluster_size=512, compat=compat, backing_file="a-rather-long-name", backing_fmt="raw"
    )
    drive(write_empty(storage, options.header()))
    disk = Disk(drive(open_memory(storage, backing=raw_node(below))))
    disk.pwrite(b"d" * 5000, 3000)
    disk.write_zeroes(5000, 9000)
    disk.write_zeroes(20000, 2000, unmap=False)
    found = disk.pread(disk.size, 0)
    disk.close()
    return bytes(storage.content), below, found


@pytest.mark.parametrize(("compat", "change"), CHANGES)
def test_a_crash_leaves_before_or_after(compat: str, change: Any) -> None:
    image, below, expected = _image(compat)
    log = WriteLog(MemoryStorage(BLOCKING, image))
    disk = Disk(drive(open_memory(log, backing=raw_node(below))))
    drive(change(disk.node))
    disk.close()
    replay, random, seen = Replay(image, log.entries), Random(2), set()
    for _ in replay.steps():
        for state in (replay.everything(), *replay.subsets(random, 12), replay.scattered(random)):
            check_bytes(state, leaks=True)
            reader = Qcow2Reader(state)
            assert reader.read(backing=below) == expected
            seen.add((state[7], reader.image[99] if state[7] == 3 else 4))
    assert len(seen) == 2


@pytest.mark.parametrize(("compat", "change"), CHANGES)
def test_a_failing_call_leaves_it_whole(compat: str, change: Any) -> None:
    image, below, expected = _image(compat)
    index = failures = 0
    while True:
        index += 1
        storage = MemoryStorage(BLOCKING, image)
        disk = Disk(drive(open_memory(Faults(storage, fail_at(index)), backing=raw_node(below))))
        failed = False
        try:
            drive(change(disk.node))
        except EnbanError:
            failed = True
        try:
            assert disk.pread(disk.size, 0) == expected
            disk.close()
        except EnbanError:
            failed = True
        check_bytes(storage.content, leaks=True)
        assert Qcow2Reader(storage.content).read(backing=below) == expected
        failures += failed
        if not failed:
            break
    assert failures > 5


@needs_qemu_img
@pytest.mark.parametrize("cluster", ["4k", "64k"])
def test_the_same_as_qemu(tmp_path: Path, cluster: str) -> None:
    """Both programs amend the same image in the same steps; the results say and hold the same."""
    ours, theirs, flat = (tmp_path / name for name in ("ours", "theirs", "flat"))
    qemu_img("create", "-q", "-f", "qcow2", "-o", f"cluster_size={cluster}", ours, "4M")
    with enban.open(ours, writable=True) as disk:
        fill(disk, 4)
    theirs.write_bytes(ours.read_bytes())
    qemu_img("convert", "-O", "raw", ours, flat)
    for options in (
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
        "size=8M",
        "refcount_bits=16,lazy_refcounts=off",
        "compat=v2",
        "compat=v3",
    ):
        command("amend", "-o", options, ours)
        qemu_img("amend", "-f", "qcow2", "-o", options, theirs)
        assert facts(ours) == facts(theirs), options
        qemu_check(ours)
        check_file(ours)
        qemu_img("compare", ours, theirs)
    with enban.open(ours) as disk:
        assert disk.size == 8 << 20 and disk.pread(4 << 20, 0) == flat.read_bytes()
    for options in ("cluster_size=8k", "compat=0.10,lazy_refcounts=on", "compat=0.10,refcount_bits=8"):
        qemu_img("amend", "-f", "qcow2", "-o", options, theirs, ok=(1,))
        refused("amend", "-o", options, ours)


def test_the_command(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", SIZE)
    assert "compat=" in command("amend", "-o", "help").out
    assert "cluster_size" not in command("amend", "-o", "help").out
    assert "give -o" in refused("amend", path)
    assert "which image" in refused("amend", "-o", "compat=1.1")
    command("amend", "-q", "-o", "compat=0.10", path)
    assert facts(path)["compat"] == "0.10"
