"""Packing a piece of a convert: what becomes of each of its clusters, and which can be stored together.

Rule kept: a cluster is packed whole, with what shows through from below, or not at all; packing that
saves nothing leaves it plain.
"""

from __future__ import annotations

from .sources import SKIP, ZEROES
from .zeroes import is_zero

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .sources import Sources

    Deflate = Callable[[memoryview], bytes]
    Unit = tuple[int, bytes | None]  # the offset in the piece, and the packed cluster or one of these:

PLAIN = b""  # packing saves nothing
ZEROS = None  # zeros to be written


class Packer:
    """reads_zero: whether what is not written to the target reads as zeros."""

    def __init__(self, sources: Sources, deflate: Deflate, cluster: int, *, reads_zero: bool) -> None:
        self._sources = sources
        self._deflate = deflate
        self._cluster = cluster
        self._reads_zero = reads_zero

    def units(self, view: memoryview, start: int) -> list[Unit]:
        """Pack what was read from `start` of the sources; clusters left to what is below are left out."""
        deflate, cluster = self._deflate, self._cluster
        found: list[Unit] = []
        for first in range(0, len(view), cluster):
            data = view[first : first + cluster]
            if not self._reads_zero:
                skipped = self._skipped(start + first, len(data))
                if skipped == len(data):
                    continue
                if skipped:  # a cluster is packed whole: with what shows through from below
                    self._read_through(data, start + first)
            if is_zero(data):
                if not self._reads_zero:
                    found.append((first, ZEROS))
                continue
            if len(data) < cluster:  # the last cluster of the disk
                data = memoryview(bytes(data) + bytes(cluster - len(data)))
            small = deflate(data)
            found.append((first, small if len(small) < cluster else PLAIN))
        return found

    def _read_through(self, view: memoryview, start: int) -> None:
        done = 0
        while done < len(view):
            n, kind = self._sources.extent(start + done, len(view) - done)
            if kind != ZEROES:
                self._sources.read(view[done : done + n], start + done)
            done += n

    def _skipped(self, start: int, length: int) -> int:
        """How many bytes of a range are left to what is below the target."""
        found, end = 0, start + length
        while start < end:
            n, kind = self._sources.extent(start, end - start)
            found += n if kind == SKIP else 0
            start += n
        return found


def runs(units: list[Unit], cluster: int) -> list[tuple[int, list[bytes | None]]]:
    """Neighbours of one kind, packed, plain or zeros, together: (offset of the first, what they are)."""
    found: list[tuple[int, list[bytes | None]]] = []
    for first, unit in units:
        if found:
            start, run = found[-1]
            alike = bool(run[0]) == bool(unit) and (run[0] is ZEROS) == (unit is ZEROS)
            if alike and start + len(run) * cluster == first:
                run.append(unit)
                continue
        found.append((first, [unit]))
    return found
