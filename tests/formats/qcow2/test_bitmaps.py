"""Dirty bitmaps of qcow2: what they say after writes, across closing, resizing, snapshots and power cuts."""

from __future__ import annotations

import asyncio
import errno
import struct
import threading
from functools import partial
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import enban
from enban.aio import AsyncDisk, AsyncioRuntime
from enban.block.bitmaps import Bits
from enban.block.runtime import BLOCKING, drive
from enban.block.storage import Storage
from enban.errors import (
    CorruptImageError,
    EnbanError,
    HostError,
    ImageError,
    ReadOnlyError,
    UnsupportedOperationError,
    UsageError,
)
from enban.filters import faults, writelog
from enban.filters.delay import Delay
from enban.filters.faults import Faults
from enban.filters.writelog import WriteLog
from enban.formats.qcow2 import bitmaps as engine
from enban.lab.crash_states import Replay
from enban.lab.damage import check
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from enban.wire.qcow2_bitmaps import IN_USE, BitmapEntry
from tests.support import KIB, MIB, check_bytes, empty_image, open_memory, pattern, raw_node


def memory_image(size: int = MIB, **options: Any) -> MemoryStorage:
    return MemoryStorage(BLOCKING, empty_image(size, **options))


def open_disk(storage: Storage, *, writable: bool = True, backing: bytes = b"") -> enban.Disk:
    below = raw_node(backing) if backing else None
    return enban.Disk(drive(open_memory(storage, writable=writable, backing=below)))


def stored(image: bytes | bytearray) -> dict[str, set[int] | None]:
    """What the independent reader finds: the dirty granules by name, None for an inconsistent bitmap."""
    reader = Qcow2Reader(image)
    return {b.name: None if b.in_use else reader.dirty(b) for b in reader.bitmaps()}


