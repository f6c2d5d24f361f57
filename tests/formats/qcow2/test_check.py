"""Check: every kind of damage by hand, three ways of counting against each other at random, and
images made to exhaust it."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

import enban
from enban.errors import CorruptImageError, HostError, UnsupportedOperationError, UsageError
from enban.formats.common.findings import BEYOND_QEMU, MOST_KEPT, SEVERITY, CheckResult, Findings
from enban.formats.common.tables import to_big_endian
from enban.formats.qcow2.check_counts import Counts, decode, encode
from enban.formats.qcow2.check_tables import RunTemplate
from enban.jobs import check as job
from enban.lab.damage import COMPRESSED, COPIED, OFFSET, SHAPES, Map, check, damage, make_image
from enban.lab.qcow2_reader import Qcow2Reader
from tests.support import Face, empty_image, make_qcow2

Damage = Callable[[Map], None]


def wrong(result: CheckResult) -> dict[str, int]:
    """Findings that are more than notes."""
    return {kind: count for kind, count in result.kinds.items() if SEVERITY[kind] != "note"}


# -- sound images ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", SHAPES)
def test_a_used_image_is_clean(shape: str, seed: int) -> None:
    image = make_image(shape, seed)
    assert Qcow2Reader(image).check().clean
    for numpy in (None, False, True):
        result = check(image, numpy=numpy)
        assert result.clean and not result.findings and result.exit_code == 0
        cluster = Map(image).cluster
        assert result.image_end_offset == -(-len(image) // cluster) * cluster
        assert result.total_clusters == -(-Map(image).size // cluster)


@pytest.mark.parametrize("size", [0, 512, 1 << 20, 1 << 30])
@pytest.mark.parametrize("shape", SHAPES)
def test_an_empty_image_is_clean(shape: str, size: int) -> None:
    result = check(empty_image(size, **SHAPES[shape]))
    assert result.clean and result.allocated_clusters == 0


# -- every kind of finding -------------------------------------------------------------------


def change(place: Callable[[Map], int], value: Callable[[Map, int], int]) -> Damage:
    """Damage that replaces the 8-byte number at a place."""

    def apply(places: Map) -> None:
        at = place(places)
        places.put(at, value(places, places.word(at)))

    return apply


def first_data(places: Map) -> int:
    return places.data_places()[0]


def first_packed(places: Map) -> int:
    return next(place for place in places.l2_places() if places.word(place) & COMPRESSED)


def first_l1(places: Map) -> int:
    return next(place for place in places.l1 if places.word(place))


def past_end(places: Map, _: int) -> int:
    return (len(places.image) // places.cluster + 2) * places.cluster | COPIED


def flip(bits: int) -> Callable[[Map, int], int]:
    return lambda _, old: old ^ bits


KINDS: list[tuple[str, str, Damage, dict[str, int]]] = [
    ("refcount too low", "4k", change(lambda m: m.blocks[0], lambda m, old: 0), {"refcount-low": 4}),
    ("L1 reserved", "4k", change(first_l1, flip(1 << 57)), {"l1-reserved": 1}),
    ("L1 low bit", "4k", change(first_l1, flip(1)), {"l1-reserved": 1}),
    ("L1 unaligned", "4k", change(first_l1, flip(512)), {"l1-unaligned": 1}),
    ("L1 flags alone", "4k", change(lambda m: m.l1[-1], lambda m, old: COPIED), {"l1-no-table": 1}),
    ("L1 past the end", "4k", change(first_l1, past_end), {"l1-past-end": 1}),
    ("L1 flag", "4k", change(first_l1, flip(COPIED)), {"copied-l1": 1}),
    ("L2 reserved", "4k", change(first_data, flip(1 << 60)), {"l2-reserved": 1}),
    ("L2 unaligned", "4k", change(first_data, flip(1 << 10)), {"l2-unaligned": 1}),
    ("L2 past the end", "4k", change(first_data, past_end), {"l2-past-end": 1, "refcount-leak": 1}),
    ("L2 flag", "4k", change(first_data, flip(COPIED)), {"copied-l2": 1}),
    (
        "L2 flag alone",
        "4k",
        change(lambda m: (m.word(m.l1[0]) & OFFSET) + 4088, lambda m, old: COPIED),
        {"copied-no-cluster": 1},
    ),
    ("zero flag in version 2", "v2", change(first_data, flip(1)), {"zero-flag": 1}),
    ("zero flag with subclusters", "extended", change(first_data, flip(1)), {"zero-flag": 1}),
    ("packed and COPIED", "4k", change(first_packed, flip(COPIED)), {"packed-copied": 1}),
    (
        "packed past the end",
        "4k",
        change(first_packed, lambda m, old: COMPRESSED | len(m.image) * 2),
        {"packed-past-end": 1},
    ),
    (
        "packed with subclusters",
        "extended",
        change(lambda m: first_packed(m) + 8, flip(1)),
        {"packed-subclusters": 1},
    ),
    (
        "subclusters both",
        "extended",
        change(lambda m: first_data(m) + 8, lambda m, old: 2**64 - 1),
        {"subclusters-both": 1},
    ),
    ("subclusters alone", "extended", change(first_data, lambda m, old: 0), {"subclusters-no-cluster": 1}),
    ("block entry reserved", "4k", change(lambda m: m.table[0], flip(4)), {"block-reserved": 1}),
    ("block entry unaligned", "4k", change(lambda m: m.table[0], flip(1024)), {"block-unaligned": 1}),
    ("block past the end", "4k", change(lambda m: m.table[0], past_end), {"block-past-end": 1}),
    (
        "block used twice",
        "4k",
        change(lambda m: m.table[1], lambda m, old: m.word(m.table[0])),
        {"block-shared": 1},
    ),
    ("data on a table", "4k", change(first_data, lambda m, old: m.word(first_l1(m))), {"overlap": 1}),
    ("data on the header", "4k", change(first_data, lambda m, old: m.table_offset | COPIED), {"overlap": 1}),
    (
        "table on a table, whose block it takes for data",
        "4k",
        change(lambda m: m.l1[0], lambda m, old: m.table_offset | COPIED),
        {"overlap": 2},
    ),
    ("leak", "4k", change(first_data, lambda m, old: 0), {"refcount-leak": 1}),
]


@pytest.mark.parametrize(("shape", "apply", "expected"), [k[1:] for k in KINDS], ids=[k[0] for k in KINDS])
def test_kind(shape: str, apply: Damage, expected: dict[str, int]) -> None:
    image = make_image(shape, 3)
    apply(Map(image))
    results = [check(image, numpy=numpy) for numpy in (None, False, True)]
    for kind, count in expected.items():
        assert results[0].kinds.get(kind) == count, results[0].kinds
    first = next(iter(expected))
    assert any(f.kind == first and f.text and "\n" not in f.text for f in results[0].findings)
    assert results[0].exit_code in (1, 2, 3)
    assert [r.kinds for r in results] == [results[0].kinds] * 3


def test_too_many_references_for_a_refcount() -> None:
    image = make_image("1-bit")
    places = Map(image)
    one, other = places.data_places()[:2]
    places.put(other, places.word(one))
    assert check(image).kinds["refcount-overflow"] == 1


def test_counts_past_the_end_of_the_file_are_leaks() -> None:
    image = make_image("4k")
    places = Map(image)
    clusters = -(-len(image) // places.cluster)
    struct.pack_into(">H", image, places.blocks[0] + 2 * (clusters + 5), 1)
    result = check(image)
    assert wrong(result) == {"leak-past-end": 1} and result.leaks == 1 and result.exit_code == 3


def test_bits_of_the_header_are_told() -> None:
    image = make_image("4k")
    image[79] |= 3
    result = check(image)
    assert result.clean and result.dirty and result.corrupt
    assert result.kinds == {"dirty": 1, "corrupt": 1}
    image[95] |= 4
    assert "unknown-autoclear" in check(image).kinds


def test_an_external_data_file_is_not_counted() -> None:
    image = empty_image(1 << 20, cluster_size=4096, data_file="data")
    assert check(image).clean
    places = Map(image)
    table = len(image) + -len(image) % 4096
    image.extend(bytes(table + 4096 - len(image)))
    places.put(places.l1[0], table | COPIED)
    struct.pack_into(">H", image, places.blocks[0] + 2 * (table // 4096), 1)
    for index in range(4):  # the first lies at offset 0 of the data file
        places.put(table + 8 * index, 4096 * index | COPIED)
    places.put(table + 8 * 6, 1 << 30 | COPIED)  # far past the end of this file
    for numpy in (False, True):
        result = check(image, numpy=numpy)
        assert result.clean and result.allocated_clusters == 5 and result.fragmented_clusters == 1
    places.put(table + 8 * 2, 4096 * 2)
    places.put(table + 8 * 9, COMPRESSED | 4096)
    for numpy in (False, True):
        assert check(image, numpy=numpy).kinds == {"copied-l2": 1, "packed-external": 1}


# -- snapshots, bitmaps, encryption ----------------------------------------------------------


def test_snapshot_tables_count() -> None:
    image = make_image("4k", 1)
    places = Map(image)
    assert places.snapshot_l1 and check(image).clean
    lost = bytearray(image)
    Map(lost).put(places.snapshots_offset, places.word(places.snapshots_offset) + 512)
    assert check(lost).kinds["snapshot-l1"] == 1
    incomplete = bytearray(image)
    struct.pack_into(">I", incomplete, places.snapshots_offset + 36, 8)
    assert check(incomplete).kinds["snapshot-incomplete"] >= 1
    gone = bytearray(image)
    struct.pack_into(">Q", gone, 64, len(image) * 4096)
    result = check(gone)
    assert result.kinds["snapshot-table"] == 1 and result.corruptions


def add_bitmaps(image: bytearray, *, valid: bool = True) -> tuple[int, int, int]:
    """One bitmap with two data clusters, counted; (directory, table, data) offsets."""
    places = Map(image)
    cluster = places.cluster
    directory = len(image) + -len(image) % cluster
    table, data = directory + cluster, directory + 2 * cluster
    image.extend(bytes(data + 2 * cluster - len(image)))
    name = b"bitmap-0"
    in_use = 1  # so that its table may be longer than the disk needs
    entry = struct.pack(">QIIBBHI", table, 4, in_use, 1, 16, len(name), 0) + name
    image[directory : directory + len(entry)] = entry
    places.put(table, data)
    places.put(table + 8, 1)  # all ones, without a cluster
    places.put(table + 16, data + cluster)
    for offset in range(directory, len(image), cluster):
        struct.pack_into(">H", image, places.blocks[0] + 2 * (offset // cluster), 1)
    length = struct.unpack_from(">I", image, 100)[0]
    old = image[length : 4096 - 32]
    image[length:4096] = (struct.pack(">IIIIQQ", 0x23852875, 24, 1, 0, len(entry), directory) + old)[
        : 4096 - length
    ].ljust(4096 - length, b"\0")
    if valid:
        image[95] |= 1
    return directory, table, data


def test_bitmaps_count_while_their_feature_bit_is_set() -> None:
    image = make_image("4k")
    directory, table, data = add_bitmaps(image)
    assert check(image).clean
    unset = bytearray(image)
    unset[95] &= ~1
    assert wrong(check(unset)) == {"refcount-leak": 4}
    for place, value, kind in (
        (table, data | 2, "bitmap-entry"),
        (table, data | 1, "bitmap-entry"),
        (table, data + 512, "bitmap-entry"),
        (table, 1 << 40, "past-end"),
        (directory, table + 512, "bitmap-table"),
        (directory, 1 << 40, "past-end"),
    ):
        broken = bytearray(image)
        Map(broken).put(place, value)
        assert check(broken).kinds.get(kind) == 1, (kind, check(broken).kinds)
    shared = bytearray(image)
    Map(shared).put(table, Map(shared).table_offset)
    assert check(shared).kinds["overlap"] == 1


def test_broken_bitmap_directories_are_findings() -> None:
    for position, value in ((8, 70000), (12, 5), (16, 1 << 40), (24, 1 << 40), (8, 9)):
        image = make_image("4k")
        add_bitmaps(image)
        start = image.index(struct.pack(">I", 0x23852875))
        width = ">Q" if position >= 16 else ">I"
        struct.pack_into(width, image, start + position, value)
        assert check(image).kinds.get("bitmap-directory") == 1, position


def test_the_encryption_header_counts() -> None:
    image = make_image("4k")
    places = Map(image)
    offset = len(image) + -len(image) % 4096
    image.extend(bytes(offset + 8192 - len(image)))
    for cluster in (offset // 4096, offset // 4096 + 1):
        struct.pack_into(">H", image, places.blocks[0] + 2 * cluster, 1)
    assert wrong(check(image)) == {"refcount-leak": 2}
    length = struct.unpack_from(">I", image, 100)[0]
    image[length:4096] = (
        struct.pack(">IIQQ", 0x0537BE77, 16, offset, 8192) + image[length : 4096 - 24]
    ).ljust(4096 - length, b"\0")
    assert check(image).clean
    struct.pack_into(">Q", image, length + 16, 1 << 50)
    assert check(image).kinds["past-end"] == 1


# -- three ways of counting ------------------------------------------------------------------


def facts(result: CheckResult) -> dict[str, object]:
    findings = sorted(repr(f) for f in result.findings)
    return {
        **{key: value for key, value in vars(result).items() if key not in ("findings", "kinds")},
        "kinds": result.kinds,
        "findings": findings if len(findings) < MOST_KEPT else "many",
    }


def all_ways_agree(image: bytearray, note: object) -> CheckResult:
    """As the job does it; entry by entry; with numpy; and each in small windows."""
    result = check(image)
    for numpy, window in ((False, 1 << 25), (True, 1 << 25), (False, 64), (True, 64), (None, 256)):
        other = check(image, numpy=numpy, window=window)
        assert facts(other) == facts(result), (note, numpy, window)
    ordered = [check(image, numpy=numpy).findings for numpy in (None, False, True)]
    assert ordered[0] == ordered[1] == ordered[2], note
    return result


@pytest.mark.parametrize("shape", SHAPES)
def test_all_ways_of_counting_agree_on_damaged_images(shape: str) -> None:
    seen: set[str] = set()
    for seed in range(8 if shape == "64k" else 25):
        random = Random(f"{shape} {seed}")
        image = make_image(shape, seed % 3)
        notes = damage(image, random)
        seen.update(all_ways_agree(image, (shape, seed, notes)).kinds)
    assert len(seen) > 4  # the damage does find its way


@pytest.mark.long
@pytest.mark.parametrize("shape", SHAPES)
def test_all_ways_of_counting_agree_on_many_damaged_images(shape: str) -> None:
    for seed in range(1000, 2500):
        image = make_image(shape, seed % 7)
        notes = damage(image, Random(f"{shape} {seed}"))
        all_ways_agree(image, (shape, seed, notes))


@pytest.mark.parametrize("shape", ["512", "4k", "extended", "v2", "64-bit"])
def test_the_independent_reader_agrees(shape: str) -> None:
    """Where it calls an image clean, or names leaked clusters, so does the check."""
    verdicts = set()
    for seed in range(25 if shape == "extended" else 60):
        image = make_image(shape, seed % 3)
        notes = damage(image, Random(f"reader {shape} {seed}"))
        if any("cut" in note or "snapshot" in note for note in notes):
            continue
        try:
            report = Qcow2Reader(image).check()
        except (ValueError, IndexError, struct.error):
            continue
        result = check(image)
        beyond = sum(result.kinds.get(kind, 0) for kind in BEYOND_QEMU if kind != "leak-past-end")
        reserved = sum(result.kinds.get(kind, 0) for kind in ("l1-reserved", "l2-reserved", "block-shared"))
        if not beyond + reserved:
            assert bool(report.corruptions) == bool(result.corruptions or result.check_errors), (seed, notes)
        if not report.corruptions and not result.corruptions:
            assert len(report.leaks) == result.leaks, (seed, notes)
        verdicts.add((bool(report.corruptions), bool(report.leaks)))
    assert len(verdicts) >= 3


# -- counting --------------------------------------------------------------------------------

SPANS = st.lists(
    st.tuples(st.integers(0, 90), st.integers(1, 30), st.integers(1, 70000)).map(
        lambda s: (s[0], s[0] + s[1], s[2])
    ),
    max_size=40,
)


def naive(spans: list[tuple[int, int, int]], lo: int, hi: int) -> list[int]:
    counts = [0] * (hi - lo)
    for first, end, weight in spans:
        for cluster in range(max(first, lo), min(end, hi)):
            counts[cluster - lo] += weight
    return counts


@given(SPANS, st.sampled_from([4, 1 << 16]), st.booleans())
def test_counts(spans: list[tuple[int, int, int]], most_spans: int, numpy: bool) -> None:
    """Spans and flat forms give what adding one by one gives."""
    lo, hi = 16, 80
    counts = Counts(lo, hi, most_spans)
    for index, span in enumerate(spans):
        if numpy and index == len(spans) // 2:
            from enban.formats.qcow2.check_numpy import NumpyCounts

            counts = NumpyCounts(counts, exact=False)
        counts.add(*span)
    assert counts.finish()
    expected = naive(spans, lo, hi)
    assert list(counts.values(lo, hi - lo)) == expected
    assert [counts.value(cluster) for cluster in range(lo, hi)] == expected
    assert counts.one_each == (max(expected) <= 1)
    assert counts.top() == max((lo + i for i, n in enumerate(expected) if n), default=-1)
    assert [counts.any(cluster, 8) for cluster in range(lo, hi - 8)] == [
        any(expected[i : i + 8]) for i in range(hi - lo - 8)
    ]
    over = [(c, n) for first, end, n in counts.excess(100) for c in range(first, end)]
    assert over == [(lo + i, n) for i, n in enumerate(expected) if n > 100]


@given(SPANS, st.integers(0, 6), st.randoms(use_true_random=False), st.booleans())
def test_refcounts_are_compared_exactly(
    spans: list[tuple[int, int, int]], order: int, random: Random, flat: bool
) -> None:
    lo, hi, end = 0, 64, 50
    counts = Counts(lo, hi)
    if flat:
        import numpy as np

        from enban.formats.qcow2.check_numpy import NumpyCounts

        counts = NumpyCounts(counts, exact=True)
        counts.points(np.array([3, 3, 70], np.int64), 1)
    else:
        counts.add(3, 4, 2)
    for span in spans:
        counts.add(*span)
    counts.finish()
    most = (1 << (1 << order)) - 1
    wanted = [min(n, most) for n in naive([*spans, (3, 4, 2)], lo, hi)]
    disk = [random.choice((n, n, n, 0, 1, most)) for n in wanted]
    raw = encode(disk, order)
    assert list(decode(raw, order)) == disk
    found = counts.compare(memoryview(raw), lo, order, end, 5)
    unequal = [(c, d, w) for c, (d, w) in enumerate(zip(disk, wanted, strict=True)) if d != w]
    if not unequal:
        assert found is None
        return
    assert found is not None
    assert found.examples == unequal[:5]
    assert found.low == sum(d < w for _, d, w in unequal)
    assert found.leaks == sum(d > w and c < end for c, d, w in unequal)
    assert found.past == sum(d > w and c >= end for c, d, w in unequal)
    assert found.missing == any(d == 0 for _, d, w in unequal if d < w)
    assert found.top == max((c for c in range(end) if disk[c]), default=-1)


def test_quick_counting_notices_what_it_lost() -> None:
    import numpy as np

    from enban.formats.qcow2.check_numpy import NumpyCounts

    twice = np.array([5, 5, 6], np.int64)
    quick = NumpyCounts(Counts(0, 64), exact=False)
    quick.points(twice, 1)
    assert not quick.finish()
    exact = NumpyCounts(Counts(0, 64), exact=True)
    exact.points(twice, 1)
    assert exact.finish() and exact.value(5) == 2
    exact = NumpyCounts(Counts(0, 64), exact=True)
    for _ in range(300):
        exact.points(twice, 1 << 24)
    assert not exact.finish()  # 2^32 wraps


@pytest.mark.parametrize("bits", range(12, 22))
def test_templates_recognise_tables_in_order(bits: int) -> None:
    template, size = RunTemplate(bits), 1 << bits
    random = Random(bits)
    entries = size // 8
    for start in (1, 255, 65535, 65536, (1 << 24) - 3, random.getrandbits(55 - bits)):
        first = start * size | random.choice((0, COPIED))
        numbers = array("Q", range(first, first + entries * size, size))
        buffer = bytearray(8) + to_big_endian(numbers) + bytearray(8)
        assert template.matches(buffer, 8, entries)
        for index in (0, 1, entries // 2, entries - 1):
            changed = array("Q", numbers)
            changed[index] ^= 1 << random.choice((0, 9, bits, 40, 63))
            assert not template.matches(to_bytes(changed), 0, entries)


def to_bytes(numbers: array[int]) -> bytearray:
    return bytearray(to_big_endian(numbers))


def test_kinds_have_a_severity_and_findings_are_bounded() -> None:
    findings = Findings()
    for number in range(1000):
        findings.add("refcount-low", number, f"finding {number}")
    findings.many("refcount-leak", 1 << 40, ((n, "leak") for n in range(1 << 40)))
    assert len(findings.kept) == MOST_KEPT and findings.kinds == {
        "refcount-low": 1000,
        "refcount-leak": 1 << 40,
    }
    assert set(BEYOND_QEMU) <= set(SEVERITY)
    with pytest.raises(enban.EnbanError):
        findings.add("no such kind", 0, "")


# -- the job ---------------------------------------------------------------------------------


def test_progress_runs_up_to_its_total(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(make_image("4k"))
    calls: list[tuple[int, int]] = []
    assert job.check(path, progress=lambda done, total: calls.append((done, total))).clean
    assert calls == sorted(calls) and len({total for _, total in calls}) == 1
    assert calls[-1][0] == calls[-1][1]


def test_progress_can_end_the_check(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(make_image("4k"))

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.check(path, progress=stop)
    assert job.check(path).clean  # the file was let go of


def test_on_both_faces(tmp_path: Path, face: Face) -> None:
    path = tmp_path / "disk.qcow2"
    image = make_image("4k")
    places = Map(image)
    places.put(places.data_places()[0], 0)
    path.write_bytes(image)

    async def scenario() -> None:
        runtime = face.runtime()
        found = await job.run_check(str(path), runtime)
        assert found.leaks == 1 and found.exit_code == 3
        repaired = await job.run_check(str(path), runtime, repair="all")
        assert repaired.clean and repaired.leaks_fixed == 1

    face.run(scenario())
    assert job.check(path).clean


def test_what_the_job_refuses(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    with pytest.raises(UnsupportedOperationError, match="raw"):
        job.check(raw, format="raw")
    image = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    with pytest.raises(UsageError):
        job.check(image, repair="some")
    with pytest.raises(UsageError):
        job.check(image, repair="all", force_share=True)
    with pytest.raises(HostError):
        job.check(tmp_path / "missing")
    with enban.open(image, writable=True):
        with pytest.raises(HostError):
            job.check(image)
        assert job.check(image, force_share=True).clean


def test_json_has_the_keys_of_qemu_img(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(make_image("4k"))
    facts = job.check(path).as_dict()
    assert facts["check-errors"] == 0 and facts["format"] == "qcow2" and "leaks" not in facts
    assert list(facts)[:3] == ["filename", "format", "check-errors"]


PLAIN_CHECK = """
import sys
if sys.argv[2] == "without":
    sys.modules["numpy"] = None
