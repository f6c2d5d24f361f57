"""Snapshots made by QEMU used by enban, and the reverse, `qemu-img check` clean at every step."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

import enban
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.catalog import open_door
from enban.cli import main
from tests.support import make_qcow2, needs_qemu_img, qemu_check, qemu_img

SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"cluster_size": 512}, id="512"),
    pytest.param({"cluster_size": 4096, "refcount_bits": 8}, id="4k-8bit"),
    pytest.param({"cluster_size": 16384, "extended_l2": True}, id="extended"),
    pytest.param({"compat": "0.10", "cluster_size": 4096}, id="v2"),
]


@needs_qemu_img
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(2))
def test_both_programs_on_one_image(tmp_path: Path, shape: dict[str, object], seed: int) -> None:
    random = Random(seed)
    size = 1 << 20
    path = make_qcow2(tmp_path / "disk.qcow2", size, **shape)
    model = bytearray(size)
    kept: dict[str, bytes] = {}
    for number in range(24):
        with enban.open(path, writable=True) as disk:
            for _ in range(4):
                offset = random.randrange(len(model))
                length = min(len(model) - offset, random.choice([512, 9000, 80000]))
                if random.random() < 0.8:
                    data = random.randbytes(length)
                    disk.pwrite(data, offset)
                else:
                    disk.discard(offset, length)
                    data = disk.pread(length, offset)
                    old = model[offset : offset + length]
                    assert all(new in (before, 0) for new, before in zip(data, old, strict=True))
                model[offset : offset + length] = data
        if random.random() < 0.2 and shape.get("compat") != "0.10":
            new_size = random.randrange(1, 5) << 18
            if random.random() < 0.5:
                qemu_img("resize", "-q", "--shrink", path, str(new_size))
            else:
                with enban.open(path, writable=True) as disk:
                    disk.resize(new_size)
            model = model[:new_size] + bytes(max(0, new_size - len(model)))
            qemu_check(path)
        theirs = random.random() < 0.5
        action = random.choice(["-c", "-c", "-a", "-d"]) if kept else "-c"
        name = f"s{number}" if action == "-c" else random.choice(list(kept))
        if theirs:
            qemu_img("snapshot", action, name, path)
        else:
            with enban.open(path, writable=True) as disk:
                if action == "-c":
                    disk.create_snapshot(name)
                elif action == "-a":
                    disk.apply_snapshot(name)
                else:
                    disk.delete_snapshot(name)
        if action == "-c":
            kept[name] = bytes(model)
        elif action == "-a":
            model = bytearray(kept[name])
        else:
            del kept[name]
        qemu_check(path)
        with enban.open(path) as disk:
            assert disk.size == len(model) and disk.pread(disk.size, 0) == model
    for name, content in kept.items():
        out = tmp_path / "out.raw"
        qemu_img("convert", "-l", f"snapshot.name={name}", "-O", "raw", path, out)
        # QEMU 7.2 shows a snapshot in the size that the disk has now.
        length = min(len(content), len(model))
        assert out.read_bytes()[:length] == content[:length]
        with Disk(drive(open_door(str(path), BLOCKING, snapshot_name=name))) as disk:
            assert disk.pread(disk.size, 0) == content


@needs_qemu_img
def test_both_mean_the_same_by_a_name_that_is_the_id_of_another(tmp_path: Path) -> None:
    ours, theirs = (make_qcow2(tmp_path / name, 1 << 20) for name in ("ours", "theirs"))
    for path in (ours, theirs):
        for name in ("a", "1"):
            with enban.open(path, writable=True) as disk:
                disk.pwrite(name.encode(), 0)
                disk.create_snapshot(name)
    outs = tmp_path / "ours.raw", tmp_path / "theirs.raw"
    assert main(["convert", "-l", "1", "-O", "raw", str(ours), str(outs[0])]) == 0
    qemu_img("convert", "-l", "1", "-O", "raw", theirs, outs[1])
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert main(["snapshot", "-a", "1", str(ours)]) == 0
    qemu_img("snapshot", "-a", "1", theirs)
    assert main(["snapshot", "-d", "1", str(ours)]) == 0
    qemu_img("snapshot", "-d", "1", theirs)
    found = []
    for path in (ours, theirs):
        with enban.open(path) as disk:
            found.append((disk.pread(1, 0), [(s.id, s.name) for s in disk.snapshots]))
    assert found[0] == found[1]


@needs_qemu_img
def test_hundreds_of_snapshots(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with enban.open(path, writable=True) as disk:
        for number in range(300):
            disk.pwrite(number.to_bytes(2, "big") * 256, number * 512)
            disk.create_snapshot(f"n{number}")
    qemu_check(path)
    listed = qemu_img("snapshot", "-l", path)
    assert all(f"n{number} " in listed for number in range(300))
    with enban.open(path, writable=True) as disk:
        for number in range(0, 300, 2):
            disk.delete_snapshot(f"n{number}")
        disk.apply_snapshot("n151")
        assert disk.pread(512, 151 * 512) == (151).to_bytes(2, "big") * 256
        assert disk.pread(512, 152 * 512) == bytes(512)
    qemu_check(path)
    assert path.stat().st_size < 70 << 20  # 300 times an L1, an L2 and a data cluster of 64 KiB are 56 MiB
