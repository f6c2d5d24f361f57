"""Dirty bitmaps shared with QEMU: each writes, and says the same of what both wrote."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

import enban
from enban.errors import ImageError
from tests.cli.command import command, environment
from tests.support import (
    KIB,
    MIB,
    check_file,
    make_qcow2,
    needs,
    needs_qemu_img,
    needs_qemu_io,
    pattern,
    qemu_check,
    qemu_img,
    qemu_io,
)

needs_qemu_nbd = needs("qemu-nbd", "qemu-utils")
needs_nbdinfo = needs("nbdinfo", "libnbd-bin")
needs_daemon = needs("qemu-storage-daemon", "qemu-system-common")


def same_info(path: Path) -> list[dict[str, Any]]:
    """`info` of both says the same of the bitmaps; what it says."""
    theirs = json.loads(qemu_img("info", "-U", "--output=json", path))["format-specific"]["data"].get(
        "bitmaps", []
    )
    ours = enban.image_info(str(path), force_share=True)[0]["format-specific"]["data"].get("bitmaps", [])
    assert ours == theirs
    return list(ours)


def dirty(path: Path, name: str) -> list[tuple[int, int]]:
    with enban.open(path) as disk:
        return list(disk.dirty(name))


@contextmanager
def process(socket: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server until the block ends; it is ready when its socket is there."""
    server = subprocess.Popen(words, env=environment(), stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not socket.exists():
            assert server.poll() is None and time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)
        yield server
    finally:
        server.terminate()
        server.wait(30)
        socket.unlink(missing_ok=True)


def nbd_map(socket: Path, name: str) -> list[tuple[int, int]]:
    """What a server says of a bitmap, by nbdinfo."""
    out = subprocess.run(
        ["nbdinfo", "--json", f"--map=qemu:dirty-bitmap:{name}", f"nbd+unix:///?socket={socket}"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    return [(e["offset"], e["length"]) for e in json.loads(out) if e["type"]]


def joined(extents: list[tuple[int, int]]) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for start, length in extents:
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], found[-1][1] + length)
        else:
            found.append((start, length))
    return found


def qemu_says(path: Path, name: str, folder: Path) -> list[tuple[int, int]]:
    """QEMU's view of a bitmap, over qemu-nbd."""
    socket = folder / "qemu.sock"
    words = ("qemu-nbd", "-r", "-t", "-f", "qcow2", "-B", name, "-k", str(socket), str(path))
    with process(socket, *words):
        return joined(nbd_map(socket, name))


SHAPES = [
    pytest.param({}, id="default"),
    pytest.param({"cluster_size": 512}, id="512"),
    pytest.param({"cluster_size": 4096, "refcount_bits": 1}, id="1-bit"),
    pytest.param({"cluster_size": 16384, "extended_l2": True}, id="extended"),
    pytest.param({"cluster_size": 2 * MIB}, id="2M"),
    pytest.param({"backing_file": "b" * 200 + ".raw", "backing_fmt": "raw"}, id="chain"),
    pytest.param({"backing_file": "base.raw", "backing_fmt": "raw", "cluster_size": 1024}, id="short-chain"),
]


