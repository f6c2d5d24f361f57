"""Checking qcow images: sound ones are clean, and each kind of damage is found and counted."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.block.codec import deflater
from enban.block.runtime import BLOCKING, drive
from enban.errors import UnsupportedOperationError
from enban.formats.common.findings import CheckResult
from enban.formats.qcow.check import Checker, Usage
from enban.formats.qcow.opening import open_qcow
from enban.jobs.check import check
from enban.lab.qcow_reader import QcowReader
from enban.storage.memory import MemoryStorage
from tests.qcow_support import make_qcow, memory_qcow, open_disk
from tests.support import KIB, MIB, pattern


def check_memory(storage: MemoryStorage, **options: Any) -> CheckResult:
    node = drive(open_qcow("image", BLOCKING, storage, writable=False, metadata_only=True))
    return drive(Checker(node, **options).run())


def put(storage: MemoryStorage, offset: int, value: int) -> None:
    storage.content[offset : offset + 8] = value.to_bytes(8, "big")


def sample() -> MemoryStorage:
    """L1 at 48, L2 table at 4096, guest clusters 0, 1 at 8192 and 12288, 2, 3 packed behind, 4 plain."""
    storage = memory_qcow(4 * MIB)
    disk = open_disk(storage)
    disk.pwrite(pattern(8192), 0)
    for number in (2, 3):
        disk.write_packed(deflater("zlib")(bytes([number]) * 4096), number * 4096)
    disk.pwrite(pattern(4096), 4 * 4096)
    disk.close()
    return storage


def test_a_sound_image() -> None:
    storage = sample()
    result = check_memory(storage)
    assert result.clean and result.exit_code == 0 and not result.findings
    assert (result.total_clusters, result.allocated_clusters, result.compressed_clusters) == (1024, 5, 2)
    assert result.image_end_offset == len(storage.content)
    assert result.format == "qcow"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cluster_size": 512, "l2_entries": 64},
        {"cluster_size": 65536, "l2_entries": 64},
        {"backing_file": "a name"},
        {"encrypt_format": "aes"},
    ],
)
def test_new_images(options: dict[str, Any]) -> None:
    for size in (0, 512, 10 * MIB):
        assert check_memory(memory_qcow(size, **options)).clean
    if "encrypt_format" not in options:
        storage = memory_qcow(10 * MIB, **options)
        with open_disk(storage) as disk:
            disk.pwrite(b"x", 5 * MIB)
        assert check_memory(storage).clean  # what fills up the L1 table is no leak


@pytest.mark.parametrize(
    ("place", "value", "kinds"),
    [
        (48, 1 << 40, {"l1-past-end": 1, "unused": 6}),
        (48, 8, {"l1-past-end": 1, "unused": 6}),
        (4096, 1 << 40, {"l2-past-end": 1, "unused": 1}),
        (4096, 8192 + 7, {"l2-unaligned": 1, "unused": 1}),
        (4096, 12288, {"overlap": 1, "unused": 1}),  # two entries, one cluster
        (4096, 4096, {"overlap": 1, "unused": 1}),  # data over its table
        (4096, 512 * 9, {"overlap": 1}),  # what is left of a cluster counts as padding
        (4096 + 40, 8192, {"overlap": 1}),
        (4096 + 16, 0, {"unused": 0}),  # some bytes of packed data: less than a sector
        (56, 4096, {"overlap": 6}),  # two L1 entries, one table: it and all that it names
        (4096 + 16, 1 << 63 | 1 << 40, {"packed-past-end": 1}),
        (4096 + 16, 1 << 63 | 25 << 51, {"packed-past-end": 1}),
        (4096 + 16, 1 << 63 | 25 << 51 | 8192, {"packed-unreadable": 1, "overlap": 1}),
    ],
)
def test_damage(place: int, value: int, kinds: dict[str, int]) -> None:
    storage = sample()
    put(storage, place, value)
    result = check_memory(storage)
    assert result.kinds == {kind: count for kind, count in kinds.items() if count}
    assert result.exit_code == (2 if set(result.kinds) - {"unused"} else 0 if result.clean else 3)
    for finding in result.findings:
        assert "\n" not in str(finding)


def test_the_length_of_a_name_that_is_not_there() -> None:
    storage = memory_qcow(4 * MIB)
    storage.content[16:20] = (4096).to_bytes(4, "big")
    assert check_memory(storage).clean


def test_clusters_behind_the_end_are_not_counted_as_parts_of_the_disk() -> None:
    storage = sample()
    with open_disk(storage) as disk:
        disk.resize(4096 + 512)
    result = check_memory(storage)
    assert (result.total_clusters, result.allocated_clusters, result.compressed_clusters) == (2, 2, 0)
    assert result.clean  # the table still names them


def test_packed_data_that_does_not_unpack() -> None:
    storage = sample()
    reader = QcowReader(storage.content)
    host, length = reader.packed(reader.table(0)[3])
    storage.content[host : host + length] = b"\xff" * length
    result = check_memory(storage)
    assert result.kinds == {"packed-unreadable": 1} and result.corruptions == 1
    assert "guest offset 0x3000" in str(result.findings[0])


def test_what_is_left_behind_is_a_leak() -> None:
    storage = sample()
    disk = open_disk(storage)
    for number in range(32):
        disk.write_packed(
            deflater("zlib")(random.Random(number).randbytes(2048).ljust(4096, b"\0")), number * 4096
        )
    disk.pwrite(b"x" * 32 * 4096, 0)
    disk.close()
    result = check_memory(storage)
    assert result.corruptions == 0 and result.exit_code == 3
    assert set(result.kinds) == {"unused"}
    assert 15 <= result.leaks <= 25  # about half a cluster each, and the first plain ones
    storage.content.extend(bytes(3 * 4096))
    assert check_memory(storage).leaks == result.leaks + 3


def test_progress_comes_to_an_end() -> None:
    seen: list[tuple[int, int]] = []
    node = drive(open_qcow("image", BLOCKING, sample(), writable=False))
    drive(Checker(node, lambda done, whole: seen.append((done, whole))).run())
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1]


@pytest.mark.parametrize("seed", range(12))
def test_little_memory_gives_the_same_answer(seed: int) -> None:
    """With room for a handful of runs the check goes over the file in parts."""
    choose = random.Random(seed)
    storage = memory_qcow(MIB, cluster_size=1024, l2_entries=64)
    disk = open_disk(storage)
    for _ in range(120):
        at = choose.randrange(1024) * 1024
        if choose.random() < 0.5:
            data = choose.randbytes(200) * 6
            disk.write_packed(deflater("zlib")(data[:1024]), at)
        else:
            disk.pwrite(choose.randbytes(1024), at)
    disk.close()
    if seed % 3:  # holes, so that there are many runs
        reader = QcowReader(storage.content)
        for index, table in enumerate(reader.l1):
            for position in range(0, 64, 2):
                if table and (seed % 3 == 1 or position % 8 == 0):
                    put(storage, table + position * 8, 0)
            assert index < 16
    whole = check_memory(storage)
    for most, pending in ((4, 3), (8, 1000), (1000, 7)):
        parts = check_memory(storage, most=most, pending=pending)
        assert (
            (parts.corruptions, parts.image_end_offset)
            == (whole.corruptions, whole.image_end_offset)
            == (0, whole.image_end_offset)
        )
        assert abs(parts.leaks - whole.leaks) <= whole.leaks // 2 + 1  # a gap may be told in two parts
        assert bool(parts.leaks) == bool(whole.leaks)


def settled(
    ranges: list[tuple[int, int]], low: int, *, most: int, pending: int
) -> tuple[Usage, list[tuple[int, int]]]:
    found: list[tuple[int, int]] = []

    def clash(start: int, end: int, user: int) -> None:
        found.append((start, end))

    usage = Usage(low, 100, clash, most=most, pending=pending)
    for number, (start, length) in enumerate(ranges):
        usage.add(start, start + length, number)
    usage.settle()
    return usage, found


@given(
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=30),
    st.integers(1, 40),
    st.integers(4, 40),
)
def test_runs_and_clashes(ranges: list[tuple[int, int]], pending: int, most: int) -> None:
    """Against one counter a byte."""
    counts = [0] * 100
    for start, length in ranges:
        for at in range(start, start + length):
            counts[at] += 1
    low = 0
    clashing: set[int] = set()
    used: set[int] = set()
    while low < 100:
        usage, found = settled(ranges, low, most=most, pending=pending)
        window = range(low, usage.high)
        clashing |= {at for a, b in found for at in range(a, b)} & set(window)
        used |= {at for a, b in usage.runs for at in range(a, b)} & set(window)
        assert usage.runs == sorted(usage.runs)
        assert usage.high > low
        low = usage.high
    assert used == {at for at, count in enumerate(counts) if count}
    assert clashing == {at for at, count in enumerate(counts) if count > 1}


def test_the_job(tmp_path: Path) -> None:
    path = make_qcow(tmp_path / "x.qcow", 64 * KIB)
    assert check(path).clean
    with path.open("r+b") as file:
        file.seek(48)
        file.write((1 << 40).to_bytes(8, "big"))
    result = check(path)
    assert result.exit_code == 2 and result.as_dict()["corruptions"] == 1
    with pytest.raises(UnsupportedOperationError, match="cannot be repaired"):
        check(path, repair="all")
