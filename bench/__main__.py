"""The command line of the bench; `python -m bench --help`."""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bench import growth, report
from bench.case import all_cases
from bench.harness import MIB, Bench, Row, room_bytes
from bench.inputs import path_of
from bench.run import own_peak_bytes

HERE = Path(__file__).resolve().parent
GIB = 1 << 30


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description="enban and its peers side by side")
    add = parser.add_argument
    add("--only", default="", metavar="TEXT", help="the case TEXT, or those with TEXT in their name")
    add("--list", action="store_true", help="show the cases and their commands")
    pairs = os.environ.get("BENCH_PAIRS") or None
    add("--pairs", type=int, default=pairs, help="pairs a case (BENCH_PAIRS; 7, with --growth 3)")
    add("--growth", action="store_true", help="time and memory against image size, instead of the cases")
    add("--ours", default="", metavar="COMMAND", help="the command under test (this environment's enban)")
    where = "where images are made, and kept for the next run (BENCH_DIR; bench/out/work, which is removed)"
    add("--dir", type=Path, default=os.environ.get("BENCH_DIR") or None, metavar="FOLDER", help=where)
    kept = "takes every sample (bench/out/results.json, with --growth growth.json)"
    add("--json", type=Path, metavar="FILE", help=kept)
    add("--strict", action="store_true", help="exit 1 also when a goal was missed or a case not run")
    options = parser.parse_args(arguments)
    if options.json is None:
        options.json = HERE / "out" / ("growth.json" if options.growth else "results.json")
    if options.pairs is None:
        options.pairs = 3 if options.growth else 7
    if options.pairs < 1:
        parser.error("--pairs must be at least 1")
    return options


def find_ours(named: str) -> list[str]:
    if named:
        return shlex.split(named)
    own = Path(sys.executable).parent / "enban"
    if not own.exists():
        raise SystemExit(
            f"bench: {own} is not there: run scripts/setup dev (make bench does), or name one with --ours"
        )
    return [str(own)]


def compile_modules(ours: list[str]) -> None:
    """What an installed package has. An environment may forbid Python to write compiled modules as it goes
    (PYTHONDONTWRITEBYTECODE), and each start of ours would then compile every module again."""
    python = Path(ours[0]).parent / "python"
    code = "import compileall, enban; compileall.compile_dir(enban.__path__[0], quiet=2)"
    subprocess.run([python if python.exists() else sys.executable, "-c", code], check=False)


def exit_code(rows: list[Row], *, strict: bool) -> int:
    bad = {"failed", "missed", "not run"} if strict else {"failed"}
    return int(any(row.verdict in bad for row in rows))


def show(text: str) -> None:
    report.tell("")
    print(text, flush=True)


def run_cases(bench: Bench, only: str, document: dict[str, Any]) -> list[Row]:
    rows = []
    cases = all_cases()
    for case in [c for c in cases if c.name == only] or [c for c in cases if only in c.name]:
        row = bench.measure(case)
        rows.append(row)
        document["rows"] = [report.as_json(row) for row in rows]
        print(f"  {case.name}: {report.ratio_cell(row)} {row.verdict}", file=sys.stderr, flush=True)
    show(report.table(rows))
    return rows


def run_growth(bench: Bench, only: str, keep: bool, document: dict[str, Any]) -> list[Row]:
    curves = growth.measure(bench, growth_operations(only), keep=keep)
    document["growth"] = [growth.curve_json(curve) for curve in curves]
    for curve in curves:
        show(growth.curve_table(curve) + "\n")
    return [row for curve in curves for row in curve.rows.values()]


def growth_operations(only: str) -> list[growth.Operation]:
    return [operation for operation in growth.OPERATIONS if only in operation.name]


def needed_bytes(folder: Path, only: str, grow: bool) -> int:
    """What must fit at once: all inputs that are not there yet, or in growth those of the largest size."""
    if grow:
        operations = growth_operations(only)
        at_once = [growth.inputs_at(operations, size) for size in growth.sizes_of(operations)]
    else:
        at_once = [{name for case in all_cases() if only in case.name for name in case.inputs}]
    return max(
        (room_bytes({name for name in names if not path_of(folder, name).exists()}) for names in at_once),
        default=0,
    )


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.list:
        for case in all_cases():
            if options.only in case.name:
                goal = "no goal" if case.goal is None else f"goal {case.goal:.3g}"
                print(f"{case.name} ({goal})\n    {case.peer}\n    enban {case.ours}")
        return 0
    if not hasattr(os, "pidfd_open"):
        raise SystemExit("bench: only Linux can be measured")
    ours = find_ours(options.ours)
    names = [one.name for one in (growth.OPERATIONS if options.growth else all_cases())]
    if not any(options.only in name for name in names):
        raise SystemExit(f"bench: nothing has {options.only!r} in its name: see --list")
    folder = options.dir or HERE / "out" / "work"
    folder.mkdir(parents=True, exist_ok=True)
    need = needed_bytes(folder, options.only, options.growth)
    free = shutil.disk_usage(folder).free
    if need > free:
        raise SystemExit(
            f"bench: {folder} has {free / GIB:.1f} GiB of free space and about {need / GIB:.1f} are needed:"
            " name another place with --dir"
        )
    facts = report.machine()
    document: dict[str, Any] = {
        "ours": ours,
        "pairs": options.pairs,
        "started": time.strftime("%FT%TZ", time.gmtime()),
        "machine": facts,
    }
    print(f"{report.headline(facts)}; {options.pairs} pairs; ours: {shlex.join(ours)}", flush=True)
    compile_modules(ours)
    bench = Bench(folder, ours, options.pairs, report.tell)
    try:
        if options.growth:
            rows = run_growth(bench, options.only, options.dir is not None, document)
        else:
            rows = run_cases(bench, options.only, document)
    except KeyboardInterrupt:
        show("bench: interrupted")
        return 130
    finally:
        document["load_at_end"] = os.getloadavg()[0]
        document["harness_peak_bytes"] = own_peak_bytes()
        report.save(options.json, document)
        if options.dir is None:
            shutil.rmtree(folder, ignore_errors=True)
    print(
        f"load at the end {document['load_at_end']:.1f}; "
        f"no peak is seen below the harness's own {own_peak_bytes() / MIB:.0f} MiB; "
        f"every sample is in {options.json}"
    )
    return exit_code(rows, strict=options.strict)


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