@needs_qemu_img
@needs_qemu_io
@needs_qemu_nbd
@needs_nbdinfo
@pytest.mark.parametrize("creator", ["ours", "theirs"])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_write_one_image(tmp_path: Path, shape: dict[str, Any], creator: str) -> None:
    """Bitmaps made, changed and removed by either, writes by either: at every step both see the same."""
    random = Random(len(str(shape)))
    size = 3 * MIB + 512
    path = tmp_path / "disk.qcow2"
    if "backing_file" in shape:
        (tmp_path / shape["backing_file"]).write_bytes(pattern(MIB))
    if creator == "ours":
        make_qcow2(path, size, **shape)
    else:
        options = ",".join(f"{k}={'on' if v is True else v}" for k, v in shape.items())
        qemu_img("create", "-q", "-f", "qcow2", *(("-o", options) if options else ()), path, str(size))
    model: dict[str, set[int]] = {}
    for number in range(10):
        theirs = random.random() < 0.5
        action = random.choice(
            ("add", "add", "write", "write", "write", "clear", "remove", "merge", "toggle")
        )
        name = random.choice(sorted(model)) if model else ""
        if action == "add" or not model:
            name = f"bitmap-{number}"
            if theirs:
                qemu_img("bitmap", "--add", "-g", "4096", path, name)
            else:
                with enban.open(path, writable=True) as disk:
                    disk.add_bitmap(name, granularity=4096)
            model[name] = set()
        elif action == "write":
            offset, length = random.randrange(size - 200_000), random.randrange(1, 200_000)
            if theirs:
                qemu_io(path, f"write -P {number + 1} {offset} {length}")
            else:
                with enban.open(path, writable=True) as disk:
                    disk.pwrite(pattern(length, number), offset)
            for bits in model.values():
                bits |= set(range(offset // 4096, (offset + length - 1) // 4096 + 1))
        elif action == "toggle":
            for flag in ("--disable", "--enable"):
                if theirs:
                    qemu_img("bitmap", flag, path, name)
                else:
                    with enban.open(path, writable=True) as disk:
                        (disk.disable_bitmap if flag == "--disable" else disk.enable_bitmap)(name)
        elif action == "merge":
            other = random.choice(sorted(model))
            if theirs:
                qemu_img("bitmap", "--merge", other, path, name)
            else:
                with enban.open(path, writable=True) as disk:
                    disk.merge_bitmap(name, other)
            model[name] |= model[other]
        else:
            if theirs:
                qemu_img("bitmap", f"--{action}", path, name)
            else:
                with enban.open(path, writable=True) as disk:
                    (disk.clear_bitmap if action == "clear" else disk.remove_bitmap)(name)
            model[name].clear()
            if action == "remove":
                del model[name]
        qemu_check(path)
        check_file(path)
        assert sorted(b["name"] for b in same_info(path)) == sorted(model)
        for name, bits in model.items():
            seen = dirty(path, name)
            assert {n for s, k in seen for n in range(s // 4096, -(-(s + k) // 4096))} == bits, (number, name)
    for name in model:
        assert qemu_says(path, name, tmp_path) == dirty(path, name)


@needs_qemu_img
@needs_qemu_io
@needs_qemu_nbd
@needs_nbdinfo
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_other_sizes_and_snapshots(tmp_path: Path, first: str) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 2 * MIB, cluster_size=512)
    qemu_img("bitmap", "--add", "-g", "512", path, "b")
    qemu_img("bitmap", "--add", "-g", "64k", "--disable", path, "off")
    for size in (40 * MIB, 5 * MIB, 512, 9 * MIB):
        if first == "ours":
            with enban.open(path, writable=True) as disk:
                disk.create_snapshot(f"s{size}")
                disk.resize(size)
                disk.pwrite(b"x", size - 1)
        else:
            qemu_img("resize", "--shrink", path, str(size))
            qemu_io(path, f"write -P 7 {size - 512} 512")
        qemu_check(path)
        check_file(path)
        same_info(path)
        for name in ("b", "off"):
            assert qemu_says(path, name, tmp_path) == dirty(path, name)
        assert (size - 512) in {s + k - 512 for s, k in dirty(path, "b")}
    if first == "ours":
        with enban.open(path, writable=True) as disk:
            disk.apply_snapshot(f"s{5 * MIB}")
            assert list(disk.dirty("b")) == [(0, 40 * MIB)]
        qemu_check(path)
        assert qemu_says(path, "b", tmp_path) == [(0, 40 * MIB)]


@needs_qemu_img
@needs_qemu_io
def test_after_a_crash_of_either_the_other_does_not_believe(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    qemu_img("bitmap", "--add", path, "b")
    disk = enban.open(path, writable=True)
    disk.pwrite(b"x", 0)
    disk.flush()
    assert same_info(path)[0]["flags"] == ["in-use", "auto"]
    killed = tmp_path / "killed.qcow2"
    shutil.copy(path, killed)
    disk.close()
    assert same_info(path)[0]["flags"] == ["auto"]
    assert same_info(killed)[0]["flags"] == ["in-use", "auto"]
    qemu_img("bitmap", "--clear", killed, "b", ok=(1,))
    qemu_img("convert", "--bitmaps", "-O", "qcow2", killed, tmp_path / "t.qcow2", ok=(1,))
    qemu_io(killed, "write 0 64k")
    with enban.open(killed, writable=True) as again:
        with pytest.raises(ImageError, match="inconsistent"):
            again.clear_bitmap("b")
        again.remove_bitmap("b")
    qemu_check(killed)
    # And the other way round: a storage daemon that is killed.
    daemon = shutil.which("qemu-storage-daemon")
    if daemon is None:
        pytest.skip("qemu-storage-daemon is missing (Debian package qemu-system-common)")
    socket = tmp_path / "d.sock"
    words = (
        daemon,
        "--blockdev",
        f"driver=file,filename={path},node-name=f",
        "--blockdev",
        "driver=qcow2,file=f,node-name=q",
        "--nbd-server",
        f"addr.type=unix,addr.path={socket}",
        "--export",
        "type=nbd,id=e,node-name=q,name=,writable=on",
    )
    with process(socket, *words) as server:
        qemu_io(f"nbd+unix:///?socket={socket}", "write 64k 64k", options=("-f", "raw"))
        server.send_signal(signal.SIGKILL)
        server.wait(30)
    with enban.open(path) as disk:
        assert [b.inconsistent for b in disk.bitmaps()] == [True]


@needs_qemu_img
@needs_nbdinfo
@needs_qemu_io
def test_our_server_shows_what_qemu_wrote_through_it(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 8 * MIB)
    qemu_img("bitmap", "--add", "-g", "4096", path, "b")
    socket = tmp_path / "ours.sock"
    uri = f"nbd+unix:///?socket={socket}"
    with process(socket, *command("serve", "-B", "b", "-k", str(socket), path)):
        qemu_io(uri, "write 1M 100k", "write -z 3M 64k", "write -P 3 5M 4k", options=("-f", "raw"))
        expected = [(MIB, 100 * KIB), (5 * MIB, 4 * KIB)]
        seen = joined(nbd_map(socket, "b"))
        assert [e for e in seen if e[0] != 3 * MIB] == expected
        # QEMU as a client takes the context for the one it knows: dirty is "no data" there.
        image = f"driver=nbd,server.type=unix,server.path={socket},x-dirty-bitmap=qemu:dirty-bitmap:b"
        found = json.loads(qemu_img("map", "--output=json", "--image-opts", image))
        assert joined([(e["start"], e["length"]) for e in found if not e["data"]]) == seen
        listed = subprocess.run(
            ["nbdinfo", "--list", uri], capture_output=True, text=True, timeout=60, check=True
        )
        assert "qemu:dirty-bitmap:b" in listed.stdout
    assert dirty(path, "b") == seen
    qemu_check(path)
    same_info(path)


@needs_qemu_img
@needs_qemu_io
def test_bitmaps_that_were_copied_and_backups_are_what_qemu_takes_them_for(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 8 * MIB)
    qemu_io(path, "write -P 1 0 2M")
    enban.backup(path, tmp_path / "full.qcow2", bitmap="b")
    qemu_io(path, "write -P 2 1M 300k", "discard 0 64k")
    copy = tmp_path / "copy.qcow2"
    enban.convert(path, copy, target_format="qcow2", bitmaps=True)
    assert same_info(copy) == same_info(path) and dirty(copy, "b") == dirty(path, "b")
    qemu_check(copy)
    theirs = tmp_path / "theirs.qcow2"
    qemu_img("convert", "--bitmaps", "-O", "qcow2", copy, theirs)
    assert same_info(theirs) == same_info(path) and dirty(theirs, "b") == dirty(path, "b")
    enban.backup(path, tmp_path / "next.qcow2", bitmap="b", base=tmp_path / "full.qcow2")
    qemu_img("compare", path, tmp_path / "next.qcow2")
    qemu_check(tmp_path / "next.qcow2")
    qemu_check(path)
    assert (
        json.loads(qemu_img("info", "--output=json", tmp_path / "next.qcow2"))["backing-filename"]
        == "full.qcow2"
    )


@needs_qemu_img
def test_many_bitmaps(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB, cluster_size=4096)
    with enban.open(path, writable=True) as disk:
        for number in range(100):
            disk.add_bitmap(f"bitmap number {number} \u65e5", granularity=512)
        disk.pwrite(b"x", 5000)
    assert len(same_info(path)) == 100
    qemu_check(path)
    qemu_img("bitmap", "--merge", "bitmap number 7 \u65e5", path, "bitmap number 99 \u65e5")
    with enban.open(path, writable=True) as disk:
        for number in range(0, 100, 2):
            assert list(disk.dirty(f"bitmap number {number} \u65e5")) == [(4608, 512)]
            disk.remove_bitmap(f"bitmap number {number} \u65e5")
    assert len(same_info(path)) == 50
    qemu_check(path)


@needs_qemu_img
@needs_qemu_io
@needs_qemu_nbd
def test_our_client_reads_the_bitmap_of_qemus_server(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 8 * MIB)
    qemu_img("bitmap", "--add", "-g", "64k", path, "b")
    qemu_io(path, "write 1M 100k", "write 5M 4k")
    socket = tmp_path / "qemu.sock"
    with (
        process(
            socket, "qemu-nbd", "-r", "-t", "-e", "4", "-f", "qcow2", "-B", "b", "-k", str(socket), str(path)
        ),
        enban.open(f"nbd+unix:///?socket={socket}") as disk,
    ):
        assert list(disk.dirty("b")) == [(MIB, 128 * KIB), (5 * MIB, 64 * KIB)]


@needs_qemu_img
def test_bitmaps_of_a_chain(tmp_path: Path) -> None:
    """What commits and kept snapshots write to an image below is recorded there; a header that changes for
    other reasons keeps its bitmaps."""
    base, top = tmp_path / "base.qcow2", tmp_path / "top.qcow2"
    make_qcow2(base, 16 * MIB)
    qemu_img("bitmap", "--add", base, "b")
    with enban.open(base, writable=True, snapshot=True) as disk:
        disk.pwrite(b"x" * 100_000, 3 * MIB)
        assert disk.bitmaps() == []
        disk.commit()
    assert dirty(base, "b") == [(3 * MIB, 128 * KIB)]
    qemu_img("create", "-q", "-f", "qcow2", "-b", base.name, "-F", "qcow2", top)
    with enban.open(top, writable=True) as disk:
        disk.add_bitmap("t")
        disk.pwrite(b"y", 9 * MIB)
    enban.commit(str(top))
    assert dirty(base, "b") == [(3 * MIB, 128 * KIB), (9 * MIB, 64 * KIB)]
    assert dirty(top, "t") == [(9 * MIB, 64 * KIB)]
    other = tmp_path / ("b" * 180 + ".qcow2")
    shutil.copy(base, other)
    for name in (other.name, "", base.name):
        enban.rebase(str(top), name, backing_format="qcow2" if name else "", unsafe=True)
        assert [b["name"] for b in same_info(top)] == ["t"]
        with enban.open(top, writable=True) as disk:
            disk.add_bitmap("second")
            assert disk.node.backing_name == name
            disk.remove_bitmap("second")
        info = json.loads(qemu_img("info", "--output=json", top))
        assert info.get("backing-filename", "") == name
        qemu_check(top)
        check_file(top)
    assert dirty(top, "t") == [(9 * MIB, 64 * KIB)]
    with enban.open(top, writable=True) as disk:
        disk.clear_bitmap("t")
        disk.write_vm_state(b"v" * 300_000, 0)
        assert list(disk.dirty("t")) == []
    qemu_check(top)
