"""Changing the size: zeros in what is new, nothing of what was cut, and tables that fit."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import HostError, UsageError
from enban.filters import faults
from enban.filters.faults import Faults, fail_at
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import KIB, MIB, check_bytes, empty_image, open_memory, pattern, raw_node

IMAGES: list[dict[str, Any]] = [
    {},
    {"cluster_size": 512},
    {"compat": "0.10"},
    {"extended_l2": True},
    {"extended_l2": True, "cluster_size": 16384},
    {"data_file": "d", "cluster_size": 4096},
]


def make(
    size: int, backing: bytes = b"", **options: Any
) -> tuple[enban.Disk, MemoryStorage, MemoryStorage | None]:
    if backing:
        options["backing_file"] = "b"
    memory = MemoryStorage(BLOCKING, empty_image(size, **options))
    data = MemoryStorage(BLOCKING) if "data_file" in options else None
    disk = enban.Disk(drive(open_memory(memory, backing=raw_node(backing) if backing else None, data=data)))
    return disk, memory, data


@pytest.mark.parametrize("options", IMAGES, ids=str)
def test_grow_and_shrink_at_every_kind_of_edge(options: dict[str, Any]) -> None:
    """Sizes inside a cluster, at its edge, one sector on, many tables on; back and forth, with writes."""
    backing = pattern(300 * KIB + 512, 3)
    disk, memory, data = make(100 * KIB, backing, **options)
    model = bytearray(backing[: 100 * KIB])
    sizes = [
        64 * KIB,
        64 * KIB + 512,
        128 * KIB,
        128 * KIB - 512,
        512,
        500 * KIB,
        0,
        512,
        3 * MIB,
        200 * KIB + 1024,
    ]
    for number, size in enumerate(sizes):
        disk.resize(size)
        del model[size:]
        model.extend(bytes(size - len(model)))
        assert disk.size == size and disk.pread(size, 0) == model, f"after resizing to {size}"
        for at in (size // 3, size - 700):
            if 0 <= at < size:
                data_here = pattern(min(700, size - at), number + 10)
                disk.pwrite(data_here, at)
                model[at : at + len(data_here)] = data_here
    disk.close()
    content = data.content if data is not None else None
    check_bytes(memory.content, data_file=content)
    assert Qcow2Reader(memory.content, data_file=content).read(backing=backing) == model


@pytest.mark.parametrize("options", IMAGES, ids=str)
def test_what_was_cut_off_does_not_come_back(options: dict[str, Any]) -> None:
    disk, memory, data = make(256 * KIB, **options)
    disk.pwrite(b"\xee" * 256 * KIB, 0)
    for shrink in (100 * KIB + 512, 64 * KIB, 512):
        disk.resize(shrink)
        disk.resize(256 * KIB)
        assert disk.pread(256 * KIB, 0) == b"\xee" * shrink + bytes(256 * KIB - shrink)
    disk.close()
    check_bytes(memory.content, data_file=data.content if data is not None else None)


def test_shrinking_gives_space_back() -> None:
    disk, memory, _ = make(2 * MIB, cluster_size=4096)
    disk.pwrite(b"x" * 2 * MIB, 0)
    disk.resize(64 * KIB)
    disk.resize(2 * MIB)
    before = len(memory.content)
    disk.pwrite(b"y" * MIB, MIB)
    assert len(memory.content) == before
    disk.close()
    check_bytes(memory.content)


def test_growing_moves_the_l1_table_and_frees_the_old_one() -> None:
    disk, memory, _ = make(32 * KIB, cluster_size=512)
    disk.pwrite(pattern(32 * KIB), 0)
    for size in (MIB, 4 * MIB, 16 * MIB, 17 * MIB):
        disk.resize(size)
        disk.pwrite(b"end".ljust(512), size - 512)
    assert disk.pread(32 * KIB, 0) == pattern(32 * KIB)
    assert disk.pread(512, 4 * MIB - 512) == b"end".ljust(512)
    disk.close()
    check_bytes(memory.content)


@pytest.mark.parametrize("preallocation", ["metadata", "falloc", "full"])
@pytest.mark.parametrize(
    "options", [{}, {"cluster_size": 512}, {"extended_l2": True}, {"data_file": "d"}], ids=str
)
def test_growing_with_preallocation(options: dict[str, Any], preallocation: str) -> None:
    disk, memory, data = make(100 * KIB + 512, **options)
    disk.pwrite(b"\xaa" * 1000, 0)
    disk.resize(600 * KIB + 512, preallocation=preallocation)
    assert disk.pread(disk.size, 0) == (b"\xaa" * 1000).ljust(disk.size, b"\0")
    target = data if data is not None else memory
    before = len(target.content)
    disk.pwrite(pattern(400 * KIB), 150 * KIB)
    assert len(target.content) <= before + 1536, "space was not there after all"
    assert disk.pread(400 * KIB, 150 * KIB) == pattern(400 * KIB)
    with pytest.raises(UsageError):
        disk.resize(1024, preallocation=preallocation)
    disk.close()
    check_bytes(memory.content, data_file=data.content if data is not None else None)


@pytest.mark.parametrize("grow", [True, False])
@pytest.mark.parametrize("operation", [faults.WRITE, faults.FLUSH])
def test_a_resize_that_fails_is_old_or_new_and_the_disk_knows_which(operation: str, grow: bool) -> None:
    """Also when the header's write may or may not have arrived: what is flushed later is kept."""
    sizes = (64 * KIB, 512 * KIB) if grow else (512 * KIB, 64 * KIB)
    for number in range(1, 40):
        memory = MemoryStorage(BLOCKING, empty_image(sizes[0], cluster_size=512))
        storage = Faults(memory)
        disk = enban.Disk(drive(open_memory(storage)))
        disk.pwrite(pattern(64 * KIB), 0)
        disk.flush()
        storage.decide = fail_at(number, operations=(operation,))
        try:
            disk.resize(sizes[1])
            failed = False
        except HostError:
            failed = True
        storage.decide = None
        assert disk.size in sizes and (failed or disk.size == sizes[1])
        size = disk.size
        disk.pwrite(b"last".ljust(512), size - 512)
        disk.flush()
        reader = Qcow2Reader(memory.content)  # as a power cut would leave it now
        assert not reader.check().corruptions
        assert reader.size == size, "memory and header disagree about the size"
        assert reader.read()[size - 512 :] == b"last".ljust(512)
        disk.close()
        check_bytes(memory.content, leaks=True)
        assert Qcow2Reader(memory.content).read()[: 64 * KIB - 512] == pattern(64 * KIB)[: 64 * KIB - 512]
        if not failed:
            break
    assert number > 1


def test_sizes_that_are_refused() -> None:
    disk, memory, _ = make(MIB, cluster_size=512)
    before = bytes(memory.content)
    for size in (1000, 1 << 50, 1 << 63):
        with pytest.raises(UsageError):
            disk.resize(size)
        assert disk.size == MIB
    disk.resize(MIB)
    disk.close()
    assert memory.content == before


def test_resizing_in_many_small_steps() -> None:
    disk, memory, _ = make(512, cluster_size=512)
    model = bytearray(512)
    sizes = [(n * 7919) % 400 * 512 + 512 for n in range(40)]
    for number, (_, size) in enumerate(pairwise(sizes)):
        disk.resize(size)
        del model[size:]
        model.extend(bytes(size - len(model)))
        disk.pwrite(bytes([number + 1]) * 512, size - 512)
        model[size - 512 :] = bytes([number + 1]) * 512
    assert disk.pread(len(model), 0) == model
    disk.close()
    check_bytes(memory.content)
