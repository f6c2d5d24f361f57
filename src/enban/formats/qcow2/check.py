"""Checking an image: every refcount against the references there are, every table entry for sense.

    layout    header, L1 tables, snapshots, refcount table, bitmaps          (check_layout)
    count     L2 tables: what they refer to, and whether their entries may   (check_references, check_tables)
    compare   refcount blocks against the counts                             (here, check_counts)
    flags     the COPIED flags of the active tables against the refcounts    (check_flags)

What is read for them, and in which order, is said by `check_walk`; `check_numpy` does in bulk what is many.

The last three run for one window of host clusters after another, so memory does not grow
with the image: at most 2^25 clusters (2 TiB of a file with 64 KiB clusters) are counted at
a time, which takes up to 160 MiB with every cluster in disorder and next to nothing with
tables in order, and beside that some 100 bytes for each L2 table. What an image's numbers
claim is never allocated, only what its file holds.

The numbers mean what `qemu-img check` means by them; `findings.BEYOND_QEMU` lists the kinds
that it does not look for.
"""

from __future__ import annotations

from ...wire.qcow2 import CORRUPT, DIRTY
from ..common.findings import CORRUPTION, ERROR, LEAK, CheckResult
from .check_counts import parts
from .check_flags import Flags
from .check_references import References
from .check_walk import WINDOW, Meter, Walk

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import Cluster, HostOffset
    from .check_counts import Counts, Difference
    from .check_walk import Report
    from .node import Qcow2Node


class Checker:
    """One check of an image; `repair` uses its parts.

    window, numpy: for tests, the clusters counted at a time and whether to use numpy (None:
        if it is there and there is work enough).
    """

    def __init__(
        self, node: Qcow2Node, meter: Meter, *, window: int = WINDOW, numpy: bool | None = None
    ) -> None:
        self.walk = Walk(node, meter, window=window, numpy=numpy)
        self.references = References(self.walk)
        self.flags = Flags(self.walk)
        self.image = self.walk.image
        self.layout = self.walk.layout
        self.findings = self.walk.findings
        self.tally = self.references.tally
        self.top: Cluster = -1

    async def check(self, first_stage: int = 0) -> None:
        """All of it; results are in `findings`, `tally` and `top`."""
        await self.layout.read()
        windows = self.walk.windows()
        self.walk.begin(first_stage, len(windows))
        finished: list[tuple[Cluster, Cluster, bool]] = []
        for lo, hi in windows:
            counts = await self.references.count(lo, hi, first=lo == 0)
            perfect = await self._compare(counts)
            finished.append((lo, hi, perfect))
        self.walk.begin(first_stage + 1, len(windows))
        not_copied = self.tally.not_copied or not self.flags.all_set_in_l1()
        not_copied = not_copied or self.tally.past_end or "l1-past-end" in self.findings.kinds
        for (lo, hi, perfect), reach in zip(finished, self.walk.reaches(windows), strict=True):
            if not_copied or not perfect:
                await self.flags.look(lo, reach, await self.flags.ones(lo, hi))

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

    # -- refcounts -------------------------------------------------------------------------

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
        async for index, raw in self.walk.blocks(counts.lo, counts.hi):
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
                self.walk.clashing.add(cluster)
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
