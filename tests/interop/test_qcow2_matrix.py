"""qcow2 and QEMU, both directions, over the whole matrix of options.

What enban writes, `qemu-img check` calls clean and QEMU reads identically; what qemu-img and
qemu-io write, enban reads identically and the independent check finds clean, also after enban
has written on top of it.
"""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

import enban
from enban.block.codec import deflater
from enban.block.runtime import drive
from enban.formats.qcow2.node import Qcow2Node
from enban.jobs.create import create
from enban.lab.qcow2_reader import Qcow2Reader
from enban.units import parse_size
from tests.support import (
    KIB,
    MIB,
    Face,
    check_file,
    needs_qemu_img,
    needs_qemu_io,
    pattern,
    qemu_check,
    qemu_img,
    qemu_io,
    qemu_same,
)

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
OPTIONS = [
    *(f"cluster_size={size}" for size in CLUSTER_SIZES),
    *(f"cluster_size={size},compat=0.10" for size in (512, 4096, 65536, 2 * MIB)),
    *(
        f"refcount_bits={1 << order},cluster_size={size}"
        for order, size in enumerate((4096, 512, 65536) * 2 + (512,))
    ),
    "lazy_refcounts=on",
    "compression_type=zstd",
    "extended_l2=on,cluster_size=16k",
    "extended_l2=on",
    "extended_l2=on,cluster_size=2M,refcount_bits=1",
    "preallocation=metadata",
    "preallocation=metadata,cluster_size=512",
    "preallocation=metadata,extended_l2=on",
    "preallocation=falloc,cluster_size=4k",
    "preallocation=full,compat=0.10",
    "data_file=data.raw",
    "data_file=data.raw,cluster_size=512",
    "data_file=data.raw,extended_l2=on,cluster_size=16k",
    "data_file=data.raw,data_file_raw=on,cluster_size=4k",
    "data_file=data.raw,data_file_raw=on,preallocation=metadata",
]
SIZES = [0, 512, 64 * KIB - 512, 64 * KIB + 512, MIB + 1536]

pytestmark = [pytest.mark.interop]


def options_of(text: str) -> dict[str, str]:
    return dict(item.split("=") for item in text.split(",") if item)


def cluster_of(text: str) -> int:
    return parse_size(options_of(text).get("cluster_size", "64k"))


def size_for(text: str) -> int:
    """Large enough for several L2 tables where clusters are small, with a tail inside a cluster."""
    return {512: 300 * KIB + 512}.get(cluster_of(text), max(MIB, 3 * cluster_of(text)) + 1536)


Plan = list[tuple[str, int, int, int]]


