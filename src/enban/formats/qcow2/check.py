"""Checking an image: every refcount against the references there are, every table entry for sense.

    layout    header, L1 tables, snapshots, refcount table, bitmaps          (check_layout)
    count     L2 tables: what they refer to, and whether their entries may   (check_tables, check_numpy)
    compare   refcount blocks against the counts                             (check_counts)
    copied    the COPIED flags of the active tables against the refcounts

The last three run for one window of host clusters after another, so memory does not grow
with the image: at most 2^25 clusters (2 TiB of a file with 64 KiB clusters) are counted at
a time, which takes up to 160 MiB with every cluster in disorder and next to nothing with
tables in order, and beside that some 100 bytes for each L2 table. What an image's numbers
claim is never allocated, only what its file holds.

Work is saved where it can be: a table that maps adjacent clusters in order is recognised by
one comparison of bytes; tables in disorder are left to numpy, if it is installed and they
are many. Entry by entry all else is looked at, with the same results.

The numbers mean what `qemu-img check` means by them; `findings.BEYOND_QEMU` lists the kinds
that it does not look for.
"""

from __future__ import annotations

from ...errors import UnsupportedFeatureError
from ...units import align_up
from ...wire.qcow2 import COMPRESSED, COPIED, CORRUPT, DIRTY, L1_RESERVED, L2_RESERVED, OFFSET_MASK
from ..common.findings import CORRUPTION, ERROR, LEAK, CheckResult, Findings
from ..common.tables import SECTOR_ENTRIES, from_big_endian, sector_runs, to_big_endian
from .check_counts import Counts, Difference, decode, encode, parts
from .check_layout import CHUNK, Image, Layout, sound
from .check_tables import UNKNOWN, RunTemplate, Tally, scan_table, wrong_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from types import ModuleType

    from ...units import Cluster, HostOffset
    from .check_numpy import Numbers
    from .node import Qcow2Node

    Report = Callable[[int, int], None]

WINDOW = 1 << 25  # clusters counted at a time
MOST_CLUSTERS = 1 << 34  # of a file; QEMU gives up at 2^31
_NUMPY_FROM = 1 << 20  # bytes of L2 tables in disorder that are worth importing numpy for
_TEMPLATE_FROM = 512  # entries of an L2 table that are worth comparing as a whole
_ONE = b"\1"


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


