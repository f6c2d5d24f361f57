"""Ctrl-C, SIGTERM and SIGKILL in the middle of a job: nothing that looks finished stays behind.

A convert from a pipe that is held open is a job that is surely in the middle.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import enban as enban_package
from tests.cli.command import command, enban, environment, refused
from tests.support import pattern

MIB = 1 << 20


@contextmanager
def half_done(target: Path, *flags: str) -> Iterator[subprocess.Popen[bytes]]:
    """A convert that has read 8 MiB of a pipe and waits for more."""
    with subprocess.Popen(
        command("convert", "-f", "raw", "-O", "qcow2", *flags, "-", target),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    ) as running:
        try:
            assert running.stdin is not None
            running.stdin.write(pattern(8 * MIB))
            running.stdin.flush()
            partial = Path(f"{target}.enban-partial")
            deadline = time.monotonic() + 60
            while not (partial.exists() and partial.stat().st_size > 4 * MIB):
                assert time.monotonic() < deadline, "the convert did not start"
                assert running.poll() is None, running.communicate()
                time.sleep(0.01)
            yield running
        finally:
            if running.poll() is None:
                running.kill()


@pytest.mark.parametrize(
    ("number", "code", "text"),
    [
        (signal.SIGINT, 130, b"enban: interrupted"),
        (signal.SIGTERM, 143, b"enban: terminated"),
        (signal.SIGHUP, 143, b"enban: terminated"),
    ],
)
@pytest.mark.parametrize("there_before", [False, True])
def test_interrupted(tmp_path: Path, number: int, code: int, text: bytes, there_before: bool) -> None:
    target = tmp_path / "target.qcow2"
    if there_before:
        target.write_bytes(b"old content")
    with half_done(target) as running:
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
    assert running.returncode == code
    assert err.strip() == text
    assert [path.name for path in tmp_path.iterdir()] == (["target.qcow2"] if there_before else [])
    if there_before:
        assert target.read_bytes() == b"old content"


def test_killed(tmp_path: Path) -> None:
    """Data-loss case 25: a killed convert leaves no file under the final name, and the next one works."""
    target = tmp_path / "target.qcow2"
    with half_done(target) as running:
        running.kill()
        running.communicate(timeout=60)
    assert not target.exists()
    source = tmp_path / "source.raw"
    source.write_bytes(pattern(MIB))
    enban("convert", "-f", "raw", "-O", "qcow2", source, target)
    with enban_package.open(target) as disk:
        assert disk.pread(disk.size, 0) == pattern(MIB)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source.raw", "target.qcow2"]


def test_two_jobs_for_one_target(tmp_path: Path) -> None:
    """The second is refused while the first one works, and harms nothing."""
    target = tmp_path / "target.qcow2"
    with half_done(target) as running:
        assert "another process is making this image" in refused("create", "-f", "qcow2", target, "1M")
        _out, err = running.communicate(timeout=60)
    assert (running.returncode, err) == (0, b"")
    with enban_package.open(target) as disk:
        assert disk.pread(8 * MIB, 0) == pattern(8 * MIB)
    assert os.listdir(tmp_path) == ["target.qcow2"]