def plan(seed: int, size: int, cluster: int, count: int = 14) -> Plan:
    """(operation, offset, length, byte): whole sectors; some in a cluster, some over several."""
    random, steps = Random(seed), []
    for number in range(count if size else 0):
        operation = random.choice(("write", "write", "write", "zero", "unmap", "discard"))
        length = min(random.choice((512, 1536, cluster, 2 * cluster + 512)), 600 * KIB)
        offset = random.randrange(size // 512) * 512
        if random.random() < 0.4:
            offset -= offset % cluster
        steps.append((operation, offset, min(length, size - offset), number + 1))
    return steps


def write_with_enban(path: Path, steps: Plan) -> bytes:
    """Do a plan and return what the disk shows then."""
    with enban.open(path, writable=True, cache="unsafe") as disk:
        for operation, offset, length, byte in steps:
            if operation == "write":
                disk.pwrite(bytes([byte]) * length, offset)
            elif operation == "discard":
                disk.discard(offset, length)
            else:
                disk.write_zeroes(offset, length, unmap=operation == "unmap")
        return disk.pread(disk.size, 0)


def write_with_qemu(path: Path, steps: Plan) -> None:
    names = {
        "write": "write -q -P {2}",
        "zero": "write -q -z",
        "unmap": "write -q -z -u",
        "discard": "discard -q",
    }
    commands = [
        f"{names[op].format(0, 0, byte)} {offset} {length}" for op, offset, length, byte in steps if length
    ]
    if commands:
        qemu_io(path, *commands, options=("-f", "qcow2", "-d", "unmap"), cwd=path.parent)


def read_with_qemu(path: Path) -> bytes:
    raw = path.with_suffix(".raw")
    qemu_img("convert", "-f", "qcow2", "-O", "raw", path, raw, cwd=path.parent)
    content = raw.read_bytes()
    raw.unlink()
    return content


def clean_for_both(path: Path) -> None:
    data = path.parent / "data.raw"
    check_file(path, data_file=data if data.exists() else None)
    qemu_check(path)


@needs_qemu_img
@pytest.mark.parametrize("text", OPTIONS)
def test_qemu_reads_what_enban_writes(text: str, tmp_path: Path) -> None:
    path, size = tmp_path / "a.qcow2", size_for(text)
    create(path, "qcow2", options_of(text), size=size)
    clean_for_both(path)
    for seed in (1, 2):
        content = write_with_enban(path, plan(seed, size, cluster_of(text)))
        clean_for_both(path)
        assert read_with_qemu(path) == content
    if "data_file_raw" in text:
        assert (tmp_path / "data.raw").read_bytes()[:size].ljust(size, b"\0") == content


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("text", OPTIONS)
def test_enban_reads_what_qemu_writes_and_goes_on(text: str, tmp_path: Path) -> None:
    path, size = tmp_path / "a.qcow2", size_for(text)
    qemu_img("create", "-q", "-f", "qcow2", "-o", text, path, str(size), cwd=tmp_path)
    write_with_qemu(path, plan(3, size, cluster_of(text)))
    content = read_with_qemu(path)
    with enban.open(path) as disk:
        assert disk.size == len(content)
        assert disk.pread(disk.size, 0) == content
    data = tmp_path / "data.raw"
    check_file(path, data_file=data if data.exists() else None)
    content = write_with_enban(path, plan(4, size, cluster_of(text)))
    clean_for_both(path)
    assert read_with_qemu(path) == content
    write_with_qemu(path, plan(5, size, cluster_of(text), 5))  # and QEMU goes on where enban left off
    content = read_with_qemu(path)
    with enban.open(path) as disk:
        assert disk.pread(disk.size, 0) == content
    clean_for_both(path)


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "text", ["", "cluster_size=512", "compat=0.10", "extended_l2=on", "data_file=data.raw"]
)
def test_odd_sizes_both_ways(text: str, size: int, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create(ours, "qcow2", options_of(text), size=size)
    steps = plan(6, size, cluster_of(text), 8)
    content = write_with_enban(ours, steps)
    clean_for_both(ours)
    assert read_with_qemu(ours) == content and len(content) == size
    (tmp_path / "data.raw").unlink(missing_ok=True)
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", text) if text else ()), theirs, str(size), cwd=tmp_path)
    write_with_qemu(theirs, steps)
    with enban.open(theirs) as disk:
        assert disk.size == size
        assert disk.pread(size, 0) == read_with_qemu(theirs)


@needs_qemu_img
@pytest.mark.parametrize("size", [1, 511, 1000, 65537])
def test_sizes_that_are_no_sectors_are_rounded_up_as_qemu_does(size: int, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create(ours, "qcow2", {}, size=size)
    qemu_img("create", "-q", "-f", "qcow2", theirs, str(size))
    with enban.open(ours) as one, enban.open(theirs) as other:
        assert one.size == other.size == -(-size // 512) * 512


# -- compressed clusters ---------------------------------------------------------------------

PACKED = [
    "cluster_size=512",
    "cluster_size=4096",
    "",
    "cluster_size=2097152",
    "compression_type=zstd",
    "compression_type=zstd,cluster_size=4096",
    "compat=0.10",
    "extended_l2=on",
    "refcount_bits=1",
    "refcount_bits=64,cluster_size=4096",
]


def compressible(size: int) -> bytes:
    """Text-like bytes that pack to a third, some zeros, some that do not pack at all."""
    words = b"".join(b"%d times around the disk; " % n for n in range(size // 24))[:size]
    mixed = bytearray(words.ljust(size, b"."))
    mixed[size // 4 : size // 3] = bytes(size // 3 - size // 4)
    mixed[size // 2 : size // 2 + size // 8] = Random(1).randbytes(size // 8)
    return bytes(mixed)


@needs_qemu_img
@pytest.mark.parametrize("text", PACKED)
def test_compressed_by_qemu(text: str, tmp_path: Path) -> None:
    size = 200 * KIB + 512 if cluster_of(text) == 512 else max(MIB, 2 * cluster_of(text)) + 512
    content = compressible(size)
    raw, path = tmp_path / "in.raw", tmp_path / "a.qcow2"
    raw.write_bytes(content)
    arguments = ["-o", text] if text else []
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *arguments, raw, path)
    check_file(path)
    with enban.open(path) as disk:
        assert disk.pread(size, 0) == content
        assert disk.pread(3000, size // 3 - 1500) == content[size // 3 - 1500 :][:3000]
    changed = write_with_enban(path, plan(7, size, cluster_of(text)))
    clean_for_both(path)
    assert read_with_qemu(path) == changed
    assert Qcow2Reader(path.read_bytes()).read() == changed


@needs_qemu_img
@pytest.mark.parametrize("text", PACKED)
def test_compressed_by_enban(text: str, tmp_path: Path) -> None:
    cluster = cluster_of(text)
    size = 200 * KIB + 512 if cluster == 512 else max(MIB, 2 * cluster) + 512
    content = compressible(size)
    path = tmp_path / "a.qcow2"
    create(path, "qcow2", options_of(text), size=size)
    with enban.open(path, writable=True, cache="unsafe") as disk:
        pack = deflater(disk.node.codec)
        for at in range(0, size, cluster):
            piece = content[at : at + cluster].ljust(cluster, b"\0")
            packed = pack(piece)
            if len(packed) < cluster:
                drive(disk.door.write_packed(packed, at))
            else:
                disk.pwrite(piece[: size - at], at)
    clean_for_both(path)
    qemu_same(path, content, tmp_path)
    with enban.open(path, writable=True, cache="unsafe") as disk:  # again over what is there, and in part
        for at in range(0, size // 2, 2 * cluster):
            packed = pack(b"x" * cluster)
            if len(packed) < cluster:
                drive(disk.door.write_packed(packed, at))
        disk.pwrite(b"y" * 700, 300)
        content = disk.pread(size, 0)
    clean_for_both(path)
    qemu_same(path, content, tmp_path)


# -- chains and snapshots --------------------------------------------------------------------


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("longer", [False, True])
@pytest.mark.parametrize("base_format", ["raw", "qcow2"])
@pytest.mark.parametrize(
    "text", ["", "cluster_size=512", "compat=0.10", "extended_l2=on", "extended_l2=on,cluster_size=16k"]
)
def test_chains_both_ways(text: str, base_format: str, longer: bool, tmp_path: Path) -> None:
    """A base of either maker below an overlay of the other, shorter and longer than it."""
    size = 400 * KIB + 512
    content = pattern(size + 100 * KIB if longer else size // 2 // 512 * 512 + 512, 3)
    (tmp_path / "content").write_bytes(content)
    qemu_img("convert", "-f", "raw", "-O", base_format, tmp_path / "content", tmp_path / "base")
    names = f"backing_file=base,backing_fmt={base_format}" + ("," + text if text else "")
    ours, theirs = tmp_path / "ours.qcow2", tmp_path / "theirs.qcow2"
    create(ours, "qcow2", options_of(names), size=size)
    qemu_img("create", "-q", "-f", "qcow2", "-o", names, theirs, str(size), cwd=tmp_path)
    steps = plan(8, size, cluster_of(text))
    seen = write_with_enban(ours, steps)
    clean_for_both(ours)
    assert read_with_qemu(ours) == seen
    write_with_qemu(theirs, steps)
    with enban.open(theirs) as disk:
        assert disk.pread(size, 0) == read_with_qemu(theirs)
    top = tmp_path / "top.qcow2"  # three layers, the middle one QEMU's
    create(top, "qcow2", {"backing_file": "theirs.qcow2", "backing_fmt": "qcow2"}, size=size + 64 * KIB)
    seen = write_with_enban(top, plan(9, size, 65536))
    clean_for_both(top)
    assert read_with_qemu(top) == seen


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize(
    "text", ["", "cluster_size=512", "compat=0.10", "extended_l2=on,cluster_size=16k", "refcount_bits=2"]
)
def test_snapshots_of_qemu_survive_our_writes(text: str, tmp_path: Path) -> None:
    path, size = tmp_path / "a.qcow2", 300 * KIB + 512
    qemu_img("create", "-q", "-f", "qcow2", *(("-o", text) if text else ()), path, str(size))
    write_with_qemu(path, plan(10, size, cluster_of(text)))
    before = read_with_qemu(path)
    qemu_img("snapshot", "-c", "one", path)
    middle = write_with_enban(path, plan(11, size, cluster_of(text)))
    clean_for_both(path)
    qemu_img("snapshot", "-c", "two", path)
    write_with_enban(path, plan(12, size, cluster_of(text)))
    clean_for_both(path)
    reader = Qcow2Reader(path.read_bytes())
    assert reader.read(snapshot="one") == before
    assert reader.read(snapshot="two") == middle
    qemu_img("snapshot", "-a", "one", path)
    with enban.open(path) as disk:
        assert disk.pread(size, 0) == before
    qemu_img("snapshot", "-d", "one", path)
    qemu_img("snapshot", "-a", "two", path)
    assert read_with_qemu(path) == middle
    clean_for_both(path)


# -- sizes that change -----------------------------------------------------------------------


@needs_qemu_img
@pytest.mark.parametrize("shrink", [False, True])
@pytest.mark.parametrize(
    "text", ["", "cluster_size=4k", "extended_l2=on", "compat=0.10", "data_file=data.raw"]
)
def test_what_lies_behind_the_end_never_comes_back(text: str, shrink: bool, tmp_path: Path) -> None:
    """The last cluster reaches past the disk's end. Whoever grows the disk must find zeros there,
    QEMU too, which does not clear it."""
    path, size = tmp_path / "a.qcow2", 100 * KIB + 512
    create(path, "qcow2", options_of(text), size=size)
    with enban.open(path, writable=True, cache="unsafe") as disk:
        assert isinstance(disk.node, Qcow2Node)
        disk.node.pass_discards = False  # as on a file system without holes
        disk.pwrite(b"\xee" * 80 * KIB, 0)  # clusters to be freed and used again
        disk.flush()
        disk.discard(0, 80 * KIB)
        disk.flush()
        disk.pwrite(b"\x11" * 1024, size - 1024)
        if shrink:
            size -= 512
            disk.resize(size)
        content = disk.pread(size, 0)
    qemu_img("resize", "-q", "-f", "qcow2", path, str(size + MIB), cwd=tmp_path)
    assert read_with_qemu(path) == content + bytes(MIB)
    with enban.open(path) as disk:
        assert disk.pread(disk.size, 0) == content + bytes(MIB)


@needs_qemu_img
def test_both_faces_read_what_qemu_wrote(face: Face, tmp_path: Path) -> None:
    raw, path = tmp_path / "in.raw", tmp_path / "a.qcow2"
    raw.write_bytes(compressible(MIB))
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, path)

    async def scenario() -> None:
        disk = await face.open(path)
        assert disk.format == "qcow2"
        for at, length in ((0, MIB), (12345, 70000), (MIB - 1, 1)):
            assert await disk.pread(length, at) == compressible(MIB)[at : at + length]
        await disk.close()

    face.run(scenario())
