"""Where guest bytes live: extents of each kind, runs, chains, and entries that contradict themselves."""

from __future__ import annotations

from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptImageError
from enban.extent import COMPRESSED, DATA, UNALLOCATED, ZERO, Extent
from enban.formats.common.progressions import BATCH
from enban.formats.qcow2.node import Qcow2Node
from enban.storage.memory import MemoryStorage
from tests.support import KIB, MIB, empty_image, open_memory, pattern, raw_node

C = 4096


def make(size: int = MIB, *, backing: bytes = b"", **options: Any) -> tuple[enban.Disk, MemoryStorage]:
    memory = MemoryStorage(BLOCKING, empty_image(size, **{"cluster_size": C, **options}))
    data = MemoryStorage(BLOCKING) if "data_file" in options else None
    return enban.Disk(
        drive(open_memory(memory, backing=raw_node(backing) if backing else None, data=data))
    ), memory


def kinds(disk: enban.Disk, offset: int = 0, length: int | None = None) -> list[tuple[int, int, int, int]]:
    return [(e.start, e.length, e.kind, e.depth) for e in disk.map(offset, length)]


def test_every_kind_in_one_disk() -> None:
    disk, memory = make(backing=pattern(10 * C + 100))
    disk.pwrite(b"d" * 2 * C, C)
    disk.write_zeroes(4 * C, C)
    drive(disk.door.write_packed(b"\x03\x00" + b"x" * 90, 6 * C))
    assert kinds(disk, 0, 12 * C) == [
        (0, C, DATA, 1),
        (C, 2 * C, DATA, 0),
        (3 * C, C, DATA, 1),
        (4 * C, C, ZERO, 0),
        (5 * C, C, DATA, 1),
        (6 * C, C, COMPRESSED, 0),
        (7 * C, 3 * C + 100, DATA, 1),
        (10 * C + 100, 2 * C - 100, UNALLOCATED, 0),
    ]
    data = next(e for e in disk.map(C) if e.kind == DATA)
    assert data.storage is memory and memory.content[data.host : data.host + 2 * C] == b"d" * 2 * C
    below = next(iter(disk.map(3 * C + 5, 10)))
    assert (below.start, below.host, below.length) == (3 * C + 5, 3 * C + 5, 10)
    packed = next(iter(disk.map(6 * C + 50, 100)))
    assert (packed.unit, packed.start, packed.length) == (6 * C, 6 * C + 50, 100)
    assert packed.packed >= 92 and (packed.host + packed.packed) % 512 == 0
    assert repr(data) == f"<data {C:#x}+{2 * C:#x} @{data.host:#x} depth 0>"


def test_maps_have_no_gaps_and_agree_with_runs() -> None:
    """`lookup`, `runs` (for whole disks) and reading tell one story, from any offset."""
    for options in ({}, {"extended_l2": True, "cluster_size": 16384}, {"data_file": "d"}, {"compat": "0.10"}):
        disk, _ = make(2 * MIB, **options)
        disk.pwrite(b"a" * 700 * KIB, 3 * KIB)
        disk.write_zeroes(100 * KIB, 300 * KIB)
        disk.pwrite(b"b" * 5 * KIB, 200 * KIB)
        disk.discard(500 * KIB, 64 * KIB)
        node, whole = disk.node, disk.pread(disk.size, 0)
        for offset, length in ((0, disk.size), (12345, 600_000), (disk.size - 1, 1)):
            at = offset
            for extent in disk.map(offset, length):
                assert extent.start == at and extent.length > 0
                if extent.kind != DATA:
                    assert not any(whole[at : at + extent.length])
                at += extent.length
            assert at == offset + length
            at = offset
            while at < offset + length:
                runs = node.runs(at, offset + length - at)
                if runs is None:
                    drive(node.load(at))
                    continue
                for start, count, kind, host in runs:
                    assert start == at and count > 0
                    first = node.lookup(start, count)
                    assert isinstance(first, Extent) and first.kind == kind
                    assert host == first.host or kind == UNALLOCATED  # there: space kept for it
                    at += count
            assert at == offset + length
        disk.close()


