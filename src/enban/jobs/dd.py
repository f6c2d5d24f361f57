"""A part of a disk as a new image, with the arithmetic of dd(1).

`skip` blocks are left out at the start, then at most `count` are copied. (qemu-img counts the
skipped blocks too, so `skip=1 count=1` copies nothing there; here it copies the second block.)
"""

from __future__ import annotations

from enban.block.gate import TRUSTED
from enban.errors import UsageError
from enban.jobs.copying import PIECE, copy_piece, pieces
from enban.jobs.create import prepare_target
from enban.jobs.map import READS_ZERO, disk_size, walk
from enban.units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.block.disk import Disk
    from enban.block.gate import Gate
    from enban.jobs.progress import Report

LARGEST_BLOCK = (1 << 31) - 1


class DdResult:
    """length: bytes copied, zeros among them. beyond: `skip` reached past the end of the source."""

    __slots__ = ("beyond", "length")

    def __init__(self, length: int, *, beyond: bool) -> None:
        self.length = length
        self.beyond = beyond


def dd(
    source: Disk,
    target: str,
    format: str = "raw",
    *,
    block_size: int = SECTOR,
    count: int | None = None,
    skip: int = 0,
    gate: Gate = TRUSTED,
    progress: Report | None = None,
) -> DdResult:
    """Copy `count` blocks (None: all) from block `skip` on to a new image. Zeros take no space there.

    Raises UsageError, HostError (LockedError, NoSpaceError), ImageError.
    """
    if not 0 < block_size <= LARGEST_BLOCK:
        raise UsageError(f"block size {block_size} is not possible", hint=f"use 1 to {LARGEST_BLOCK}")
    size = disk_size(source.node)
    start = min(skip * block_size, size)
    end = size if count is None else min(size, start + count * block_size)
    with prepare_target(target, format, {}, size=end - start, gate=gate) as made:
        sparse = not (made.in_place and format == "raw")
        with memoryview(bytearray(PIECE)) as buffer:
            for place, n, _, flags, _, _ in walk(source.node, start, end):
                if not flags & READS_ZERO:
                    for piece, length in pieces(place, n):
                        copy_piece(source, piece, made.disk, piece - start, buffer[:length], sparse=sparse)
                        if progress is not None:
                            progress(piece + length - start, end - start)
                elif not sparse:
                    made.disk.write_zeroes(place - start, n)
        made.commit()
    if progress is not None:
        progress(end - start, end - start)
    return DdResult(end - start, beyond=skip * block_size > size)
