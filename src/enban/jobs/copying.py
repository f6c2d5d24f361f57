"""Copying guest ranges between open disks: the common part of dd, rebase and commit.

(`convert` has its own road, with several threads and compression.)
"""

from __future__ import annotations

from enban.block.runtime import drive
from enban.jobs.advice import Advice
from enban.jobs.zeroes import find_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from enban.block.disk import Disk

PIECE = 2 << 20
GRAIN = 4096  # zeros are left out, and differences copied, in units of this


def pieces(start: int, length: int) -> Iterator[tuple[int, int]]:
    """A range in parts that do not cross a multiple of PIECE: (offset, length)."""
    end = start + length
    while start < end:
        n = min(end - start, PIECE - start % PIECE)
        yield start, n
        start += n


class Writer:
    """Writes one after the other to a disk, and tells its host what helps."""

    def __init__(self, disk: Disk) -> None:
        self._door = disk.door
        self._advice = Advice()

    def write(self, data: memoryview, offset: int) -> None:
        """Write at most PIECE bytes."""
        door = self._door
        plan = drive(door.plan_write(data, offset))
        try:
            for part in plan[0].pieces:
                self._advice.will_write(part.storage, part.host, part.length)
        finally:
            drive(door.run_plan(plan))
        for part in plan[0].pieces:
            self._advice.has_written(part.storage, part.host, part.length)


def copy_piece(
    source: Disk, place: int, target: Disk, offset: int, part: memoryview, *, sparse: bool
) -> None:
    """Copy as many guest bytes as `part` is long, through it.

    sparse: the target reads zeros there, so zeros need no writing.
    """
    source.readinto(part, place)
    if not sparse:
        target.pwrite(part, offset)
        return
    for first, last in find_data(part, GRAIN):
        target.pwrite(part[first:last], offset + first)
