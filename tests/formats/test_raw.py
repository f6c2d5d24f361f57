"""raw: slices, sizes, preallocation, and the first sector of a disk whose format was guessed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

import enban
from enban.aio import AsyncDisk, AsyncioRuntime
from enban.block.door import Door
from enban.block.runtime import BLOCKING
from enban.catalog import probe
from enban.errors import OutOfRangeError, UnsupportedOperationError, UsageError
from enban.filters.delay import Delay
from enban.formats.raw import RawNode
from enban.storage.memory import MemoryStorage
from tests.support import KIB, MIB, Face, make_qcow2, pattern

QCOW2 = b"QFI\xfb\x00\x00\x00\x03"


def disk_over(memory: MemoryStorage, **options: object) -> enban.Disk:
    return enban.Disk(Door(RawNode("raw", BLOCKING, memory, writable=True, **options), writable=True))  # type: ignore[arg-type]


def test_bytes_are_where_they_are(face: Face, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(pattern(100_003))

    async def scenario() -> None:
        disk = await face.open(path, writable=True)
        assert (disk.format, disk.size) == ("raw", 100_003)
        assert await disk.pread(50, 99_950) == pattern(100_003)[99_950:100_000]
        await disk.pwrite(b"hello", 99_998)
        await disk.write_zeroes(10, 30)
        await disk.discard(1000, 64 * KIB)
        with pytest.raises(OutOfRangeError):
            await disk.pwrite(b"x", 100_003)
        await disk.close()

    face.run(scenario())
    expected = bytearray(pattern(100_003))
    expected[99_998:] = b"hello"
    expected[10:40] = bytes(30)
    expected[1000 : 1000 + 64 * KIB] = bytes(64 * KIB)
    assert path.read_bytes() == expected


def test_a_slice_is_a_disk_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(pattern(64 * KIB))
    options = {"driver": "raw", "offset": 4096, "size": 8192, "file": {"filename": str(path)}}
    with enban.open(options, writable=True) as disk:
        assert disk.size == 8192
        assert disk.pread(8192, 0) == pattern(64 * KIB)[4096:12288]
        disk.pwrite(b"\xaa" * 8192, 0)
        disk.write_zeroes(100, 100)
        for offset, length in ((8192, 1), (0, 8193)):
            with pytest.raises(OutOfRangeError):
                disk.pwrite(bytes(length), offset)
        with pytest.raises(UnsupportedOperationError):
            disk.resize(16384)
    expected = bytearray(pattern(64 * KIB))
    expected[4096:12288] = b"\xaa" * 100 + bytes(100) + b"\xaa" * 7992
    assert path.read_bytes() == expected


@pytest.mark.parametrize("bounds", [(65 * KIB, 0), (0, 65 * KIB), (64 * KIB, 1), (-1, 10)])
def test_a_slice_must_lie_inside(bounds: tuple[int, int], tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(64 * KIB))
    with pytest.raises(UsageError):
        enban.open({"driver": "raw", "offset": bounds[0], "size": bounds[1], "file": str(path)})


def test_a_qcow2_image_inside_a_raw_slice_is_just_bytes(tmp_path: Path) -> None:
    inner = make_qcow2(tmp_path / "inner.qcow2", MIB)
    with enban.open(inner, format="raw") as disk:
        assert disk.format == "raw" and disk.pread(4, 0) == QCOW2[:4]


@pytest.mark.parametrize("preallocation", ["off", "falloc", "full"])
def test_resize(preallocation: str, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(b"\xff" * 10_000)
    with enban.open(path, writable=True) as disk:
        disk.resize(3_000_001, preallocation=preallocation)
        assert disk.size == 3_000_001
        assert disk.pread(disk.size, 0) == b"\xff" * 10_000 + bytes(2_990_001)
        disk.resize(5000)
    assert path.read_bytes() == b"\xff" * 5000
    if preallocation == "off":
        with enban.open(path, writable=True) as disk, pytest.raises(UsageError):
            disk.resize(10_000, preallocation="metadata")
        assert path.stat().st_size == 5000


# -- the first sector ------------------------------------------------------------------------


def test_a_guessed_raw_disk_does_not_become_another_format(face: Face, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(MIB))

    async def scenario() -> None:
        disk = await face.open(path, writable=True)
        for write in (
            disk.pwrite(QCOW2, 0),
            disk.pwrite(QCOW2 + bytes(MIB - 8), 0),
            disk.pwrite(b"KDMV", 0),
            disk.pwrite(b"LUKS\xba\xbe", 0),
            disk.pwrite(b"conectix", 0),
            disk.pwrite(b"\x7f\x10\xda\xbe", 0x40),
            disk.pwrite(b"# anything\r\n \nversion=1\n", 0),
        ):
            with pytest.raises(UsageError, match="look like"):
                await write
            assert await disk.pread(512, 0) == bytes(512), "a refused write left something"
        await disk.pwrite(b"\xeb\x3c\x90 boot code", 0)
        await disk.pwrite(QCOW2, 512)
        await disk.pwrite(QCOW2, 1)
        await disk.close()

    face.run(scenario())
    with enban.open(path) as disk:
        assert disk.format == "raw"


def test_nor_in_many_steps(face: Face, tmp_path: Path) -> None:
    """Byte by byte, from behind, and by zeroing or discarding the bytes that are in the way."""
    path = tmp_path / "a.img"
    path.write_bytes(bytes(MIB))

    async def scenario() -> None:
        disk = await face.open(path, writable=True)
        for at in range(7, -1, -1):
            if at:
                await disk.pwrite(QCOW2[at : at + 1], at)
            else:
                with pytest.raises(UsageError):
                    await disk.pwrite(QCOW2[:1], 0)
        await disk.pwrite(b"QED\xff", 0)  # QED's magic ends in a zero byte
        for step in (disk.write_zeroes(3, 3), disk.discard(3, 600), disk.write_zeroes(3, 1, unmap=False)):
            with pytest.raises(UsageError):
                await step
        assert await disk.pread(4, 0) == b"QED\xff"
        await disk.write_zeroes(0, 4096)
        await disk.close()

    face.run(scenario())
    with enban.open(path) as disk:
        assert disk.format == "raw"


def test_nor_by_two_writes_at_once() -> None:
    """Each is harmless when it is looked at; together they are a header."""

    async def scenario() -> None:
        runtime = AsyncioRuntime(2)
        memory = MemoryStorage(runtime, bytes(4096))
        for seed in range(30):
            node = RawNode("raw", runtime, Delay(memory, seed, most_s=0.0003), writable=True, probe=probe)
            disk = AsyncDisk(Door(node, writable=True), runtime)
            writes = (disk.pwrite(QCOW2[:3], 0), disk.pwrite(QCOW2[3:5], 3), disk.pwrite(QCOW2[5:], 5))
            results = await asyncio.gather(*writes, return_exceptions=True)
            assert sum(isinstance(result, UsageError) for result in results) == 1
            assert probe(memory.content[:512]) == "raw"
            memory.content[:512] = bytes(512)
        runtime.close()

    asyncio.run(scenario())


def test_an_explicit_format_allows_any_content(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(MIB))
    with enban.open(path, writable=True, format="raw") as disk:
        disk.pwrite(QCOW2, 0)
    assert path.read_bytes()[:8] == QCOW2


def test_a_short_guessed_disk(tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.write_bytes(bytes(6))
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"abcdef", 0)
        with pytest.raises(OutOfRangeError):
            disk.pwrite(QCOW2, 0)
    assert path.read_bytes() == b"abcdef"


def test_an_empty_disk(face: Face, tmp_path: Path) -> None:
    path = tmp_path / "a.img"
    path.touch()

    async def scenario() -> None:
        disk = await face.open(path, writable=True)
        assert (disk.size, disk.format) == (0, "raw")
        assert [extent async for extent in disk.map()] == []
        await disk.flush()
        await disk.close()

    face.run(scenario())