def test_a_run_longer_than_a_batch_is_one_extent() -> None:
    """Adjacent entries are recognised in bulk; the edges of the batches must not show."""
    size = 3 * BATCH * 512 + 10 * 512
    disk, _ = make(size, cluster_size=512)
    disk.pwrite(pattern(size), 0)
    node = disk.node
    assert isinstance(node, Qcow2Node)
    per_table = node.l2_mask + 1
    for index, extent in enumerate(disk.map()):
        assert extent.kind == DATA and extent.length <= per_table * 512, index
    assert disk.pread(size, 0) == pattern(size)
    wide, _ = make(4 * MIB, cluster_size=8192)  # 1024 entries a table, two batches
    wide.pwrite(b"x" * 4 * MIB, 0)
    assert len(kinds(wide)) == 1
    wide.pwrite(b"y" * 10, 0)
    wide.discard(700 * 8192 // 2, 8192)
    assert [k for _, _, k, _ in kinds(wide)] == [DATA, ZERO, DATA]


def test_subclusters() -> None:
    disk, _ = make(MIB, extended_l2=True, cluster_size=16384, backing=pattern(MIB))
    disk.pwrite(b"s" * 512, 512)
    disk.write_zeroes(2048, 1024)
    assert kinds(disk, 0, 16384) == [
        (0, 512, DATA, 1),
        (512, 512, DATA, 0),
        (1024, 1024, DATA, 1),
        (2048, 1024, ZERO, 0),
        (3072, 13312, DATA, 1),
    ]
    assert (
        disk.pread(4096, 0)
        == pattern(512) + b"s" * 512 + pattern(MIB)[1024:2048] + bytes(1024) + pattern(MIB)[3072:4096]
    )


def corrupt(entry: int, bitmap: int | None = None, **options: Any) -> enban.Disk:
    """A disk whose first L2 entry is as given."""
    disk, memory = make(**options)
    disk.pwrite(b"x" * disk.node.unit, 0)
    disk.close()
    image = memory.content
    l1 = int.from_bytes(image[40:48], "big")
    table = int.from_bytes(image[l1 : l1 + 8], "big") & ((1 << 56) - 1)
    image[table : table + 8] = entry.to_bytes(8, "big")
    if bitmap is not None:
        image[table + 8 : table + 16] = bitmap.to_bytes(8, "big")
    return enban.Disk(drive(open_memory(MemoryStorage(BLOCKING, image))))


EXT = {"extended_l2": True, "cluster_size": 16384}
BAD: list[tuple[int, int | None, dict[str, Any], str]] = [
    ((1 << 63) | 512, None, {}, "no cluster"),
    (1, None, {"compat": "0.10"}, "zero flag"),
    ((1 << 63) | 512, 1, EXT, "no cluster"),
    ((1 << 63) | 5 * 16384, 1 | 1 << 32, EXT, "both data and zero"),
    (0, 1, EXT, "without a cluster"),
]


@pytest.mark.parametrize(("entry", "bitmap", "options", "words"), BAD)
def test_contradictions_are_named(
    entry: int, bitmap: int | None, options: dict[str, Any], words: str
) -> None:
    for use in (lambda d: d.pread(1, 0), lambda d: d.pwrite(b"x", 0), lambda d: list(d.map(0, 1))):
        disk = corrupt(entry, bitmap, **options)
        with pytest.raises(CorruptImageError) as info:
            use(disk)
        text = str(info.value)
        assert words in text and "memory" in text and "check" in text and "\n" not in text


def test_data_behind_the_end_of_the_file_reads_as_zeros() -> None:
    disk = corrupt((1 << 63) | (1 << 30))
    assert disk.pread(C, 0) == bytes(C)


def test_an_l2_table_outside_the_file_is_reported_where_it_is_named() -> None:
    disk, memory = make()
    disk.close()
    l1 = int.from_bytes(memory.content[40:48], "big")
    memory.content[l1 : l1 + 8] = ((1 << 63) | (1 << 40)).to_bytes(8, "big")
    disk = enban.Disk(drive(open_memory(memory, writable=False)))
    with pytest.raises(CorruptImageError, match="not inside the file"):
        disk.pread(1, 0)