from enban.jobs.check import check
result = check(sys.argv[1])
print(result.as_dict(), sorted(result.kinds.items()), bool(sys.modules.get("numpy")))
"""


def run_check(path: Path, how: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", PLAIN_CHECK, str(path), how],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ).stdout


def test_numpy_is_optional_and_left_alone_for_small_images(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    path.write_bytes(make_image("4k"))
    assert run_check(path, "with") == run_check(path, "without")
    assert "False" in run_check(path, "with").split()[-1]
    write_big(path, 300, shuffled=True)
    with_numpy, without = run_check(path, "with"), run_check(path, "without")
    assert with_numpy.split()[-1] == "True" and without.split()[-1] == "False"
    assert with_numpy.split()[:-1] == without.split()[:-1]


# -- big and hostile images ------------------------------------------------------------------


def write_big(path: Path, tables: int, *, shuffled: bool = False, cluster: int = 4096) -> None:
    """A sparse image with that many full L2 tables, its metadata complete and nothing else."""
    per_table, per_block = cluster // 8, cluster // 2
    l1_clusters = -(-tables * 8 // cluster)
    blocks = 1
    while True:
        table_clusters = -(-blocks * 8 // cluster)
        first = 1 + table_clusters + blocks + l1_clusters
        total = first + tables * (1 + per_table)
        if blocks * per_block >= total:
            break
        blocks += 1
    slots = [first + table * (1 + per_table) + 1 + i for table in range(tables) for i in range(per_table)]
    if shuffled:
        Random(1).shuffle(slots)
    with path.open("wb") as file:

        def put(cluster_number: int, numbers: array[int]) -> None:
            file.seek(cluster_number * cluster)
            file.write(to_big_endian(numbers))

        start = (b"QFI\xfb", 3, 0, 0, cluster.bit_length() - 1, tables * per_table * cluster, 0, tables)
        rest = ((1 + table_clusters + blocks) * cluster, cluster, table_clusters, 0, 0, 0, 0, 0, 4, 104)
        file.write(struct.pack(">4sIQIIQIIQQIIQQQQII", *start, *rest))
        put(1, array("Q", [(1 + table_clusters + i) * cluster for i in range(blocks)]))
        file.seek((1 + table_clusters) * cluster)
        file.write(b"\0\1" * total)
        put(
            1 + table_clusters + blocks,
            array("Q", [(first + t * (1 + per_table)) * cluster | COPIED for t in range(tables)]),
        )
        for table in range(tables):
            entries = slots[table * per_table : (table + 1) * per_table]
            put(first + table * (1 + per_table), array("Q", [slot * cluster | COPIED for slot in entries]))
        file.truncate(total * cluster)


def test_tables_in_order_take_no_numpy_and_damage_is_found_among_them(tmp_path: Path) -> None:
    path = tmp_path / "big.qcow2"
    write_big(path, 600)
    assert "numpy" not in run_check(path, "with") and run_check(path, "with").endswith("False\n")
    result = job.check(path)
    assert result.clean and result.allocated_clusters == 600 * 512 and result.fragmented_clusters == 0
    with path.open("r+b") as file:
        places = Map(bytearray(file.read(4096 * 400)))
        table = places.word(places.l1[300]) & OFFSET
        file.seek(table + 80)
        file.write(bytes(8))
        file.seek(places.word(places.table[3]))
        file.write(b"\0\2")
        file.seek(places.l1[5])
        file.write((places.word(places.l1[5]) & OFFSET).to_bytes(8, "big"))
    result = job.check(path)
    assert wrong(result) == {"refcount-leak": 2, "copied-l2": 1, "copied-l1": 1}


def test_shuffled_tables(tmp_path: Path) -> None:
    path = tmp_path / "big.qcow2"
    write_big(path, 300, shuffled=True)
    result = job.check(path)
    assert result.clean and result.allocated_clusters == 300 * 512
    with path.open("r+b") as file:
        places = Map(bytearray(file.read(4096 * 400)))
        table = places.word(places.l1[0]) & OFFSET
        file.seek(table)
        entry = file.read(8)
        file.seek(table + 4088)
        file.write(entry)  # twice in one table: the quick way of counting loses it
    result = job.check(path)
    assert wrong(result) == {"refcount-leak": 1, "refcount-low": 1}


def hostile(path: Path, size: int, l1_entries: int, parts: dict[int, bytes], cluster: int = 65536) -> None:
    header = (b"QFI\xfb", 3, 0, 0, cluster.bit_length() - 1, 1 << 20, 0, l1_entries, 2 * cluster, cluster, 1)
    with path.open("wb") as file:
        file.truncate(size)
        file.write(struct.pack(">4sIQIIQIIQQIIQQQQII", *header, 0, 0, 0, 0, 0, 4, 104))
        for offset, content in parts.items():
            file.seek(offset)
            file.write(content)


def numbers(values: list[int]) -> bytes:
    return to_big_endian(array("Q", values))


def quickly(path: Path, seconds: float = 30.0) -> CheckResult:
    start = time.monotonic()
    result = job.check(path)
    assert time.monotonic() - start < seconds
    return result


def test_a_table_named_a_million_times_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "hostile.qcow2"
    entry = numbers([40 << 20 | COPIED])
    hostile(path, 64 << 20, 1 << 20, {65536: numbers([60 << 20]), 131072: entry * (1 << 20)})
    result = quickly(path)
    assert result.kinds["refcount-overflow"] == (1 << 20) - 65535 and result.kinds["copied-l1"] == 1 << 20


def test_tables_in_holes_of_a_huge_file_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "hostile.qcow2"
    cluster = 2 << 20
    l1 = numbers(list(range(64 << 20, (64 << 20) + 20000 * cluster, cluster)))
    hostile(path, 1 << 40, 20000, {cluster: numbers([3 * cluster]), 2 * cluster: l1}, cluster)
    result = quickly(path)
    assert result.kinds["refcount-low"] == 20000 + 4


def test_a_sparse_file_without_end(tmp_path: Path) -> None:
    path = tmp_path / "hostile.qcow2"
    hostile(path, 1 << 42, 64, {512: numbers([4096])}, 512)
    assert quickly(path).kinds["refcount-low"] == 4


def test_refcount_table_that_names_one_block_everywhere(tmp_path: Path) -> None:
    path = tmp_path / "hostile.qcow2"
    hostile(path, 8 << 20, 1, {65536: numbers([1 << 20] * 8192)})
    assert quickly(path).kinds["block-shared"] == 8191


def test_l2_tables_of_noise(tmp_path: Path) -> None:
    path = tmp_path / "hostile.qcow2"
    tables = numbers([(4 + i) * 65536 | COPIED for i in range(16)])
    noise = Random(1).randbytes(16 * 65536)
    hostile(path, 64 << 20, 16, {65536: numbers([3 << 16]), 131072: tables, 4 * 65536: noise})
    result = quickly(path)
    assert result.corruptions > 16 * 8192 and len(result.findings) == MOST_KEPT


@pytest.mark.parametrize("seed", range(40))
def test_noise_anywhere_gives_findings_or_one_clear_error(seed: int, tmp_path: Path) -> None:
    random = Random(seed)
    image = make_image(random.choice(list(SHAPES)), seed)
    for _ in range(random.randrange(1, 60)):
        at = random.randrange(len(image))
        image[at : at + random.choice((1, 4, 8, 64))] = random.randbytes(random.choice((1, 4, 8, 64)))
    if random.random() < 0.5:
        del image[random.randrange(104, len(image)) :]
    path = tmp_path / "noise.qcow2"
    path.write_bytes(image)
    try:
        result = job.check(path, format="qcow2")
    except enban.EnbanError as error:
        assert "\n" not in str(error)
    else:
        assert all("\n" not in finding.text for finding in result.findings)


def test_cut_short_anywhere(tmp_path: Path) -> None:
    image = make_image("4k")
    for length in range(0, len(image), 4096 + 512):
        path = tmp_path / "short.qcow2"
        path.write_bytes(image[:length])
        if length < 104:
            with pytest.raises(CorruptImageError):
                job.check(path, format="qcow2")
        else:
            assert not job.check(path, format="qcow2").clean or length >= len(image) - 4096
