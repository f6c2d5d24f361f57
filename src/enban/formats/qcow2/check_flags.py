"""The COPIED flags of the active tables against the refcounts: found wrong, or set right.

An entry should have the flag exactly if what it points to has refcount 1 (specification, "L1 table entry",
"L2 table entry"). The rule of setting them right: only entries that are otherwise sound are written, and
only in tables that have their cluster to themselves.
"""

from __future__ import annotations

from ...wire.qcow2_entries import COPIED, L1_RESERVED, L2_RESERVED, OFFSET_MASK
from ..common.tables import SECTOR_ENTRIES, from_big_endian, sector_runs, to_big_endian
from .check_counts import decode, encode, parts
from .check_layout import sound
from .check_tables import UNKNOWN, wrong_flags

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...units import Cluster, HostOffset
    from .check_walk import Walk

_ONE = b"\1"


class Flags:
    def __init__(self, walk: Walk) -> None:
        self.walk = walk

    def all_set_in_l1(self) -> bool:
        """Whether every entry of the active L1 table has the flag."""
        return all(entry & COPIED for entry in self.walk.layout.l1 if entry & OFFSET_MASK)

    async def ones(self, lo: Cluster, hi: Cluster) -> bytearray:
        """For each cluster of a window, whether its refcount is 1: 0, 1 or UNKNOWN."""
        image = self.walk.image
        flags = bytearray(hi - lo)
        order = image.order
        async for index, raw in self.walk.blocks(lo, hi):
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
        for index in self.walk.layout.unreadable:
            if lo <= index * image.per_block < hi:
                start = index * image.per_block - lo
                flags[start : start + image.per_block] = bytes((UNKNOWN,)) * image.per_block
        return flags

    async def look(self, lo: Cluster, reach: Cluster, ones: bytearray, *, fix: bool = False) -> int:
        """Look at the COPIED flags of entries that point to clusters in [lo, reach).

        ones: for each cluster from `lo` on whether the flag should be set, or UNKNOWN; behind those it
        should not. fix: set the flags of otherwise sound entries right in place of reporting them.
        Returns how many were wrong.
        """
        image, layout = self.walk.image, self.walk.layout
        size, step, bits = image.cluster, image.header.l2_entry_size, image.bits
        wrong = await self._copied_l1(lo, reach, ones, fix)
        async for buffer, offsets in self.walk.tables(active_only=True):
            for row, places in self._wrong_flags(buffer, offsets, lo, reach, ones):
                offset, sectors = offsets[row], set()
                active = layout.active(offset)
                if fix:
                    if not self.walk.may_write(offset):
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
                    self.walk.findings.many("copied-l2", len(places) * active, texts, active)
            self.walk.meter.step(len(offsets) * size)
        return wrong

    def _sound(self, buffer: bytearray, position: int) -> bool:
        entry = int.from_bytes(buffer[position : position + 8], "big")
        return self.walk.image.external or sound(self.walk.image, entry, L2_RESERVED)

    def _flag_texts(
        self, buffer: bytearray, row: int, offset: HostOffset, places: list[int]
    ) -> Iterator[tuple[HostOffset, str]]:
        step = self.walk.image.header.l2_entry_size
        for place in places:
            position = (row << self.walk.image.bits) + place * step
            entry = int.from_bytes(buffer[position : position + 8], "big")
            yield offset + place * step, _flag_text("L2", entry)

    async def _copied_l1(self, lo: Cluster, reach: Cluster, ones: bytearray, fix: bool) -> int:
        layout, image = self.walk.layout, self.walk.image
        wrong: list[int] = []
        for index, entry in enumerate(layout.l1):
            cluster = (entry & OFFSET_MASK) >> image.bits
            if not entry & OFFSET_MASK or not lo <= cluster < reach:
                continue
            if entry >> 63 != (ones[cluster - lo] if cluster - lo < len(ones) else 0) != UNKNOWN:
                wrong.append(index)
        start = image.header.l1_offset
        if not fix:
            texts = ((start + index * 8, _flag_text("L1", layout.l1[index])) for index in wrong)
            self.walk.findings.many("copied-l1", len(wrong), texts)
            return len(wrong)
        if self.walk.clashing.intersection(range(*image.span(start, 8 * len(layout.l1)))):
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
        image, entries = self.walk.image, self.walk.image.header.l2_entries
        rows = []
        for row in range(len(offsets)):
            if image.external and lo:
                break  # what lies in the data file is in no window: it is looked at with the first
            entry = self.walk.regular(buffer, row)
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
        self.walk.disorder += len(rows) << image.bits
        if rows and self.walk.bulk():
            assert self.walk.numpy is not None
            matrix = self.walk.matrix(buffer, offsets, rows)
            for row, places in self.walk.numpy.copied_mismatches(image, matrix, lo, reach, ones):
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


def _flag_text(table: str, entry: int) -> str:
    has = "has the COPIED flag, but its refcount is not 1"
    lacks = "lacks the COPIED flag, but its refcount is 1"
    return f"{table} entry {entry:#x} {has if entry & COPIED else lacks}"
