"""Running the `enban` command in tests: in this process (quick) or as a process of its own."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

from enban.cli import main

ROOT = Path(__file__).parents[2]


class Ran:
    """How a command ended. err: its lines on standard error."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code = code
        self.out = out
        self.err = err.splitlines()

    def __repr__(self) -> str:
        return f"<exit {self.code}\n{self.out}\n{self.err}>"


def enban(*words: str | Path, code: int = 0) -> Ran:
    """Run a command in this process; an exit code other than `code` fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        got = main([str(word) for word in words])
    ran = Ran(got, out.getvalue(), err.getvalue())
    assert got == code, f"enban {' '.join(map(str, words))}: {ran}"
    return ran


def refused(*words: str | Path, code: int = 1) -> str:
    """Run a command that must fail, and return its one line on standard error."""
    ran = enban(*words, code=code)
    assert len(ran.err) == 1, ran
    assert ran.err[0].startswith("enban: ")
    return ran.err[0]


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "enban", *map(str, words)]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "src")}


def process(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a process of its own."""
    return subprocess.run(
        command(*words), capture_output=True, text=True, timeout=120, check=False, env=environment()
    )
