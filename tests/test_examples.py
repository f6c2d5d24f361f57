"""Every program in examples/ does what its first lines say, as a process of its own."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import enban
from tests.support import MIB, check_file, needs, pattern

if TYPE_CHECKING:
    from enban.block.storage import ReadBuffer

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(folder: Path, name: str, *words: str | Path, code: int = 0) -> list[str]:
    """Run an example in a folder. Returns its lines; of a failure, the one line of complaint."""
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / f"{name}.py", *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, f"{name} {words}: {done.returncode}\n{done.stdout}{done.stderr}"
    if code == 0:
        assert not done.stderr, done.stderr
        return done.stdout.splitlines()
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    return lines


def write(path: Path, *parts: tuple[int, ReadBuffer]) -> None:
    with enban.open(path, writable=True, gate=enban.TRUSTED) as disk:
        for offset, content in parts:
            disk.pwrite(content, offset)


def read(path: Path, length: int, offset: int) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(length, offset)


def content_of(path: Path) -> bytes:
    with enban.open(path) as disk:
        return disk.pread(disk.size, 0)


def image(path: Path, size: int = 4 * MIB, *parts: tuple[int, ReadBuffer], **options: str) -> Path:
    enban.create(str(path), "qcow2", options, size=size)
    write(path, *parts)
    return path


# A call of each example with an image that is not there.
WITHOUT_IMAGE = {
    "archive_in_disk": ("none.qcow2",),
    "changes": ("save", "none.qcow2", "changes.bin"),
    "copy_async": ("none.qcow2", "copy.qcow2"),
    "overlay": ("none.qcow2", "keep"),
    "partitions": ("none.qcow2",),
    "picture": ("none.qcow2",),
    "rollback": ("none.qcow2", "0=text"),
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_says_how_it_is_called_and_what_is_missing(path: Path, tmp_path: Path) -> None:
    assert run(tmp_path, path.stem, code=2)[0].startswith(f"usage: {path.name} ")
    complaint = run(tmp_path, path.stem, *WITHOUT_IMAGE[path.stem], code=1)[0]
    assert complaint.startswith(f"{path.stem}: none.qcow2: cannot open")
    assert complaint.endswith(": no such file or directory")


# -- partitions ------------------------------------------------------------------------------


def superblock(label: bytes, *, blocks: int = 1000, free: int = 250) -> bytes:
    """The fields of an ext4 superblock that the example shows."""
    block = bytearray(1024)
    struct.pack_into("<III", block, 4, blocks, 0, free)
    struct.pack_into("<IH", block, 24, 2, 0)
    struct.pack_into("<H", block, 56, 0xEF53)
    struct.pack_into("<II", block, 92, 4, 0x40)
    block[104:120] = bytes(range(16))
    block[120 : 120 + len(label)] = label
    return bytes(block)


def test_partitions_of_an_mbr(tmp_path: Path) -> None:
    sector = bytearray(512)
    for slot, (kind, first, count) in enumerate(((0x83, 2048, 2048), (0x82, 4096, 1024))):
        struct.pack_into("<B3xB3xII", sector, 446 + 16 * slot, 0, kind, first, count)
    sector[510:] = b"\x55\xaa"
    disk = image(tmp_path / "d.qcow2", 4 * MIB, (0, sector), (MIB + 1024, superblock(b"data")))
    assert run(tmp_path, "partitions", disk.name) == [
        f"d.qcow2: qcow2, {4 * MIB} bytes",
        "  1: 0x100000 + 0x100000  0x83",
        "     ext4 'data' 00010203-0405-0607-0809-0a0b0c0d0e0f, 1000 blocks of 4096 bytes, 75 % used",
        "  2: 0x200000 + 0x80000  0x82",
    ]


def test_partitions_of_a_gpt(tmp_path: Path) -> None:
    mbr, header, entry = bytearray(512), bytearray(512), bytearray(128)
    struct.pack_into("<B3xB3xII", mbr, 446, 0, 0xEE, 1, 0xFFFFFFFF)
    mbr[510:] = b"\x55\xaa"
    header[:8] = b"EFI PART"
    struct.pack_into("<QII", header, 72, 2, 4, 128)
    entry[:16] = bytes.fromhex("af3dc60f838472478e793d69d8477de4")
    struct.pack_into("<QQ", entry, 32, 2048, 4095)
    entry[56:64] = "root".encode("utf-16-le")
    disk = image(tmp_path / "d.qcow2", 4 * MIB, (0, mbr), (512, header), (1024, entry))
    assert run(tmp_path, "partitions", disk.name)[1:] == [
        "  1: 0x100000 + 0x100000  0fc63daf-8483-4772-8e79-3d69d8477de4 root"
    ]


@needs("mkfs.ext4", "e2fsprogs")
def test_partitions_of_a_real_file_system(tmp_path: Path) -> None:
    subprocess.run(
        ["mkfs.ext4", "-q", "-F", "-L", "real", "-b", "4096", "real.raw", "16M"], cwd=tmp_path, check=True
    )
    lines = run(tmp_path, "partitions", "real.raw")
    assert lines[1] == f"  -: 0x0 + {16 * MIB:#x}  whole disk"
    assert "ext4 'real'" in lines[2] and "4096 blocks of 4096 bytes" in lines[2]


def test_partitions_of_rubbish(tmp_path: Path) -> None:
    """Numbers of a hostile table neither end the program nor make it read past the disk."""
    header = bytearray(512)
    header[:8] = b"EFI PART"
    struct.pack_into("<QII", header, 72, (1 << 64) - 1, 0xFFFF, 128)
    mbr = bytearray(512)
    struct.pack_into("<B3xB3xII", mbr, 446, 0, 0xEE, 1, 0xFFFFFFFF)
    mbr[510:] = b"\x55\xaa"
    for name, count in (("many", 0xFFFF), ("far", 4)):
        struct.pack_into("<I", header, 80, count)
        image(tmp_path / name, MIB, (0, mbr), (512, header))
        assert run(tmp_path, "partitions", name)[1:] == [f"  -: 0x0 + {MIB:#x}  whole disk"]


# -- the others ------------------------------------------------------------------------------


def test_copy_async(tmp_path: Path) -> None:
    content = pattern(3 * MIB - 512)
    disk = image(tmp_path / "a.qcow2", 8 * MIB, (70_000, content))
    assert run(tmp_path, "copy_async", "a.qcow2", "b.qcow2") == [f"{49 * 65536} bytes copied"]
    assert content_of(tmp_path / "b.qcow2") == content_of(disk)
    check_file(tmp_path / "b.qcow2")


@pytest.mark.parametrize("decision", ["keep", "drop"])
def test_overlay(tmp_path: Path, decision: str) -> None:
    base = image(tmp_path / "base.qcow2", 4 * MIB, (0, b"from below".ljust(65536)))
    lines = run(tmp_path, "overlay", "base.qcow2", decision)
    after = b"written through the overlay" if decision == "keep" else b"from below".ljust(27)
    assert lines[0] == f"the overlay itself holds 65536 of {4 * MIB} bytes"
    assert lines[1].endswith("b'written through the overlay'")
    assert lines[2].endswith(repr(b"from below".ljust(27)))
    assert lines[-1] == f"now:     {after!r}"
    assert read(base, 27, 0) == after
    check_file(base)
    assert [path.name for path in tmp_path.iterdir()] == ["base.qcow2"]


def test_picture(tmp_path: Path) -> None:
    image(tmp_path / "base.qcow2", 8 * MIB, (0, pattern(2 * MIB)))
    enban.create(str(tmp_path / "top.qcow2"), "qcow2", {"backing_file": "base.qcow2", "backing_fmt": "qcow2"})
    write(tmp_path / "top.qcow2", (6 * MIB, b"x" * MIB))
    *lines, empty, legend = run(tmp_path, "picture", "top.qcow2", "8")
    assert lines == ["++++++++"] * 4 + ["........"] * 8 + ["########"] * 2 + ["........"] * 2
    assert not empty
    assert legend == "one character: 64 KiB   # data   + data below   . nothing"


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_archive_in_disk(tmp_path: Path, kind: str) -> None:
    members = {"one.txt": b"the first", "two.bin": os.urandom(100_000)}
    packed = io.BytesIO()
    if kind == "tar":
        with tarfile.open(fileobj=packed, mode="w") as archive:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)
    content = packed.getvalue()
    image(tmp_path / "a.qcow2", len(content), (0, content))
    assert run(tmp_path, "archive_in_disk", "a.qcow2") == list(members)
    assert run(tmp_path, "archive_in_disk", "a.qcow2", "one.txt") == ["the first"]
    assert "no" in run(tmp_path, "archive_in_disk", "a.qcow2", "three", code=1)[0]


def test_archive_in_disk_without_an_archive(tmp_path: Path) -> None:
    image(tmp_path / "a.qcow2", MIB, (0, pattern(MIB)))
    complaint = run(tmp_path, "archive_in_disk", "a.qcow2", code=1)
    assert complaint == ["archive_in_disk: a.qcow2 holds no tar or zip archive"]


def test_rollback(tmp_path: Path) -> None:
    disk = image(tmp_path / "a.qcow2", 4 * MIB, (0, pattern(MIB)))
    before = content_of(disk)
    assert "outside the disk" in run(tmp_path, "rollback", "a.qcow2", "0=new", "1G=far", code=1)[0]
    assert content_of(disk) == before
    assert run(tmp_path, "rollback", "a.qcow2", "0=new", "64k=text") == ["2 changes made"]
    assert read(disk, 3, 0) + read(disk, 4, 65536) == b"newtext"
    with enban.open(disk) as opened:
        assert not opened.snapshots
    check_file(disk)


def test_changes(tmp_path: Path) -> None:
    base = image(tmp_path / "base.qcow2", 4 * MIB, (0, pattern(2 * MIB)))
    enban.create(str(tmp_path / "top.qcow2"), "qcow2", {"backing_file": "base.qcow2", "backing_fmt": "qcow2"})
    write(tmp_path / "top.qcow2", (100_000, b"changed"), (3 * MIB, b"new"))
    with enban.open(tmp_path / "top.qcow2", writable=True) as top:
        top.write_zeroes(MIB, 65536)
    want = content_of(tmp_path / "top.qcow2")
    assert run(tmp_path, "changes", "save", "top.qcow2", "c.bin") == [f"{3 * 65536} bytes"]
    assert (tmp_path / "c.bin").stat().st_size == 3 * (65536 + 16)
    assert run(tmp_path, "changes", "load", "c.bin", "base.qcow2") == [f"{3 * 65536} bytes"]
    assert content_of(base) == want
    (tmp_path / "c.bin").write_bytes((tmp_path / "c.bin").read_bytes()[:-1])
    assert "no complete file of changes" in run(tmp_path, "changes", "load", "c.bin", "base.qcow2", code=1)[0]
