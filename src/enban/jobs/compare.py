"""Do two disks hold the same?

Both maps are walked together. What both know to be zero, or have at the same place of the same
file (two overlays of one base), needs no reading. The rest is handed out in order, in batches
of half a MiB, to a few threads, so when one batch differs every earlier one is looked at
already or in work, and the difference reported is the first.

A thread has two buffers and uses them again and again. A batch of several ranges is packed
into the front of both; whatever was behind it compared equal before and still does, so always
the whole buffers are compared, which Python does at the speed of memory.
"""

from __future__ import annotations

from enban.block.runtime import drive
from enban.errors import InternalError
from enban.jobs.map import (
    HAS_DATA,
    HAS_OFFSET,
    PRESENT,
    READS_ZERO,
    disk_size,
    padded,
    pairs,
    same_place,
    walk,
)
from enban.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from enban.block.disk import Disk
    from enban.jobs.progress import Report

PIECE = 512 << 10  # small enough for buffers to stay in the cache of a core
WORKERS = 2

# Why two disks differ.
SIZE, STATUS, CONTENT = "size", "status", "content"

_STATUS = HAS_DATA | READS_ZERO | PRESENT | HAS_OFFSET


class Comparison:
    """The outcome. equal: the disks hold the same. reason: SIZE, STATUS or CONTENT if they do not.

    offset: for CONTENT the first sector that differs, for STATUS where the allocation does; in bytes.
    sizes_differ: one disk is longer; they are equal all the same if the rest is zeros.
    """

    __slots__ = ("equal", "offset", "reason", "sizes_differ")

    def __init__(self, *, sizes_differ: bool) -> None:
        self.equal = True
        self.reason = ""
        self.offset = -1
        self.sizes_differ = sizes_differ

    def differ(self, reason: str, offset: int = -1) -> Comparison:
        self.equal, self.reason, self.offset = False, reason, offset
        return self


def compare(
    one: Disk, other: Disk, *, strict: bool = False, progress: Report | None = None, workers: int = WORKERS
) -> Comparison:
    """Compare two open disks byte for byte; bytes beyond the end of one count as zeros.

    strict: also their sizes and what is allocated, as qemu-img compare -s.
    Raises HostError, ImageError.
    """
    size_one, size_other = disk_size(one.node), disk_size(other.node)
    result = Comparison(sizes_differ=size_one != size_other)
    if strict:
        if result.sizes_differ:
            return result.differ(SIZE)
        place = _first_status_difference(one, other)
        if place >= 0:
            # Content is compared up to there: a difference in it comes first.
            first = _run(one, other, place, progress, workers)
            return result.differ(STATUS, place) if first < 0 else result.differ(CONTENT, first)
    first = _run(one, other, max(size_one, size_other), progress, workers)
    return result if first < 0 else result.differ(CONTENT, first)


def _first_status_difference(one: Disk, other: Disk) -> int:
    """Where the disks are first allocated differently; -1 if nowhere."""
    end = disk_size(one.node)
    for start, _, left, right in pairs(walk(one.node, 0, end), walk(other.node, 0, end)):
        if left[3] & _STATUS != right[3] & _STATUS:
            return start
    return -1


def _batches(one: Disk, other: Disk, end: int) -> Iterator[list[tuple[int, int]]]:
    """The ranges (start, length) that must be read, in order, as many at a time as PIECE holds."""
    batch: list[tuple[int, int]] = []
    room = PIECE
    for start, length, left, right in pairs(padded(one.node, 0, end), padded(other.node, 0, end)):
        if left[3] & right[3] & READS_ZERO or same_place(left, right):
            continue
        while length:
            n = min(length, room)
            if batch and sum(batch[-1]) == start:
                batch[-1] = (batch[-1][0], batch[-1][1] + n)
            else:
                batch.append((start, n))
            start, length, room = start + n, length - n, room - n
            if not room:
                yield batch
                batch, room = [], PIECE
    if batch:
        yield batch


class _Work:
    """What the threads of one comparison share."""

    def __init__(self, one: Disk, other: Disk, end: int, progress: Report | None) -> None:
        from threading import Lock

        self.one = one
        self.other = other
        self.end = end
        self.progress = progress
        self.guard = Lock()
        self.batches = _batches(one, other, end)
        self.first = -1  # the lowest offset known to differ
        self.error: BaseException | None = None

    def next(self) -> list[tuple[int, int]] | None:
        with self.guard:
            if self.first >= 0 or self.error is not None:
                return None
            return next(self.batches, None)

    def run(self) -> None:
        left, right = bytearray(PIECE), bytearray(PIECE)
        try:
            with memoryview(left) as left_view, memoryview(right) as right_view:
                while (batch := self.next()) is not None:
                    filled = 0
                    for start, length in batch:
                        _read(self.one, left_view[filled : filled + length], start)
                        _read(self.other, right_view[filled : filled + length], start)
                        filled += length
                    if left != right:
                        place = _first_difference(left, right, batch)
                        with self.guard:
                            self.first = place if self.first < 0 else min(self.first, place)
                    if self.progress is not None:
                        self.progress(sum(batch[-1]), self.end)
        except BaseException as error:
            with self.guard:
                self.error = self.error or error


def _first_difference(left: bytearray, right: bytearray, batch: list[tuple[int, int]]) -> int:
    """The guest offset of the first sector that differs."""
    filled = 0
    for start, length in batch:
        for sector in range(0, length, SECTOR):
            part = slice(filled + sector, filled + min(length, sector + SECTOR))
            if left[part] != right[part]:
                return start + sector
        filled += length
    raise InternalError("buffers differ, but no sector of them does", hint="please report this")


def _read(disk: Disk, view: memoryview, start: int) -> None:
    """Fill a buffer; what lies behind the end of the disk (inside its last sector) is zeros."""
    inside = min(len(view), max(0, disk.size - start))
    if inside:
        drive(disk.door.read_into(view[:inside], start))
    if inside < len(view):
        view[inside:] = bytes(len(view) - inside)


def _run(one: Disk, other: Disk, end: int, progress: Report | None, workers: int) -> int:
    """The first offset below `end` whose sector differs; -1 if there is none."""
    work = _Work(one, other, end, progress)
    if workers > 1 and end > 4 * PIECE:
        from threading import Thread

        threads = [Thread(target=work.run, daemon=True) for _ in range(workers)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:  # Ctrl-C: let the threads stop before the disks are closed
            with work.guard:
                work.error = work.error or error
            for thread in threads:
                thread.join()
            raise
    else:
        work.run()
    if work.error is not None:
        raise work.error
    if progress is not None and work.first < 0:
        progress(end, end)
    return work.first
