"""Carries out cases: makes inputs, alternates peer and enban, proves results equal, judges the figures."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import inputs
from bench.case import Case, expand
from bench.run import Sample, run, warm
from bench.stats import Spread, ratio

MIB = 1 << 20
RAW_SLACK = 64 << 10  # bytes: the map of a sparse file takes blocks too, sometimes one more


class NotRun(Exception):
    """The row cannot be run here, and why."""


class Failed(Exception):
    """A command failed or its result is wrong, and how."""


@dataclass(slots=True)
class Side:
    """What one command of a case cost, sample by sample."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    # What its last {out} takes: see `written_bytes`.
    out_bytes: int | None = None
    # Killed at the bound of the case: `seconds` says how long it had run.
    unfinished: bool = False

    def add(self, sample: Sample) -> None:
        self.seconds.append(sample.seconds)
        self.cpu_seconds.append(sample.cpu_seconds)
        self.peak_bytes = max(self.peak_bytes, sample.peak_bytes)


@dataclass(slots=True)
class Row:
    """A case and what came of it: met, missed, shown (no goal), not run or failed, and why."""

    case: Case
    peer: Side
    ours: Side
    verdict: str
    why: str = ""

    @property
    def ratio(self) -> Spread | None:
        if not self.peer.seconds or not self.ours.seconds:
            return None
        return ratio(self.peer.seconds, self.ours.seconds)


def judge(case: Case, peer: Side, ours: Side) -> tuple[str, str]:
    """The verdict over measured sides, and everything that was missed."""
    missed = []
    got = ratio(peer.seconds, ours.seconds).median
    if case.goal is not None and got < case.goal:
        missed.append(f"ratio {got:.2f} is below {case.goal:.2f}")
    if (
        case.no_larger
        and ours.out_bytes is not None
        and peer.out_bytes is not None
        and ours.out_bytes > peer.out_bytes + (RAW_SLACK if case.out == "raw" else 0)
    ):
        missed.append(f"wrote {ours.out_bytes - peer.out_bytes} bytes more than the peer")
    if case.peak_mib is not None and ours.peak_bytes > case.peak_mib * MIB:
        missed.append(f"peak memory {ours.peak_bytes / MIB:.0f} MiB is above {case.peak_mib}")
    if missed:
        return "missed", "; ".join(missed)
    return ("shown" if case.goal is None else "met"), ""


