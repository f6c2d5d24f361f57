"""Walking through an image's tables for a check or a repair: each is read once a window, many at a time.

`Walk` says which windows of host clusters there are and gives L2 tables and refcount blocks in the order
of their places; it judges nothing. The rule: what an image's numbers claim is never allocated, and no
buffer grows with the image.

Work is saved where it can be: a table that maps adjacent clusters in order is recognised by one
comparison of bytes (`regular`); tables in disorder are left to numpy, if it is installed and they are many
(`bulk`).
"""

from __future__ import annotations

from ...errors import UnsupportedFeatureError
from ...units import align_up
from ...wire.qcow2_entries import COMPRESSED, L2_RESERVED, OFFSET_MASK
from ..common.findings import Findings
from .check_layout import CHUNK, Image, Layout
from .check_tables import RunTemplate

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from types import ModuleType

    from ...units import Cluster, HostOffset
    from .check_numpy import Numbers
    from .node import Qcow2Node

    Report = Callable[[int, int], None]

WINDOW = 1 << 25  # clusters counted at a time
MOST_CLUSTERS = 1 << 34  # of a file; QEMU gives up at 2^31
_NUMPY_FROM = 1 << 20  # bytes of L2 tables in disorder that are worth importing numpy for
_TEMPLATE_FROM = 512  # entries of an L2 table that are worth comparing as a whole


class Meter:
    """Tells a callback how far the work is. total: bytes of tables to go through; a stage that
    is not needed counts as gone through."""

    def __init__(self, report: Report | None, stages: int) -> None:
        self._report = report
        self._stages = stages
        self._stage = 0
        self._share = 1
        self._unit = 0
        self._done = 0
        self._shown = 0

    def begin(self, stage: int, share: int) -> None:
        """Enter a stage (0, 1, ...) of `share` bytes; the first call sets what every stage counts for."""
        self._unit = self._unit or max(1, share)
        self._stage = stage
        self._share = max(1, share)
        self._done = 0
        self.step(0)

    def step(self, length: int) -> None:
        self._done = min(self._done + length, self._share)
        if self._report is not None:
            whole = self._stage * self._unit + self._done * self._unit // self._share
            self._shown = min(max(self._shown, whole), self._stages * self._unit)
            self._report(self._shown, self._stages * self._unit)

    def finish(self) -> None:
        self.begin(self._stages, 1)


