"""Readers on other threads take no lock: whatever moment a change slips in, they see old or new.

A real race shows once in a million runs. Here the tables are made to run a change between any two
looks that a reader takes at them, for each pair of looks in turn.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import pytest

import enban
from enban.block.codec import deflater
from enban.block.runtime import BLOCKING, drive
from enban.formats.qcow2.node import Qcow2Node
from enban.storage.memory import MemoryStorage
from tests.support import KIB, check_bytes, empty_image, open_memory, pattern, raw_node

SIZE = 64 * KIB
CLUSTER = 16 * KIB
IMAGES: dict[str, dict[str, Any]] = {
    "extended": {"extended_l2": True},
    "extended-data": {"extended_l2": True, "data_file": "d"},
    "standard": {},
    "standard-data": {"data_file": "d"},
}


class Racy(array):  # type: ignore[type-arg]
    """L2 entries that call `hook` after the `countdown`-th look at them."""

    countdown = -1
    hook: Callable[[], None] = staticmethod(lambda: None)

    def __getitem__(self, index: Any) -> Any:
        value = super().__getitem__(index)
        self.countdown -= 1
        if self.countdown == 0:
            self.hook()
        return value


def packed(disk: enban.Disk, at: int) -> None:
    pack = deflater("zlib")
    drive(disk.door.write_packed(pack(b"\x33" * CLUSTER), at))


CHANGES: dict[str, Callable[[enban.Disk], object]] = {
    "write whole": lambda disk: disk.pwrite(b"\x11" * CLUSTER, CLUSTER),
    "write part": lambda disk: disk.pwrite(b"\x22" * 1024, CLUSTER + 4096),
    "write all": lambda disk: disk.pwrite(b"\x44" * SIZE, 0),
    "zero": lambda disk: disk.write_zeroes(CLUSTER, CLUSTER),
    "zero and keep": lambda disk: disk.write_zeroes(CLUSTER, CLUSTER, unmap=False),
    "zero part": lambda disk: disk.write_zeroes(CLUSTER + 1024, 3072),
    "discard": lambda disk: disk.discard(CLUSTER, 2 * CLUSTER),
    "packed": lambda disk: packed(disk, CLUSTER),
}
STARTS: dict[str, Callable[[enban.Disk], object]] = {
    "empty": lambda disk: None,
    "data": lambda disk: disk.pwrite(pattern(SIZE, 2), 0),
    "part": lambda disk: disk.pwrite(pattern(3000, 2), CLUSTER + 3000),
    "zero": lambda disk: disk.write_zeroes(0, SIZE),
    "packed": lambda disk: packed(disk, CLUSTER),
}


def prepare(
    options: dict[str, Any], start: str
) -> tuple[enban.Disk, Racy, MemoryStorage, MemoryStorage | None]:
    external = "data_file" in options
    memory = MemoryStorage(BLOCKING, empty_image(SIZE, cluster_size=CLUSTER, **options))
    data = MemoryStorage(BLOCKING) if external else None
    door = drive(open_memory(memory, data=data, backing=raw_node(pattern(SIZE, 9))))
    disk = enban.Disk(door)
    STARTS[start](disk)
    disk.write_zeroes(0, 512)  # so that there is a table in any case
    disk.flush()
    node = door.node
    assert isinstance(node, Qcow2Node)
    table = node.cache.tables[0]
    racy = Racy("Q", table.entries)
    table.entries = racy
    node.cache.readable[0] = racy
    if 0 in node.cache.overwritable:
        node.cache.overwritable[0] = racy
    return disk, racy, memory, data


CASES = [
    (name, change, start)
    for name, options in IMAGES.items()
    for change in CHANGES
    for start in STARTS
    if not ("data_file" in options and "packed" in (change, start))  # a data file has no compressed clusters
]


@pytest.mark.parametrize(("name", "change", "start"), CASES)
def test_a_read_sees_old_or_new(name: str, change: str, start: str) -> None:
    options = IMAGES[name]
    for offset, length in ((0, SIZE), (CLUSTER + 4096, 1024), (CLUSTER + 2048, 6000)):
        look = 1
        while True:
            disk, racy, memory, data = prepare(options, start)
            old = disk.pread(length, offset)
            fired: list[int] = []

            def hook(disk: enban.Disk = disk, fired: list[int] = fired) -> None:
                fired.append(1)
                CHANGES[change](disk)

            racy.hook, racy.countdown = hook, look
            seen = disk.pread(length, offset)
            racy.countdown = -1
            new = disk.pread(length, offset)
            for at in range(0, length, 512):
                part = seen[at : at + 512]
                assert part in (old[at : at + 512], new[at : at + 512]), (
                    f"look {look}, offset {offset + at:#x}"
                )
            disk.close()
            if not fired:
                break
            look += 1
        check_bytes(memory.content, data_file=data.content if data is not None else None)
        assert look > 1 or length == 1024, "the reader never looked at the table"


@pytest.mark.parametrize("name", IMAGES)
def test_the_short_cut_for_writes_never_hits_a_cluster_that_left(name: str) -> None:
    """A write in place, while the cluster is zeroed and the space goes to somebody else."""
    options = IMAGES[name]
    look = 1
    while True:
        disk, racy, memory, data = prepare(options, "data")
        fired: list[int] = []

        def hook(disk: enban.Disk = disk, fired: list[int] = fired) -> None:
            fired.append(1)
            disk.discard(CLUSTER, CLUSTER)
            disk.flush()
            disk.pwrite(b"\x77" * CLUSTER, 2 * CLUSTER)

        racy.hook, racy.countdown = hook, look
        disk.pwrite(b"\x55" * 1024, CLUSTER + 1024)
        racy.countdown = -1
        if fired:
            assert disk.pread(CLUSTER, 2 * CLUSTER) == b"\x77" * CLUSTER
            seen = disk.pread(CLUSTER, CLUSTER)
            for at in range(0, CLUSTER, 1024):
                allowed = (b"\x55" * 1024, bytes(1024)) if at == 1024 else (bytes(1024),)
                assert seen[at : at + 1024] in allowed
        disk.close()
        check_bytes(memory.content, data_file=data.content if data is not None else None)
        if not fired:
            break
        look += 1
    assert look > 1
