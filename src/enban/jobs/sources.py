"""What a convert reads: one or more disks as one, and which parts of them need no reading.

Rule kept: `extent` names as READ whatever may hold data; what it calls ZEROES or SKIP is never read.
"""

from __future__ import annotations

from ..block.runtime import drive
from ..errors import InternalError
from ..extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from ..units import align_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.disk import Disk
    from ..block.node import Node
    from ..extent import Extent

# What is to be done with a range of the source.
READ = 1  # it may hold data
ZEROES = 2  # it reads as zeros
SKIP = 3  # the target's backing file has it

# How far an extent is followed at once; what is known of it then answers the questions after the first.
_AHEAD = 64 << 20


class Sources:
    """One or more disks read as if they stood one after the other. They do not change meanwhile."""

    def __init__(self, disks: list[Disk], *, top_only: bool, dense: bool = False) -> None:
        self.disks = disks
        self.top_only = top_only
        self.dense = dense  # zeros are copied like any other data
        self.starts: list[int] = []
        self.holes: dict[Node, bool] = {}
        self._known = (0, 0, READ)  # the newest answer: start, end, kind
        self.size = 0
        for disk in disks:
            self.size = align_up(self.size, 512)  # each begins at a sector, as in qemu-img
            self.starts.append(self.size)
            self.size += disk.size

    def find(self, offset: int) -> tuple[Disk, int]:
        for disk, start in zip(reversed(self.disks), reversed(self.starts), strict=True):
            if offset >= start:
                return disk, start
        raise InternalError("offset before the first source", hint="please report this")

    def extent(self, offset: int, length: int) -> tuple[int, int]:
        """(bytes from `offset` that are of one kind, READ, ZEROES or SKIP)."""
        first, last, kind = self._known
        # Of data it is enough to know some; what needs no reading is told as far as it was asked for.
        if not first <= offset < last or (kind != READ and offset + length > last):
            found, kind = self._find_extent(offset, length)
            last = offset + found
            self._known = offset, last, kind
        return min(length, last - offset), kind

    def _find_extent(self, offset: int, length: int) -> tuple[int, int]:
        """As `extent`, but possibly longer."""
        disk, start = self.find(offset)
        inside = offset - start
        if inside >= disk.size:  # rounding behind a source
            return min([length, *(later - offset for later in self.starts if later > offset)]), ZEROES
        extent = self.where(disk, inside, min(max(length, _AHEAD), disk.size - inside))
        if self.top_only and extent.depth:
            return extent.length, SKIP
        if self.dense:
            return extent.length, READ
        if extent.kind in (ZERO, UNALLOCATED):
            return extent.length, ZEROES
        if extent.kind == DATA and extent.storage is not None and self._holes(extent.node):
            hole, n = drive(extent.storage.status(extent.host, extent.length))
            return n, ZEROES if hole else READ
        if extent.kind == COMPRESSED and not extent.depth:  # its neighbours too: they are unpacked together
            runs = extent.node.runs(inside, min(length, disk.size - inside))
            if runs:
                return runs[0][1], READ
        return extent.length, READ

    def _holes(self, node: Node) -> bool:
        """Whether it pays to ask the storage of a node for holes."""
        answer = self.holes.get(node)
        if answer is None:
            answer = self.holes[node] = drive(node.holes())
        return answer

    def where(self, disk: Disk, offset: int, length: int) -> Extent:
        return drive(disk.door.extent(offset, length))

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill a buffer with what the sources hold; not from the rounding between them."""
        while buffer:
            disk, start = self.find(offset)
            n = min(len(buffer), disk.size - (offset - start))
            drive(disk.door.read_into(buffer[:n], offset - start))
            buffer = buffer[n:]
            offset += n
