"""Repairing an image: what a check found is set right, as far as that needs no guessing.

Steps, each durable before the next begins:

    1  drop     entries that point past the end of the file are let go (their data never was durable)
    2  raise    refcounts that are too low; or, where the refcount structure itself is damaged, a
                new one is written behind everything and the header led over to it
    3  flags    COPIED set where the refcount will be 1 and cleared elsewhere
    4  lower    refcounts that are too high
    5  bits     dirty and corrupt, if a new check finds nothing wrong any more

After a crash in between the repair can be repeated: once step 2 is done, what an entry points to
is counted at least as often as it is used, and a dirty or corrupt bit stands until all is done.

Nothing is freed while there may be references that were not found (a lost table, an
unknown feature). Tables that share a cluster with another table are not written. Feature
bits other than the two are never touched.
"""

from __future__ import annotations

from array import array

from ...errors import CorruptImageError, NoSpaceError, UnsupportedFeatureError
from ...units import SECTOR, align_up
from ...wire.qcow2 import AUTOCLEAR_BITMAPS, AUTOCLEAR_RAW_DATA, CORRUPT, DIRTY, MAX_REFCOUNT_TABLE_BYTES
from ...wire.qcow2_entries import OFFSET_MASK
from ..common.findings import CORRUPTION, ERROR, LEAK, CheckResult, Findings
from ..common.tables import from_big_endian, sector_runs, to_big_endian
from .bitmaps import open_bitmaps
from .check import Checker
from .check_counts import PART, decode, encode, parts
from .check_flags import singles
from .check_layout import never_durable
from .check_tables import repaired_entry
from .check_walk import Meter
from .opening import read_snapshots, read_table
from .refcounts import Refcounts
from .switch import Change, switch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...block.storage import Storage
    from ...units import Cluster, HostOffset
    from .check_counts import Counts
    from .node import Qcow2Node

_FLAG_KINDS = ("copied-l1", "copied-l2")
_DROPPED_KINDS = (
    "copied-no-cluster",
    "l2-past-end",
    "l2-unaligned",
    "packed-copied",
    "packed-past-end",
    "subclusters-no-cluster",
)
_STAGES = 9  # check 2, drop, raise, flags 2, lower, check 2


async def repair_image(
    node: Qcow2Node, mode: str, progress: Callable[[int, int], None] | None = None
) -> CheckResult:
    """Check an open writable image, repair it, check it again.

    mode: "leaks" frees what is counted but not used; "all" repairs the rest as well. Nothing may
    be in flight on the node; afterwards it works with the repaired tables.

    The result tells the state after; `repaired` what was found before and what was done.
    Raises HostError (NoSpaceError, ...), PeerError; the image is then as after a crash.
    """
    meter = Meter(progress, _STAGES)
    before = Checker(node, meter)
    await before.check()
    found = before.findings
    work = _Repair(node, meter)
    fault = await _bitmaps_fault(node, before.walk.clashing) if mode == "all" else ""
    if fault:
        await _drop_bitmaps(node, fault, work.done)
        before = Checker(node, meter)
        await before.check()
    if any(before.findings.total(kind) for kind in (CORRUPTION, LEAK, ERROR)):
        await work.run(before, everything=mode == "all")
        after = Checker(node, meter)
        await after.check(7)
        if work.rebuilt and before.walk.clashing and after.findings.total(CORRUPTION):
            # Tables that had to be left alone may have become free of others with the new refcounts.
            await work.run(after, everything=True)
            after = Checker(node, meter)
            await after.check(7)
    else:
        after = before
    if mode == "all" and not work.impossible:
        await _reload(node)
        fault = await _bitmaps_fault(node, after.walk.clashing, counted=True)
        if fault:
            await _drop_bitmaps(node, fault, work.done)
            await work.run(after, everything=True)
            after = Checker(node, meter)
            await after.check(7)
    if work.impossible:
        after.findings.add("repair-impossible", -1, work.impossible)
    elif not after.findings.total(CORRUPTION) and not after.findings.total(ERROR):
        await _clear_bits(node, work.done)
    await _reload(node)
    meter.finish()
    result = after.result()
    fixed = found.total(CORRUPTION, but=_FLAG_KINDS) - after.findings.total(CORRUPTION, but=_FLAG_KINDS)
    result.corruptions_fixed = max(0, fixed) + work.flags
    result.leaks_fixed = max(0, found.total(LEAK) - result.leaks)
    if found is not after.findings or work.done.kept:
        result.repaired = found.kept + work.done.kept
        result.repaired_kinds = {**found.kinds, **work.done.kinds}
    return result


