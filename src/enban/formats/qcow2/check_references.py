"""Counting references: what the header, the tables and the bitmaps of an image say is in use.

A window of host clusters is counted at a time. Along the way, in the first window, every entry is looked
at for sense. Tables in order are counted as a whole, those in disorder by numpy where `Walk.bulk` allows,
all others entry by entry, with the same results. A count that turns out not to have been exact is made
again in a more exact way.
"""

from __future__ import annotations

from ...wire.qcow2_entries import COPIED, OFFSET_MASK
from ..common.tables import from_big_endian
from .check_counts import Counts
from .check_tables import Tally, scan_table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import Cluster, HostOffset
    from .check_walk import Walk


class References:
    """tally: figures of the active image, complete after the first window.

    mapped: whether references to the refcount table and blocks count. extra: clusters that count as
        referenced once more.
    """

    def __init__(self, walk: Walk) -> None:
        self.walk = walk
        self.tally = Tally()
        self.mapped = True
        self.extra: tuple[Cluster, Cluster] = (0, 0)
        self._exactness = 0  # 0 quick, 1 exact, 2 plain

    async def count(self, lo: Cluster, hi: Cluster, *, first: bool) -> Counts:
        """References to the clusters [lo, hi). first: also look at the sense of every entry."""
        report = first
        self._exactness = 0
        while True:
            counts = self._new_counts(lo, hi)
            self._count_metadata(counts)
            counts = await self._count_tables(counts, report)
            await self._count_bitmaps(counts, report)
            if counts.finish():
                return counts
            report = False  # that was complete, only the counting was not exact
            self._exactness += 1

    def _new_counts(self, lo: Cluster, hi: Cluster) -> Counts:
        counts = Counts(lo, hi)
        if self.walk.numpy is not None and self._exactness < 2:
            return self._in_bulk(counts)
        return counts

    def _in_bulk(self, start: Counts) -> Counts:
        assert self.walk.numpy is not None
        counts: Counts = self.walk.numpy.NumpyCounts(start, exact=self._exactness == 1)
        return counts

    def _count_metadata(self, counts: Counts) -> None:
        layout, image = self.walk.layout, self.walk.image
        counts.add(*self.extra)
        for first, end, what in layout.uses:
            if self.mapped or what != "refcount table":
                counts.add(first, end)
        if self.mapped:
            for cluster, times in layout.block_clusters.items():
                counts.add(cluster, cluster + 1, times)
        for offset in layout.tables:
            counts.add(*image.span(offset, image.cluster), layout.weight(offset))

    async def _count_bitmaps(self, counts: Counts, report: bool) -> None:
        for start, end, weight in self.walk.layout.bitmap_tables:
            async for place, words in self.walk.image.words(start, end, holes=False):
                for index, entry in enumerate(words):
                    if entry:
                        cluster = self.walk.layout.bitmap_cluster(place + index * 8, entry, weight, report)
                        if cluster >= 0:
                            counts.add(cluster, cluster + 1, weight)

    async def _count_tables(self, counts: Counts, report: bool) -> Counts:
        layout, image = self.walk.layout, self.walk.image
        tally = self.tally if report else None
        async for buffer, offsets in self.walk.tables():
            rows = self._take_regular(buffer, offsets, counts, tally)
            self.walk.disorder += len(rows) << image.bits
            if rows and self.walk.bulk() and self._exactness < 2:
                if not isinstance(counts, self._numpy_type()):
                    counts = self._in_bulk(counts)
                rows = self._scan_in_bulk(buffer, offsets, rows, counts, tally)
            for row in rows:
                offset = offsets[row]
                words = from_big_endian(buffer[row << image.bits : row + 1 << image.bits])
                active, weight = layout.active(offset), layout.weight(offset)
                scan_table(
                    image,
                    words,
                    offset,
                    active,
                    weight,
                    counts,
                    tally,
                    self.walk.findings if report else None,
                )
            self.walk.meter.step(len(offsets) << image.bits)
        return counts

    def _take_regular(
        self, buffer: bytearray, offsets: list[HostOffset], counts: Counts, tally: Tally | None
    ) -> list[int]:
        """Deal with tables that are empty or map adjacent clusters in order; the rows of the others."""
        layout, bits, entries = self.walk.layout, self.walk.image.bits, self.walk.image.header.l2_entries
        rows = []
        for row, offset in enumerate(offsets):
            entry = self.walk.regular(buffer, row)
            if entry < 0:
                rows.append(row)
            elif entry:
                if tally is not None:
                    active = layout.active(offset)
                    tally.allocated += entries * active
                    if not entry & COPIED:
                        tally.not_copied += entries * active
                if not self.walk.image.external:
                    start = (entry & OFFSET_MASK) >> bits
                    counts.add(start, start + entries, layout.weight(offset))
        return rows

    def _numpy_type(self) -> type[Counts]:
        assert self.walk.numpy is not None
        found: type[Counts] = self.walk.numpy.NumpyCounts
        return found

    def _scan_in_bulk(
        self,
        buffer: bytearray,
        offsets: list[HostOffset],
        rows: list[int],
        counts: Counts,
        tally: Tally | None,
    ) -> list[int]:
        """Count what these rows refer to; the rows that must be looked at one by one."""
        assert self.walk.numpy is not None
        layout = self.walk.layout
        matrix = self.walk.matrix(buffer, offsets, rows)
        active = [layout.active(offsets[row]) for row in rows]
        weights = [layout.weight(offsets[row]) for row in rows]
        left = self.walk.numpy.scan_rows(self.walk.image, matrix, active, weights, counts, tally)
        return [rows[index] for index in left]
