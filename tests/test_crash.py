"""Promise 1, by exploration: a power cut at any moment of a workload.

The lab's crash explorer (`enban.lab.crash`) judges every state: at most leaks, every flushed
sector there, every unflushed one old or new, never foreign bytes; a snapshot's bytes never change.
Here it goes over a fixed part of the space, and is made to fail where it must.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from random import Random

import pytest

from enban.filters import faults, writelog
from enban.lab.crash import Explorer, Recording, record
from enban.lab.crash_states import Replay
from enban.lab.images import ALL, IMAGES, Image, pattern
from enban.lab.oracle import Violation
from enban.lab.storm import CROWDED, explore_crowd
from enban.lab.workload import Operation, operations, prepare
from tests.support import qemu_check, qemu_img

OPERATIONS = 40


def recorded(image: Image, seed: int, *, decide: faults.Decide | None = None) -> Recording:
    """A workload on an image that has been in use before."""
    start, _, guest = prepare(image, seed)
    script = operations(image, seed + 7, OPERATIONS, resizes=decide is None, snapshots=decide is None)
    return record(image, script, start=start, guest=guest, decide=decide)


@pytest.mark.parametrize("image", ALL, ids=repr)
def test_power_cuts(image: Image) -> None:
    tally = Explorer(recorded(image, 11), 11, reopen_every=40).explore()
    assert tally.states > 150 and tally.reopened > 3
    if image.format == "qcow2":
        assert tally.leaking, "no state shows a leak: the record has no unflushed writes in it"


@pytest.mark.long
@pytest.mark.parametrize("seed", range(100, 160))
@pytest.mark.parametrize("image", ALL, ids=repr)
def test_power_cuts_long(image: Image, seed: int) -> None:
    Explorer(recorded(image, seed), seed, subsets=16, scattered=8, reopen_every=50).explore()


FULL_OF_TABLES = Image("512-rc64", 96 * 1024, cluster_size=512, refcount_bits=64)


@pytest.mark.parametrize("operation", [faults.FLUSH, faults.WRITE])
@pytest.mark.parametrize("image", [FULL_OF_TABLES, IMAGES[3]], ids=repr)
def test_power_cuts_after_a_failed_barrier(image: Image, operation: str) -> None:
    """A flush or a write fails, enban goes on, and then the power is cut. What a failed barrier had
    written already must not be taken back or built upon."""
    explored = 0
    for number in range(1, 14, 2):
        recording = recorded(image, 14, decide=faults.fail_at(number, operations=(operation,)))
        if recording.failures:
            explored += 1
            Explorer(recording, 14, subsets=1, reopen_every=100).explore()
    assert explored > 2


@pytest.mark.long
@pytest.mark.parametrize("operation", [faults.FLUSH, faults.WRITE])
@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("image", [FULL_OF_TABLES, *IMAGES], ids=repr)
def test_power_cuts_after_a_failed_barrier_long(image: Image, seed: int, operation: str) -> None:
    for number in range(seed % 7 + 1, 60, 7):
        recording = recorded(image, seed, decide=faults.fail_at(number, operations=(operation,)))
        if not recording.failures:
            break
        Explorer(recording, seed, subsets=2, scattered=3, reopen_every=200).explore()


SHARED = (
    Image("512", 24 * 1024, cluster_size=512),
    Image("4k-v2", 64 * 1024, cluster_size=4096, compat="0.10"),
    Image("16k-ext", 100 * 1024, cluster_size=16384, extended_l2=True),
)


@pytest.mark.interop
@pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is missing (Debian package qemu-utils)"
)
@pytest.mark.parametrize("image", SHARED, ids=repr)
def test_power_cuts_beside_a_snapshot(image: Image, tmp_path: Path) -> None:
    """Clusters and L2 tables are shared with a snapshot that QEMU made; its bytes stay."""
    start, _, guest = prepare(image, 12)
    path = tmp_path / "a.qcow2"
    path.write_bytes(start)
    qemu_img("snapshot", "-c", "base", path)
    qemu_check(path)
    script = operations(image, 19, OPERATIONS)
    recording = record(image, script, start=path.read_bytes(), guest=guest, kept={"base": guest})
    assert Explorer(recording, 12, reopen_every=40).explore().states > 200


@pytest.mark.interop
@pytest.mark.skipif(
    shutil.which("qemu-img") is None, reason="qemu-img is missing (Debian package qemu-utils)"
)
def test_qemu_agrees_on_crash_states(tmp_path: Path) -> None:
    """A sample of states judged by qemu-img check: leaks only, as the independent check says."""
    image = Image("512-chain", 20 * 1024, cluster_size=512, backing=pattern(12 * 1024 + 512, 5))
    recording = recorded(image, 13)
    replay, random = Replay(recording.start, recording.entries), Random(13)
    path = tmp_path / "a.qcow2"
    (tmp_path / "below").write_bytes(image.backing)
    judged = 0
    for number, entry in enumerate(replay.steps()):
        if entry.kind != writelog.MARK and number % 5 == 0:
            path.write_bytes(replay.scattered(random))
            report = qemu_check(path, leaks=True)
            assert not report.get("corruptions") and not report["check-errors"]
            judged += 1
    assert judged > 8


def test_a_missing_flush_would_be_found() -> None:
    """The instrument itself: the same workload with its flushes ignored must fail somewhere."""
    recording = recorded(IMAGES[0], 11)
    for entry in recording.entries:
        if entry.kind == writelog.FLUSH:
            entry.ended = 0
    with pytest.raises(Violation):
        Explorer(recording, 11, scattered=4, reopen_every=1 << 30).explore()


def test_freed_clusters_in_time() -> None:
    """Every way a cluster leaves the mapping, each followed at once by a write that wants space:
    the image is so full of small clusters that early reuse would be seen."""
    image = Image("512-full", 8 * 1024, cluster_size=512)
    start, _, guest = prepare(image, 0)
    random = Random(3)
    script = []
    for number in range(60):
        at = random.randrange(16) * 512
        kind = random.choice(("zero", "discard", "packed", "write"))
        content = bytes([number + 1]) * 512
        script.append(Operation(kind, at, 512, content))
        script.append(Operation("write", (at + 512) % 8192, 512, content[::-1]))
        if number % 9 == 8:
            script.append(Operation("flush"))
    recording = record(image, script, start=start, guest=guest)
    assert Explorer(recording, 3, reopen_every=60).explore().states > 500


# -- many requests at once -------------------------------------------------------------------


@pytest.mark.parametrize("image", CROWDED, ids=repr)
def test_power_cuts_in_a_crowd(image: Image) -> None:
    assert explore_crowd(image, 1) > 250


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2, 40))
@pytest.mark.parametrize("image", CROWDED, ids=repr)
def test_power_cuts_in_a_crowd_long(image: Image, seed: int) -> None:
    explore_crowd(image, seed)
