"""The mover: reads over layers, what is written around a partial write, strides, and host copies."""

from __future__ import annotations

import random
from typing import Any

import pytest

import enban
from enban.block import mover
from enban.block.codec import deflater
from enban.block.door import Door
from enban.block.node import Node
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptDataError
from enban.filters import writelog
from enban.filters.faults import READ, Call, Faults
from enban.filters.writelog import WriteLog
from enban.formats.raw import RawNode
from enban.storage.memory import MemoryStorage
from tests.support import KIB, MIB, AnyDisk, Face, check_bytes, empty_image, open_memory, pattern, raw_node


def overlay(below: Node | None, size: int, **options: Any) -> tuple[enban.Disk, WriteLog]:
    log = WriteLog(MemoryStorage(BLOCKING, empty_image(size, **options)))
    return enban.Disk(drive(open_memory(log, backing=below))), log


def written(log: WriteLog) -> list[tuple[int, int]]:
    """Length and count of the writes since the last call, as (offset in its cluster, length)."""
    found = [(e.offset, e.length) for e in log.entries if e.kind == writelog.WRITE]
    log.entries.clear()
    return found


def test_a_read_goes_down_as_many_layers_as_it_takes(face: Face) -> None:
    async def scenario() -> None:
        runtime = face.runtime()
        node: Node = RawNode("base", runtime, MemoryStorage(runtime, pattern(50_000, 1)), writable=False)
        model = bytearray(pattern(50_000, 1).ljust(64 * KIB, b"\0"))
        for layer in range(2, 7):
            image = empty_image(64 * KIB, cluster_size=512 << layer)
            door = await open_memory(MemoryStorage(runtime, image), backing=node)
            at = layer * 9001
            data = pattern(3000, layer)
            await face.disk(door).pwrite(data, at)
            model[at : at + 3000] = data
            node = door.node
        disk = face.disk(Door(node, writable=False))
        assert await disk.pread(64 * KIB, 0) == model
        depths = {extent.depth async for extent in disk.map()}
        assert len(depths) > 3 and max(depths) == 5

    face.run(scenario())


def test_a_backing_file_that_ends_inside_a_cluster_and_a_sector() -> None:
    below = pattern(10_001)
    disk, log = overlay(raw_node(below), 64 * KIB, cluster_size=8192)
    assert disk.pread(64 * KIB, 0) == below.ljust(64 * KIB, b"\0")
    disk.pwrite(b"x", 9000)  # the cluster that straddles the end is filled from both sides of it
    expected = bytearray(below.ljust(64 * KIB, b"\0"))
    expected[9000] = ord("x")
    assert disk.pread(64 * KIB, 0) == expected
    disk.close()
    assert isinstance(log.below, MemoryStorage)
    check_bytes(log.below.content)


def test_a_partial_write_is_joined_with_its_surroundings() -> None:
    """One write of a cluster, not three; and nothing but the bytes where the rest is zeros already."""
    disk, log = overlay(raw_node(pattern(MIB)), MIB, cluster_size=65536)
    disk.pwrite(b"x" * 100, 70_000)
    sizes = [length for _, length in written(log)]
    assert sizes.count(65536) >= 1 and 100 not in sizes
    alone, log = overlay(None, MIB, cluster_size=65536)
    alone.pwrite(b"x", 500_000)  # makes the L2 table
    written(log)
    alone.pwrite(b"x" * 100, 70_000)
    assert [length for _, length in written(log)] == [100]


def test_a_cluster_too_large_to_join_is_written_in_parts() -> None:
    size = mover.JOIN * 3
    assert 2 * MIB <= mover.JOIN  # so that it takes a run of clusters
    disk, log = overlay(raw_node(pattern(size)), size, cluster_size=2 * MIB)
    disk.pwrite(b"x" * (size - 200), 100)
    expected = pattern(size)[:100] + b"x" * (size - 200) + pattern(size)[-100:]
    assert disk.pread(size, 0) == expected
    assert max(length for _, length in written(log)) >= size - 200 - 2 * MIB
    disk.close()


