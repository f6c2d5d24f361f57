"""A campaign: the parts of the lab in turn, for a time, with a word for a person now and then.

The time is cut into rounds, each part gets its share of a round. Long campaigns are a soak test
as well: memory and descriptors must not grow.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, TextIO

from enban.errors import UsageError

from .findings import Finding
from .fuzz import FuzzPart
from .images import by_name
from .kill import KillPart, open_descriptors
from .oracle import ENGINE, Violation
from .parts import CrashPart, FaultPart, FullDiskPart, Part, StormPart
from .workload import parse_script

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .workload import Operation

# The share of the time that each part gets.
SHARES = {"crash": 10, "faults": 5, "full": 1, "storm": 4, "kill": 5, "fuzz": 5}
PARTS = tuple(SHARES)
QUICK_S = 28.0
ROUND_S = 60.0
MOST_FINDINGS = 10  # then it ends: they are likely to be one

# A soak is judged when it has run for so long; before that memory still settles.
SOAK_S = 120.0
GROWTH = 64 << 20


class Soak:
    """Samples of memory and descriptors; the first part of a run is left out, as caches fill then."""

    EVERY_S = 1.0

    def __init__(self) -> None:
        self.began = monotonic()
        self.samples: list[tuple[float, int, int]] = []  # (seconds, bytes resident, descriptors)

    def sample(self) -> None:
        if self.samples and monotonic() - self.began < self.samples[-1][0] + self.EVERY_S:
            return
        gc.collect()
        self.samples.append((monotonic() - self.began, resident(), open_descriptors()))

    def figures(self) -> tuple[int, int, int, int]:
        """(bytes after the first quarter, bytes in the last quarter, descriptors then and then)."""
        if not self.samples:
            return 0, 0, 0, 0
        end = self.samples[-1][0]
        early = [s for s in self.samples if end / 4 <= s[0] <= end / 2] or self.samples[:1]
        late = [s for s in self.samples if s[0] >= end * 3 / 4]
        return (
            max(s[1] for s in early),
            min(s[1] for s in late),
            max(s[2] for s in early),
            min(s[2] for s in late),
        )

    def judge(self) -> None:
        """Raises Violation if they grew."""
        if not self.samples or self.samples[-1][0] < SOAK_S:
            return
        early, late, descriptors, later = self.figures()
        if late > early + GROWTH + early // 4:
            raise Violation(ENGINE, f"memory grew from {early >> 20} to {late >> 20} MiB")
        if later > descriptors + 4:
            raise Violation(ENGINE, f"open descriptors grew from {descriptors} to {later}")


def resident() -> int:
    """Bytes of memory this process has; 0 where that cannot be seen."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


class Screen:
    """Progress on standard error: a line that is redrawn, or with `plain` a new one every ten seconds."""

    def __init__(self, *, plain: bool = False, silent: bool = False, stream: TextIO | None = None) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.terminal = not silent and self.stream.isatty()
        self.active = self.terminal or (plain and not silent)
        self.every = 0.2 if self.terminal else 10.0
        self.next = 0.0
        self.width = 0

    def show(self, text: str) -> None:
        if not self.active or monotonic() < self.next:
            return
        self.next = monotonic() + self.every
        if self.terminal:
            self.stream.write("\r" + text[:150].ljust(self.width))
            self.width = len(text[:150])
        else:
            self.stream.write(text + "\n")
        self.stream.flush()

    def line(self, text: str) -> None:
        """A line that stays."""
        if self.terminal and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.width = 0
        if self.active or text:
            self.stream.write(text + "\n" if text else "")
            self.stream.flush()


