"""Do two disks hold the same?

Both maps are walked together. Strides that both know to be zero, or have at the same place of
the same file (two overlays of one base), need no reading. The others are read and compared by
a few threads, each with two buffers it uses again and again. They are handed out in order, so
when one differs every earlier one is looked at already or in work, and the difference
reported is the first.
"""

from __future__ import annotations

from enban.block.runtime import drive
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
from enban.units import SECTOR, align_down

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from enban.block.disk import Disk
    from enban.jobs.map import Run
    from enban.jobs.progress import Progress

PIECE = 512 << 10  # small enough for buffers to stay in the cache of a core
WORKERS = 2

# How a range is to be compared.
SAME = 0  # known to be equal
READ_BOTH = 1
FIRST_ZERO = 2  # the first disk reads zeros there, the second is to be read
SECOND_ZERO = 3

# Why two disks differ.
SIZE, STATUS, CONTENT = "size", "status", "content"

_STATUS = HAS_DATA | READS_ZERO | PRESENT | HAS_OFFSET
_ZEROES = bytearray(PIECE)


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
    one: Disk, other: Disk, *, strict: bool = False, progress: Progress | None = None, workers: int = WORKERS
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


def _how(left: Run, right: Run) -> int:
    zero_left, zero_right = left[3] & READS_ZERO, right[3] & READS_ZERO
    if zero_left and zero_right:
        return SAME
    if zero_left:
        return FIRST_ZERO
    if zero_right:
        return SECOND_ZERO
    return SAME if same_place(left, right) else READ_BOTH


def _pieces(one: Disk, other: Disk, end: int) -> Iterator[tuple[int, int, int]]:
    """What is to be read, in order: (start, length, how). Pieces are whole strides, as long as they
    differ in nothing but how their parts are to be compared: long reads beat short exact ones."""
    stride, how = 0, SAME
    for place, n, left, right in pairs(padded(one.node, 0, end), padded(other.node, 0, end)):
        kind = _how(left, right)
        if kind == SAME:
            continue
        if place >= stride + PIECE:
            if how != SAME:
                yield stride, PIECE, how
            stride, how = align_down(place, PIECE), SAME
        how = kind if how in (SAME, kind) else READ_BOTH
        while place + n > stride + PIECE:
            yield stride, PIECE, how
            stride, how = stride + PIECE, kind
    if how != SAME:
        yield stride, min(PIECE, end - stride), how


class _Work:
    """What the threads of one comparison share."""

    def __init__(self, one: Disk, other: Disk, end: int, progress: Progress | None) -> None:
        from threading import Lock

        self.one = one
        self.other = other
        self.end = end
        self.progress = progress
        self.guard = Lock()
        self.pieces = _pieces(one, other, end)
        self.first = -1  # the lowest offset known to differ
        self.error: BaseException | None = None

    def next(self) -> tuple[int, int, int] | None:
        with self.guard:
            if self.first >= 0 or self.error is not None:
                return None
            return next(self.pieces, None)

    def run(self) -> None:
        left, right = bytearray(PIECE), bytearray(PIECE)
        try:
            while (piece := self.next()) is not None:
                start, length, how = piece
                if length < PIECE:  # the last one; a slice of a buffer would be compared item by item
                    place = self._differs(start, bytearray(length), bytearray(length), bytearray(length), how)
                else:
                    place = self._differs(start, left, right, _ZEROES, how)
                if place >= 0:
                    with self.guard:
                        self.first = place if self.first < 0 else min(self.first, place)
                if self.progress is not None:
                    self.progress.update(start + length, self.end)
        except BaseException as error:
            with self.guard:
                self.error = self.error or error

    def _differs(self, start: int, left: bytearray, right: bytearray, zeroes: bytearray, how: int) -> int:
        if how == FIRST_ZERO:
            left = zeroes
        else:
            _read(self.one, left, start)
        if how == SECOND_ZERO:
            right = zeroes
        else:
            _read(self.other, right, start)
        if left == right:
            return -1
        for sector in range(0, len(left), SECTOR):
            if left[sector : sector + SECTOR] != right[sector : sector + SECTOR]:
                return start + sector
        raise AssertionError("buffers differ and do not")


def _read(disk: Disk, buffer: bytearray, start: int) -> None:
    """Fill a buffer; what lies behind the end of the disk (inside its last sector) is zeros."""
    inside = min(len(buffer), disk.size - start)
    if inside == len(buffer):
        drive(disk.door.read_into(buffer, start))
        return
    with memoryview(buffer) as view:
        drive(disk.door.read_into(view[:inside], start))
        view[inside:] = bytes(len(buffer) - inside)


def _run(one: Disk, other: Disk, end: int, progress: Progress | None, workers: int) -> int:
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
        progress.update(end, end)
    return work.first
