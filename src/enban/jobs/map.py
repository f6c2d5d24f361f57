"""Where every byte of a disk lives, as a list.

`walk` lists a range down the whole backing chain, run by run; `entries` joins runs that
continue each other. Both hold a few thousand runs at a time, whatever the size of the disk.

The flags are those of qemu-img map: an area that the image has allocated is DATA even where
the file below is a hole (then ZERO too); in a raw image a hole is ZERO only.
"""

from __future__ import annotations

from bisect import bisect_right

from enban.block.runtime import drive
from enban.extent import COMPRESSED, DATA, UNALLOCATED, ZERO
from enban.units import SECTOR, align_up

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from enban.block.disk import Disk
    from enban.block.node import Node
    from enban.block.storage import Storage

    # (start, length, depth, flags, host offset or -1, the node that answers)
    Run = tuple[int, int, int, int, int, Node]

# What is known of a run.
HAS_DATA = 1  # allocated, its bytes are somewhere
READS_ZERO = 2
PRESENT = 4  # allocated by some layer: another backing file below would not show through
HAS_OFFSET = 8  # the bytes are plain, at the host offset

_DATA = HAS_DATA | PRESENT | HAS_OFFSET
_FLAGS = {  # by kind, and whether there is a host offset
    (DATA, True): _DATA,
    (DATA, False): HAS_DATA | PRESENT,  # encrypted
    (ZERO, True): READS_ZERO | PRESENT | HAS_OFFSET,
    (ZERO, False): READS_ZERO | PRESENT,
    (COMPRESSED, False): HAS_DATA | PRESENT,
    (UNALLOCATED, True): READS_ZERO | HAS_OFFSET,
    (UNALLOCATED, False): READS_ZERO,
}
_ROOM = 4096