def written_bytes(path: Path, image_format: str) -> int:
    """What an output takes: the length of an image file; of a raw file, whose length is given, its data."""
    status = path.stat()
    return status.st_blocks * 512 if image_format == "raw" else status.st_size


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: where it works, which command is ours, how many pairs a case gets, whom to tell."""

    folder: Path
    ours: list[str]
    pairs: int
    tell: Callable[[str], None]
    python: str = sys.executable

    # ---- inputs

    def own_step(self, module: str, *arguments: str) -> None:
        """Runs a module of the bench as a process, for work that would make this one large."""
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments],
            check=False,
            cwd=Path(__file__).resolve().parent.parent,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        if done.returncode:
            words = done.stderr.strip().splitlines()
            raise Failed(words[-1] if words else f"{module} ended with {done.returncode}")

    def make_input(self, name: str) -> Path:
        path = inputs.path_of(self.folder, name)
        if not path.exists():
            self.tell(f"making {name}")
            self.own_step("bench.inputs", str(self.folder.resolve()), name)
        return path

    def forget(self, names: set[str]) -> None:
        """Removes inputs and what they were made from."""
        for name in with_origins(names):
            inputs.path_of(self.folder, name).unlink(missing_ok=True)

    def values(self, names: list[str], out: Path) -> dict[str, str]:
        made = {name: str(self.make_input(name)) for name in names}
        return {**made, "out": str(out), "folder": str(self.folder), "python": self.python}

    def missing(self, case: Case) -> list[str]:
        """Programs that the case needs and this machine has not."""
        needed = {case.peer_program, *case.needs} - {"{python}"}
        for name in case.inputs:
            needed |= inputs.programs(name)
        return sorted(program for program in needed if shutil.which(program) is None)

    # ---- one case

    def measure(self, case: Case) -> Row:
        """Runs a case to its row; never raises for what a command does."""
        row = Row(case, Side(), Side(), "failed")
        try:
            if absent := self.missing(case):
                raise NotRun(f"missing: {', '.join(absent)}")
            self.fill(row)
            row.verdict, row.why = judge(case, row.peer, row.ours)
        except NotRun as reason:
            row.verdict, row.why = "not run", str(reason)
        except (Failed, OSError) as reason:
            row.verdict, row.why = "failed", str(reason)
        finally:
            for path in self.outputs():
                path.unlink(missing_ok=True)
        return row

    def outputs(self) -> list[Path]:
        return [self.folder / f"{who}.{what}" for who in ("peer", "ours") for what in ("out", "stdout")]

    def fill(self, row: Row) -> None:
        case = row.case
        peer_out, peer_stdout, ours_out, ours_stdout = self.outputs()
        peer = expand(case.peer, self.values(case.inputs, peer_out))
        ours = expand(case.ours, self.values(case.inputs, ours_out))
        ours = [*ours, *self.ours] if case.self_timed else [*self.ours, *ours]
        warm_up = [inputs.path_of(self.folder, name) for name in case.inputs]
        captured = case.same_json
        # An output takes as much of the page cache as its input; the rest is for whoever else wants some.
        memory = 3 * max((path.stat().st_blocks * 512 for path in warm_up), default=0)

        def once(argv: list[str], *, bound_s: float | None = None, stdout: Path | None = None) -> Sample:
            for path in warm_up:
                warm(path)
            if case.out:
                self.own_step("bench.memory", str(memory))
                for path in warm_up:  # pages of theirs may have gone meanwhile
                    warm(path)
            sample = run(argv, self.folder, timeout_s=bound_s, stdout=stdout)
            if sample.timed_out and bound_s is not None:
                return sample
            if sample.ended_not(case.peer_code if argv is peer else 0):
                ending = f"signal {-sample.code}" if sample.code < 0 else f"code {sample.code}"
                raise Failed(f"{' '.join(argv[:2])} ended with {ending}: {sample.complaint}")
            return sample

        # The unmeasured round: caches fill, results are compared.
        if case.peer_bound_s is None:
            once(peer, stdout=peer_stdout if captured else None)
        ours_bound_s = case.peer_bound_s
        if once(ours, bound_s=ours_bound_s, stdout=ours_stdout if captured else None).timed_out:
            raise Failed(f"ours was not done after {ours_bound_s} s")
        self.verify(case)

        def sample_of(side: Side, argv: list[str], out: Path, bound_s: float | None = None) -> None:
            # Both outputs go: no old dirty pages are written while something is timed.
            for path in self.outputs():
                path.unlink(missing_ok=True)
            said = out.with_suffix(".stdout") if case.self_timed else None
            sample = once(argv, bound_s=bound_s, stdout=said)
            if said is not None:
                sample = replace(sample, seconds=figure(said))
            side.add(sample)
            side.unfinished = sample.timed_out
            if case.out and not sample.timed_out:
                side.out_bytes = written_bytes(out, case.out)

        pairs = self.pairs * case.more
        if case.peer_bound_s is not None:
            self.tell(f"{case.name}: the peer, once, for {case.peer_bound_s:g} s at most")
            sample_of(row.peer, peer, peer_out, case.peer_bound_s)
        for pair in range(pairs):
            self.tell(f"{case.name}: pair {pair + 1} of {pairs}")
            turns = [(row.peer, peer, peer_out), (row.ours, ours, ours_out)]
            for side, argv, out in turns if pair % 2 == 0 else reversed(turns):
                if side is row.ours or case.peer_bound_s is None:
                    sample_of(side, argv, out)

    def verify(self, case: Case) -> None:
        """After the unmeasured round: what both wrote or said must be the same."""
        peer_out, peer_stdout, ours_out, ours_stdout = self.outputs()
        if case.out:
            done = run(
                ["qemu-img", "compare", "-f", case.out, "-F", case.out, str(peer_out), str(ours_out)],
                self.folder,
            )
            if done.failed:
                raise Failed("qemu-img compare finds our output different from the peer's")
            if (
                case.out == "qcow2"
                and run(["qemu-img", "check", "-f", "qcow2", str(ours_out)], self.folder).failed
            ):
                raise Failed("qemu-img check finds errors in our output")
        if case.same_json:
            self.own_step("bench.same_json", str(peer_stdout), str(ours_stdout))


def figure(stdout: Path) -> float:
    """What a self-timed command said on its last line."""
    words = stdout.read_text().split()
    try:
        return float(words[-1])
    except (IndexError, ValueError):
        raise Failed(f"no figure on the last line of {stdout.name}") from None


def with_origins(names: set[str]) -> set[str]:
    return names | {origin for name in names for origin in inputs.made_from(name)}


def room_bytes(names: set[str]) -> int:
    """What the inputs, their origins, and two outputs of the largest take on the disk, about."""
    sizes = [inputs.estimate_bytes(name) for name in with_origins(names)]
    return sum(sizes) + 2 * max(sizes, default=0)