def granules(disk: enban.Disk, name: str) -> set[int]:
    size = next(b.granularity for b in disk.bitmaps() if b.name == name)
    return {
        place // size
        for start, length in disk.dirty(name)
        for place in range(start // size * size, start + length, size)
    }


# -- the bits ----------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    st.integers(1, 40_000),
    st.sampled_from([9, 10, 12]),
    st.lists(
        st.tuples(st.sampled_from("sssscrk"), st.integers(0, 45_000), st.integers(1, 20_000)), max_size=25
    ),
    st.tuples(st.integers(0, 40_000), st.integers(1, 40_000)),
)
def test_bits_against_a_set(
    sectors: int, shift: int, steps: list[tuple[str, int, int]], window: tuple[int, int]
) -> None:
    """Sizes in sectors of 512; chunks of 64 bytes, so that there are many."""
    bits, model = Bits(sectors * 512, shift, 64), set()
    for kind, offset, length in steps:
        start, end = offset * 512 + 7, (offset + length) * 512
        count = -(-bits.size >> shift)
        if kind == "s":
            bits.set(start, end - start)
            model |= {n for n in range(start >> shift, (end - 1 >> shift) + 1) if n < count}
        elif kind == "c":
            bits.clear()
            model.clear()
        elif kind == "r":
            bits.resize(offset * 512 + 512)
            model = {n for n in model if n < -(-bits.size >> shift)}
        else:
            other = bits.copy()
            bits.clear()
            for number, chunk in other.chunks.items():
                bits.put(number, chunk)
    start = min(window[0] * 512 + 1, bits.size - 1)
    length = min(window[1] * 512, bits.size - start)
    seen = list(bits.extents(start, length))
    assert all(a + b < c for (a, b), (c, _) in pairwise(seen)), "extents touch"
    for granule in range(start >> shift, (start + length - 1 >> shift) + 1):
        first, last = max(start, granule << shift), min(start + length, granule + 1 << shift)
        inside = any(a <= first and last <= a + b for a, b in seen)
        assert inside == (granule in model), granule
    assert sum(b for _, b in seen) <= length


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([9, 11]),
    st.lists(st.tuples(st.integers(0, 39_000), st.integers(1, 9000)), max_size=12),
    st.lists(st.tuples(st.integers(0, 39_000), st.integers(1, 9000)), max_size=12),
)
def test_merged_bits(shift: int, mine: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    size = 40_000 * 512
    bits, other = Bits(size, 9, 64), Bits(size, shift, 64)
    for chosen, ranges in ((bits, mine), (other, theirs)):
        for offset, length in ranges:
            chosen.set(offset * 512, length * 512)
    expected = {
        n for ranges in (bits, other) for s, k in ranges.extents(0, size) for n in range(s >> 9, s + k >> 9)
    }
    before = list(other.extents(0, size))
    bits.merge(other)
    bits.merge(bits)
    assert {n for s, k in bits.extents(0, size) for n in range(s >> 9, s + k >> 9)} == expected
    bits.set(0, size)
    assert list(other.extents(0, size)) == before


def test_bits_from_many_threads() -> None:
    bits = Bits(64 * MIB, 9, 512)

    def work(number: int) -> None:
        for place in range(number, 1 << 15, 8):
            bits.set(place * 512, 512)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(bits.extents(0, 64 * MIB)) == [(0, 16 * MIB)]


# -- what they say -----------------------------------------------------------------------------

HISTORY = ("write",) * 6 + ("zero", "discard", "add", "change", "reopen", "resize", "snap")
KINDS: dict[str, dict[str, Any]] = {
    "64k": {},
    "512": {"cluster_size": 512},
    "ext": {"cluster_size": 16384, "extended_l2": True},
    "1-bit": {"cluster_size": 4096, "refcount_bits": 1},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_bitmap_is_kept_over_closing_and_opening(kind: str) -> None:
    memory = memory_image(3 * MIB + 512, **KINDS[kind])
    with open_disk(memory) as disk:
        disk.add_bitmap("fine", granularity=512)
        disk.add_bitmap("off", enabled=False)
        disk.add_bitmap("coarse", granularity=MIB)
        assert [(b.name, b.granularity, b.enabled, b.inconsistent) for b in disk.bitmaps()] == [
            ("fine", 512, True, False),
            ("off", 65536, False, False),
            ("coarse", MIB, True, False),
        ]
        disk.pwrite(b"x" * 1000, 100_000)
        disk.pwrite(b"y", 3 * MIB + 511)
        assert list(disk.dirty("fine")) == [(99_840, 1536), (3 * MIB, 512)]
        assert list(disk.dirty("fine", 100_000, 500)) == [(100_000, 500)]
        assert list(disk.dirty("coarse")) == [(0, MIB), (3 * MIB, 512)]
        assert list(disk.dirty("off")) == []
    assert stored(memory.content) == {"fine": {195, 196, 197, 6144}, "off": set(), "coarse": {0, 3}}
    check_bytes(memory.content)
    with open_disk(memory, writable=False) as disk:
        assert granules(disk, "coarse") == {0, 3} and granules(disk, "off") == set()
    with open_disk(memory) as disk:
        disk.pwrite(bytes(512), MIB)
        disk.discard(2 * MIB, 256 * KIB)
        assert granules(disk, "coarse") == {0, 1, 2, 3}
        disk.clear_bitmap("fine")
        disk.disable_bitmap("coarse")
        disk.enable_bitmap("off")
        disk.pwrite(b"z", 0)
    found = stored(memory.content)
    assert found == {"fine": {0}, "off": {0}, "coarse": {0, 1, 2, 3}}
    check_bytes(memory.content)
    with open_disk(memory) as disk:
        disk.merge_bitmap("fine", "coarse")
        disk.remove_bitmap("coarse")
        disk.clear_bitmap("off")
    assert stored(memory.content) == {"fine": set(range(6145)), "off": set()}
    check_bytes(memory.content)
    with open_disk(memory) as disk:
        disk.remove_bitmap("fine")
        disk.remove_bitmap("off")
    reader = Qcow2Reader(memory.content)
    assert not reader.autoclear and reader.bitmaps() == []
    check_bytes(memory.content)


def test_nothing_is_written_for_bitmaps_that_are_only_looked_at() -> None:
    memory = memory_image()
    with open_disk(memory) as disk:
        disk.add_bitmap("b")
        disk.pwrite(b"x", 0)
    before = bytes(memory.content)
    with open_disk(memory) as disk:
        assert list(disk.dirty("b")) == [(0, 65536)]
        disk.pread(100, 0)
        disk.flush()
    assert memory.content == before


def test_in_use_is_on_the_disk_before_the_first_change_and_only_of_enabled_ones() -> None:
    memory = memory_image()
    with open_disk(memory) as disk:
        disk.add_bitmap("on")
        disk.add_bitmap("off", enabled=False)
    log = WriteLog(memory)
    disk = open_disk(log)
    before = bytes(memory.content)
    disk.pwrite(b"x" * 512, 0)
    replay = Replay(before, log.entries)
    for _ in replay.steps():
        content = replay.everything()
        if Qcow2Reader(content).read() != bytes(MIB):
            assert stored(replay.durable) == {"on": None, "off": set()}
    assert stored(memory.content) == {"on": None, "off": set()}
    disk.flush()
    killed = MemoryStorage(BLOCKING, bytes(memory.content))
    disk.close()
    assert stored(memory.content) == {"on": {0}, "off": set()}
    with open_disk(killed) as disk:  # as after a crash
        assert [b.inconsistent for b in disk.bitmaps()] == [True, False]
        for use in (
            lambda: list(disk.dirty("on")),
            lambda: disk.clear_bitmap("on"),
            lambda: disk.disable_bitmap("on"),
            lambda: disk.merge_bitmap("off", "on"),
        ):
            with pytest.raises(ImageError, match="inconsistent"):
                use()
        disk.pwrite(b"y", 70_000)
        disk.resize(2 * MIB)
    assert stored(killed.content) == {"on": None, "off": set()}
    with open_disk(killed) as disk:
        disk.remove_bitmap("on")
    check_bytes(killed.content)
    assert stored(killed.content) == {"off": set()}


def test_wrong_requests_are_refused_in_one_line() -> None:
    memory = memory_image()
    with open_disk(memory) as disk:
        disk.add_bitmap("b")
        for request, words in (
            (lambda: disk.add_bitmap("b"), "already"),
            (lambda: disk.add_bitmap(""), "name"),
            (lambda: disk.add_bitmap("x" * 1024), "name"),
            (lambda: disk.add_bitmap("c", granularity=1000), "granularity"),
            (lambda: disk.add_bitmap("c", granularity=256), "granularity"),
            (lambda: disk.add_bitmap("c", granularity=1 << 32), "granularity"),
            (lambda: disk.add_bitmap("c", granularity=0), "granularity"),
            (lambda: disk.remove_bitmap("c"), "no bitmap"),
            (lambda: list(disk.dirty("c")), "no bitmap"),
            (lambda: disk.merge_bitmap("b", "c"), "no bitmap"),
        ):
            with pytest.raises(UsageError, match=words):
                request()
        with open_disk(memory_image(2 * MIB)) as other:
            other.add_bitmap("b")
            with pytest.raises(UsageError, match="cannot be merged"):
                disk.merge_bitmap("b", "b", of=other)
    with open_disk(memory, writable=False) as disk, pytest.raises(ReadOnlyError):
        disk.clear_bitmap("b")
    with (
        open_disk(memory_image(compat="0.10")) as disk,
        pytest.raises(UnsupportedOperationError, match="version 2"),
    ):
        disk.add_bitmap("b")
    with (
        open_disk(memory_image(1 << 50, cluster_size=2 * MIB)) as disk,
        pytest.raises(UsageError, match="larger granularity"),
    ):
        disk.add_bitmap("b", granularity=512)


def test_a_bitmap_of_a_vast_disk_takes_memory_by_what_is_written() -> None:
    memory = memory_image(1 << 45, cluster_size=65536)
    with open_disk(memory) as disk:
        disk.add_bitmap("b")
        for place in (0, 1 << 44, (1 << 45) - 1):
            disk.pwrite(b"x", place)
        bits = drive(drive(disk.door.bitmaps()).bits("b"))
        assert len(bits.chunks) == 3
        assert [start for start, _ in disk.dirty("b")] == [0, 1 << 44, (1 << 45) - 65536]
    check_bytes(memory.content)
    with open_disk(memory, writable=False) as disk:
        assert len(list(disk.dirty("b"))) == 3


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1 << 30), st.sampled_from(sorted(KINDS)), st.booleans())
def test_random_histories_against_a_model(seed: int, kind: str, chain: bool) -> None:
    """For each bitmap the model knows what must be set (content may differ from when it was cleared)."""
    random = Random(seed)
    size = 256 * KIB + 512
    backing = pattern(200 * KIB, 3) if chain else b""
    memory = MemoryStorage(
        BLOCKING, empty_image(size, **KINDS[kind], **({"backing_file": "b"} if chain else {}))
    )
    disk = open_disk(memory, backing=backing)
    model: dict[str, tuple[int, bool, set[int]]] = {}
    for step in range(30):
        action = random.choice(HISTORY)
        size = disk.size
        if action in ("write", "zero", "discard"):
            offset = random.randrange(size)
            length = random.randrange(1, min(size - offset, 40_000) + 1)
            before = disk.pread(size, 0)
            if action == "write":
                disk.pwrite(pattern(length, seed + step), offset)
            elif action == "zero":
                disk.write_zeroes(offset, length, unmap=random.random() < 0.5)
            else:
                disk.discard(offset, length)
            after = disk.pread(size, 0)
            for granularity, enabled, dirty in model.values():
                if enabled:
                    dirty |= {
                        n
                        for n in range(-(-size // granularity))
                        if before[n * granularity : (n + 1) * granularity]
                        != after[n * granularity : (n + 1) * granularity]
                    }
        elif action == "add":
            name, granularity = f"b{step}", random.choice((512, 4096, 65536))
            enabled = random.random() < 0.7
            disk.add_bitmap(name, granularity=granularity, enabled=enabled)
            model[name] = (granularity, enabled, set())
        elif action == "change" and model:
            name = random.choice(sorted(model))
            granularity, enabled, dirty = model[name]
            what = random.choice(("remove", "clear", "toggle", "merge"))
            if what == "remove":
                disk.remove_bitmap(name)
                del model[name]
            elif what == "clear":
                disk.clear_bitmap(name)
                dirty.clear()
            elif what == "toggle":
                (disk.disable_bitmap if enabled else disk.enable_bitmap)(name)
                model[name] = (granularity, not enabled, dirty)
            else:
                other = random.choice(sorted(model))
                disk.merge_bitmap(name, other)
                step_bytes, _, source = model[other]
                for n in list(source):
                    end = min((n + 1) * step_bytes, size)
                    dirty |= set(range(n * step_bytes // granularity, -(-end // granularity)))
        elif action == "resize":
            new = random.randrange(1, 800) * 512
            disk.resize(new)
            for granularity, enabled, dirty in model.values():
                if enabled and new > size:
                    dirty |= set(range(size // granularity, -(-new // granularity)))
                dirty -= {n for n in dirty if n * granularity >= new}
        elif action == "snap" and kind != "1-bit":
            names = [s.name for s in disk.snapshots]
            if not names or random.random() < 0.5:
                disk.create_snapshot(f"s{step}")
            elif random.random() < 0.5:
                disk.delete_snapshot(random.choice(names))
            else:
                disk.apply_snapshot(random.choice(names))
                for granularity, enabled, dirty in model.values():
                    if enabled:
                        dirty |= set(range(-(-disk.size // granularity)))
                    dirty -= {n for n in dirty if n * granularity >= disk.size}
        elif action == "reopen":
            disk.close()
            check_bytes(memory.content)
            for name, found in stored(memory.content).items():
                assert found is not None and model[name][2] <= found
            disk = open_disk(memory, backing=backing)
        assert {b.name: b.enabled for b in disk.bitmaps()} == {n: e for n, (_, e, _) in model.items()}
        for name, (_, _, dirty) in model.items():
            assert dirty <= granules(disk, name), (name, action)
    disk.close()
    check_bytes(memory.content)


def test_a_disabled_bitmap_says_exactly_what_was_written_while_it_was_enabled() -> None:
    memory = memory_image(cluster_size=4096)
    expected: set[int] = set()
    random = Random(5)
    with open_disk(memory) as disk:
        disk.add_bitmap("b", granularity=512)
        for _ in range(200):
            place = random.randrange(2047)
            disk.pwrite(b"x" * 600, place * 512)
            expected |= {place, place + 1}
        disk.disable_bitmap("b")
        disk.pwrite(b"z" * MIB, 0)
    assert stored(memory.content) == {"b": expected}


def test_asyncio_and_many_writers() -> None:
    async def main() -> bytes:
        runtime = AsyncioRuntime()
        memory = MemoryStorage(runtime, empty_image(4 * MIB))
        disk = AsyncDisk(await open_memory(memory))
        await disk.add_bitmap("b", granularity=512)
        await asyncio.gather(*(disk.pwrite(b"x" * 512, n * 8192) for n in range(512)))
        assert [e async for e in disk.dirty("b")] == [(n * 8192, 512) for n in range(512)]
        await disk.add_bitmap("c", enabled=False)
        await disk.merge_bitmap("c", "b")
        await disk.clear_bitmap("b")
        await disk.enable_bitmap("c")
        await disk.disable_bitmap("c")
        await disk.remove_bitmap("b")
        assert [b.name for b in await disk.bitmaps()] == ["c"]
        await disk.close()
        runtime.close()
        return bytes(memory.content)

    content = asyncio.run(main())
    check_bytes(content)
    assert stored(content) == {"c": set(range(64))}


@pytest.mark.parametrize("seed", range(6))
def test_bitmaps_looked_at_first_by_many_at_once(seed: int) -> None:
    """Who asks while the directory is still being read works with the same bitmaps as everybody."""
    with open_disk(memory := memory_image()) as disk:
        disk.add_bitmap("old")

    async def main() -> None:
        runtime = AsyncioRuntime()
        storage = Delay(MemoryStorage(runtime, memory.content), seed)
        disk = AsyncDisk(await open_memory(storage))
        await asyncio.gather(
            disk.bitmaps(),
            disk.add_bitmap("a", granularity=512),
            disk.pwrite(b"x" * 5000, 0),
            disk.add_bitmap("b", granularity=512),
            disk.bitmaps(),
        )
        await disk.pwrite(b"y", 100_000)
        for name in ("old", "a", "b"):
            assert 100_000 in [p for s, k in [e async for e in disk.dirty(name)] for p in range(s, s + k)]
        assert {info.name for info in await disk.bitmaps()} == {"old", "a", "b"}
        await disk.close()
        runtime.close()

    asyncio.run(main())


def test_threads_write_while_bitmaps_come_and_go() -> None:
    memory = memory_image(8 * MIB)
    with open_disk(memory) as disk:
        disk.add_bitmap("all", granularity=4096)
        stop = threading.Event()
        written: list[set[int]] = [set() for _ in range(4)]

        def work(number: int) -> None:
            random = Random(number)
            while not stop.is_set():
                place = random.randrange(2048)
                disk.pwrite(b"%d" % number, place * 4096)
                written[number].add(place)

        threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for _ in range(25):
            disk.add_bitmap("passing")
            disk.disable_bitmap("passing")
            disk.remove_bitmap("passing")
        stop.set()
        for thread in threads:
            thread.join()
        assert granules(disk, "all") == set.union(*written)
    check_bytes(memory.content)


# -- failures ----------------------------------------------------------------------------------


def test_a_full_disk_at_close_makes_bitmaps_coarser_and_never_wrong() -> None:
    memory = memory_image(cluster_size=512)
    with open_disk(memory) as disk:
        disk.add_bitmap("b", granularity=512)
        disk.pwrite(b"a" * MIB, 0)
        disk.clear_bitmap("b")
    faulty = Faults(memory)
    disk = open_disk(faulty)
    disk.pwrite(b"x", 100 * 512)
    disk.flush()
    size = memory.size()
    faulty.decide = lambda call: (
        faults.Fault(errno.ENOSPC)
        if call.operation == faults.WRITE and call.offset + call.length > size
        else None
    )
    disk.close()
    dirty = stored(memory.content)["b"]
    assert dirty is not None and 100 in dirty and len(dirty) > 1
    check_bytes(memory.content, leaks=True)


@pytest.mark.parametrize("operation", [faults.WRITE, faults.FLUSH])
def test_a_failure_anywhere_leaves_bitmaps_right_or_inconsistent(operation: str) -> None:
    """Each storage call in turn fails once, in all that can be done with bitmaps."""
    memory = memory_image(cluster_size=512)
    with open_disk(memory) as disk:
        disk.pwrite(pattern(MIB // 2, 4), 0)
        disk.add_bitmap("a", granularity=512)
        disk.add_bitmap("z", granularity=512, enabled=False)
    start = bytes(memory.content)
    failed = 0
    for number in range(1, 80):
        memory = MemoryStorage(BLOCKING, start)
        faulty = Faults(memory)
        disk = open_disk(faulty)
        base = disk.pread(disk.size, 0)
        faulty.decide = faults.fail_at(number, operations=(operation,))
        bases = {"a": [base], "n": [base]}
        errors = 0
        for action in (
            partial(disk.add_bitmap, "n", granularity=512),
            partial(disk.pwrite, b"1" * 700, 5000),
            partial(disk.clear_bitmap, "a"),
            partial(disk.resize, MIB + MIB // 2),
            partial(disk.pwrite, b"2" * 700, MIB + 5000),
            partial(disk.enable_bitmap, "z"),
            partial(disk.remove_bitmap, "z"),
            disk.close,
        ):
            try:
                action()
            except (HostError, UsageError):
                errors += 1
            if not disk.door.closed:
                for kept in bases.values():
                    kept.append(disk.pread(disk.size, 0))
        if not errors:
            break
        failed += 1
        check_bytes(memory.content, leaks=True)
        after = Qcow2Reader(memory.content).read()
        for name, dirty in stored(memory.content).items():
            if dirty is not None and name in bases:
                assert any(sound(dirty, 512, old, after) for old in bases[name]), (number, name)
    assert failed > 15


def sound(dirty: set[int], granularity: int, old: bytes, new: bytes) -> bool:
    """Whether a bitmap that was cleared when the disk was `old` may be what it is now it is `new`."""
    old = old[: len(new)].ljust(len(new), b"\0")
    return all(
        n in dirty
        for n in range(-(-len(new) // granularity))
        if old[n * granularity : (n + 1) * granularity] != new[n * granularity : (n + 1) * granularity]
    )


# -- power cuts --------------------------------------------------------------------------------

CRASHED: dict[str, dict[str, Any]] = {
    "512": {"cluster_size": 512},
    "512-rc64": {"cluster_size": 512, "refcount_bits": 64},
    "4k-chain": {"cluster_size": 4096, "backing_file": "b" * 300},
    "ext": {"cluster_size": 16384, "extended_l2": True},
}


ACTIONS = ("write", "write", "write", "add", "clear", "toggle", "remove", "resize", "flush")


def crash_session(kind: str, seed: int) -> tuple[bytes, list[writelog.Entry], bytes]:
    """Several openings of one image, all on record. Marks tell what each bitmap is relative to."""
    options = CRASHED[kind]
    backing = pattern(20 * KIB, 3) if "backing_file" in options else b""
    random = Random(seed)
    start = bytes(empty_image(40 * KIB, **options))
    log = WriteLog(MemoryStorage(BLOCKING, start))
    bases: dict[str, bytes] = {}
    count = 0
    for _ in range(3):
        disk = open_disk(log, backing=backing)
        for _ in range(9):
            action = random.choice(ACTIONS)
            content = disk.pread(disk.size, 0)
            if action == "write":
                offset = random.randrange(disk.size - 1)
                disk.pwrite(pattern(min(700, disk.size - offset), seed + count), offset)
            elif action == "add":
                name = f"bitmap-{count}"
                log.mark(("may", name, content))
                disk.add_bitmap(name, granularity=512)
                bases[name] = content
                log.mark(("is", name, content))
            elif action == "resize":
                disk.resize(random.randrange(10, 120) * 512)
            elif action == "flush":
                disk.flush()
            elif bases:
                name = random.choice(sorted(bases))
                if action == "clear":
                    log.mark(("may", name, content))
                    disk.clear_bitmap(name)
                    log.mark(("is", name, content))
                elif action == "remove":
                    disk.remove_bitmap(name)
                    del bases[name]
                else:  # what is written while it is off is no business of a bitmap: not looked at any more
                    log.mark(("off", name, b""))
                    disk.disable_bitmap(name)
                    disk.merge_bitmap(name, name)
                    del bases[name]
            count += 1
        disk.close()
    return start, log.entries, backing


def explore(kind: str, seed: int, *, subsets: int, scattered: int) -> tuple[int, int, int]:
    """(states, states with a bitmap that counts, states with one that does not)."""
    start, record, backing = crash_session(kind, seed)
    random = Random(seed)
    replay = Replay(start, record)
    legal: dict[str, list[bytes]] = {}
    states = valid = doubtful = 0
    for number, entry in enumerate(replay.steps()):
        if entry.kind == writelog.MARK:
            assert isinstance(entry.note, tuple)
            what, name, content = entry.note
            if what == "may":
                legal[name] = [*legal.get(name, []), content]
            elif what == "is":
                legal[name] = [content]
            else:
                legal.pop(name)
            continue
        tried = [replay.everything()]
        if replay.pending:
            tried.append(replay.torn(random))
            tried.extend(replay.subsets(random, subsets))
            tried.extend(replay.scattered(random) for _ in range(scattered))
        for state in tried:
            states += 1
            where = f"{kind}, seed {seed}, at entry {number} {entry}"
            reader = Qcow2Reader(state)
            report = reader.check()
            assert not report.corruptions, f"{where}: {report.corruptions[:4]}"
            guest = reader.read(backing=backing)
            for bitmap in reader.bitmaps():
                if bitmap.in_use:
                    doubtful += 1
                    continue
                valid += 1
                dirty = reader.dirty(bitmap)
                bases = legal.get(bitmap.name)
                assert bases is None or any(sound(dirty, 512, base, guest) for base in bases), (
                    f"{where}: bitmap {bitmap.name} hides a change"
                )
            if states % 60 == 0:
                memory = MemoryStorage(BLOCKING, state)
                with open_disk(memory, backing=backing) as disk:
                    disk.pwrite(b"on", 0)
                    for info in disk.bitmaps():
                        disk.remove_bitmap(info.name)
                check_bytes(memory.content, leaks=True)
    return states, valid, doubtful


@pytest.mark.parametrize("kind", CRASHED)
def test_power_cuts(kind: str) -> None:
    """After a crash at any point a bitmap is complete or says that it is not."""
    states, valid, doubtful = explore(kind, 21, subsets=3, scattered=2)
    assert states > 300 and valid > 50 and doubtful > 50


@pytest.mark.long
@pytest.mark.parametrize("seed", range(200, 240))
@pytest.mark.parametrize("kind", CRASHED)
def test_power_cuts_long(kind: str, seed: int) -> None:
    assert explore(kind, seed, subsets=8, scattered=6)[0] > 200


def test_forgotten_in_use_flags_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The instrument itself: bitmaps that are not marked in use must fail the exploration somewhere."""
    real = engine.Qcow2Bitmaps._write_flags

    async def forgetful(self: engine.Qcow2Bitmaps, entry: BitmapEntry, flags: int) -> None:
        await real(self, entry, flags & ~IN_USE)

    monkeypatch.setattr(engine.Qcow2Bitmaps, "_write_flags", forgetful)
    with pytest.raises(AssertionError, match="hides a change"):
        for seed in range(5):
            explore("512", seed, subsets=3, scattered=2)


# -- hostile images ----------------------------------------------------------------------------


def hostile(place: str, value: int, width: int = 8) -> MemoryStorage:
    """An image with two bitmaps, one number of which is wrong. place: "extension+N", "entry+N", "table+N"."""
    memory = memory_image()
    with open_disk(memory) as disk:
        disk.pwrite(b"x", 0)
        disk.add_bitmap("one")
        disk.add_bitmap("two", granularity=512)
        disk.pwrite(b"y", 70_000)
    image = memory.content
    extension = image.index(struct.pack(">II", 0x23852875, 24)) + 8
    (directory,) = struct.unpack_from(">Q", image, extension + 16)
    second = directory + 32
    (table,) = struct.unpack_from(">Q", image, second)
    base, _, more = place.partition("+")
    at = {"extension": extension, "entry": second, "table": table}[base] + int(more)
    image[at : at + width] = value.to_bytes(width, "big")
    return memory


HOSTILE = [
    ("extension+0", 65536, 4, "extension is not valid"),
    ("extension+0", 60000, 4, "ends inside entry"),
    ("extension+4", 7, 4, "extension is not valid"),
    ("extension+8", 1 << 40, 8, "extension is not valid"),
    ("extension+8", 40, 8, "ends inside entry 1"),
    ("extension+16", 1 << 40, 8, "not inside the file"),
    ("extension+16", 0, 8, "not inside the file"),
    ("extension+16", 512, 8, "not inside the file"),
    ("entry+0", 0, 8, "cluster boundary"),
    ("entry+0", 1 << 50, 8, "past the end"),
    ("entry+0", 65536 + 512, 8, "cluster boundary"),
    ("entry+0", 65536, 8, "refcount|other metadata|entry"),
    ("entry+8", 0, 4, "0 entries"),
    ("entry+8", 0xFFFFFFFF, 4, "4294967295 entries"),
    ("entry+8", 5, 4, "5 entries instead of 1"),
    ("entry+17", 8, 1, r"2\^8"),
    ("entry+17", 63, 1, r"2\^63"),
    ("entry+18", 0, 2, "name of 0 bytes"),
    ("entry+18", 0xFFFF, 2, "name of 65535 bytes|ends inside"),
    ("entry+20", 0xFFFFFFFF, 4, "ends inside"),
    ("table+0", 1 << 50, 8, "has an entry"),
    ("table+0", 65536 | 1, 8, "has an entry"),
    ("table+0", 65536 | 512, 8, "has an entry"),
    ("table+0", 1 << 60, 8, "has an entry"),
    ("table+0", 65536, 8, "other metadata"),
]


@pytest.mark.parametrize(("place", "value", "width", "words"), HOSTILE)
def test_hostile_directories(place: str, value: int, width: int, words: str) -> None:
    """Reading the guest works; the first change is refused in one line, and a repair drops the bitmaps."""
    memory = hostile(place, value, width)
    guest = Qcow2Reader(memory.content).read()
    with open_disk(memory, writable=False) as disk:
        assert disk.pread(disk.size, 0) == guest
    before = bytes(memory.content)
    disk = open_disk(memory)
    with pytest.raises(CorruptImageError, match=words) as caught:
        disk.pwrite(b"x", 0)
    assert "\n" not in str(caught.value) and "check -r" in str(caught.value)
    disk.close()
    assert Qcow2Reader(memory.content).read() == guest
    memory = MemoryStorage(BLOCKING, before)
    from enban.formats.qcow2.opening import open_qcow2
    from enban.formats.qcow2.repair import repair_image

    node = drive(open_qcow2("memory", BLOCKING, memory, writable=True, metadata_only=True))
    result = drive(repair_image(node, "all"))
    drive(node.close())
    assert result.clean and "bitmaps-dropped" in result.repaired_kinds
    assert Qcow2Reader(memory.content).read() == guest and stored(memory.content) == {}
    check_bytes(memory.content)
    with open_disk(memory) as disk:
        disk.pwrite(b"x", 0)


def test_a_bitmap_of_an_unknown_kind_is_kept_and_not_believed() -> None:
    memory = hostile("entry+16", 9, 1)
    with open_disk(memory) as disk:
        assert [b.inconsistent for b in disk.bitmaps()] == [False, True]
        disk.pwrite(b"x", 0)
    with open_disk(memory) as disk:
        assert len(disk.bitmaps()) == 2
        disk.remove_bitmap("two")
    check_bytes(memory.content)
    assert stored(memory.content) == {"one": {0, 1}}


@pytest.mark.parametrize("seed", range(8))
def test_random_damage_ends_in_errors_of_ours(seed: int) -> None:
    """Bytes of the directory, tables, bits and the header's extension are changed at random: whatever is
    done then raises nothing but our errors. Guest data is not harmed, unless a pointer was made to lead to
    it: that a check would find, as with any other table."""
    random = Random(seed)
    memory = memory_image(256 * KIB, cluster_size=512)
    with open_disk(memory) as disk:
        disk.pwrite(pattern(200 * KIB), 0)
        for name in ("one", "two", "three"):
            disk.add_bitmap(name, granularity=512)
            disk.pwrite(b"x" * 3000, 9000)
    reader = Qcow2Reader(memory.content)
    places = [(memory.content.index(struct.pack(">II", 0x23852875, 24)) + 8, 24)]
    for bitmap in reader.bitmaps():
        places.append((bitmap.table_offset, 16))
    places += [(reader.directory, reader.directory_length)] * 2
    original, guest = bytes(memory.content), reader.read()
    refused = kept = 0
    for _ in range(60):
        content = bytearray(original)
        for _ in range(random.choice((1, 1, 2, 4))):
            start, length = random.choice(places)
            content[start + random.randrange(length)] = random.choice(
                (0, 1, 2, 0x80, 0xFF, random.randrange(256))
            )
        damaged = MemoryStorage(BLOCKING, content)
        overlapping = overlaps(content)
        disk = open_disk(damaged)
        expected = bytearray(guest)
        for step in range(6):
            try:
                if step == 2:
                    disk.add_bitmap("new", granularity=512)
                elif step == 3:
                    disk.clear_bitmap("two")
                elif step == 4:
                    disk.remove_bitmap("one")
                else:
                    disk.pwrite(b"%d" % step * 600, step * 20_000)
                    expected[step * 20_000 : step * 20_000 + 600] = b"%d" % step * 600
                for info in disk.bitmaps():
                    if not info.inconsistent:
                        list(disk.dirty(info.name))
            except EnbanError as error:
                refused += 1
                assert "\n" not in str(error)
        try:
            disk.close()
        except EnbanError:
            refused += 1
        assert overlapping or Qcow2Reader(damaged.content).read() == expected
        kept += not overlapping
    assert refused > 20 and kept > 20


def overlaps(image: bytearray) -> bool:
    """Whether a check finds something that is used twice."""
    kinds = check(image).kinds
    return "refcount-low" in kinds or "overlap" in kinds