class Holes:
    """Asks a storage where its holes are, and remembers: neighbours are asked about again and again."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._zero: list[bool] = []

    def status(self, offset: int) -> tuple[bool, int]:
        """(whether the byte at `offset` is in a hole, where that part ends)."""
        place = bisect_right(self._starts, offset) - 1
        if place >= 0 and offset < self._ends[place]:
            return self._zero[place], self._ends[place]
        size = self._storage.size()
        if offset >= size:
            return True, 1 << 63
        zero, length = drive(self._storage.status(offset, size - offset))
        end = offset + length
        place += 1
        if place < len(self._starts) and self._starts[place] < end:
            self._starts[place] = offset  # the same part, known from further up
        else:
            if len(self._starts) >= _ROOM:
                self._starts.clear()
                self._ends.clear()
                self._zero.clear()
                place = 0
            self._starts.insert(place, offset)
            self._ends.insert(place, end)
            self._zero.insert(place, zero)
        return zero, end


class _Layer:
    """One node of a chain, and how to look into its storage."""

    __slots__ = ("depth", "holes", "in_hole", "node", "size")

    def __init__(self, node: Node, depth: int) -> None:
        self.node = node
        self.depth = depth
        self.size = disk_size(node)
        # A raw image's own map is that of its file; in others, space over a hole is allocated all the same.
        self.in_hole = READS_ZERO | PRESENT | HAS_OFFSET | (0 if node.format == "raw" else HAS_DATA)
        self.holes = Holes(node.data) if node.cipher is None and drive(node.holes()) else None


def disk_size(node: Node) -> int:
    """The virtual size in whole sectors: what a guest sees of a raw file of any length."""
    return align_up(node.size, SECTOR)


def walk(top: Node, offset: int, end: int) -> Iterator[Run]:
    """The runs of [offset, end) in order, without gaps, each from the layer that answers for it.

    Runs of one place may come in parts. Raises CorruptImageError, HostError.
    """
    layers = [_Layer(top, 0)]
    # Ranges still to be told, the next one last: (layer, offset, end, runs known of it).
    todo: list[tuple[_Layer, int, int, Iterator[tuple[int, int, int, int]] | None]] = [
        (layers[0], offset, end, None)
    ]
    while todo:
        layer, position, stop, known = todo.pop()
        if known is None:
            if position >= stop:
                continue
            known = iter(_load(layer, position, stop))
        node, depth, below = layer.node, layer.depth, layer.node.backing
        holes, in_hole, flags_of = layer.holes, layer.in_hole, _FLAGS
        for start, length, kind, host in known:
            if kind == UNALLOCATED and below is not None and start < disk_size(below):
                if depth + 1 == len(layers):
                    layers.append(_Layer(below, depth + 1))
                inner = min(start + length, layers[depth + 1].size)
                todo.append((layer, start + length, stop, known))
                if inner < start + length:
                    kept = host + inner - start if host >= 0 else -1
                    rest = iter([(inner, start + length - inner, UNALLOCATED, kept)])
                    todo.append((layer, inner, start + length, rest))
                todo.append((layers[depth + 1], start, inner, None))
                break
            position = start + length
            if kind == DATA and holes is not None:
                zero, until = holes.status(host)
                if host + length <= until:
                    yield start, length, depth, in_hole if zero else _DATA, host, node
                else:
                    yield from _look(layer, start, length, host)
            else:
                yield start, length, depth, flags_of[kind, host >= 0], host, node
        else:
            # The runs known may end before the range; a part of one range never goes on alone.
            if position < stop:
                todo.append((layer, position, stop, None))


def _load(layer: _Layer, offset: int, end: int) -> list[tuple[int, int, int, int]]:
    """The runs of one layer from `offset` on, as many as are at hand."""
    node = layer.node
    if offset >= node.size:  # the rest of the last sector of a raw file
        return [(offset, end - offset, ZERO, offset)]
    found = node.runs(offset, min(end, node.size) - offset)
    while found is None:
        drive(node.load(offset))
        found = node.runs(offset, min(end, node.size) - offset)
    if node.cipher is not None:  # encrypted bytes are of no use to who asks where
        return [(start, length, kind, -1) for start, length, kind, _ in found]
    return found


def _look(layer: _Layer, start: int, length: int, host: int) -> Iterator[Run]:
    """A run of plain bytes, divided by the holes of its storage."""
    holes = layer.holes
    assert holes is not None
    end = host + length
    while host < end:
        zero, until = holes.status(host)
        n = min(until, end) - host
        yield start, n, layer.depth, layer.in_hole if zero else _DATA, host, layer.node
        start += n
        host += n


def padded(node: Node, offset: int, end: int) -> Iterator[Run]:
    """`walk` over a range that may reach past the end of the disk: there it reads as zeros."""
    size = disk_size(node)
    if offset < size:
        yield from walk(node, offset, min(size, end))
    if end > size:
        start = max(offset, size)
        yield start, end - start, 0, READS_ZERO, -1, node


def pairs(ones: Iterator[Run], others: Iterator[Run]) -> Iterator[tuple[int, int, Run, Run]]:
    """Two lists of runs of one range side by side: (start, length, run of the first, run of the second)."""
    left, right = next(ones, None), next(others, None)
    position = left[0] if left is not None else 0
    while left is not None and right is not None:
        left_end, right_end = left[0] + left[1], right[0] + right[1]
        stop = min(left_end, right_end)
        yield position, stop - position, left, right
        position = stop
        if left_end == stop:
            left = next(ones, None)
        if right_end == stop:
            right = next(others, None)


def same_place(left: Run, right: Run) -> bool:
    """Whether two runs of one guest range are the same bytes of the same file."""
    return bool(
        left[3] & right[3] & HAS_OFFSET
        and left[4] - left[0] == right[4] - right[0]
        and left[5].data.identity == right[5].data.identity
    )


def entries(disk: Disk, offset: int = 0, length: int | None = None) -> Iterator[Run]:
    """The map of a disk: its runs, those joined that continue each other in every respect.

    offset, length: the part to list, in bytes; cut to the disk.
    """
    size = disk_size(disk.node)
    end = size if length is None else min(size, offset + length)
    if offset >= end:
        return
    runs = walk(disk.node, offset, end)
    start, length, depth, flags, host, node = next(runs)
    for run in runs:
        _, n, next_depth, next_flags, next_host, next_node = run
        if (
            next_flags == flags
            and next_depth == depth
            and (next_host == host + length or not flags & HAS_OFFSET)
            and next_node is node
        ):
            length += n
        else:
            yield start, length, depth, flags, host, node
            start, length, depth, flags, host, node = run
    yield start, length, depth, flags, host, node
