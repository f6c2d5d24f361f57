"""Used images of every shape that matters to a check, and ways to break them that know their structure."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from random import Random
from typing import Any

from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptImageError, EnbanError
from enban.filters.base import Filter
from enban.formats.common.findings import CheckResult
from enban.formats.qcow2.check import Checker
from enban.formats.qcow2.check_walk import WINDOW, Meter
from enban.formats.qcow2.node import Qcow2Node
from enban.formats.qcow2.opening import open_qcow2
from enban.storage.memory import MemoryStorage

from .images import Image, pattern

OFFSET = 0x00FFFFFFFFFFFE00
COPIED = 1 << 63
COMPRESSED = 1 << 62

# Kinds of image: the shapes that matter to a check.
SHAPES: dict[str, dict[str, Any]] = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "64k": {},
    "v2": {"cluster_size": 1024, "compat": "0.10"},
    "1-bit": {"cluster_size": 1024, "refcount_bits": 1},
    "2-bit": {"cluster_size": 512, "refcount_bits": 2},
    "4-bit": {"cluster_size": 512, "refcount_bits": 4},
    "8-bit": {"cluster_size": 2048, "refcount_bits": 8},
    "32-bit": {"cluster_size": 1024, "refcount_bits": 32},
    "64-bit": {"cluster_size": 512, "refcount_bits": 64},
    "extended": {"cluster_size": 16384, "extended_l2": True},
    "lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "backed": {"cluster_size": 4096, "backing_file": "below"},
}


_ANY = Image("any", 0)  # opens qcow2 images of whatever shape


def make_image(shape: str, seed: int = 0) -> bytearray:
    """A used image: data, zeroes, holes; where refcounts allow compressed clusters and, unless the seed
    is a multiple of 3, snapshots."""
    options = SHAPES[shape]
    random = Random(f"{shape} {seed}")
    cluster = options.get("cluster_size", 65536)
    size = cluster * random.randrange(30, 90) + 512 * random.randrange(2)
    kind = Image(shape, size, **options)
    storage = MemoryStorage(BLOCKING, kind.empty())
    disk = Disk(drive(kind.open(storage)))
    wide = options.get("refcount_bits", 16) > 2
    for number in range(40):
        offset = random.randrange(size)
        length = min(size - offset, random.choice((512, cluster, 3 * cluster)))
        dice = random.random()
        if dice < 0.5:
            disk.pwrite(pattern(length, number + 1), offset)
        elif dice < 0.6:
            disk.write_zeroes(offset, length, unmap=random.random() < 0.5)
        elif dice < 0.7:
            disk.discard(offset, length)
        elif dice < 0.85 and wide:
            packed = deflater(disk.node.codec)(pattern(cluster // 8, number + 7).ljust(cluster, b"\0"))
            if len(packed) < cluster:
                disk.write_packed(packed, offset // cluster * cluster)
        if number in (12, 13, 30) and wide and seed % 3:
            disk.create_snapshot(f"s{number}")
    disk.close()
    return storage.content


def guest(image: bytes | bytearray) -> list[bytes | None]:
    """What the guest sees, a cluster at a time; None where reading fails; nothing if it cannot be opened."""
    try:
        disk = Disk(drive(_ANY.open(MemoryStorage(BLOCKING, image), writable=False)))
    except CorruptImageError:
        return []
    size = disk.node.cluster_size
    seen: list[bytes | None] = []
    for offset in range(0, disk.size, size):
        try:
            seen.append(disk.pread(min(size, disk.size - offset), offset))
        except EnbanError:
            seen.append(None)
    return seen


def open_for_check(image: bytes | bytearray | Filter | MemoryStorage) -> Qcow2Node:
    storage = MemoryStorage(BLOCKING, image) if isinstance(image, bytes | bytearray) else image
    return drive(open_qcow2("image", BLOCKING, storage, writable=True, metadata_only=True))


def check(
    image: bytes | bytearray | Filter | MemoryStorage,
    *,
    window: int = WINDOW,
    numpy: bool | None = None,
) -> CheckResult:
    """Check an image in memory. numpy: False the plain way only, True numpy only, None as the job would."""
    checker = Checker(open_for_check(image), Meter(None, 2), window=window, numpy=numpy)
    drive(checker.check())
    return checker.result()


class Map:
    """Where an image has what, read straight from its bytes."""

    bits: int
    size: int
    l1_entries: int
    l1_offset: int
    table_offset: int
    table_clusters: int
    snapshots_offset: int

    def __init__(self, image: bytearray) -> None:
        self.image = image
        (
            self.version,
            self.bits,
            self.size,
            self.l1_entries,
            self.l1_offset,
            self.table_offset,
            self.table_clusters,
            count,
            self.snapshots_offset,
        ) = struct.unpack_from(">I12xIQ4xIQQIIQ", image, 4)
        self.cluster = 1 << self.bits
        incompatible = struct.unpack_from(">Q", image, 72)[0] if self.version == 3 else 0
        self.step = 16 if incompatible & 16 else 8
        self.l1 = [self.l1_offset + 8 * index for index in range(self.l1_entries)]
        self.snapshot_l1: list[int] = []
        at = self.snapshots_offset
        for _ in range(count):
            l1_offset, l1_entries, ident, name = struct.unpack_from(">QIHH", image, at)
            (extra,) = struct.unpack_from(">I", image, at + 36)
            self.snapshot_l1 += [l1_offset + 8 * index for index in range(l1_entries)]
            at = -(-(at + 40 + extra + ident + name) // 8) * 8
        self.table = [self.table_offset + 8 * i for i in range(self.table_clusters * self.cluster // 8)]

    def word(self, place: int) -> int:
        return int.from_bytes(self.image[place : place + 8], "big")

    def put(self, place: int, value: int) -> None:
        self.image[place : place + 8] = value.to_bytes(8, "big")

    def _inside(self, offset: int) -> bool:
        return offset > 0 and offset + self.cluster <= len(self.image)

    @property
    def l2_tables(self) -> list[int]:
        """Offsets of L2 tables, the active ones first."""
        found = [self.word(place) & OFFSET for place in self.l1 + self.snapshot_l1]
        return [offset for offset in dict.fromkeys(found) if self._inside(offset)]

    @property
    def blocks(self) -> list[int]:
        return [offset for place in self.table if self._inside(offset := self.word(place) & ~511)]

    def l2_places(self, active: bool = True) -> Iterator[int]:
        """Places of L2 entries that are not 0."""
        for l1_place in self.l1 if active else self.l1 + self.snapshot_l1:
            table = self.word(l1_place) & OFFSET
            if self._inside(table):
                for place in range(table, table + self.cluster, self.step):
                    if self.word(place):
                        yield place

    def data_places(self) -> list[int]:
        """Places of active L2 entries of plain data clusters."""
        return [place for place in self.l2_places() if self.word(place) & OFFSET and not self._odd(place)]

    def _odd(self, place: int) -> bool:
        return bool(self.word(place) & (COMPRESSED | 1))


def damage(image: bytearray, random: Random) -> list[str]:
    """Break an image in one or a few places; says what was done."""
    notes = []
    places = Map(image)
    end = len(image)
    for _ in range(random.choice((1, 1, 1, 2, 3, 6))):
        what, place = _place(places, random)
        if place + 8 > end:
            continue
        old = places.word(place)
        clusters = -(-end // places.cluster)
        new = random.choice(
            (
                random.getrandbits(64),
                old ^ 1 << random.randrange(64),
                old ^ 1 << random.randrange(64),
                old ^ 1 << random.randrange(16),
                0,
                old ^ COPIED,
                random.randrange(clusters + 3) * places.cluster | COPIED,
                random.randrange(clusters) * places.cluster + 512 * random.randrange(8),
                (clusters + random.randrange(3)) * places.cluster | COPIED,
                old | 1,
                places.word(min(_place(places, random)[1], end - 8)),
            )
        )
        if what == "refcount table" and new & ~511 >= 1 << 50:
            new = old ^ 1  # an offset that no file system can hold says nothing new
        places.put(place, new)
        notes.append(f"{what} at {place:#x}: {old:#x} -> {new:#x}")
    if random.random() < 0.1:
        cut = random.randrange(end // 2, end) // 512 * 512
        del image[cut:]
        notes.append(f"cut at {cut:#x}")
    if random.random() < 0.05 and places.version == 3:
        image[79] |= random.choice((1, 2, 3))
        notes.append("dirty or corrupt bit")
    return notes


def _place(places: Map, random: Random) -> tuple[str, int]:
    chance = random.random()
    if chance < 0.12:
        return "L1", random.choice([p for p in places.l1 if places.word(p)] or places.l1)
    if chance < 0.2 and places.snapshot_l1:
        return "snapshot's L1", random.choice(places.snapshot_l1)
    if chance < 0.3:
        return "refcount table", random.choice([p for p in places.table if places.word(p)] or places.table)
    if chance < 0.34:
        return "refcount table", random.choice(places.table)
    blocks, tables = places.blocks, places.l2_tables
    if chance < 0.5 and blocks:
        span = max(8, min(places.cluster, len(places.image) // places.cluster * 2))
        return "refcounts", random.choice(blocks) + random.randrange(span // 8) * 8
    if not tables:
        return "nothing", len(places.image)
    table = random.choice(tables)
    used = [p for p in range(table, table + places.cluster, places.step) if places.word(p)]
    if used and random.random() < 0.8:
        place = random.choice(used)
    else:
        place = table + random.randrange(places.cluster // places.step) * places.step
    if places.step == 16 and random.random() < 0.4:
        return "subclusters", place + 8
    return "L2", place