class Checker:
    """One walk through an image's metadata; `repair` uses its parts too.

    window, numpy: for tests, the clusters counted at a time and whether to use numpy (None:
        if it is there and there is work enough).
    """

    def __init__(
        self, node: Qcow2Node, meter: Meter, *, window: int = WINDOW, numpy: bool | None = None
    ) -> None:
        self.node = node
        self.image = Image(node)
        if self.image.clusters > MOST_CLUSTERS:
            raise UnsupportedFeatureError(
                f"a file of {self.image.clusters} clusters is too large to check",
                path=node.name,
            )
        self.findings = Findings()
        self.tally = Tally()
        self.layout = Layout(self.image, self.findings)
        self.meter = meter
        per_block = self.image.per_block
        self.window = -(-window // per_block) * per_block
        self.top: Cluster = -1
        self.clashing: set[Cluster] = set()  # two tables claim them
        self.mapped = True  # whether references to the refcount table and blocks count
        self.extra: tuple[Cluster, Cluster] = (0, 0)  # clusters that count as referenced once more
        self._want_numpy = numpy
        self._numpy: ModuleType | None = None
        self._disorder = 0  # bytes of tables that were not simply in order
        self._template: RunTemplate | None = None
        self._zeroes = bytes(self.image.cluster)
        self._exactness = 0  # 0 quick, 1 exact, 2 plain

    # -- the check -------------------------------------------------------------------------

    async def check(self, first_stage: int = 0) -> None:
        """All of it; results are in `findings`, `tally` and `top`."""
        await self.layout.read()
        windows = self.windows()
        self.begin(first_stage, len(windows))
        finished: list[tuple[Cluster, Cluster, bool]] = []
        for lo, hi in windows:
            counts = await self.count(lo, hi, first=lo == 0)
            perfect = await self._compare(counts)
            finished.append((lo, hi, perfect))
        self.begin(first_stage + 1, len(windows))
        not_copied = self.tally.not_copied or not all(self._l1_copied())
        not_copied = not_copied or self.tally.past_end or "l1-past-end" in self.findings.kinds
        for (lo, hi, perfect), reach in zip(finished, self.reaches(windows), strict=True):
            if not_copied or not perfect:
                await self.copied(lo, reach, await self.ones(lo, hi))

    def begin(self, stage: int, windows: int) -> None:
        """A stage that goes through all L2 tables for each window, and through the refcount blocks."""
        tables = len(self.layout.tables) << self.image.bits
        blocks = len(self.layout.block_clusters) << self.image.bits
        self.meter.begin(stage, tables * windows + blocks)

    def result(self) -> CheckResult:
        image, tally, findings = self.image, self.tally, self.findings
        result = CheckResult(image.name, "qcow2")
        result.image_end_offset = (self.top + 1) << image.bits
        result.total_clusters = -(-image.header.size // image.cluster)
        result.allocated_clusters = tally.allocated
        result.fragmented_clusters = tally.fragmented
        result.compressed_clusters = tally.compressed
        result.check_errors = findings.total(ERROR)
        result.corruptions = findings.total(CORRUPTION)
        result.leaks = findings.total(LEAK)
        result.dirty = bool(image.header.incompatible & DIRTY)
        result.corrupt = bool(image.header.incompatible & CORRUPT)
        if result.dirty:
            findings.add(
                "dirty", 72, "the dirty bit is set: the image was not closed, its refcounts may be behind"
            )
        if result.corrupt:
            findings.add(
                "corrupt", 72, "the corrupt bit is set: the image must be repaired before it is written"
            )
        result.findings, result.kinds = findings.kept, findings.kinds
        return result

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

    # -- counting --------------------------------------------------------------------------

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
        if self._numpy is not None and self._exactness < 2:
            return self._numpy_counts(counts)
        return counts

    def _numpy_counts(self, start: Counts) -> Counts:
        assert self._numpy is not None
        counts: Counts = self._numpy.NumpyCounts(start, exact=self._exactness == 1)
        return counts

    def _count_metadata(self, counts: Counts) -> None:
        layout, image = self.layout, self.image
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
        for start, end, weight in self.layout.bitmap_tables:
            async for place, words in self.image.words(start, end, holes=False):
                for index, entry in enumerate(words):
                    if entry:
                        cluster = self.layout.bitmap_cluster(place + index * 8, entry, weight, report)
                        if cluster >= 0:
                            counts.add(cluster, cluster + 1, weight)

    async def _count_tables(self, counts: Counts, report: bool) -> Counts:
        layout, image = self.layout, self.image
        tally = self.tally if report else None
        async for buffer, offsets in self.tables():
            rows = self._take_regular(buffer, offsets, counts, tally)
            self._disorder += len(rows) << image.bits
            if rows and self._use_numpy() and self._exactness < 2:
                if not isinstance(counts, self._numpy_type()):
                    counts = self._numpy_counts(counts)
                rows = self._scan_in_bulk(buffer, offsets, rows, counts, tally)
            for row in rows:
                offset = offsets[row]
                words = from_big_endian(buffer[row << image.bits : row + 1 << image.bits])
                active, weight = layout.active(offset), layout.weight(offset)
                scan_table(
                    image, words, offset, active, weight, counts, tally, self.findings if report else None
                )
            self.meter.step(len(offsets) << image.bits)
        return counts

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

    def _take_regular(
        self, buffer: bytearray, offsets: list[HostOffset], counts: Counts, tally: Tally | None
    ) -> list[int]:
        """Deal with tables that are empty or map adjacent clusters in order; the rows of the others."""
        layout, bits, entries = self.layout, self.image.bits, self.image.header.l2_entries
        rows = []
        for row, offset in enumerate(offsets):
            entry = self.regular(buffer, row)
            if entry < 0:
                rows.append(row)
            elif entry:
                if tally is not None:
                    active = layout.active(offset)
                    tally.allocated += entries * active
                    if not entry & COPIED:
                        tally.not_copied += entries * active
                if not self.image.external:
                    start = (entry & OFFSET_MASK) >> bits
                    counts.add(start, start + entries, layout.weight(offset))
        return rows

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

    # -- numpy, if it is there and worth its import ----------------------------------------

    def _use_numpy(self) -> bool:
        if self._numpy is not None:
            return True
        if self._want_numpy is False or (self._want_numpy is None and self._disorder < _NUMPY_FROM):
            return False
        try:
            from . import check_numpy
        except ImportError:
            if self._want_numpy:
                raise
            self._want_numpy = None
            self._disorder = -1 << 62  # not to be asked again
            return False
        self._numpy = check_numpy
        return True

    def _numpy_type(self) -> type[Counts]:
        assert self._numpy is not None
        found: type[Counts] = self._numpy.NumpyCounts
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
        assert self._numpy is not None
        layout = self.layout
        matrix = self._matrix(buffer, offsets, rows)
        active = [layout.active(offsets[row]) for row in rows]
        weights = [layout.weight(offsets[row]) for row in rows]
        left = self._numpy.scan_rows(self.image, matrix, active, weights, counts, tally)
        return [rows[index] for index in left]

    def _matrix(self, buffer: bytearray, offsets: list[HostOffset], rows: list[int]) -> Numbers:
        """The rows of a buffer of tables as numbers."""
        assert self._numpy is not None
        size = self.image.cluster
        with memoryview(buffer) as view:
            matrix: Numbers = self._numpy.native(view[: len(offsets) * size], size // 8)
        return matrix if len(rows) == len(offsets) else matrix[rows]

    # -- refcounts -------------------------------------------------------------------------

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

    async def _compare(self, counts: Counts) -> bool:
        """Refcounts of a window against its references. True if each cluster in use is counted
        once and used once, and nothing else is counted."""
        image, layout, findings = self.image, self.layout, self.findings
        perfect = counts.one_each
        end = image.end
        blocks = layout.blocks[counts.lo // image.per_block : counts.hi // image.per_block]
        if counts.top() < 0 and not any(blocks):
            return True  # a stretch of a sparse file that nothing speaks of
        nothing = memoryview(bytes(image.cluster))
        async for index, raw in self.blocks(counts.lo, counts.hi):
            start = index * image.per_block
            if raw is None and not counts.any(start, image.per_block):
                continue
            for first, part in parts(nothing if raw is None else raw, start, image.order):
                found = counts.compare(part, first, image.order, end, findings.room)
                if found is not None:
                    perfect = False
                    self.top = max(self.top, found.top)
                    layout.rebuild = layout.rebuild or (raw is None and found.low > 0)
                    self._report_counts(found, end)
        for index in sorted(layout.unreadable):
            first = index * image.per_block
            number = min(first + image.per_block, end) - first
            if counts.lo <= first < counts.hi and number > 0:
                perfect = False
                text = (
                    f"refcounts of {number} clusters from {first:#x} on are lost with refcount block {index}"
                )
                findings.add("refcount-unreadable", first << image.bits, text, number)
        self.top = max(self.top, counts.top())
        for first, stop, uses in counts.excess(image.most_references):
            over = uses - image.most_references
            text = f"{uses} references to a cluster are more than a refcount can hold"
            places = ((cluster << image.bits, text) for cluster in range(first, stop))
            findings.many("refcount-overflow", over * (stop - first), places, over)
        if not counts.one_each:
            self._overlaps(counts)
        return perfect

    def _report_counts(self, found: Difference, end: Cluster) -> None:
        texts: dict[str, list[tuple[HostOffset, str]]] = {
            "refcount-low": [],
            "refcount-leak": [],
            "leak-past-end": [],
        }
        for cluster, refcount, uses in found.examples:
            kind = (
                "refcount-low" if refcount < uses else "refcount-leak" if cluster < end else "leak-past-end"
            )
            offset = cluster << self.image.bits
            texts[kind].append(
                (offset, f"cluster at {offset:#x} has refcount {refcount} and {uses} references")
            )
        for kind, number in (
            ("refcount-low", found.low),
            ("refcount-leak", found.leaks),
            ("leak-past-end", found.past),
        ):
            self.findings.many(kind, number, texts[kind])

    def _overlaps(self, counts: Counts) -> None:
        """Clusters that hold a table and are in use for something else too."""
        image, layout, findings = self.image, self.layout, self.findings
        seen: set[Cluster] = set()

        def look(cluster: Cluster, own: int, what: str) -> None:
            uses = counts.value(cluster)
            if cluster in seen:
                self.clashing.add(cluster)
            elif uses != own:
                seen.add(cluster)
                text = f"{what} at {cluster << image.bits:#x} shares its cluster with {uses - own} other uses"
                findings.add("overlap", cluster << image.bits, text)

        for first, end, what in layout.uses:
            for cluster in range(max(first, counts.lo), min(end, counts.hi)):
                look(cluster, 1, what)
        for cluster, times in layout.block_clusters.items():
            if counts.lo <= cluster < counts.hi:
                uses = counts.value(cluster)
                others = uses - times
                wrong = sum(min(others + nth, image.most_references) != 1 for nth in range(1, times + 1))
                if wrong:
                    text = f"refcount block at {cluster << image.bits:#x} is used {uses} times"
                    findings.add("block-shared", cluster << image.bits, text, wrong)
                if uses != 1:
                    layout.rebuild = True
                look(cluster, times, "refcount block")
        for offset in layout.tables:
            cluster = offset >> image.bits
            if counts.lo <= cluster < counts.hi and not offset & image.mask:
                look(cluster, layout.weight(offset), "L2 table")

    # -- COPIED flags ----------------------------------------------------------------------

    def _l1_copied(self) -> list[bool]:
        return [bool(entry & COPIED) for entry in self.layout.l1 if entry & OFFSET_MASK]

    async def ones(self, lo: Cluster, hi: Cluster) -> bytearray:
        """For each cluster of a window, whether its refcount is 1: 0, 1 or UNKNOWN."""
        image = self.image
        flags = bytearray(hi - lo)
        order = image.order
        async for index, raw in self.blocks(lo, hi):
            if raw is None:
                continue
            for first, part in parts(raw, index * image.per_block, order):
                content = bytes(part)
                if content == encode([1] * 64, order) * (len(content) // (8 << order)):
                    found = _ONE * ((len(content) << 3) >> order)
                elif any(content):
                    found = singles(decode(content, order))
                else:
                    continue
                flags[first - lo : first - lo + len(found)] = found
        for index in self.layout.unreadable:
            if lo <= index * image.per_block < hi:
                start = index * image.per_block - lo
                flags[start : start + image.per_block] = bytes((UNKNOWN,)) * image.per_block
        return flags

    async def copied(self, lo: Cluster, reach: Cluster, ones: bytearray, *, fix: bool = False) -> int:
        """Look at the COPIED flags of entries that point to clusters in [lo, reach).

        ones: for each cluster from `lo` on whether the flag should be set, or UNKNOWN; behind those it
        should not. fix: set the flags of otherwise sound entries right in place of reporting them.
        Returns how many were wrong.
        """
        image, layout = self.image, self.layout
        size, step, bits = image.cluster, image.header.l2_entry_size, image.bits
        wrong = await self._copied_l1(lo, reach, ones, fix)
        async for buffer, offsets in self.tables(active_only=True):
            for row, places in self._wrong_flags(buffer, offsets, lo, reach, ones):
                offset, sectors = offsets[row], set()
                active = layout.active(offset)
                if fix:
                    if not self.may_write(offset):
                        continue
                    places = [place for place in places if self._sound(buffer, (row << bits) + place * step)]
                wrong += len(places)
                for place in places:
                    position = place * step
                    sectors.add(position // 512)
                    if fix:
                        buffer[(row << bits) + position] ^= COPIED >> 56
                if fix:
                    for start, end in sector_runs(sectors):
                        await image.file.write(
                            buffer[(row << bits) + start : (row << bits) + end], offset + start
                        )
                else:
                    texts = self._flag_texts(buffer, row, offset, places)
                    self.findings.many("copied-l2", len(places) * active, texts, active)
            self.meter.step(len(offsets) * size)
        return wrong

    def may_write(self, table: HostOffset) -> bool:
        """Whether an L2 table is all there and has its cluster to itself, as far as tables go."""
        image = self.image
        whole = not table & image.mask and table + image.cluster <= image.file_size
        return whole and table >> image.bits not in self.clashing

    def _sound(self, buffer: bytearray, position: int) -> bool:
        entry = int.from_bytes(buffer[position : position + 8], "big")
        return self.image.external or sound(self.image, entry, L2_RESERVED)

    def _flag_texts(
        self, buffer: bytearray, row: int, offset: HostOffset, places: list[int]
    ) -> Iterator[tuple[HostOffset, str]]:
        step = self.image.header.l2_entry_size
        for place in places:
            position = (row << self.image.bits) + place * step
            entry = int.from_bytes(buffer[position : position + 8], "big")
            yield offset + place * step, flag_text("L2", entry)

    async def _copied_l1(self, lo: Cluster, reach: Cluster, ones: bytearray, fix: bool) -> int:
        layout, image = self.layout, self.image
        wrong: list[int] = []
        for index, entry in enumerate(layout.l1):
            cluster = (entry & OFFSET_MASK) >> image.bits
            if not entry & OFFSET_MASK or not lo <= cluster < reach:
                continue
            if entry >> 63 != (ones[cluster - lo] if cluster - lo < len(ones) else 0) != UNKNOWN:
                wrong.append(index)
        start = image.header.l1_offset
        if not fix:
            texts = ((start + index * 8, flag_text("L1", layout.l1[index])) for index in wrong)
            self.findings.many("copied-l1", len(wrong), texts)
            return len(wrong)
        if self.clashing.intersection(range(*image.span(start, 8 * len(layout.l1)))):
            return 0
        wrong = [index for index in wrong if sound(image, layout.l1[index], L1_RESERVED)]
        for index in wrong:
            layout.l1[index] ^= COPIED
        for first, end in sector_runs({index // SECTOR_ENTRIES for index in wrong}):
            await image.file.write(to_big_endian(layout.l1, first // 8, end // 8), start + first)
        return len(wrong)

    def _wrong_flags(
        self, buffer: bytearray, offsets: list[HostOffset], lo: Cluster, reach: Cluster, ones: bytearray
    ) -> Iterator[tuple[int, list[int]]]:
        """(row, indexes of entries with a wrong flag), rows without any left out."""
        image, entries = self.image, self.image.header.l2_entries
        rows = []
        for row in range(len(offsets)):
            if image.external and lo:
                break  # what lies in the data file is in no window: it is looked at with the first
            entry = self.regular(buffer, row)
            first = (entry & OFFSET_MASK) >> image.bits if entry > 0 else 0
            if entry == 0 or (first and (first >= reach or first + entries <= lo)):
                continue
            if not (
                first >= lo
                and first
                and not image.external
                and ones.count(entry >> 63, first - lo, first - lo + entries) == entries
            ):
                rows.append(row)
        self._disorder += len(rows) << image.bits
        if rows and self._use_numpy():
            assert self._numpy is not None
            matrix = self._matrix(buffer, offsets, rows)
            for row, places in self._numpy.copied_mismatches(image, matrix, lo, reach, ones):
                yield rows[row], places
            return
        for row in rows:
            words = from_big_endian(buffer[row << image.bits : row + 1 << image.bits])
            places = wrong_flags(image, words, lo, reach, ones)
            if places:
                yield row, places


def singles(refcounts: Sequence[int]) -> bytes:
    """For each number whether it is 1."""
    return bytes(map((1).__eq__, refcounts))


def flag_text(table: str, entry: int) -> str:
    has = "has the COPIED flag, but its refcount is not 1"
    lacks = "lacks the COPIED flag, but its refcount is 1"
    return f"{table} entry {entry:#x} {has if entry & COPIED else lacks}"


async def check_image(node: Qcow2Node, progress: Report | None = None) -> CheckResult:
    """Check an open image; nothing may be in flight on it. Nothing is written.

    progress: called with (done, total) bytes of tables; what it raises ends the check.
    Raises HostError, PeerError, UnsupportedFeatureError.
    """
    meter = Meter(progress, 2)
    checker = Checker(node, meter)
    await checker.check()
    meter.finish()
    return checker.result()
