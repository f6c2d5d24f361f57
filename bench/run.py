"""Runs one command and says what it cost: wall time, processor time, peak memory.

Times are from just before the start to the moment the end is seen; the kernel accounts processor time and
peak memory of exactly that process (wait4), children it waited for included. Linux only (pidfd, SEEK_DATA).
"""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from dataclasses import dataclass
from pathlib import Path

# As Linux counts ru_maxrss.
MAXRSS_UNIT_BYTES = 1024


@dataclass(frozen=True, slots=True)
class Sample:
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    code: int
    timed_out: bool
    # The last line the command wrote to standard error.
    complaint: str

    @property
    def failed(self) -> bool:
        return self.ended_not(0)

    def ended_not(self, code: int) -> bool:
        """Whether it ended in another way than with this code."""
        return self.code != code or self.timed_out


def run(
    argv: list[str], folder: Path, *, timeout_s: float | None = None, stdout: Path | None = None
) -> Sample:
    """Runs `argv` with no input; its output goes to `stdout` or nowhere, its complaints into `folder`.

    After `timeout_s` the command, and whatever it started in its process group, is killed. OSError if it
    cannot be started.
    """
    errors = folder / "stderr"
    writing = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
        (os.POSIX_SPAWN_OPEN, 1, os.fspath(stdout or os.devnull), writing, 0o600),
        (os.POSIX_SPAWN_OPEN, 2, os.fspath(errors), writing, 0o600),
    ]
    started = time.perf_counter()
    pid = os.posix_spawnp(argv[0], argv, os.environ, file_actions=actions, setpgroup=0)
    timed_out = True  # also when we are interrupted while we wait
    try:
        # Readable when the process has ended: a wait with a time limit, without polling.
        ended = os.pidfd_open(pid)
        try:
            timed_out = not select.select([ended], [], [], timeout_s)[0]
        finally:
            os.close(ended)
    finally:
        seconds = time.perf_counter() - started
        if timed_out:
            os.killpg(pid, signal.SIGKILL)
        _, status, usage = os.wait4(pid, 0)
    return Sample(
        seconds=seconds,
        cpu_seconds=usage.ru_utime + usage.ru_stime,
        peak_bytes=usage.ru_maxrss * MAXRSS_UNIT_BYTES,
        code=os.waitstatus_to_exitcode(status),
        timed_out=timed_out,
        complaint=last_line(errors),
    )


def own_peak_bytes() -> int:
    """The peak of the harness: no child is ever recorded below it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT_BYTES


def last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").strip().splitlines()
    return lines[-1].strip() if lines else ""


def warm(path: Path) -> None:
    """Reads every data range of a file, so that the page cache holds it; pages do leave it by themselves."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        end = path.stat().st_size
        position = 0
        while position < end:
            try:
                position = os.lseek(file.fileno(), position, os.SEEK_DATA)
            except OSError:  # ENXIO: only a hole is left
                return
            hole = os.lseek(file.fileno(), position, os.SEEK_HOLE)
            os.lseek(file.fileno(), position, os.SEEK_SET)
            while position < hole:
                count = file.readinto(buffer)
                if not count:
                    return
                position += count