async def repair_dirty(node: Qcow2Node) -> None:
    """Make an image that was not closed fit for writing; for the opener, before anything else is done.

    Raises CorruptImageError if it cannot be repaired, HostError, PeerError.
    """
    result = await repair_image(node, "all")
    if result.corruptions or result.check_errors:
        raise CorruptImageError(
            "the image was not closed and cannot be repaired completely",
            path=node.name,
            hint="run: enban check -r all, or open it read-only",
        )


async def _bitmaps_fault(node: Qcow2Node, clashing: set[Cluster], *, counted: bool = False) -> str:
    """Why the bitmaps cannot be used; "" if they can. clashing: clusters that two tables claim. counted:
    refcounts are right already, and tell which clusters are guest data as well."""
    try:
        places = await (await open_bitmaps(node)).places(counted=counted)
    except CorruptImageError as error:
        return error.what
    bits = node.cluster_bits
    for offset, length, what in places:
        if not clashing.isdisjoint(range(offset >> bits, (offset + length - 1 >> bits) + 1)):
            return f"a {what} lies on other metadata"
    return ""


async def _drop_bitmaps(node: Qcow2Node, fault: str, done: Findings) -> None:
    """Damaged bitmaps can be neither kept right nor read, and keep the image from being opened by others:
    without the feature bit they do not count, and their clusters are free."""
    header = node.header
    await node.file.write((header.autoclear & ~AUTOCLEAR_BITMAPS).to_bytes(8, "big"), 88)
    await node.file.flush()
    header.autoclear &= ~AUTOCLEAR_BITMAPS
    node.dirty_bitmaps = None
    done.add("bitmaps-dropped", 88, f"the bitmaps were dropped: {fault}")


async def _clear_bits(node: Qcow2Node, done: Findings) -> None:
    header = node.header
    bits = header.incompatible & (DIRTY | CORRUPT)
    if bits:
        await node.file.write((header.incompatible & ~bits).to_bytes(8, "big"), 72)
        await node.file.flush()
        header.incompatible &= ~bits
        names = " and ".join(name for bit, name in ((DIRTY, "dirty"), (CORRUPT, "corrupt")) if bits & bit)
        done.add("bits-cleared", 72, f"cleared the {names} bit")


async def _reload(node: Qcow2Node) -> None:
    """Let the node work with what is on the disk now. What cannot be read stays empty."""
    header, file = node.header, node.file
    node.cache.clear()
    node.l1_dirty.clear()
    node.packed_end = 0
    entries = header.refcount_table_clusters * header.cluster_size // 8
    try:
        table = await read_table(file, header.refcount_table_offset, entries, "refcount table", node.name)
        node.refcounts = Refcounts(file, header, table, node.name)
        node.l1 = await read_table(file, header.l1_offset, header.l1_entries, "L1 table", node.name)
        node.snapshots = await read_snapshots(file, header, node.name)
    except CorruptImageError:
        pass  # the check has told