class Campaign:
    """parts: in the order they run. seconds: in all, 0 without an end. pieces: of each part, 0 for as many
    as the time allows. directory: where findings go."""

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int,
        seconds: float,
        pieces: int = 0,
        directory: Path,
        screen: Screen,
    ) -> None:
        self.parts = parts
        self.seed = seed
        self.seconds = seconds
        self.pieces = pieces
        self.directory = directory
        self.screen = screen
        self.findings: list[Finding] = []
        self.stopped: KeyboardInterrupt | None = None  # what ended it early
        self.soak = Soak()
        self.began = monotonic()
        for part in parts:
            part.tick = self.show

    @property
    def elapsed(self) -> float:
        return monotonic() - self.began

    def run(self) -> list[Finding]:
        """All of it. Ctrl-C ends it early, with what is known until then."""
        try:
            if self.pieces:
                self._run_pieces()
            else:
                self._run_rounds()
        except KeyboardInterrupt as stopped:
            self.stopped = stopped
            self.screen.line("interrupted: what follows is what was done until then")
        finally:
            for part in self.parts:
                part.close()
        self._judge_soak()
        self.screen.line("")
        return self.findings

    def _run_pieces(self) -> None:
        for part in self.parts:
            for _ in range(self.pieces):
                self._step(part)
                if len(self.findings) >= MOST_FINDINGS:
                    return

    def _run_rounds(self) -> None:
        whole = sum(SHARES.get(part.name, 5) for part in self.parts)
        while self.elapsed < self.seconds and len(self.findings) < MOST_FINDINGS:
            length = min(ROUND_S, self.seconds - self.elapsed)
            start = self.elapsed
            share = 0
            for part in self.parts:
                share += SHARES.get(part.name, 5)
                until = start + length * share / whole
                while len(self.findings) < MOST_FINDINGS:
                    self._step(part)  # one at least, even where the part before took longer than its share
                    self.soak.sample()
                    if self.elapsed >= until:
                        break

    def _step(self, part: Part) -> None:
        finding = part.step()
        if finding is not None:
            self._keep(finding)

    def _keep(self, finding: Finding) -> None:
        self.findings.append(finding)
        try:
            place = f", kept in {finding.save(self.directory)}"
        except OSError as error:
            place = f" (could not be kept: {error})"
        self.screen.line(f"FOUND {finding.kind}: {finding.text}{place}")

    def _judge_soak(self) -> None:
        try:
            self.soak.judge()
        except Violation as violation:
            self._keep(Finding("soak", "all", self.seed, violation, again="the same command for as long"))

    # -- what a person sees ----------------------------------------------------------------

    def show(self) -> None:
        parts = []
        for part in self.parts:
            name, number = next(iter(part.counts.items()), ("", 0))
            if number:
                rate = number / part.seconds if part.seconds else 0
                parts.append(f"{part.name} {number:,} {name}" + (f" ({rate:,.0f}/s)" if rate >= 1 else ""))
        clock = _clock(self.elapsed) + (f" of {_clock(self.seconds)}" if self.seconds else "")
        self.screen.show(f"{clock}  " + " | ".join([*parts, f"findings {len(self.findings)}"]))

    def table(self) -> str:
        """The result, for a person."""
        lines = [f"{'part':<8} {'seconds':>8}  done"]
        for part in self.parts:
            done = ", ".join(f"{number:,} {name}" for name, number in part.counts.items())
            name, number = next(iter(part.counts.items()), ("", 0))
            rate = f"; {number / part.seconds:,.0f} {name}/s" if part.seconds and number else ""
            lines.append(f"{part.name:<8} {part.seconds:>8.1f}  {done or 'nothing'}{rate}")
        early, late, descriptors, later = self.soak.figures()
        if late:
            memory = f"{early / 2**20:.0f} -> {late / 2**20:.0f} MiB"
            lines.append(f"memory   {memory}, descriptors {descriptors} -> {later}")
        for finding in self.findings:
            lines += ["", f"{finding.kind.upper()} in {finding.part}: {finding.text}"]
            lines += [f"    {operation}" for operation in finding.script]
            lines += [f"  again: {finding.again}"]
            if finding.directory:
                lines += [f"  kept in {finding.directory}"]
        count = len(self.findings)
        verdict = "no promise was broken" if not count else f"{count} finding{'s' * (count > 1)}"
        lines += ["", f"seed {self.seed}, {self.elapsed:.0f} seconds: {verdict}"]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        early, late, descriptors, later = self.soak.figures()
        return {
            "seed": self.seed,
            "seconds": round(self.elapsed, 1),
            "parts": {part.name: {"seconds": round(part.seconds, 1), **part.counts} for part in self.parts},
            "memory": {"early": early, "late": late},
            "descriptors": {"early": descriptors, "late": later},
            "findings": [finding.as_dict() for finding in self.findings],
        }


def _clock(seconds: float) -> str:
    whole = int(seconds)
    return (
        f"{whole // 3600}:{whole // 60 % 60:02}:{whole % 60:02}"
        if whole >= 3600
        else f"{whole // 60}:{whole % 60:02}"
    )


def make_parts(
    names: Sequence[str],
    seed: int,
    *,
    only: str = "",
    script: str | None = None,
    server: str = "",
    corpus: str = "",
) -> list[Part]:
    """The parts of these names. script: text of a workload for the crash explorer. Raises UsageError,
    and OSError if the corpus cannot be read."""
    made: list[Part] = []
    for name in names:
        if name == "crash":
            made.append(CrashPart(seed, only, script=_operations(script, only)))
        elif name == "faults":
            made.append(FaultPart(seed, only))
        elif name == "full":
            made.append(FullDiskPart(seed, only))
        elif name == "storm":
            made.append(StormPart(seed, only))
        elif name == "kill":
            made.append(KillPart(seed, only, server=server))
        else:
            made.append(FuzzPart(seed, only, corpus=Path(corpus) if corpus else None))
    made = [part for part in made if part.kinds]
    if not made:
        raise UsageError(f"no part has a kind of image '{only}'", hint="see: enban torture --list")
    return made


def _operations(script: str | None, only: str) -> list[Operation] | None:
    if script is None:
        return None
    try:
        return parse_script(script, by_name(only))
    except KeyError:
        raise UsageError("a script is for one kind of image", hint="say --only KIND too") from None
    except ValueError as error:
        raise UsageError(f"the script cannot be read: {error}") from None
