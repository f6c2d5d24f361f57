"""The parts of a campaign: each does one bounded piece of work at a time, and counts.

What a piece is follows from the seed and the number of the piece alone, so `--seed`, `--only` and
`--count 1` do any one of them again.
"""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING

from enban.filters import faults

from .crash import Explorer, Tally, record
from .faultwalk import KINDS as FAULT_KINDS
from .faultwalk import WAYS, walk, walk_failing_flush, walk_sizes
from .findings import Finding
from .fulldisk import KINDS as FULL_KINDS
from .fulldisk import Place, fill
from .images import ALL, EXTERNAL, Image
from .live import KINDS as LIVE_KINDS
from .live import commit_in_a_storm, pull_in_a_storm
from .oracle import Violation
from .shrink import shrink
from .storm import CROWDED, ambush, explore_crowd, storm
from .storm import KINDS as STORM_KINDS
from .workload import Operation, operations

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

OPERATIONS = 40  # of a workload of the crash explorer
SHRINK_S = 20.0


class Part:
    """Base class. kinds: the images it works on, in turn; piece n has seed `seed + n // len(kinds)`.
    counts: what was done so far; the first is what its speed is measured in.
    tick: called often with nothing to say but that work goes on."""

    name = ""
    kinds: Sequence[Image] = ()

    def __init__(self, seed: int, only: str = "", tick: Callable[[], None] | None = None) -> None:
        self.seed = seed
        self.number = 0
        self.counts: dict[str, int] = {}
        self.seconds = 0.0
        self.tick = tick
        if only:
            self.kinds = [image for image in self.kinds if image.name == only]

    def count(self, name: str, number: int = 1) -> None:
        self.counts[name] = self.counts.get(name, 0) + number

    def beat(self, _: int = 0) -> None:
        if self.tick is not None:
            self.tick()

    def step(self) -> Finding | None:
        """The next piece of work."""
        place, self.number = self.number, self.number + 1
        image, seed = self.kinds[place % len(self.kinds)], self.seed + place // len(self.kinds)
        began = monotonic()
        try:
            self.work(image, seed)
        except Violation as violation:
            return self.found(image, seed, violation)
        finally:
            self.seconds += monotonic() - began
        return None

    def work(self, image: Image, seed: int) -> None:
        raise NotImplementedError

    def found(self, image: Image, seed: int, violation: Violation) -> Finding:
        return Finding(self.name, image.name, seed, violation)

    def close(self) -> None:
        """Give back what the part holds between pieces."""


class CrashPart(Part):
    """Crash states of recorded workloads. script: this workload instead of random ones."""

    name = "crash"
    kinds = ALL
    subsets, scattered = 16, 8

    def __init__(
        self,
        seed: int,
        only: str = "",
        tick: Callable[[], None] | None = None,
        *,
        script: list[Operation] | None = None,
    ) -> None:
        super().__init__(seed, only, tick)
        self.script = script

    def work(self, image: Image, seed: int) -> None:
        self._explore(image, seed, self.script or self._workload(image, seed))

    def _workload(self, image: Image, seed: int) -> list[Operation]:
        """In every fourth workload storage calls fail as well; snapshots and resizes are for the others."""
        calm = not self._fails(seed)
        return operations(image, seed, OPERATIONS, reopens=calm, resizes=calm, snapshots=calm)

    def _fails(self, seed: int) -> bool:
        return seed % 4 == 3

    def _decide(self, seed: int) -> faults.Decide | None:
        if not self._fails(seed):
            return None
        kind = (faults.FLUSH, faults.WRITE)[seed // 4 % 2]
        return faults.fail_at(seed // 8 % 12 + 1, operations=(kind,))

    def _explore(self, image: Image, seed: int, script: list[Operation], *, counted: bool = True) -> None:
        before = 0

        def progress(states: int) -> None:
            nonlocal before
            if counted:
                self.count("states", states - before)
            before = states
            self.beat()

        recording = record(image, script, decide=self._decide(seed))
        explorer = Explorer(
            recording, seed, subsets=self.subsets, scattered=self.scattered, tick=progress, reopen_every=64
        )
        try:
            explorer.explore()
        finally:
            if counted:
                tally: Tally = explorer.tally
                self.count("workloads")
                self.count("with failures", bool(recording.failures))
                self.count("with leaks", tally.leaking)
                self.count("reopened", tally.reopened)

    def found(self, image: Image, seed: int, violation: Violation) -> Finding:
        worst = violation

        def fails(script: list[Operation]) -> bool:
            nonlocal worst
            try:
                self._explore(image, seed, script, counted=False)
            except Violation as again:
                worst = again
                return True
            return False

        script = self.script or self._workload(image, seed)
        short = shrink(script, fails, seconds=SHRINK_S)
        fails(short)
        return Finding(self.name, image.name, seed, worst, script=short, before=image.empty())


class FaultPart(Part):
    """Every call of a workload fails in every way."""

    name = "faults"
    kinds = FAULT_KINDS

    def work(self, image: Image, seed: int) -> None:
        for way in WAYS:
            calls, errors = walk(image, seed, way, tick=self.beat)
            self.count("faults", calls)
            self.count("errors", errors)
        for index in range(1, 6):
            self.count("faults", walk_failing_flush(image, seed, index))
        if image is not EXTERNAL:
            walk_sizes(image, seed, range(0, 48, 3))
            self.count("faults", 16)
        self.count("workloads")


class FullDiskPart(Part):
    """A real file system that runs full."""

    name = "full"
    kinds = FULL_KINDS

    def __init__(self, seed: int, only: str = "", tick: Callable[[], None] | None = None) -> None:
        super().__init__(seed, only, tick)
        self._place: Place | None = None

    def work(self, image: Image, seed: int) -> None:
        if self._place is None:
            self._place = Place()
        errors, operations_done = fill(image, seed, self._place)
        self.count("operations", operations_done)
        self.count("refused", errors)
        self.count(f"on {self._place.kind}")

    def close(self) -> None:
        if self._place is not None:
            self._place.close()


class StormPart(Part):
    """Storms, and crash states of storms."""

    name = "storm"
    kinds = STORM_KINDS

    def work(self, image: Image, seed: int) -> None:
        if not image.external:
            for number in range(4 * seed, 4 * seed + 4):
                self.count("requests", ambush(image, number))
            self.beat()
        self.count("requests", storm(image, seed))
        self.count("storms")
        self.beat()
        place = self.kinds.index(image)
        if place < 4:
            job = pull_in_a_storm if place % 2 else commit_in_a_storm
            self.count("requests", job(LIVE_KINDS[place // 2], seed))
            self.beat()
        if image in CROWDED:
            self.count("crash states", explore_crowd(image, seed, tick=self.beat))
