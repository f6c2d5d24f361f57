"""What the bench prints and keeps: aligned tables, and results.json with every sample."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import MIB, Row, Side
from bench.stats import Spread


def align(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first and the last are text, the others figures."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    last = len(widths) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if column in (0, last) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def seconds(value: float) -> str:
    """Three figures or so, the unit chosen to fit."""
    if value < 0.0001:
        return f"{value * 1e6:.1f} us"
    if value < 0.1:
        return f"{value * 1000:.1f} ms"
    return f"{value:.3f} s" if value < 10 else f"{value:.1f} s"


def time_cell(side: Side) -> str:
    if not side.seconds:
        return "-"
    spread = Spread.of(side.seconds)
    if side.unfinished:
        return f"> {seconds(spread.median)}"
    if len(side.seconds) == 1:
        return f"{seconds(spread.median)} (once)"
    scale, unit, places = (1000, "ms", 1) if spread.median < 0.1 else (1, "s", 3 if spread.median < 10 else 1)
    low, middle, high = (f"{value * scale:.{places}f}" for value in (spread.low, spread.median, spread.high))
    return f"{middle} {unit} ({low}..{high})"


def ratio_cell(row: Row) -> str:
    got = row.ratio
    if got is None:
        return "-"
    if row.peer.unfinished:
        return f"> {got.median:.1f}"
    return f"{got.median:.2f} ({got.low:.2f}..{got.high:.2f})"


def table(rows: Sequence[Row]) -> str:
    """One line a case; what was missed, not run or failed is said below."""
    lines = [
        (
            "case",
            "peer, median (min..max)",
            "ours",
            "peer/ours",
            "goal",
            "peak MiB: peer",
            "ours",
            "size: ours/peer",
            "verdict",
        )
    ]
    notes = []
    for row in rows:
        case = row.case
        sizes = "-"
        if row.ours.out_bytes is not None and row.peer.out_bytes:
            sizes = f"{row.ours.out_bytes / row.peer.out_bytes:.4f}"
        lines.append(
            (
                case.name,
                time_cell(row.peer),
                time_cell(row.ours),
                ratio_cell(row),
                "-" if case.goal is None else f">= {case.goal:.3g}",
                f"{row.peer.peak_bytes / MIB:.0f}" if row.peer.seconds else "-",
                f"{row.ours.peak_bytes / MIB:.0f}" if row.ours.seconds else "-",
                sizes,
                row.verdict,
            )
        )
        if row.why:
            notes.append(f"{row.verdict}: {case.name}: {row.why}")
    return "\n".join([align(lines), *notes])


def version_of(program: str) -> str | None:
    path = shutil.which(program)
    if path is None:
        return None
    done = subprocess.run(
        [path, "--version"], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    return (done.stdout or done.stderr).partition("\n")[0]


def machine() -> dict[str, Any]:
    """What the figures depend on besides the programs."""
    return {
        "system": platform.platform(),
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "qemu-img": version_of("qemu-img"),
    }


def headline(facts: dict[str, Any]) -> str:
    busy = " (busy: expect a wide spread)" if facts["load"] > facts["cores"] / 2 else ""
    return (
        f"{facts['cores']} cores, {facts['system']}, Python {facts['python']}, "
        f"{facts['qemu-img'] or 'no qemu-img'}; load {facts['load']:.1f}{busy}"
    )


def as_json(row: Row) -> dict[str, Any]:
    got = row.ratio
    return {
        "name": row.case.name,
        "case": asdict(row.case),
        "verdict": row.verdict,
        "why": row.why,
        "ratio": None if got is None else asdict(got),
        "ratio_is_lower_bound": row.peer.unfinished,
        "peer": asdict(row.peer),
        "ours": asdict(row.ours),
    }


def save(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n")
    partial.rename(path)


def tell(line: str) -> None:
    """Progress: one line that is written over on a terminal; nothing in a log."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{line}")
        sys.stderr.flush()
