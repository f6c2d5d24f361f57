"""qcow images go to and fro between enban and QEMU: the same bytes on both sides."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.runtime import drive
from enban.formats.qcow.node import QcowNode
from tests.qcow_support import PASSPHRASE, check_sound, make_qcow, needs_cryptography
from tests.support import KIB, MIB, needs_qemu_img, needs_qemu_io, pattern, qemu_img, qemu_io

# (size, cluster size): QEMU makes only 4096 and, with a backing file, 512; it reads all.
SHAPES = [
    (512, 4096),
    (1536, 512),
    (4096, 4096),
    (2 * MIB, 4096),  # exactly one L2 table
    (2 * MIB + 512, 4096),
    (5 * MIB - 1024, 4096),
    (3 * MIB + 512, 512),
    (3 * MIB, 65536),
    (300 * KIB, 16384),
]


def mixed(size: int, seed: int) -> bytes:
    """Runs of zeros, of repeated bytes and of noise, of any length."""
    choose = random.Random(seed)
    out = bytearray()
    while len(out) < size:
        length = choose.choice((100, 512, 4096, 5000, 64 * KIB, 300 * KIB))
        kind = choose.randrange(3)
        out += (
            bytes(length)
            if kind == 0
            else bytes([choose.randrange(256)]) * length
            if kind == 1
            else choose.randbytes(length)
        )
    return bytes(out[:size])


def fill(disk: Disk, content: bytes, *, packed: bool = False) -> None:
    """Write what is not zero, in clusters."""
    cluster = disk.node.cluster_size
    deflate = deflater("zlib")
    for at in range(0, len(content), cluster):
        part = content[at : at + cluster]
        if not any(part):
            continue
        small = deflate(part.ljust(cluster, b"\0")) if packed else b""
        if packed and len(small) < cluster:
            disk.write_packed(small, at)
        else:
            disk.pwrite(part, at)


def secret(directory: Path) -> tuple[str, ...]:
    (directory / "key").write_bytes(PASSPHRASE)
    return "--object", f"secret,id=key,file={directory / 'key'}"


def encrypted_name(path: Path) -> str:
    return f"driver=qcow,encrypt.format=aes,encrypt.key-secret=key,file.filename={path}"


def encrypted_reference(path: Path) -> dict[str, Any]:
    return {
        "driver": "qcow",
        "file": {"filename": str(path)},
        "encrypt": {"key-file": str(path.parent / "key")},
    }


def qemu_packs(raw: Path, path: Path) -> None:
    """QEMU's `convert -c`. For qcow it (7.2) writes all of the image and then exits with 1, without
    a word: a last call that means "no more data" is refused. So the result is compared."""
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow", raw, path, ok=(0, 1))
    qemu_img("compare", "-f", "raw", "-F", "qcow", raw, path)


def qemu_reads(path: Path, content: bytes) -> None:
    raw = path.with_suffix(".seen")
    qemu_img("convert", "-f", "qcow", "-O", "raw", path, raw)
    assert raw.read_bytes() == content
    raw.unlink()


@needs_qemu_img
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("size", sorted({size for size, _ in SHAPES}))
def test_what_qemu_wrote(size: int, packed: bool, tmp_path: Path) -> None:
    content = mixed(size, size)
    (tmp_path / "x.raw").write_bytes(content)
    path = tmp_path / "x.qcow"
    if packed:
        qemu_packs(tmp_path / "x.raw", path)
    else:
        qemu_img("convert", "-f", "raw", "-O", "qcow", tmp_path / "x.raw", path)
    with enban.open(path) as disk:
        assert disk.format == "qcow" and disk.size == size
        assert disk.pread(size, 0) == content
    assert check_sound(path.read_bytes()).read() == content


@needs_qemu_img
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize(("size", "cluster"), SHAPES)
def test_what_enban_wrote(size: int, cluster: int, packed: bool, tmp_path: Path) -> None:
    content = mixed(size, size + 1)
    path = make_qcow(
        tmp_path / "x.qcow", size, cluster_size=cluster, l2_entries=4096 if cluster == 512 else 512
    )
    with enban.open(path, writable=True) as disk:
        fill(disk, content, packed=packed)
    qemu_reads(path, content)
    info = json.loads(qemu_img("info", "--output=json", path))
    assert (info["format"], info["virtual-size"], info["cluster-size"]) == ("qcow", size, cluster)


@needs_qemu_img
def test_a_new_image_has_the_same_bytes(tmp_path: Path) -> None:
    for number, (size, backing) in enumerate(
        [(512, ""), (1000, ""), (10 * MIB, ""), (7 * MIB + 512, "base.raw")]
    ):
        ours, theirs = tmp_path / f"ours{number}", tmp_path / f"theirs{number}"
        (tmp_path / "base.raw").write_bytes(bytes(MIB))
        make_qcow(ours, size, **({"backing_file": backing} if backing else {}))
        qemu_img(
            "create",
            "-q",
            "-f",
            "qcow",
            *(["-b", backing, "-F", "raw"] if backing else []),
            theirs,
            str(size),
        )
        assert ours.read_bytes() == theirs.read_bytes()


@needs_qemu_io
@needs_qemu_img
def test_patterns_in_turn(tmp_path: Path) -> None:
    """QEMU and enban write into one image by turns, over plain, packed and unallocated clusters."""
    size = 5 * MIB
    content = bytearray(mixed(size, 9))
    (tmp_path / "x.raw").write_bytes(content)
    path = tmp_path / "x.qcow"
    qemu_packs(tmp_path / "x.raw", path)
    choose = random.Random(4)
    for turn in range(8):
        commands = []
        ranges = [
            (choose.randrange(size - 70 * KIB), choose.choice((1, 700, 4096, 66 * KIB))) for _ in range(8)
        ]
        for number, (offset, length) in enumerate(ranges):
            byte = turn * 8 + number + 1
            content[offset : offset + length] = bytes([byte]) * length
            commands.append(f"write -P {byte} {offset} {length}")
        if turn % 2:
            qemu_io(path, *commands, options=("-f", "qcow"))
        else:
            with enban.open(path, writable=True) as disk:
                for number, (offset, length) in enumerate(ranges):
                    disk.pwrite(bytes([turn * 8 + number + 1]) * length, offset)
        with enban.open(path) as disk:
            assert disk.pread(size, 0) == content
        qemu_reads(path, bytes(content))
        assert check_sound(path.read_bytes()).read() == content


@needs_qemu_io
@needs_qemu_img
def test_patterns_are_verified_by_the_other_side(tmp_path: Path) -> None:
    path = tmp_path / "x.qcow"
    qemu_img("create", "-q", "-f", "qcow", path, "64M")
    qemu_io(path, "write -P 0xa5 1M 3M", "write -P 0x5a 4095 2", "write -z 2M 64k", options=("-f", "qcow"))
    with enban.open(path, writable=True) as disk:
        assert disk.pread(MIB, MIB) == b"\xa5" * MIB
        assert disk.pread(4, 4094) == b"\0\x5a\x5a\0"
        assert disk.pread(64 * KIB, 2 * MIB) == bytes(64 * KIB)
        disk.pwrite(b"\x77" * 100_000, 33 * MIB + 1)
        disk.write_zeroes(3 * MIB, 5000)
    qemu_io(
        path,
        "read -P 0xa5 1M 1M",
        "read -P 0 3M 5000",
        f"read -P 0xa5 {3 * MIB + 5000} 100",
        f"read -P 0x77 {33 * MIB + 1} 100000",
        f"read -P 0 {33 * MIB + 100_001} 4096",
        options=("-f", "qcow"),
    )


@needs_qemu_io
@needs_qemu_img
@pytest.mark.parametrize("below", ["raw", "qcow2", "qcow"])
@pytest.mark.parametrize("maker", ["qemu", "enban"])
def test_chains(below: str, maker: str, tmp_path: Path) -> None:
    size, base_size = 3 * MIB, 2 * MIB + 512
    content = bytearray(pattern(base_size, 2).ljust(size, b"\0"))
    (tmp_path / "base.raw").write_bytes(content[:base_size])
    base = tmp_path / f"base.{below}"
    if below != "raw":
        qemu_img("convert", "-f", "raw", "-O", below, tmp_path / "base.raw", base)
    path = tmp_path / "top.qcow"
    if maker == "qemu":
        qemu_img("create", "-q", "-f", "qcow", "-b", base.name, "-F", below, path, str(size))
    else:
        make_qcow(path, size, backing_file=base.name, backing_fmt=below)
    qemu_io(
        path,
        "write -P 9 1000 10",
        "write -P 8 1M 70k",
        f"write -P 7 {base_size - 3} 6",
        options=("-f", "qcow"),
    )
    for offset, length, byte in ((1000, 10, 9), (MIB, 70 * KIB, 8), (base_size - 3, 6, 7)):
        content[offset : offset + length] = bytes([byte]) * length
    with enban.open(path, writable=True) as disk:
        assert disk.node.cluster_size == 512
        assert disk.pread(size, 0) == content
        disk.pwrite(b"\xee" * 3000, 5000)
        content[5000:8000] = b"\xee" * 3000
        disk.write_zeroes(64 * KIB, 64 * KIB + 100)
        content[64 * KIB : 128 * KIB + 100] = bytes(64 * KIB + 100)
        assert disk.pread(size, 0) == content
    qemu_reads(path, bytes(content))


@needs_qemu_img
@needs_cryptography
@pytest.mark.parametrize("size", [512, MIB + 512, 3 * MIB])
def test_encrypted_by_qemu(size: int, tmp_path: Path) -> None:
    content = mixed(size, size)
    (tmp_path / "x.raw").write_bytes(content)
    path = tmp_path / "x.qcow"
    qemu_img(
        "convert",
        *secret(tmp_path),
        *("-f", "raw", "-O", "qcow", "-o", "encrypt.format=aes,encrypt.key-secret=key"),
        *(tmp_path / "x.raw", path),
    )
    with enban.open(encrypted_reference(path)) as disk:
        assert disk.pread(size, 0) == content


@needs_qemu_io
@needs_qemu_img
@needs_cryptography
@pytest.mark.parametrize("backing", [False, True], ids=["alone", "overlay"])
def test_encrypted_in_turn(backing: bool, tmp_path: Path) -> None:
    size = 2 * MIB + 512
    content = bytearray(pattern(MIB + 5 * 512, 6).ljust(size, b"\0") if backing else bytes(size))
    (tmp_path / "base.raw").write_bytes(content[: MIB + 5 * 512])
    path = make_qcow(
        tmp_path / "x.qcow", size, encrypt_format="aes", **({"backing_file": "base.raw"} if backing else {})
    )
    objects = secret(tmp_path)
    choose = random.Random(size)
    for turn in range(4):
        commands = []
        ranges = [
            (choose.randrange(size - 40 * KIB), choose.choice((1, 511, 4096, 40_000))) for _ in range(6)
        ]
        with enban.open(encrypted_reference(path), writable=True) as disk:
            for number, (offset, length) in enumerate(ranges):
                byte = turn * 6 + number + 1
                content[offset : offset + length] = bytes([byte]) * length
                if turn % 2:
                    disk.pwrite(bytes([byte]) * length, offset)
                else:
                    commands.append(f"write -P {byte} {offset} {length}")
        if commands:
            qemu_io(encrypted_name(path), *commands, options=(*objects, "--image-opts"))
        with enban.open(encrypted_reference(path)) as disk:
            assert disk.pread(size, 0) == content
        seen = tmp_path / "seen.raw"
        qemu_img("convert", *objects, "--image-opts", encrypted_name(path), "-O", "raw", seen)
        assert seen.read_bytes() == content


@needs_qemu_img
def test_after_a_resize_and_a_new_backing_file(tmp_path: Path) -> None:
    """QEMU can do neither, but reads the result."""
    (tmp_path / "one.raw").write_bytes(b"1" * MIB)
    (tmp_path / "two.raw").write_bytes(b"2" * MIB)
    path = make_qcow(tmp_path / "x.qcow", MIB, backing_file="one.raw")
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x" * 5000, 1000)
        disk.resize(9 * MIB)
        disk.pwrite(b"y" * 5000, 8 * MIB)
        assert isinstance(disk.node, QcowNode)
        drive(disk.node.set_backing("two.raw", "raw"))
    content = bytearray(b"2" * MIB + bytes(8 * MIB))
    content[1000:6000] = b"x" * 5000
    content[8 * MIB : 8 * MIB + 5000] = b"y" * 5000
    content[512:1000] = b"1" * 488  # copied with the first write to that cluster
    content[6000:6144] = b"1" * 144
    qemu_reads(path, bytes(content))
    assert "two.raw" in qemu_img("info", path)
