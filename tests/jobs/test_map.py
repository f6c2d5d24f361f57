"""The list of runs says what the engine does, byte for byte."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

import enban
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING
from enban.block.storage import Storage
from enban.errors import CorruptImageError
from enban.extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from enban.jobs.map import (
    HAS_DATA,
    HAS_OFFSET,
    PRESENT,
    READS_ZERO,
    Holes,
    disk_size,
    entries,
    padded,
    pairs,
    walk,
)
from tests.support import KIB, MIB, make_qcow2


def scatter(disk: Disk, seed: int, steps: int = 40) -> None:
    """Writes, zeros and discards all over a disk."""
    some = random.Random(seed)
    for _ in range(steps):
        offset = some.randrange(disk.size)
        length = min(disk.size - offset, some.choice([1, 512, 4 * KIB, 64 * KIB, 200 * KIB]))
        action = some.random()
        if action < 0.6:
            disk.pwrite(some.randbytes(length), offset)
        elif action < 0.8:
            disk.write_zeroes(offset, length, unmap=some.random() < 0.5)
        else:
            disk.discard(offset, length)


OPTIONS = [
    {},
    {"cluster_size": 512},
    {"cluster_size": 2 * MIB},
    {"compat": "0.10"},
    {"extended_l2": True},
    {"extended_l2": True, "cluster_size": 16 * KIB},
    {"cluster_size": 4 * KIB, "refcount_bits": 1},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_the_engine(tmp_path: Path, options: dict[str, int], seed: int) -> None:
    """Kind, place and depth of every sector are those of the extents that reading and writing go by."""
    make_qcow2(tmp_path / "base.qcow2", 2 * MIB + 512, cluster_size=8 * KIB)
    with enban.open(tmp_path / "base.qcow2", writable=True) as disk:
        scatter(disk, seed)
    make_qcow2(tmp_path / "top.qcow2", 3 * MIB, backing_file="base.qcow2", backing_fmt="qcow2", **options)
    with enban.open(tmp_path / "top.qcow2", writable=True) as disk:
        scatter(disk, seed + 100)
    with enban.open(tmp_path / "top.qcow2") as disk:
        runs = list(walk(disk.node, 0, disk.size))
        position = 0
        for start, length, _, _, _, _ in runs:
            assert start == position
            assert length > 0
            position += length
        assert position == disk.size
        listed = iter(runs)
        run = next(listed)
        content = disk.pread(disk.size, 0)
        for extent in disk.map():
            for sector in range(extent.start, extent.start + extent.length, 512):
                while run[0] + run[1] <= sector:
                    run = next(listed)
                start, _, depth, flags, host, node = run
                place = extent.host + sector - extent.start
                if extent.kind == DATA:
                    assert flags & (HAS_DATA | PRESENT | HAS_OFFSET) == HAS_DATA | PRESENT | HAS_OFFSET
                    assert host + sector - start == place
                    assert (depth, node) == (extent.depth, extent.node)
                elif extent.kind == ZERO:
                    assert flags & (READS_ZERO | PRESENT | HAS_DATA) == READS_ZERO | PRESENT
                    assert depth == extent.depth
                elif extent.kind == UNALLOCATED:
                    assert flags & (READS_ZERO | PRESENT | HAS_DATA) == READS_ZERO
                else:
                    assert extent.kind == COMPRESSED
                    assert flags == HAS_DATA | PRESENT
                if flags & READS_ZERO:
                    assert not any(content[sector : sector + 512])


@pytest.mark.parametrize("seed", range(4))
def test_parts_are_parts_of_the_whole(tmp_path: Path, seed: int) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 2 * MIB, cluster_size=4 * KIB)
    with enban.open(path, writable=True) as disk:
        scatter(disk, seed)
    with enban.open(path) as disk:
        whole = list(entries(disk))
        some = random.Random(seed)
        for _ in range(30):
            offset, end = sorted(some.sample(range(disk.size + 1), 2))
            expected = [
                (
                    max(s, offset),
                    min(s + n, end) - max(s, offset),
                    f,
                    h + max(0, offset - s) if h >= 0 else -1,
                )
                for s, n, _, f, h, _ in whole
                if s < end and s + n > offset
            ]
            assert [(s, n, f, h) for s, n, _, f, h, _ in entries(disk, offset, end - offset)] == expected
        for before, after in itertools.pairwise(whole):
            joins = before[3] == after[3] and (
                before[4] + before[1] == after[4] or not before[3] & HAS_OFFSET
            )
            assert not joins, "neighbours that continue each other are one entry"


def test_beyond_the_end(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    with enban.open(path) as disk:
        assert list(entries(disk, 2 * MIB, MIB)) == []
        assert [(s, n) for s, n, *_ in entries(disk, MIB - 10, MIB)] == [(MIB - 10, 10)]


def test_the_last_sector_of_a_raw_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.raw"
    path.write_bytes(b"x" * 1000)
    with enban.open(path) as disk:
        assert disk_size(disk.node) == 1024
        assert [run[:5] for run in entries(disk)] == [
            (0, 1000, 0, HAS_DATA | PRESENT | HAS_OFFSET, 0),
            (1000, 24, 0, READS_ZERO | PRESENT | HAS_OFFSET, 1000),
        ]


def test_damage_is_reported_not_listed(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", MIB)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x" * MIB, 0)
    image = bytearray(path.read_bytes())
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    image[l2 + 8 * 3 + 6] ^= 0x02  # an offset inside a cluster
    path.write_bytes(image)
    with enban.open(path) as disk, pytest.raises(CorruptImageError, match="guest offset 0x30000"):
        list(entries(disk))


class Stripes(Storage):
    """Data and holes in turn, 1 KiB each; counts the questions."""

    def __init__(self, size: int) -> None:
        self.name = "stripes"
        self.runtime = BLOCKING
        self.writable = False
        self._size = size
        self.asked = 0

    def size(self) -> int:
        return self._size

    async def status(self, offset: int, length: int) -> tuple[bool, int]:
        self.asked += 1
        return offset // KIB % 2 == 1, min(length, KIB - offset % KIB)


def test_holes_are_asked_for_once() -> None:
    stripes = Stripes(100 * KIB)
    holes = Holes(stripes)
    order = list(range(0, 100 * KIB, 64))
    random.Random(1).shuffle(order)
    for offset in order:
        zero, until = holes.status(offset)
        assert zero == (offset // KIB % 2 == 1)
        assert until == (offset // KIB + 1) * KIB
    assert stripes.asked < 100 * 6  # each stripe a few times, from further and further up
    before = stripes.asked
    for offset in order:
        holes.status(offset)
    assert stripes.asked == before
    assert holes.status(100 * KIB) == (True, 1 << 63)


def test_holes_remember_a_bounded_number() -> None:
    stripes = Stripes(20_000 * KIB)
    holes = Holes(stripes)
    for offset in range(0, 20_000 * KIB, KIB):
        assert holes.status(offset) == (offset // KIB % 2 == 1, offset + KIB)
    assert len(holes._starts) <= 4096


def test_pairs_and_padding(tmp_path: Path) -> None:
    (tmp_path / "one.raw").write_bytes(b"x" * 4096)
    make_qcow2(tmp_path / "other.qcow2", 8192, cluster_size=512)
    with (
        enban.open(tmp_path / "one.raw") as one,
        enban.open(tmp_path / "other.qcow2", writable=True) as other,
    ):
        other.pwrite(b"y" * 512, 1024)
        found = [
            (start, length, left[3] & READS_ZERO, right[3] & READS_ZERO)
            for start, length, left, right in pairs(padded(one.node, 0, 10000), padded(other.node, 0, 10000))
        ]
        assert found == [
            (0, 1024, 0, 2),
            (1024, 512, 0, 0),
            (1536, 2560, 0, 2),
            (4096, 4096, 2, 2),
            (8192, 1808, 2, 2),
        ]
