"""A real disk that runs full: a small file system where that is allowed, a resource limit otherwise.

An image on it is written to until there is no room, several times over; each time room is made
again, and everything that was acknowledged must still be there.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

import enban
from enban.errors import EnbanError

from .images import IMAGES, OTHERS, Image
from .oracle import CORRUPT, ENGINE, FOREIGN, SECTOR, Oracle, Violation
from .workload import Operation, fits, operations, run_until_error, see

KINDS = (*IMAGES, *OTHERS)
SIZE = 4 << 20
ROUNDS = 3


class Place:
    """A directory with little room. kind: "ext4", "tmpfs" or "limit"."""

    def __init__(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="enban-full-"))
        self.directory = self.top / "mount"
        self.directory.mkdir()
        self.kind = "limit"
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            if self._ext4():
                self.kind = "ext4"
            elif self._run("mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(self.directory)):
                self.kind = "tmpfs"

    def _ext4(self) -> bool:
        medium = self.top / "medium"
        with open(medium, "wb") as file:
            file.truncate(SIZE)
        if not self._run("mkfs.ext4", "-q", "-F", "-O", "^has_journal", "-m", "0", str(medium)):
            return False
        return self._run("mount", "-o", "loop", str(medium), str(self.directory))

    def _run(self, *command: str) -> bool:
        if shutil.which(command[0]) is None:
            return False
        return subprocess.run(command, capture_output=True, check=False, timeout=60).returncode == 0

    def tighten(self, least: int) -> None:
        """Leave room for about `least` bytes."""
        if self.kind == "limit":
            self._limit(least)
            return
        stat = os.statvfs(self.directory)
        rest = stat.f_bavail * stat.f_frsize - least
        try:
            with open(self.directory / "ballast", "wb", buffering=0) as file:
                while rest > 0:
                    rest -= file.write(bytes(min(rest, 1 << 16)))
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            # The file system needs some of it for itself: full is full.

    def loosen(self) -> None:
        """Room again."""
        if self.kind == "limit":
            self._limit(None)
        else:
            (self.directory / "ballast").unlink(missing_ok=True)

    def _limit(self, size: int | None) -> None:
        """The largest file this process may write: no full disk, but errors in the same places."""
        import resource
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        largest = max((path.stat().st_size for path in self.directory.iterdir()), default=0)
        largest = -(-largest // SECTOR) * SECTOR  # a disk is full at the end of a sector, never inside
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard if size is None else largest + size, hard))

    def close(self) -> None:
        self.loosen()
        if self.kind != "limit" and not self._run("umount", str(self.directory)):
            self._run("umount", "-l", str(self.directory))  # a disk that failed may still be open
        shutil.rmtree(self.top, ignore_errors=True)


def fill(image: Image, seed: int, place: Place) -> tuple[int, int]:
    """Write to an image until there is no room, make room, go on. Returns (operations refused, all).
    Raises Violation."""
    path = place.directory / "image"
    with open(path, "wb") as file:
        if image.format == "raw":
            file.truncate(image.size)  # with holes, or it would have all the room it needs
        else:
            file.write(image.empty())
    below = place.directory / "below"
    if image.backing:
        below.write_bytes(image.backing)
    oracle, random = Oracle(image.shown()), Random(seed)
    what = f"{image} on a full {place.kind}, seed {seed}"
    refused = done = 0
    try:
        disk = enban.open(path, writable=True, format=image.format)
        try:
            for round_number in range(ROUNDS):
                place.tighten(random.randrange(0, 48 << 10, 512))
                try:
                    for operation in operations(
                        image, 100 * seed + round_number, 30, snapshots=False, resizes=False
                    ):
                        done += 1
                        if not fits(operation, oracle):
                            continue
                        error = run_until_error(disk, oracle, operation, may_fail=True)
                        if error is not None:
                            refused += 1
                            oracle.observe(operation, see(disk), what=f"{what}: {operation} failed")
                finally:
                    place.loosen()
                for operation in (Operation("flush"), Operation("read")):
                    run_until_error(disk, oracle, operation, may_fail=False)
        except BaseException:
            with suppress(EnbanError):  # what led here is the one to report
                disk.close()
            raise
        disk.close()
    except EnbanError as error:
        raise Violation(ENGINE, f"{what}: {error}") from error
    content = path.read_bytes()
    view = image.view(content)
    report = view.check()
    if report.corruptions:
        raise Violation(CORRUPT, f"{what}: {report.corruptions[:4]}", image=content)
    if view.read() != oracle.model:
        raise Violation(FOREIGN, f"{what}: it reads differently", image=content)
    path.unlink()
    return refused, done
