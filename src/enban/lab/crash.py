"""The crash explorer: a power cut at any moment of a workload.

All storage calls of a workload are recorded. The record is replayed up to each point, states are
made up in which unflushed changes are missing, reordered and torn, and each is read by the
independent reader: at most leaks, every flushed sector there, every unflushed one old or new,
never foreign bytes; a snapshot is there as a whole or not at all, and its bytes never change.
A sample is opened by the engine, written to, closed, checked again, its leaks are repaired.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError
from enban.filters import writelog
from enban.filters.faults import Faults
from enban.filters.writelog import WriteLog
from enban.formats.qcow2.opening import open_qcow2
from enban.formats.qcow2.repair import repair_image

from .crash_states import Replay
from .images import Image, Medium
from .oracle import CORRUPT, ENGINE, LEAK, Oracle, Violation
from .qcow2_reader import Memo
from .workload import Operation, fits, operations, run_until_error

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from enban.filters.faults import Decide

    from .images import View


class Recording:
    """A workload and what it did to the storage. start: the image before it; guest: what that showed;
    kept: its snapshots. failures: operations that failed, where `decide` made storage calls fail."""

    def __init__(
        self,
        image: Image,
        start: bytes,
        guest: bytes,
        entries: list[writelog.Entry],
        failures: int = 0,
        kept: dict[str, bytes] | None = None,
    ) -> None:
        self.image = image
        self.start = start
        self.guest = guest
        self.entries = entries
        self.failures = failures
        self.kept = kept or {}


def record(
    image: Image,
    script: Sequence[Operation],
    *,
    start: bytes | None = None,
    guest: bytes | None = None,
    kept: dict[str, bytes] | None = None,
    decide: Decide | None = None,
) -> Recording:
    """Do a workload on an image in memory. start, guest: an image to begin with, and what it shows;
    without them an empty one. kept: the snapshots in it, by name. decide: makes storage calls fail.
    Raises Violation."""
    start = bytes(image.empty()) if start is None else start
    guest = image.shown() if guest is None else guest
    log = WriteLog(Medium(BLOCKING, start))
    faulty = Faults(log)
    oracle = Oracle(guest)
    oracle.snapshots.update(kept or {})
    failures = 0
    disk = enban.Disk(drive(image.open(faulty)))
    faulty.decide = decide
    for operation in [*script, Operation("flush")]:
        if not fits(operation, oracle):
            continue
        if operation.kind == "reopen":
            faulty.decide = None
            disk.close()
            oracle.done(operation)
            log.mark(("end", operation))
            disk = enban.Disk(drive(image.open(faulty)))
            faulty.decide = decide
            continue
        log.mark(("begin", operation))
        try:
            error = run_until_error(disk, oracle, operation, may_fail=decide is not None)
        except EnbanError as bad:
            raise Violation(ENGINE, f"{image}: {operation}: {bad}") from bad
        if error is not None:
            failures += 1
            oracle.failed(operation)
            oracle.observe(operation, disk.pread(disk.size, 0), what=f"{operation} failed")
        if error is not None or operation.kind == "discard":  # what it did is known only now
            operation = Operation("seen", content=bytes(oracle.model))
        log.mark(("end", operation))
    log.mark(("close", None))
    faulty.decide = None
    disk.close()
    if not failures:
        assert isinstance(log.below, Medium)
        report = image.view(log.below.content).check()
        if not report.clean:
            text = f"{image}: closed, and: {report.corruptions[:4]}, leaked clusters {report.leaks[:8]}"
            raise Violation(CORRUPT if report.corruptions else LEAK, text, image=log.below.content)
    return Recording(image, start, guest, log.entries, failures, kept)


class Tally:
    """What an exploration saw, in states."""

    __slots__ = ("bad", "clean", "corrupt", "foreign", "leaking", "lost", "reopened", "states")

    def __init__(self) -> None:
        self.states = self.clean = self.leaking = self.reopened = 0
        self.corrupt = self.lost = self.foreign = self.bad = 0

    def add(self, other: Tally) -> None:
        for name in Tally.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def as_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in Tally.__slots__}


class Explorer:
    """Cuts a recording into states and judges them.

    subsets, scattered: states of those kinds at each point. reopen_every: of so many states one is
        opened by the engine. stop: the first violation is raised; else all are counted in `tally`.
    tick: called with the number of states now and then; what it raises ends the exploration.
    """

    def __init__(
        self,
        recording: Recording,
        seed: int,
        *,
        subsets: int = 3,
        scattered: int = 2,
        reopen_every: int = 64,
        stop: bool = True,
        tick: Callable[[int], None] | None = None,
    ) -> None:
        self.recording = recording
        self.image = recording.image
        self.random = Random(seed)
        self.seed = seed
        self.subsets = subsets
        self.scattered = scattered
        self.reopen_every = reopen_every
        self.stop = stop
        self.tick = tick
        self.tally = Tally()
        self.memo = Memo()

    def explore(self) -> Tally:
        """All points of the recording. Raises Violation."""
        recording, tally = self.recording, self.tally
        oracle = Oracle(recording.guest, keep_past=not self.stop)
        oracle.snapshots.update(recording.kept)
        replay = Replay(recording.start, recording.entries)
        for number, entry in enumerate(replay.steps()):
            if entry.kind == writelog.MARK:
                follow(oracle, entry)
                continue
            for state in self._states(replay):
                tally.states += 1
                what = f"{self.image}, seed {self.seed}, at entry {number} {entry}"
                self._judge(oracle, state, what)
            if self.tick is not None:
                self.tick(tally.states)
        return tally

    def _states(self, replay: Replay) -> list[bytearray]:
        """Each state once."""
        whole = replay.everything()
        if not replay.pending:
            return [whole]
        others = [replay.torn(self.random), *replay.subsets(self.random, self.subsets)]
        others.extend(replay.scattered(self.random) for _ in range(self.scattered))
        return [
            whole,
            *(other for place, other in enumerate(others) if other not in (whole, *others[:place])),
        ]

    def _judge(self, oracle: Oracle, state: bytearray, what: str) -> None:
        try:
            self._check(oracle, state, what)
            if self.tally.states % self.reopen_every == 0:
                self.tally.reopened += 1
                reopen(self.image, state, self.tally.states, what)
        except Violation as violation:
            if self.stop:
                text = str(violation)
                text = text if text.startswith(what) else f"{what}: {text}"
                raise Violation(violation.kind, text, image=state) from violation
            if violation.kind == CORRUPT:
                self.tally.corrupt += 1
            elif violation.kind == ENGINE:
                self.tally.bad += 1

    def _check(self, oracle: Oracle, state: bytearray, what: str) -> None:
        tally = self.tally
        view = self.image.view(state, memo=self.memo)
        report = view.check()
        if report.corruptions:
            raise Violation(CORRUPT, f"{what}: {'; '.join(report.corruptions[:4])}")
        if report.leaks:
            tally.leaking += 1
        else:
            tally.clean += 1
        content = view.read()
        if not self.stop:
            lost, foreign = oracle.wrong_sectors(content)
            tally.lost += bool(lost)
            tally.foreign += bool(foreign)
            return
        oracle.check_crash(content, what=what)
        if oracle.snapshots or oracle.possible or self.image.snapshots:
            self._check_snapshots(oracle, view, what)

    def _check_snapshots(self, oracle: Oracle, view: View, what: str) -> None:
        shown = view.snapshots()
        oracle.check_snapshots(shown, shown, what)


def follow(oracle: Oracle, mark: writelog.Entry) -> None:
    """Keep an oracle in step with the marks of a recording."""
    assert isinstance(mark.note, tuple)
    moment, operation = mark.note
    if moment == "begin":
        oracle.begin(operation)
    elif moment == "end":
        if operation.kind == "seen":
            oracle.model[:] = operation.content
        oracle.done(operation)


def reopen(image: Image, state: bytes | bytearray, seed: int, what: str) -> None:
    """The engine sees in a state what the independent reader sees, and can go on from there."""
    expected = image.view(state).read()
    medium = Medium(BLOCKING, state)
    try:
        disk = enban.Disk(drive(image.open(medium)))
        if disk.pread(disk.size, 0) != expected:
            raise Violation(ENGINE, f"{what}: reopened, the engine reads something else")
        oracle = Oracle(expected)
        for operation in operations(image, seed, 5, size=disk.size, resizes=False, snapshots=False):
            run_until_error(disk, oracle, operation, may_fail=False)
        disk.close()
    except EnbanError as error:
        raise Violation(ENGINE, f"{what}: reopened: {error}") from error
    view = image.view(medium.content)
    report = view.check()
    if report.corruptions:
        raise Violation(CORRUPT, f"{what}: reopened and written to: {'; '.join(report.corruptions[:4])}")
    if view.read() != oracle.model:
        raise Violation(ENGINE, f"{what}: reopened and written to, it reads differently")
    if report.leaks:
        _repair(image, medium, bytes(oracle.model), what)


def _repair(image: Image, medium: Medium, content: bytes, what: str) -> None:
    """Leaks are given back, and nothing else changes."""
    try:
        node = drive(open_qcow2("image", BLOCKING, medium, writable=True, metadata_only=True))
        drive(repair_image(node, "leaks"))
        drive(node.close())
    except EnbanError as error:
        raise Violation(ENGINE, f"{what}: repaired: {error}") from error
    view = image.view(medium.content)
    report = view.check()
    if not report.clean:
        raise Violation(CORRUPT, f"{what}: repaired: {report.corruptions[:4]}, leaks {report.leaks[:4]}")
    if view.read() != content:
        raise Violation(ENGINE, f"{what}: repaired, it reads differently")