def test_long_requests_go_in_strides() -> None:
    """Memory and locks stay bounded; the bytes are right across the seams."""
    size = 2 * mover.STRIDE + 3 * MIB + 512
    disk, log = overlay(None, size, cluster_size=65536)
    data = bytes(range(1, 252)) * (size // 251 - 4)
    disk.pwrite(data, 300)
    assert disk.pread(len(data), 300) == data
    log.entries.clear()
    disk.write_zeroes(1000, size - 2000)
    assert not any(disk.pread(size - 2000, 1000)) and disk.pread(1, 999) == data[699:700]
    assert max((e.length for e in log.entries if e.kind == writelog.WRITE), default=0) <= MIB
    disk.close()


def test_zeroes_are_not_written_where_there_are_zeros() -> None:
    disk, log = overlay(None, 4 * MIB, cluster_size=65536)
    disk.write_zeroes(100, 2 * MIB)
    disk.write_zeroes(5, 7)
    disk.write_zeroes(0, 4 * MIB, unmap=False)
    assert not [e for e in log.entries if e.kind == writelog.WRITE and e.length > 512]
    disk.close()


@pytest.mark.parametrize("offset", [0, 1, 511, 512, 4095, 4096])
@pytest.mark.parametrize("length", [1, 511, 512, 4096, 12289])
def test_every_edge_over_every_kind(offset: int, length: int) -> None:
    """Data, zeros kept and not kept, compressed, unallocated above short and long backing files."""
    from enban.block.codec import deflater

    below = pattern(40_000, 9)
    for start in ("data", "zero", "kept", "packed", "nothing"):
        disk, log = overlay(raw_node(below), 64 * KIB, cluster_size=4096)
        model = bytearray(below.ljust(64 * KIB, b"\0"))
        for at in (8192, 16384, 36864):  # the last: where the backing file ends
            content = b""
            if start == "packed":
                content = b"packed" * 682 + b"....."[:4]
                drive(disk.door.write_packed(deflater("zlib")(content), at))
            elif start == "nothing":
                continue
            else:
                content = pattern(4096, at)
                disk.pwrite(content, at)
                if start != "data":
                    disk.write_zeroes(at, 4096, unmap=start == "zero")
                    content = bytes(4096)
            model[at : at + 4096] = content
        for at in (8192, 16384, 36864):
            data = pattern(length, at + 1)
            disk.pwrite(data, at + offset)
            model[at + offset : at + offset + length] = data
        assert disk.pread(64 * KIB, 0) == model, start
        disk.close()
        assert isinstance(log.below, MemoryStorage)
        check_bytes(log.below.content)


def test_reading_what_is_not_there_asks_no_storage() -> None:
    storage = Faults(MemoryStorage(BLOCKING, empty_image(64 * MIB, cluster_size=65536)))
    disk = enban.Disk(drive(open_memory(storage)))
    calls = storage.calls
    assert disk.pread(16 * MIB, 1 * MIB) == bytes(16 * MIB)
    assert storage.calls == calls
    disk.close()


# -- packed units that stand together --------------------------------------------------------


def reads_of(storage: Faults) -> list[tuple[int, int]]:
    """Lets a storage note its reads from now on, as (offset, length)."""
    noted: list[tuple[int, int]] = []

    def note(call: Call) -> None:
        if call.operation == READ:
            noted.append((call.offset, call.length))

    storage.decide = note
    return noted


async def packed_disk(
    face: Face, cluster: int, count: int, options: dict[str, Any]
) -> tuple[AnyDisk, Faults, bytearray]:
    """`count` packed clusters of which each fourth is written over or left out, and what they hold."""
    memory = MemoryStorage(face.runtime(), empty_image(count * cluster, cluster_size=cluster, **options))
    storage = Faults(memory)
    disk = face.disk(await open_memory(storage))
    pack = deflater(disk.node.codec)
    model = bytearray(count * cluster)
    for number in range(count):
        at = number * cluster
        if number % 16 != 5:
            content = random.Random(number).randbytes(cluster // 2).ljust(cluster, b"-")
            await disk.door.write_packed(pack(content), at)
            model[at : at + cluster] = content
        if number % 16 == 9:
            await disk.pwrite(b"plain", at + 7)
            model[at + 7 : at + 12] = b"plain"
    return disk, storage, model


@pytest.mark.parametrize(
    ("cluster", "options"),
    [(512, {}), (4096, {}), (4096, {"compression_type": "zstd"}), (65536, {"extended_l2": True})],
    ids=["512", "4k", "4k-zstd", "64k-ext"],
)
def test_packed_neighbours_are_read_at_once(face: Face, cluster: int, options: dict[str, Any]) -> None:
    async def scenario() -> None:
        disk, storage, model = await packed_disk(face, cluster, 64, options)
        assert await disk.pread(len(model), 0) == model
        noted = reads_of(storage)
        assert await disk.pread(len(model), 0) == model
        # A run of packed clusters ends at a hole or a plain cluster, or where it would be too long to read.
        assert len(noted) <= 4 * 4 + 64 * cluster // mover._PACKED_BATCH
        assert max(length for _, length in noted) <= mover._PACKED_BATCH
        some = random.Random(cluster)
        for _ in range(60):
            start, end = sorted(some.sample(range(len(model) + 1), 2))
            assert await disk.pread(end - start, start) == model[start:end]
        await disk.close()

    face.run(scenario())


def test_bytes_nobody_asked_for_are_read_between_packed_units_only_where_they_are_few(face: Face) -> None:
    async def scenario() -> None:
        storage = Faults(MemoryStorage(face.runtime(), empty_image(MIB, cluster_size=4096)))
        disk = face.disk(await open_memory(storage))
        pack = deflater("zlib")
        contents = [bytes([number]) * 4096 for number in range(1, 5)]
        for place, number in ((0, 0), (1, 1), (50, 3), (2, 2)):  # the third in the file is not the third here
            await disk.door.write_packed(pack(contents[number]), place * 4096)
        for number in range(20, 24):
            await disk.pwrite(b"x" * 4096, number * 4096)
        await disk.door.write_packed(pack(contents[3]), 3 * 4096)
        assert await disk.pread(4096, 0) == contents[0]
        noted = reads_of(storage)
        assert await disk.pread(3 * 4096, 0) == b"".join(contents[:3])
        assert len(noted) == 1 and noted[0][1] < 1000  # over the packed cluster between them
        noted.clear()
        assert await disk.pread(2 * 4096, 2 * 4096) == contents[2] + contents[3]
        assert len(noted) in (1, 2) and sum(length for _, length in noted) < 4096 + 1024
        await disk.close()

    face.run(scenario())


def test_a_broken_unit_among_sound_ones_is_named(face: Face) -> None:
    async def scenario() -> None:
        disk, storage, model = await packed_disk(face, 4096, 16, {})
        extents = [extent async for extent in disk.map()]
        broken = next(extent for extent in extents if extent.start == 3 * 4096)
        assert isinstance(storage.below, MemoryStorage)
        storage.below.content[broken.host : broken.host + 16] = b"\xff" * 16
        with pytest.raises(CorruptDataError) as caught:
            await disk.pread(16 * 4096, 0)
        assert caught.value.offset == broken.host
        assert await disk.pread(3 * 4096, 0) == model[: 3 * 4096]
        assert await disk.pread(1000, 4 * 4096) == model[4 * 4096 : 4 * 4096 + 1000]
        await disk.close()

    face.run(scenario())
