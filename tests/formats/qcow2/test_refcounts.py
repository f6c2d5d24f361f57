"""Refcounts: every width, allocation, blocks and tables that grow, and growth that fails."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptImageError, HostError, NoSpaceError, UnsupportedOperationError
from enban.filters import faults
from enban.filters.faults import Faults, fail_at
from enban.formats.qcow2.node import Qcow2Node
from enban.formats.qcow2.refcounts import PackedCounts, Refcounts, WideCounts, new_counts
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import KIB, MIB, check_bytes, empty_image, open_memory, pattern

# -- counts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", range(7))
@given(st.data())
def test_counts_are_a_list_of_numbers(order: int, data: st.DataObject) -> None:
    most = (1 << (1 << order)) - 1
    length = 64 * 8 >> order
    model = data.draw(st.lists(st.integers(0, most), min_size=length, max_size=length))
    make = PackedCounts if order < 3 else WideCounts
    counts = make(bytes(64), order)
    for index, value in enumerate(model):
        counts[index] = value
    assert len(counts) == length
    assert [counts[i] for i in range(length)] == model
    start = data.draw(st.integers(0, length - 1))
    if 0 in model[start:]:
        assert counts.index(0, start) == model.index(0, start)
    else:
        with pytest.raises(ValueError):
            counts.index(0, start)
    raw = counts.big_endian(0, 64)
    again = make(raw, order)
    assert [again[i] for i in range(length)] == model
    whole = int.from_bytes(raw, "big") if order >= 3 else int.from_bytes(raw, "little")
    width = 1 << order
    places = range(length)
    if order >= 3:  # the specification's layout: big-endian numbers; below a byte, low bits first
        assert [whole >> (length - 1 - i) * width & most for i in places] == model
    else:
        assert [whole >> i * width & most for i in places] == model


# -- allocation ------------------------------------------------------------------------------


def open_image(size: int = 64 * KIB, **options: int) -> tuple[MemoryStorage, Qcow2Node]:
    memory = MemoryStorage(BLOCKING, empty_image(size, **options))
    node = drive(open_memory(memory)).node
    assert isinstance(node, Qcow2Node)
    drive(node.prepare_change())
    return memory, node


def test_first_fit_fills_holes_before_it_grows() -> None:
    _, node = open_image(cluster_size=512)
    counts = node.refcounts
    first, count, clean = drive(counts.allocate(5))
    assert count == 5 and clean and first == counts.end - 5
    drive(counts.release(first + 1, 2))
    assert drive(counts.allocate(4)) == (first + 1, 2, False)  # a run that was used before is not clean
    assert drive(counts.allocate(1))[0] == first + 5


def test_a_count_never_goes_below_zero_or_over_its_width() -> None:
    for bits, most in ((1, 1), (2, 3), (8, 255)):
        _, node = open_image(cluster_size=512, refcount_bits=bits)
        cluster, _, _ = drive(node.refcounts.allocate(1))
        for _ in range(most - 1):
            drive(node.refcounts.add(cluster, 1))
        with pytest.raises(UnsupportedOperationError, match="exceed"):
            drive(node.refcounts.add(cluster, 1))
        assert drive(node.refcounts.get(cluster)) == most
        for _ in range(most):
            drive(node.refcounts.add(cluster, -1))
        with pytest.raises(CorruptImageError):
            drive(node.refcounts.add(cluster, -1))


def test_metadata_with_a_lost_count_is_not_given_out() -> None:
    """Refcount 0 for the header, the tables: damage, not free space."""
    for lost in range(4):
        memory = MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=512))
        block = int.from_bytes(memory.content[512:520], "big")
        memory.content[block + 2 * lost : block + 2 * lost + 2] = bytes(2)
        before = bytes(memory.content)
        disk = enban.Disk(drive(open_memory(memory)))
        with pytest.raises(CorruptImageError, match="refcount 0"):
            disk.pwrite(b"x" * 512, 0)
        assert memory.content[:72] == before[:72] and memory.content[80:] == before[80:], "written on damage"
        assert memory.content[79] == 2


def test_a_lost_refcount_block_is_not_replaced_over_the_header() -> None:
    """Its entry in the refcount table is zero, so that all clusters look free, cluster 0 first."""
    memory = MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=512))
    memory.content[512:520] = bytes(8)
    before = bytes(memory.content)
    disk = enban.Disk(drive(open_memory(memory)))
    with pytest.raises(CorruptImageError):
        disk.pwrite(b"x" * 512, 0)
    assert memory.content[:72] == before[:72] and memory.content[80:] == before[80:]


def test_clusters_counted_behind_the_end_of_the_file_are_left_alone() -> None:
    """What a crash leaves: counts that reached the disk for data that did not."""
    memory = MemoryStorage(BLOCKING, empty_image(MIB, cluster_size=512, refcount_bits=16))
    image = memory.content
    block = int.from_bytes(image[512:520], "big")
    end = -(-len(image) // 512)
    for cluster in (end + 1, end + 2, end + 5):
        image[block + 2 * cluster : block + 2 * cluster + 2] = b"\0\1"
    node = drive(open_memory(memory)).node
    assert isinstance(node, Qcow2Node)
    drive(node.prepare_change())
    place = drive(node.refcounts.allocate_adjacent(4)) // 512
    assert not {place, place + 1, place + 2, place + 3} & {end + 1, end + 2, end + 5}
    assert drive(node.refcounts.get(end + 1)) == 1
    taken = {drive(node.refcounts.allocate(1))[0] for _ in range(8)}
    assert not taken & {end + 1, end + 2, end + 5, place, place + 1, place + 2, place + 3}


def test_a_device_is_used_to_its_last_cluster() -> None:
    class Device(MemoryStorage):
        fixed_size = True

    image = empty_image(MIB, cluster_size=4096)
    device = Device(BLOCKING, bytes(image).ljust(40 * 4096, b"\0"), limit=40 * 4096)
    disk = enban.Disk(drive(open_memory(device)))
    with pytest.raises(NoSpaceError):
        disk.pwrite(pattern(200 * KIB), 0)
    written = 0
    with pytest.raises(NoSpaceError):
        while True:
            disk.pwrite(pattern(4096, written + 1), written)
            written += 4096
    node = disk.node
    assert isinstance(node, Qcow2Node)
    assert all(drive(node.refcounts.get(cluster)) for cluster in range(40)), "room was left"
    for at in range(0, written, 4096):
        assert disk.pread(4096, at) == pattern(4096, at + 1)
    disk.close()
    check_bytes(device.content)


# -- growing ---------------------------------------------------------------------------------


def fill(disk: enban.Disk, upto: int, step: int = 3 * KIB) -> int:
    """Write the disk from its start; where it got to when an error stopped it."""
    for at in range(0, upto, step):
        try:
            disk.pwrite(pattern(step, at + 1), at)
        except HostError:
            return at
    return upto


def verify(disk: enban.Disk, upto: int, step: int = 3 * KIB) -> None:
    for at in range(0, upto, step):
        assert disk.pread(step, at) == pattern(step, at + 1), f"at {at:#x}"


@pytest.mark.parametrize("refcount_bits", [64, 16, 1])
def test_the_refcount_table_grows_and_moves(refcount_bits: int) -> None:
    """Clusters of 512 bytes with counts of 64 bits: a block counts 64, a table cluster 4096 of them."""
    size = {64: 6 * MIB, 16: 3 * MIB, 1: MIB}[refcount_bits]
    memory = MemoryStorage(BLOCKING, empty_image(12 * MIB, cluster_size=512, refcount_bits=refcount_bits))
    disk = enban.Disk(drive(open_memory(memory)))
    node = disk.node
    assert isinstance(node, Qcow2Node)
    before = len(node.refcounts.table)
    assert fill(disk, size) == size
    if refcount_bits == 64:
        assert len(node.refcounts.table) > before
    verify(disk, size)
    disk.close()
    check_bytes(memory.content)
    disk = enban.Disk(drive(open_memory(memory)))
    verify(disk, size)
    disk.close()


def image_before_growth() -> tuple[bytes, int]:
    """An image a few writes before its refcount table must grow, and how far it is written."""
    memory = MemoryStorage(BLOCKING, empty_image(12 * MIB, cluster_size=512, refcount_bits=64))
    disk = enban.Disk(drive(open_memory(memory)))
    node = disk.node
    assert isinstance(node, Qcow2Node)
    entries = len(node.refcounts.table)
    at = 0
    while node.refcounts.end < 64 * entries - 24:
        disk.pwrite(pattern(3 * KIB, at + 1), at)
        at += 3 * KIB
    disk.close()
    assert len(node.refcounts.table) == entries
    return bytes(memory.content), at


START = image_before_growth()
FAULTS = {"EIO": (errno.EIO, 0), "ENOSPC": (errno.ENOSPC, 0), "torn": (errno.EIO, 512)}


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("operation", [faults.WRITE, faults.FLUSH, faults.READ])
def test_growth_fails_at_each_call_in_turn(operation: str, kind: str) -> None:
    """The image stays sound, what was written stays, and growing goes on when the fault is gone."""
    if operation == faults.FLUSH and kind == "torn":
        kind = "EIO"
    content, done = START
    number, tear = FAULTS[kind]
    index = failures = 0
    while True:
        index += 1
        memory = MemoryStorage(BLOCKING, content)
        storage = Faults(memory)
        disk = enban.Disk(drive(open_memory(storage)))
        storage.decide = fail_at(index, operations=(operation,), errno=number, done=tear)
        reached = done
        for turn in range(14):
            try:
                disk.pwrite(pattern(3 * KIB, reached + 1), reached)
                reached += 3 * KIB
                if turn % 4 == 3:
                    disk.flush()
            except HostError:
                failures += 1
                assert not Qcow2Reader(memory.content).check().corruptions
        over = storage.injected == 0
        storage.decide = None
        for _ in range(4):
            disk.pwrite(pattern(3 * KIB, reached + 1), reached)
            reached += 3 * KIB
        disk.flush()
        for at in range(done, reached, 3 * KIB):
            assert disk.pread(3 * KIB, at) == pattern(3 * KIB, at + 1)
        node = disk.node
        assert isinstance(node, Qcow2Node) and len(node.refcounts.table) > 64, "it never grew"
        disk.close()
        check_bytes(memory.content, leaks=True)
        if over:
            break
    assert failures > 2


def test_growth_on_a_full_disk_with_a_little_room_each_time() -> None:
    content, done = START
    memory = MemoryStorage(BLOCKING, content, limit=len(content))
    disk = enban.Disk(drive(open_memory(memory)))
    reached, refused = done, 0
    for _ in range(1000):
        if reached >= done + 30 * 3 * KIB:
            break
        try:
            disk.pwrite(pattern(3 * KIB, reached + 1), reached)
            reached += 3 * KIB
        except NoSpaceError:
            refused += 1
            memory.limit += 512
    assert refused > 20 and reached >= done + 30 * 3 * KIB
    verify(disk, reached)
    disk.close()
    check_bytes(memory.content, leaks=True)


def test_freed_clusters_are_used_again_and_the_file_stays_small() -> None:
    """Write, discard, write, for long: the file must not grow beyond what is in use at once."""
    memory = MemoryStorage(BLOCKING, empty_image(256 * KIB, cluster_size=512))
    disk = enban.Disk(drive(open_memory(memory)))
    chance, sizes = random.Random(1), []
    for _ in range(60):
        for at in range(0, 64 * KIB, 4 * KIB):
            disk.pwrite(pattern(4 * KIB, at + 1), at)
        disk.flush()
        disk.discard(0, 64 * KIB)
        disk.flush()
        disk.pwrite(b"x" * 512, chance.randrange(128, 500) * 512)
        sizes.append(len(memory.content))
    assert sizes[-1] < 64 * KIB * 2 + 60 * 1024 + 32 * KIB, sizes
    disk.close()
    check_bytes(memory.content)


def test_reading_counts_does_not_load_the_world() -> None:
    """Blocks in memory are bounded whatever the image's size."""
    memory = MemoryStorage(BLOCKING, empty_image(64 * KIB, cluster_size=512, refcount_bits=64))
    node = drive(open_memory(memory)).node
    assert isinstance(node, Qcow2Node)
    counts: Refcounts = node.refcounts
    assert drive(counts.get(1 << 40)) == 0
    assert not counts.blocks


@pytest.mark.parametrize("order", range(7))
def test_runs_of_counts_in_and_out(order: int) -> None:
    source = random.Random(order)
    values = [source.randrange(min(1 << (1 << order), 1 << 40)) for _ in range(512)]
    counts = new_counts(bytes(512 << order >> 3), order)
    counts.store(values)
    assert [counts[index] for index in range(512)] == values
    for first, count in ((0, 512), (1, 1), (3, 300), (509, 3), (8, 8)):
        assert counts.values(first, count) == values[first : first + count]