class _Repair:
    """done: what was done. flags: COPIED flags set right. impossible: why nothing could be done."""

    def __init__(self, node: Qcow2Node, meter: Meter) -> None:
        self.node = node
        self.file: Storage = node.file
        self.meter = meter
        self.done = Findings()
        self.flags = 0
        self.rebuilt = False
        self.impossible = ""
        self.clashing: set[Cluster] = set()
        self.beyond = False

    async def run(self, before: Checker, *, everything: bool) -> None:
        found, layout = before.findings, before.layout
        self.clashing = before.walk.clashing
        self.beyond = before.image.beyond > 0
        rebuild = layout.rebuild or bool(layout.unreadable)
        if rebuild and not everything:
            self.impossible = "the refcounts must be written anew before leaks can be freed (repair all)"
            return
        if rebuild and layout.lost:  # what is written behind the end of the file would be taken for them
            self.impossible = f"the {layout.lost[0]} is not in the file: the file is cut short"
            return
        if everything:
            if layout.lost_tables or any(kind in found.kinds for kind in _DROPPED_KINDS):
                await (await self.node.bitmaps()).distrust()  # the guest may see other bytes now
                await self._drop(before)
            if rebuild:
                await self._rebuild()
            else:
                await self._change(3, "refcounts-raised", max)
            others = 0
        else:
            others = found.total(ERROR) + found.total(CORRUPTION, but=_FLAG_KINDS)
        freeing = not layout.doubts
        if not freeing and found.total(LEAK):
            self.done.add("leaks-kept", -1, f"nothing is freed: {', '.join(layout.doubts)}")
        if not others:
            await self._flags(freeing=freeing)
        if freeing:
            await self._change(6, "refcounts-lowered", min)
        if everything and layout.incomplete_snapshots:
            await self._complete_snapshots()

    async def _checker(self, least_size: int = 0) -> Checker:
        """A checker for counting only: what it finds wrong is known already. least_size: look at the
        file as if it were at least that long."""
        checker = Checker(self.node, self.meter)
        if least_size > checker.image.file_size:
            checker.image.set_file_size(align_up(least_size, checker.image.cluster))
        checker.walk.clashing = self.clashing
        await checker.layout.read()
        return checker

    # -- 1: entries that lead nowhere ------------------------------------------------------

    async def _drop(self, before: Checker) -> None:
        image, layout = before.image, before.layout
        before.walk.begin(2, 1)
        for start, end, _ in layout.l1_parts:
            async for offset, words in image.words(start, end):
                for index, entry in enumerate(words):
                    place = offset + index * 8
                    if never_durable(image, entry) and place >> image.bits not in self.clashing:
                        await self.file.write(bytes(8), place)
                        self.done.add(
                            "dropped", place, f"L1 entry {entry:#x} pointed past the end, now unallocated"
                        )
        async for buffer, offsets in before.walk.tables():
            for row, offset in enumerate(offsets):
                if before.walk.may_write(offset) and before.walk.regular(buffer, row) < 0:
                    await self._drop_entries(before, buffer, row, offset)
            self.meter.step(len(offsets) << image.bits)
        await self.file.flush()

    async def _drop_entries(self, before: Checker, buffer: bytearray, row: int, offset: HostOffset) -> None:
        image = before.image
        words = from_big_endian(buffer[row << image.bits : row + 1 << image.bits])
        step = 2 if image.extended else 1
        sectors = set()
        for index in range(0, len(words), step):
            entry, bitmap = words[index], words[index + 1] if image.extended else 0
            new = repaired_entry(image, entry, bitmap) if entry or bitmap else (0, 0)
            if new == (entry, bitmap):
                continue
            words[index] = new[0]
            if image.extended:
                words[index + 1] = new[1]
            sectors.add(index * 8 // SECTOR)
            kind = "dropped" if (new[0] ^ entry) & OFFSET_MASK or new[1] != bitmap else "flag-cleared"
            self.done.add(kind, offset + index * 8, f"L2 entry {entry:#x} became {new[0]:#x}")
        for start, end in sector_runs(sectors):
            await self.file.write(to_big_endian(words, start // 8, end // 8), offset + start)

    # -- 2 and 4: refcounts in place -------------------------------------------------------

    async def _change(self, stage: int, kind: str, choose: Callable[[int, int], int]) -> None:
        """Set each refcount to choose(refcount, references)."""
        checker = await self._checker()
        image = checker.image
        windows = checker.walk.windows()
        checker.walk.begin(stage, len(windows))
        changed = 0
        for lo, hi in windows:
            counts = await checker.references.count(lo, hi, first=False)
            async for index, raw in checker.walk.blocks(lo, hi):
                if raw is None:
                    continue
                offset = checker.layout.blocks[index]
                for first, part in parts(raw, index * image.per_block, image.order):
                    if counts.compare(part, first, image.order, image.end, 0) is not None:
                        disk = decode(part, image.order)
                        uses = counts.values(first, len(disk))
                        most = image.most_references
                        wanted = [
                            choose(count, min(use, most)) for count, use in zip(disk, uses, strict=True)
                        ]
                        changed += sum(map(int.__ne__, disk, wanted))
                        await self._write_changes(offset, bytes(part), encode(wanted, image.order))
                    offset += len(part)
        await self.file.flush()
        if changed:
            self.done.add(kind, -1, f"{changed} {kind.replace('-', ' ')}", changed)

    async def _write_changes(self, offset: HostOffset, old: bytes, new: bytes) -> None:
        sectors = {
            place // SECTOR
            for place in range(0, len(new), SECTOR)
            if old[place : place + SECTOR] != new[place : place + SECTOR]
        }
        for start, end in sector_runs(sectors):
            await self.file.write(new[start:end], offset + start)

    # -- 2: a new refcount structure -------------------------------------------------------

    async def _rebuild(self) -> None:
        """Write all refcounts anew, behind everything that is there, and switch the header over."""
        checker = await self._checker()
        if self.beyond:
            # Entries that stay although they point past the end will find the file longer: the new
            # blocks stand behind what they point to, and that counts.
            await checker.references.count(0, checker.image.per_block, first=False)
            checker = await self._checker(checker.image.beyond)
        image, layout = checker.image, checker.layout
        checker.references.mapped = False
        keep = bool(layout.doubts)  # then what the old blocks count stays counted
        used: set[int] = set()
        windows = [window for window in checker.walk.windows() if window[0] < image.end]
        checker.walk.begin(3, 2 * len(windows))
        top: Cluster = 0
        for lo, hi in windows:
            counts = await checker.references.count(lo, hi, first=False)
            top = max(top, counts.top())
            async for index, raw in checker.walk.blocks(lo, hi):
                if counts.any(index * image.per_block, image.per_block) or (
                    keep and raw is not None and any(raw)
                ):
                    used.add(index)
            used.update(
                index
                for index in layout.unreadable
                if lo <= index * image.per_block < hi and counts.any(index * image.per_block, image.per_block)
            )
        start = image.end
        if self.file.fixed_size:  # the end of a device is no place to go on
            old = [end for _, end, _ in layout.uses] + [cluster + 1 for cluster in layout.block_clusters]
            start = max(top + 1, *old)
        blocks, table_clusters = self._place(checker, used, start)
        end = start + len(blocks) + table_clusters
        if self.file.fixed_size and end << image.bits > self.file.size():
            raise NoSpaceError(
                "no room on the device for new refcounts",
                path=self.node.name,
                hint="copy the image to a larger one",
            )
        checker.references.extra = (start, end)
        table = array("Q", bytes(table_clusters * image.cluster))
        size = checker.walk.window
        for lo in sorted({index * image.per_block // size * size for index in blocks}):
            counts = await checker.references.count(lo, lo + size, first=False)
            for place, index in enumerate(blocks, start):
                if lo <= index * image.per_block < lo + size:
                    table[index] = place << image.bits
                    content = await self._content(checker, counts, index, keep)
                    await self.file.write(content, place << image.bits)
        table_offset = start + len(blocks) << image.bits
        await self.file.write(to_big_endian(table), table_offset)
        await self.file.flush()
        await self.file.write(table_offset.to_bytes(8, "big") + table_clusters.to_bytes(4, "big"), 48)
        await self.file.flush()
        self.node.header.refcount_table_offset = table_offset
        self.node.header.refcount_table_clusters = table_clusters
        self.rebuilt = True
        self.done.add("refcounts-rebuilt", table_offset, f"wrote new refcounts in {len(blocks)} blocks")

    def _place(self, checker: Checker, used: set[int], start: Cluster) -> tuple[list[int], int]:
        """(indexes of the blocks to write, clusters of the table) when they stand from `start` on,
        and have to count themselves."""
        image = checker.image
        while True:
            clusters = -(-(max(used, default=0) + 1) * 8 // image.cluster)
            end = start + len(used) + clusters
            needed = set(range(start // image.per_block, (end - 1) // image.per_block + 1))
            if needed <= used:
                break
            used |= needed
        if clusters << image.bits > MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedFeatureError("the image is too large for a refcount table", path=self.node.name)
        return sorted(used), clusters

    async def _content(self, checker: Checker, counts: Counts, index: int, keep: bool) -> bytes:
        """A new refcount block."""
        image, layout = checker.image, checker.layout
        raw = bytearray(image.cluster)
        place = layout.blocks[index] if index < len(layout.blocks) and index not in layout.unreadable else 0
        if keep and 0 < place < image.file_size:
            await self.file.read_into(raw, place)
        content = []
        for first, part in parts(memoryview(raw), index * image.per_block, image.order):
            old = decode(part, image.order)
            uses = counts.values(first, len(old))
            most = image.most_references
            content.append(
                encode([max(a, min(b, most)) for a, b in zip(old, uses, strict=True)], image.order)
            )
        return b"".join(content)

    # -- 3: COPIED flags -------------------------------------------------------------------

    async def _flags(self, *, freeing: bool) -> None:
        """Set the flags as the refcounts will be: what is used, or if nothing is freed, what is counted."""
        checker = await self._checker()
        image = checker.image
        windows = checker.walk.windows()
        checker.walk.begin(4, 2 * len(windows))
        most = image.most_references
        number = 0
        for (lo, hi), reach in zip(windows, checker.walk.reaches(windows), strict=True):
            if freeing:
                counts = await checker.references.count(lo, hi, first=False)
                ones = bytearray()
                for first in range(lo, hi, PART):
                    uses = counts.values(first, min(PART, hi - first))
                    ones += singles(uses if most > 1 else [min(use, most) for use in uses])
            else:
                ones = await checker.flags.ones(lo, hi)
            number += await checker.flags.look(lo, reach, ones, fix=True)
        await self.file.flush()
        self.flags += number
        if number:
            self.done.add("copied-set", -1, f"{number} COPIED flags set right", number)

    # -- snapshots -------------------------------------------------------------------------

    async def _complete_snapshots(self) -> None:
        """Write the snapshot table anew with all fields that version 3 demands."""
        node = self.node
        checker = Checker(node, self.meter)
        await checker.check(7)
        if checker.findings.total(ERROR) or checker.findings.total(CORRUPTION, but=("snapshot-incomplete",)):
            return
        if node.header.autoclear & ~(AUTOCLEAR_RAW_DATA | AUTOCLEAR_BITMAPS):
            return  # the engine would clear what it does not know before a change of this kind
        await _reload(node)
        await switch(
            node,
            Change(l1=array("Q", node.l1), size=node.size, snapshots=node.snapshots, counted=[], freed=[]),
        )
        await node.flush()
        self.done.add("snapshot-table-written", node.header.snapshots_offset, "wrote the snapshot table anew")