class Walk:
    """One image's tables, and how far they were gone through.

    clashing: clusters that two tables claim. disorder: bytes of tables that were not simply in order.
    window, numpy: as of `Checker`.
    """

    def __init__(self, node: Qcow2Node, meter: Meter, *, window: int, numpy: bool | None) -> None:
        self.image = Image(node)
        if self.image.clusters > MOST_CLUSTERS:
            raise UnsupportedFeatureError(
                f"a file of {self.image.clusters} clusters is too large to check",
                path=node.name,
            )
        self.findings = Findings()
        self.layout = Layout(self.image, self.findings)
        self.meter = meter
        per_block = self.image.per_block
        self.window = -(-window // per_block) * per_block
        self.clashing: set[Cluster] = set()
        self.disorder = 0
        self.numpy: ModuleType | None = None  # our numbers in bulk, once they are worth it
        self._want_numpy = numpy
        self._template: RunTemplate | None = None
        self._zeroes = bytes(self.image.cluster)

    def windows(self) -> list[tuple[Cluster, Cluster]]:
        """Ranges of clusters to look at one after the other: the file's, and one window more of
        what the refcount blocks say of clusters behind its end."""
        per_block, size, blocks = self.image.per_block, self.window, self.layout.blocks
        end = align_up(self.image.clusters + 1, per_block)
        covered = next((index + 1 for index in range(len(blocks) - 1, -1, -1) if blocks[index]), 0)
        inside, end = end, max(end, min(covered * per_block, end + WINDOW))
        return [
            (lo, min(lo + size, end))
            for lo in range(0, end, size)
            if lo < inside or any(blocks[lo // per_block : (lo + size) // per_block])
        ]

    def reaches(self, windows: list[tuple[Cluster, Cluster]]) -> list[Cluster]:
        """For each window where the next one begins: no cluster between is counted at all."""
        return [lo for lo, _ in windows[1:]] + [1 << 64]

    def begin(self, stage: int, windows: int) -> None:
        """A stage that goes through all L2 tables for each window, and through the refcount blocks."""
        tables = len(self.layout.tables) << self.image.bits
        blocks = len(self.layout.block_clusters) << self.image.bits
        self.meter.begin(stage, tables * windows + blocks)

    # -- L2 tables -------------------------------------------------------------------------

    async def tables(self, *, active_only: bool = False) -> AsyncIterator[tuple[bytearray, list[HostOffset]]]:
        """All L2 tables in the order of their places, some at a time: a buffer and the offsets of
        the tables that stand in it one after the other. The buffer is used again for the next ones."""
        image, layout = self.image, self.layout
        size = image.cluster
        most = max(1, CHUNK // size)
        buffer = bytearray(most * size)
        view = memoryview(buffer)
        wanted = [o for o in layout.tables if layout.active(o)] if active_only else layout.tables
        if len(wanted) * size > image.file.allocated():
            wanted = [offset for offset in wanted if not await image.in_hole(offset, size)]
        for start in range(0, len(wanted), most):
            offsets = wanted[start : start + most]
            row = 0
            while row < len(offsets):
                end = row + 1
                while end < len(offsets) and offsets[end] == offsets[end - 1] + size:
                    end += 1
                await image.file.read_into(view[row * size : end * size], offsets[row])
                row = end
            yield buffer, offsets

    def regular(self, buffer: bytearray, row: int) -> int:
        """The first entry of a table that maps adjacent clusters in order or nothing at all; else -1."""
        image, entries = self.image, self.image.header.l2_entries
        if image.extended or entries < _TEMPLATE_FROM or self._want_numpy is not None:
            return -1
        position = row << image.bits
        entry = int.from_bytes(buffer[position : position + 8], "big")
        if not entry:
            return 0 if buffer.startswith(self._zeroes, position) else -1
        start, last = entry & OFFSET_MASK, entries - 1 << image.bits
        if (entry | entry + last) & (COMPRESSED | L2_RESERVED | image.mask) or not start:
            return -1
        if start + last >= min(OFFSET_MASK, image.file_size):
            return -1
        if self._template is None:
            self._template = RunTemplate(image.bits)
        return entry if self._template.matches(buffer, position, entries) else -1

    def may_write(self, table: HostOffset) -> bool:
        """Whether an L2 table is all there and has its cluster to itself, as far as tables go."""
        image = self.image
        whole = not table & image.mask and table + image.cluster <= image.file_size
        return whole and table >> image.bits not in self.clashing

    def bulk(self) -> bool:
        """Whether `numpy` is there and there is work enough for it."""
        if self.numpy is not None:
            return True
        if self._want_numpy is False or (self._want_numpy is None and self.disorder < _NUMPY_FROM):
            return False
        try:
            from . import check_numpy
        except ImportError:
            if self._want_numpy:
                raise
            self._want_numpy = None
            self.disorder = -1 << 62  # not to be asked again
            return False
        self.numpy = check_numpy
        return True

    def matrix(self, buffer: bytearray, offsets: list[HostOffset], rows: list[int]) -> Numbers:
        """The rows of a buffer of tables as numbers."""
        assert self.numpy is not None
        size = self.image.cluster
        with memoryview(buffer) as view:
            matrix: Numbers = self.numpy.native(view[: len(offsets) * size], size // 8)
        return matrix if len(rows) == len(offsets) else matrix[rows]

    # -- refcount blocks -------------------------------------------------------------------

    async def blocks(self, lo: Cluster, hi: Cluster) -> AsyncIterator[tuple[int, memoryview | None]]:
        """Refcount blocks of the clusters [lo, hi) by index; None where there is none. Those of
        `unreadable` are left out."""
        image, layout = self.image, self.layout
        size = image.cluster
        most = max(1, CHUNK // size)
        view = memoryview(bytearray(most * size))
        nothing = memoryview(bytes(size))  # what lies behind the end of the file
        places = layout.blocks
        index, end = lo // image.per_block, hi // image.per_block
        while index < end:
            if index in layout.unreadable:
                index += 1
                continue
            offset = places[index] if index < len(places) else 0
            if not offset or offset >= image.file_size:
                yield index, nothing if offset else None
                index += 1
                continue
            count = 1
            while (
                count < most
                and index + count < min(end, len(places))
                and places[index + count] == offset + count * size
                and index + count not in layout.unreadable
            ):
                count += 1
            await image.file.read_into(view[: count * size], offset)
            self.meter.step(count * size)
            for row in range(count):
                yield index + row, view[row * size : row * size + size]
            index += count
