"""Repair: every kind of damage, random damage, a power cut or a failing disk at any moment of it."""

from __future__ import annotations

import errno
import struct
from functools import partial
from pathlib import Path
from random import Random

import pytest

import enban
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.errors import CorruptImageError, HostError, NoSpaceError
from enban.filters.base import Filter
from enban.filters.faults import Call, Fault, Faults
from enban.filters.writelog import WriteLog
from enban.formats.common.findings import SEVERITY, CheckResult
from enban.formats.qcow2 import repair as repairing
from enban.formats.qcow2.check import Checker
from enban.formats.qcow2.node import Qcow2Node
from enban.formats.qcow2.repair import repair_dirty, repair_image
from enban.jobs import check as job
from enban.lab.crash_states import Replay
from enban.lab.damage import COMPRESSED, COPIED, SHAPES, Map, check, damage, guest, make_image, open_for_check
from enban.lab.qcow2_reader import Qcow2Reader
from enban.storage.memory import MemoryStorage
from tests.support import empty_image, make_qcow2, open_memory, pattern

DIRTY, CORRUPT = 1, 2


def repair(image: bytearray | Filter | MemoryStorage, mode: str = "all") -> CheckResult:
    """Repair in place; the node works with the result afterwards."""
    storage: MemoryStorage | Filter
    storage = MemoryStorage(BLOCKING, image) if isinstance(image, bytearray) else image
    node = open_for_check(storage)
    try:
        return drive(repair_image(node, mode))
    finally:
        if isinstance(image, bytearray):
            assert isinstance(storage, MemoryStorage)
            image[:] = storage.content


def same_where_readable(before: list[bytes | None], after: list[bytes | None]) -> bool:
    return len(before) == len(after) and all(
        old is None or old == new for old, new in zip(before, after, strict=True)
    )


def set_bits(image: bytearray, bits: int) -> None:
    image[79] |= bits


# -- damage by hand --------------------------------------------------------------------------


def test_a_sound_image_is_not_touched() -> None:
    for shape in SHAPES:
        image = make_image(shape)
        before = bytes(image)
        result = repair(image)
        assert image == before and result.clean
        assert not result.repaired and not result.corruptions_fixed and not result.leaks_fixed


@pytest.mark.parametrize("shape", SHAPES)
def test_refcounts_are_set_right_in_place(shape: str) -> None:
    image = make_image(shape)
    seen, size = guest(image), len(image)
    places = Map(image)
    width = max(1, SHAPES[shape].get("refcount_bits", 16) // 8)
    image[places.blocks[0] + width - 1] = 0
    image[places.blocks[0] + 3 * width - 1] ^= 0x56
    found = check(image)
    assert found.corruptions
    result = repair(image)
    assert result.clean and result.leaks_fixed == found.leaks and result.corruptions_fixed
    assert Qcow2Reader(image).check().clean
    assert len(image) == size and guest(image) == seen  # nothing grew
    assert result.repaired_kinds["refcounts-raised"] >= 1


def test_leaks_mode_frees_and_does_no_more() -> None:
    image = make_image("4k")
    places = Map(image)
    leaked, flagged = places.data_places()[:2]
    places.put(leaked, 0)
    seen = guest(image)
    assert repair(image, "leaks").leaks_fixed == 1
    assert Qcow2Reader(image).check().clean and guest(image) == seen

    image = make_image("4k")
    places.image = image
    places.put(leaked, 0)
    struct.pack_into(">H", image, places.blocks[0], 0)  # the header's cluster
    places.put(flagged, places.word(flagged) ^ COPIED)
    result = repair(image, "leaks")
    assert (result.leaks_fixed, result.corruptions_fixed) == (1, 0)
    assert result.kinds == {"refcount-low": 1, "copied-l2": 1} and result.exit_code == 2


def test_leaks_mode_sets_the_flag_of_what_it_counted_down() -> None:
    image = make_image("4k")
    places = Map(image)
    place = places.data_places()[0]
    cluster = (places.word(place) & ~COPIED) // places.cluster
    struct.pack_into(">H", image, places.blocks[0] + 2 * cluster, 2)
    places.put(place, places.word(place) & ~COPIED)
    result = repair(image, "leaks")
    assert result.clean and result.leaks_fixed == 1 and places.word(place) & COPIED


def test_leaks_mode_refuses_what_needs_new_refcounts() -> None:
    image = make_image("4k")
    places = Map(image)
    places.put(places.table[0], places.word(places.table[0]) + 512)
    before = bytes(image)
    result = repair(image, "leaks")
    assert image == before and result.exit_code == 1 and "repair-impossible" in result.kinds


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("how", ["unaligned", "past the end", "none", "on data", "noise"])
def test_refcounts_are_written_anew(shape: str, how: str) -> None:
    image = make_image(shape, 2)
    seen = guest(image)
    places = Map(image)
    place = places.table[0]
    values = {
        "unaligned": places.word(place) + 512 if places.cluster > 512 else places.word(place) | 8,
        "past the end": len(image) * 8 // places.cluster * places.cluster,
        "none": 0,
        "on data": places.word(places.data_places()[0]) & ~COPIED,
        "noise": Random(1).getrandbits(62),
    }
    places.put(place, values[how])
    result = repair(image)
    assert "refcounts-rebuilt" in result.repaired_kinds
    assert result.corruptions_fixed and not result.corruptions and not result.leaks
    assert Qcow2Reader(image).check().clean
    if how != "on data":
        assert guest(image) == seen
    node = Disk(drive(open_memory(MemoryStorage(BLOCKING, image))))  # and it can be written
    node.pwrite(pattern(3000, 9), 100)
    node.close()


def test_new_refcounts_on_a_device_use_its_free_end() -> None:
    class Device(Filter):
        def __init__(self, below: MemoryStorage) -> None:
            super().__init__(below)
            self.fixed_size = True

    image = make_image("4k")
    places = Map(image)
    places.put(places.table[0], 512)
    end = -(-len(image) // 4096) * 4096
    for room, fits in ((2, True), (1, False)):
        content = bytearray(image).ljust(end + room * 4096, b"\xee")
        storage = MemoryStorage(BLOCKING, content, limit=len(content))
        if fits:
            assert repair(Device(storage)).clean
            assert len(storage.content) == len(content)
            assert guest(storage.content) == guest(make_image("4k"))
        else:
            with pytest.raises(NoSpaceError):
                repair(Device(storage))
            assert storage.content == content


def test_flags_are_set_right() -> None:
    image = make_image("4k", 1)
    places = Map(image)
    changed = [*places.data_places()[:5], next(place for place in places.l1 if places.word(place))]
    for place in changed:
        places.put(place, places.word(place) ^ COPIED)
    seen = guest(image)
    result = repair(image)
    assert result.clean and result.corruptions_fixed == len(changed)
    assert guest(image) == seen and Qcow2Reader(image).check().clean


def test_two_owners_of_a_cluster_get_copies_when_they_write() -> None:
    image = make_image("4k")
    places = Map(image)
    one, other = places.data_places()[:2]
    places.put(other, places.word(one))
    assert repair(image).clean
    assert not places.word(one) & COPIED and not places.word(other) & COPIED
    cluster = places.word(one) & ~COPIED
    before = image[cluster : cluster + 4096]
    storage = MemoryStorage(BLOCKING, image)
    disk = Disk(drive(open_memory(storage)))
    table = next(places.word(place) & ~COPIED for place in places.l1 if places.word(place))
    disk.pwrite(b"new", (one - table) // 8 * 4096)
    disk.close()
    assert storage.content[cluster : cluster + 4096] == before


# -- entries that lead nowhere ---------------------------------------------------------------


def put_past_end(image: bytearray, backing: bytes = b"") -> tuple[int, list[bytes | None]]:
    """An image as a crash leaves it whose last cluster's data and refcount were not durable."""
    places = Map(image)
    place = max(places.data_places(), key=places.word)
    end = len(image) + -len(image) % places.cluster
    places.put(place, end | COPIED)
    return place, guest(image)


@pytest.mark.parametrize("shape", ["4k", "v2", "extended", "lazy", "64-bit"])
def test_an_entry_past_the_end_becomes_unallocated(shape: str) -> None:
    image = make_image(shape)
    set_bits(image, 0 if shape == "v2" else DIRTY)
    place, seen = put_past_end(image)
    result = repair(image)
    assert result.clean and not result.dirty
    assert not Map(image).word(place) and "dropped" in result.repaired_kinds
    after = guest(image)
    changed = [i for i, (old, new) in enumerate(zip(seen, after, strict=True)) if old != new]
    assert len(changed) <= 1 and not any(any(after[i] or b"") for i in changed)
    disk = Disk(drive(open_memory(MemoryStorage(BLOCKING, image))))
    disk.pwrite(pattern(disk.size, 3), 0)
    assert disk.pread(disk.size, 0) == pattern(disk.size, 3)
    disk.close()


def test_a_kept_zero_cluster_past_the_end_stays_zero(tmp_path: Path) -> None:
    image = make_image("backed")
    places = Map(image)
    place = places.data_places()[0]
    places.put(place, (len(image) * 2 // 4096 * 4096) | COPIED | 1)
    assert not repair(image).corruptions
    assert places.word(place) == 1


def test_a_lost_table_past_the_end_is_let_go() -> None:
    image = make_image("4k")
    places = Map(image)
    place = next(place for place in places.l1 if places.word(place))
    places.put(place, (len(image) // 4096 + 1) * 4096 | COPIED)
    result = repair(image)
    assert result.clean and not places.word(place)
    assert not any(any(part or b"") for part in guest(image))


def test_nothing_is_freed_while_a_table_is_lost() -> None:
    image = make_image("4k")
    places = Map(image)
    place = next(place for place in places.l1 if places.word(place))
    places.put(place, places.word(place) ^ 1 << 40 | 1 << 57)  # bits flipped: the table itself is good
    before = bytes(image)
    found = check(image)
    result = repair(image)
    assert found.leaks and result.leaks == found.leaks and not result.leaks_fixed
    assert "leaks-kept" in result.repaired_kinds
    assert image == before
    places.put(place, int.from_bytes(make_image("4k")[place : place + 8], "big"))
    assert check(image).clean


def test_what_may_be_good_data_stays_for_a_person_to_look_at() -> None:
    for flip in (1 << 60, 1 << 10, 1 << 61 | 1 << 50):
        image = make_image("4k")
        places = Map(image)
        place = places.data_places()[0]
        old = places.word(place) ^ flip
        places.put(place, old)
        set_bits(image, CORRUPT)
        result = repair(image)
        assert places.word(place) | COPIED == old | COPIED and result.corruptions and result.corrupt


def test_a_flag_on_a_compressed_cluster_is_cleared() -> None:
    image = make_image("4k")
    places = Map(image)
    place = next(place for place in places.l2_places() if places.word(place) & COMPRESSED)
    seen = guest(image)
    places.put(place, places.word(place) | COPIED)
    result = repair(image)
    assert result.clean and result.corruptions_fixed == 1 and guest(image) == seen


def test_a_table_shared_with_another_table_is_not_written() -> None:
    image = make_image("4k", 1)
    places = Map(image)
    place = next(place for place in places.l1 if places.word(place))
    places.put(place, places.l1_offset)  # as an L2 table its only entry has no COPIED flag either
    before = bytes(image[places.l1_offset : places.l1_offset + 4096])
    result = repair(image)
    assert "overlap" in result.kinds and result.corruptions
    assert image[places.l1_offset : places.l1_offset + 4096] == before


def test_a_file_that_was_cut_short_is_not_repaired_into_an_empty_one() -> None:
    """Its L1 table is gone: nothing may be freed, and nothing written behind the end of the file."""
    for seed, cut in ((1, 8), (1, 4096), (1, 3 * 4096 + 8), (0, 8)):
        image = make_image("4k", seed)
        places = Map(image)
        end = places.l1_offset + 8 - cut
        tail = bytes(image[end:])
        del image[end:]
        result = repair(image)
        assert result.corruptions and not result.leaks_fixed and len(image) == end
        assert check(image + tail).clean  # the rest, found again, still fits
        if places.table[0] < end:
            places.put(places.table[0], 512)
        result = repair(image)
        assert places.table[0] >= end or "repair-impossible" in result.kinds
        assert len(image) == end


# -- bits ------------------------------------------------------------------------------------


def test_only_the_dirty_and_corrupt_bits_are_cleared() -> None:
    image = make_image("4k")
    image[87] |= 0x81  # lazy refcounts, and a compatible feature nobody knows
    set_bits(image, DIRTY | CORRUPT)
    place = Map(image).data_places()[0]
    Map(image).put(place, Map(image).word(place) ^ COPIED)
    before = bytes(image[72:104])
    result = repair(image)
    assert result.clean and not result.dirty and not result.corrupt
    assert "bits-cleared" in result.repaired_kinds
    assert image[72:104] == bytes(7) + bytes([before[7] & ~3]) + before[8:]


def test_a_clean_image_loses_its_bits_too() -> None:
    image = make_image("4k")
    set_bits(image, DIRTY | CORRUPT)
    assert repair(image, "leaks").clean and not image[79] & 3


def test_bits_stay_while_something_is_wrong() -> None:
    image = make_image("4k")
    set_bits(image, DIRTY | CORRUPT)
    place = Map(image).data_places()[0]
    Map(image).put(place, Map(image).word(place) ^ 1 << 60)
    result = repair(image)
    assert result.dirty and result.corrupt and image[79] & 3 == 3 and result.exit_code == 2


def test_nothing_is_freed_where_an_unknown_feature_may_own_it() -> None:
    image = make_image("4k")
    places = Map(image)
    places.put(places.data_places()[0], 0)
    image[95] |= 0x80
    before = bytes(image)
    result = repair(image)
    assert result.leaks == 1 and image == before  # the bit is not cleared either


def test_bitmaps_survive_a_repair() -> None:
    from tests.formats.qcow2.test_check import add_bitmaps

    image = make_image("4k")
    add_bitmaps(image)
    places = Map(image)
    places.put(places.data_places()[0], 0)
    places.put(places.table[0], 0)  # all refcounts are lost
    result = repair(image)
    assert result.clean and image[95] & 1


# -- images that were not closed -------------------------------------------------------------


def lazy_crash(seed: int) -> tuple[bytearray, list[bytes | None]]:
    """A dirty image: tables written, refcounts not, some data past the end never was."""
    random = Random(seed)
    image = make_image("lazy", seed * 3)
    places = Map(image)
    seen = guest(image)
    set_bits(image, DIRTY)
    block = places.blocks[0]
    for place in places.data_places():
        if random.random() < 0.5:
            cluster = (places.word(place) & ~COPIED) // places.cluster
            struct.pack_into(">H", image, block + 2 * cluster, random.choice((0, 2)))
    used = {places.word(place) & ~COPIED for place in places.data_places()}
    last = -(-len(image) // places.cluster) - 1
    while last * places.cluster in used and random.random() < 0.7:
        last -= 1
    del image[(last + 1) * places.cluster :]
    return image, seen


@pytest.mark.parametrize("seed", range(8))
def test_repair_dirty_makes_the_node_fit_for_writing(seed: int) -> None:
    image, seen = lazy_crash(seed)
    lost = {i for i, part in enumerate(guest(image)) if part != seen[i]}
    storage = MemoryStorage(BLOCKING, image)
    door = drive(open_memory(storage))
    assert isinstance(door.node, Qcow2Node)
    drive(repair_dirty(door.node))
    disk = Disk(door)
    for index, part in enumerate(seen):
        now = disk.pread(len(part or b""), index * 4096)
        assert now == part or (index in lost and not any(now))
    disk.pwrite(pattern(disk.size // 2, 4), 100)
    disk.close()
    assert Qcow2Reader(storage.content).check().clean and not storage.content[79] & DIRTY


def test_repair_dirty_refuses_what_it_cannot_repair() -> None:
    image, _ = lazy_crash(0)
    places = Map(image)
    place = next(place for place in places.l1 if places.word(place))
    places.put(place, places.word(place) + 512)
    node = open_for_check(image)
    with pytest.raises(CorruptImageError, match="enban check -r all"):
        drive(repair_dirty(node))


# -- snapshots -------------------------------------------------------------------------------


def test_an_incomplete_snapshot_table_is_completed() -> None:
    image = make_image("4k", 1)
    places = Map(image)
    start = places.snapshots_offset
    count = struct.unpack_from(">I", image, 60)[0]
    entries, at = [], start
    for _ in range(count):  # rewritten without extra data, as version 2 wrote them
        head = bytearray(image[at : at + 40])
        ident, name = struct.unpack_from(">HH", head, 12)
        extra = struct.unpack_from(">I", head, 36)[0]
        text = image[at + 40 + extra : at + 40 + extra + ident + name]
        entries.append(bytes(head[:36]) + bytes(4) + bytes(text))
        at = -(-(at + 40 + extra + ident + name) // 8) * 8
    table = b"".join(entry + bytes(-len(entry) % 8) for entry in entries)
    image[start : start + 4096] = table.ljust(4096, b"\0")
    readers = Qcow2Reader(image)
    shown = [readers.read(snapshot=s.name) for s in readers.snapshots]
    assert check(image).kinds == {"snapshot-incomplete": count}
    result = repair(image)
    assert result.clean and result.corruptions_fixed == count
    after = Qcow2Reader(image)
    assert [after.read(snapshot=s.name) for s in after.snapshots] == shown and after.check().clean


# -- random damage ---------------------------------------------------------------------------

LEFT = {  # what a repair leaves to a person
    *("l1-reserved", "l1-unaligned", "l1-past-end", "l1-no-table", "l2-reserved", "l2-unaligned"),
    *("l2-past-end", "zero-flag", "packed-copied", "packed-external", "packed-past-end"),
    *("packed-subclusters", "subclusters-both", "refcount-overflow", "overlap", "snapshot-table"),
    *("snapshot-l1", "past-end", "cut-short", "copied-l1", "copied-l2"),
    *("subclusters-no-cluster", "copied-no-cluster"),  # in a table that is not at a cluster boundary
}


def repaired_well(image: bytearray, note: object) -> CheckResult:
    """Repair a damaged image: what is left is of the kinds that may be, no guest byte that could be
    read before changed, and a second repair finds nothing to do (unless tables lay on one another, or
    the file grew over what pointed past its end)."""
    before = guest(image)
    result = repair(image)
    dropped = result.repaired_kinds.get("dropped", 0) + result.repaired_kinds.get("overlap", 0)
    left = {kind for kind in result.kinds if SEVERITY[kind] == "corruption"}
    assert left <= LEFT or "repair-impossible" in result.kinds, (note, result.kinds)
    if {"copied-l1", "copied-l2"} & left:
        assert left - {"copied-l1", "copied-l2"}, (note, result.kinds)
    kept = {"leaks-kept", "repair-impossible"} & {*result.repaired_kinds, *result.kinds}
    assert not result.leaks or kept, (note, result.kinds)
    assert dropped or same_where_readable(before, guest(image)), note
    again = bytes(image)
    repair(image)
    assert image == again or {"overlap", "refcounts-rebuilt"} & {*result.repaired_kinds}, note
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_random_damage(shape: str) -> None:
    clean = 0
    seeds = range(6 if shape == "64k" else 15)
    for seed in seeds:
        image = make_image(shape, seed % 3)
        notes = damage(image, Random(f"repair {shape} {seed}"))
        clean += repaired_well(image, (shape, seed, notes)).clean
    assert clean > len(seeds) // 4


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_much_random_damage(shape: str) -> None:
    for seed in range(1000, 2000):
        image = make_image(shape, seed % 7)
        notes = damage(image, Random(f"repair {shape} {seed}"))
        repaired_well(image, (shape, seed, notes))


@pytest.mark.parametrize("shape", ["512", "2-bit", "v2", "extended"])
def test_small_windows_repair_the_same(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(12):
        image = make_image(shape, seed % 3)
        damage(image, Random(f"windows {shape} {seed}"))
        other = bytearray(image)
        result = repair(image)
        with monkeypatch.context() as patch:
            patch.setattr(repairing, "Checker", partial(Checker, window=64))
            same = repair(other)
        assert image == other and result.kinds == same.kinds


# -- power cuts and failing disks ------------------------------------------------------------


def repairs(seed: int) -> tuple[str, bytearray]:
    """A damaged image of which everything can be repaired; seeds give different ways to get there."""
    shape = ("512", "4k", "2-bit", "extended", "lazy", "v2")[seed % 6]
    image = make_image(shape, seed)
    places = Map(image)
    random = Random(seed)
    data = places.data_places()
    block = places.blocks[0]
    for place in random.sample(data, min(4, len(data))):
        places.put(place, random.choice((0, places.word(place) ^ COPIED)))
    image[block + random.randrange(8)] ^= 0x15
    if seed % 2:
        places.put(random.choice(data), (len(image) // places.cluster + 1) * places.cluster | COPIED)
    if seed % 3 == 0:
        places.put(places.table[0], places.word(places.table[0]) | 2)  # new refcounts needed
    if places.version == 3:
        set_bits(image, DIRTY)
    return shape, image


@pytest.mark.parametrize("seed", range(12))
def test_a_power_cut_during_a_repair(seed: int) -> None:
    """Any state it may leave is repaired to what the repair would have made, the guest sees the same,
    and as long as anything is wrong the dirty bit still stands."""
    shape, image = repairs(seed)
    before = guest(image)
    storage = MemoryStorage(BLOCKING, image)
    log = WriteLog(storage)
    result = repair(log)
    assert result.clean, (shape, result.kinds)
    finished = guest(storage.content)
    random = Random(seed)
    states = 0
    replay = Replay(bytes(image), log.entries)
    for _ in replay.steps():
        for state in (replay.everything(), *replay.subsets(random, 4), replay.scattered(random)):
            states += 1
            seen = guest(state)
            assert all(now in (old, new) for now, old, new in zip(seen, before, finished, strict=True))
            found = check(state)
            if found.corruptions and shape != "v2":
                assert found.dirty
            again = repair(state)
            assert again.clean, (seed, again.kinds)
            assert same_where_readable(finished, guest(state)) and Qcow2Reader(state).check().clean
    assert states > 20


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_a_failing_disk_during_a_repair(seed: int, error: int) -> None:
    """Call after call fails; the error comes out, and repairing again ends the work."""
    _, image = repairs(seed)
    number = failures = 0
    while True:
        number += 1
        state = MemoryStorage(BLOCKING, image)

        def decide(call: Call, nth: int = number) -> Fault | None:
            return Fault(error, done=100) if call.number == nth else None

        try:
            result = repair(Faults(state, decide))
        except HostError as problem:
            failures += 1
            assert problem.errno == error
            assert repair(state).clean
            continue
        assert result.clean
        break
    assert failures > 10


# -- the job ---------------------------------------------------------------------------------


def test_the_job_repairs_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    image = make_image("4k")
    places = Map(image)
    places.put(places.data_places()[0], 0)
    set_bits(image, DIRTY | CORRUPT)
    path.write_bytes(image)
    calls: list[tuple[int, int]] = []
    result = enban.check(path, repair="all", progress=lambda done, total: calls.append((done, total)))
    assert result.clean and result.leaks_fixed == 1 and not result.dirty and not result.corrupt
    assert calls == sorted(calls) and calls[-1][0] == calls[-1][1] and len({t for _, t in calls}) == 1
    assert job.check(path).clean
    with enban.open(path, writable=True) as disk:
        disk.pwrite(b"x", 0)


def test_the_job_repairs_what_cannot_be_opened_otherwise(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    content = bytearray(path.read_bytes())
    struct.pack_into(">QI", content, 48, 1 << 30, 1)  # the refcount table is far away
    path.write_bytes(content)
    with pytest.raises(CorruptImageError):
        enban.open(path, writable=True)
    result = enban.check(path, repair="all")
    assert result.clean and "refcounts-rebuilt" in result.repaired_kinds
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(1 << 18), 1 << 16)
    assert enban.check(path).clean


def test_an_interrupted_job_leaves_an_image_that_can_be_repaired(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    for stop_at in range(1, 60, 4):
        _, image = repairs(9)
        path.write_bytes(image)
        calls = 0

        def stop(done: int, total: int, last: int = stop_at) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise KeyboardInterrupt

        try:
            enban.check(path, repair="all", progress=stop)
        except KeyboardInterrupt:
            pass
        assert enban.check(path, repair="all").clean


def test_an_empty_image_with_no_refcounts_at_all() -> None:
    for shape, options in SHAPES.items():
        image = empty_image(1 << 20, **options)
        Map(image).put(Map(image).table[0], 0)
        assert repair(image).clean, shape
