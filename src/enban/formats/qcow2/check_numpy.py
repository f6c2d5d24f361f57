"""The parts of a check that numpy does in bulk; imported only when an image has work enough for it.

Results are those of `check_tables` and `check_counts`, the plain way: tables that hold
anything wrong or unusual are handed back to that.
"""

from __future__ import annotations

import numpy as np

from ...wire.qcow2_entries import ALL_ALLOCATED, ALL_ZERO, COMPRESSED, COPIED, L2_RESERVED, OFFSET_MASK
from .check_counts import MOST_REFERENCES, Counts, Difference, expand
from .check_tables import UNKNOWN

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ...units import Cluster
    from .check_layout import Image
    from .check_tables import Tally

    Numbers = NDArray[np.uint64]

_DISK_TYPES = {3: ">u1", 4: ">u2", 5: ">u4", 6: ">u8"}


class NumpyCounts(Counts):
    """Counts with a flat form that takes points in bulk.

    Adding points the quick way (`flat[points] += 1`) loses those that are twice in one call, and
    a count of 2^32 wraps; both make the sum too small, which `finish` sees. Then everything is
    counted again with `exact`, and if that still wraps, the plain way.
    """

    def __init__(self, start: Counts, *, exact: bool) -> None:
        """Goes on from `start`, which is not used any more."""
        super().__init__(start.lo, start.hi)
        self._exact = exact
        self._total = 0
        self._numbers: NDArray[np.uint32] | None = None
        self._spans = start._spans
        if start._flat is not None:
            self._numbers = np.frombuffer(start._flat, np.uint32).copy()
            self._total = int(self._numbers.sum(dtype=np.uint64))

    def _lay_flat(self) -> NDArray[np.uint32]:
        if self._numbers is None:
            self._numbers = np.zeros(self.hi - self.lo, np.uint32)
        return self._numbers

    def _flatten(self) -> None:
        numbers = self._lay_flat()
        for first, end, weight in self._spans:
            numbers[first - self.lo : end - self.lo] += np.uint32(weight)
            self._total += (end - first) * weight
        self._spans = []

    def points(
        self, clusters: NDArray[np.int64], weights: int | NDArray[np.uint32], *, repeated: bool = False
    ) -> None:
        """References to clusters anywhere; those of this window count. repeated: a cluster may come twice."""
        if self.lo or not clusters.size or int(clusters.max()) >= self.hi:
            inside = (clusters >= self.lo) & (clusters < self.hi)
            clusters = clusters[inside] - self.lo
            if not isinstance(weights, int):
                weights = weights[inside]
        numbers = self._lay_flat()
        if isinstance(weights, int):
            self._total += clusters.size * weights
            weights_added: np.uint32 | NDArray[np.uint32] = np.uint32(weights)
        else:
            self._total += int(weights.sum(dtype=np.uint64))
            weights_added = weights
        if self._exact or repeated:
            np.add.at(numbers, clusters, weights_added)
        else:
            numbers[clusters] += weights_added

    def finish(self) -> bool:
        if self._numbers is None:
            return super().finish()
        self._flatten()
        self.one_each = not self._numbers.size or int(self._numbers.max()) <= 1
        return int(self._numbers.sum(dtype=np.uint64)) == self._total

    def value(self, cluster: Cluster) -> int:
        return super().value(cluster) if self._numbers is None else int(self._numbers[cluster - self.lo])

    def values(self, first: Cluster, count: int) -> Sequence[int]:
        if self._numbers is None:
            return super().values(first, count)
        found: list[int] = self._numbers[first - self.lo : first - self.lo + count].tolist()
        return found

    def any(self, first: Cluster, count: int) -> bool:
        if self._numbers is None:
            return super().any(first, count)
        return bool(self._numbers[first - self.lo : first - self.lo + count].any())

    def top(self) -> Cluster:
        if self._numbers is None:
            return super().top()
        end = self._numbers.size
        while end:
            start = max(0, end - (1 << 20))
            found = np.flatnonzero(self._numbers[start:end])
            if found.size:
                return self.lo + start + int(found[-1])
            end = start
        return -1

    def excess(self, most: int) -> list[tuple[Cluster, Cluster, int]]:
        if self._numbers is None:
            return super().excess(most)
        if self.one_each or most >= MOST_REFERENCES:
            return []
        found = np.flatnonzero(self._numbers > most)
        return [(self.lo + index, self.lo + index + 1, int(self._numbers[index])) for index in found.tolist()]

    def compare(
        self, raw: memoryview, first: Cluster, order: int, end: Cluster, room: int
    ) -> Difference | None:
        if self._numbers is None:
            return super().compare(raw, first, order, end, room)
        disk = np.frombuffer(expand(raw, order), np.uint8 if order <= 3 else np.dtype(_DISK_TYPES[order]))
        wanted = self._numbers[first - self.lo : first - self.lo + disk.size]
        most = (1 << (1 << order)) - 1
        if most < MOST_REFERENCES and not self.one_each:
            wanted = np.minimum(wanted, np.uint32(most))
        unequal = disk != wanted
        if not unequal.any():
            return None
        found = Difference()
        inside = max(0, min(disk.size, end - first))
        used = np.flatnonzero(disk[:inside])
        if used.size:
            found.top = first + int(used[-1])
        low = disk < wanted
        found.low = int(np.count_nonzero(low))
        found.missing = bool((disk[low] == 0).any())
        high = unequal & ~low
        found.leaks = int(np.count_nonzero(high[:inside]))
        found.past = int(np.count_nonzero(high[inside:]))
        if room > 0:
            found.examples = [
                (first + index, int(disk[index]), int(wanted[index]))
                for index in np.flatnonzero(unequal)[:room].tolist()
            ]
        return found


def scan_rows(
    image: Image,
    rows: Numbers,
    active: Sequence[int],
    weights: Sequence[int],
    counts: NumpyCounts,
    tally: Tally | None,
) -> list[int]:
    """Count what L2 tables refer to. rows: (tables, numbers in a table), in native byte order.
    Returns the rows that were left out, for `scan_table`."""
    if image.extended:
        entries, bitmaps = rows[:, 0::2], rows[:, 1::2]
    else:
        entries, bitmaps = rows, None
    seen = int(np.bitwise_or.reduce(entries, axis=None))
    offsets = entries & np.uint64(OFFSET_MASK)
    packed = (entries & np.uint64(COMPRESSED)) != 0 if seen & COMPRESSED else None
    odd = _odd(image, entries, bitmaps, offsets, packed, seen)
    left: list[int] = []
    if odd is not None:
        left = np.flatnonzero(odd).tolist()
        if left:
            keep = np.flatnonzero(~odd)
            entries, offsets = entries[keep], offsets[keep]
            packed = packed[keep] if packed is not None else None
            active = [active[row] for row in keep.tolist()]
            weights = [weights[row] for row in keep.tolist()]
    if not entries.size:
        return left
    present = offsets != 0
    if image.external:
        zero = np.uint64(0 if image.extended else ALL_ZERO)
        present |= (entries & (zero | np.uint64(COPIED))) == np.uint64(COPIED)
    if packed is not None:
        present &= ~packed
    whole = bool(present.all())
    if tally is not None:
        _tally(image, entries, offsets, present, packed, whole, np.array(active, np.int64), tally)
    if not image.external:
        _count(image, entries, offsets, present, packed, whole, weights, counts)
    return left


def _odd(
    image: Image,
    entries: Numbers,
    bitmaps: Numbers | None,
    offsets: Numbers,
    packed: NDArray[np.bool_] | None,
    seen: int,
) -> NDArray[np.bool_] | None:
    """Which tables hold anything that must be looked at one by one; None if none does."""
    bad_bits = L2_RESERVED | image.mask & OFFSET_MASK
    if image.no_zero_flag:
        bad_bits |= ALL_ZERO
    bad: list[NDArray[np.bool_]] = []
    plain = None if packed is None else ~packed
    if seen & bad_bits:
        found = (entries & np.uint64(bad_bits)) != 0
        bad.append(found if plain is None else found & plain)
    if not image.external and (packed is not None or int(offsets.max()) >= image.file_size):
        found = offsets >= np.uint64(image.file_size)
        bad.append(found if plain is None else found & plain)
    if not offsets.all():
        found = (offsets == 0) & (entries >= np.uint64(COPIED))
        if image.external:
            found &= (entries & np.uint64(0 if image.extended else ALL_ZERO)) != 0
        bad.append(found if plain is None else found & plain)
    if bitmaps is not None:
        found = (bitmaps >> np.uint64(32) & bitmaps) != 0
        found |= (offsets == 0) & (bitmaps & np.uint64(ALL_ALLOCATED) != 0)
        bad.append(found if plain is None else found & plain)
    if packed is not None:
        if image.external:
            bad.append(packed)
        else:
            start, length = _unpack(image, entries)
            found = start + length > np.uint64(image.clusters << image.bits)
            found |= (entries & np.uint64(COPIED)) != 0
            if bitmaps is not None:
                found |= bitmaps != 0
            bad.append(found & packed)
    return np.logical_or.reduce([found.any(axis=1) for found in bad]) if bad else None


def _unpack(image: Image, entries: Numbers) -> tuple[Numbers, Numbers]:
    """(offset, length) of compressed clusters; other entries give something meaningless."""
    shift = 62 - (image.bits - 8)
    start = entries & np.uint64((1 << shift) - 1)
    sectors = (entries & np.uint64(COMPRESSED - 1)) >> np.uint64(shift)
    return start, (sectors + np.uint64(1)) * np.uint64(512) - (start & np.uint64(511))


def _tally(
    image: Image,
    entries: Numbers,
    offsets: Numbers,
    present: NDArray[np.bool_],
    packed: NDArray[np.bool_] | None,
    whole: bool,
    active: NDArray[np.int64],
    tally: Tally,
) -> None:
    per_table = np.count_nonzero(present, axis=1)
    tally.allocated += int(per_table @ active)
    not_copied = present & ((entries & np.uint64(COPIED)) == 0)
    tally.not_copied += int(np.count_nonzero(not_copied, axis=1) @ active)
    if packed is not None:
        compressed = int(np.count_nonzero(packed, axis=1) @ active)
        tally.allocated += compressed
        tally.compressed += compressed
        tally.fragmented += compressed
    step = np.uint64(image.cluster)
    if whole:
        breaks = (offsets[:, 1:] - offsets[:, :-1]) != step
        tally.fragmented += int(np.count_nonzero(breaks, axis=1) @ active)
    else:
        places = offsets[present]
        table = np.repeat(np.arange(per_table.size), per_table)
        breaks = ((places[1:] - places[:-1]) != step) & (table[1:] == table[:-1])
        tally.fragmented += int(active[table[1:][breaks]].sum())


def _count(
    image: Image,
    entries: Numbers,
    offsets: Numbers,
    present: NDArray[np.bool_],
    packed: NDArray[np.bool_] | None,
    whole: bool,
    weights: Sequence[int],
    counts: NumpyCounts,
) -> None:
    same = len(set(weights)) == 1
    by_table = np.array(weights, np.uint32)
    bits = np.uint64(image.bits)
    clusters = (offsets.reshape(-1) if whole else offsets[present]) >> bits
    if same:
        counts.points(clusters.view(np.int64), weights[0])
    else:
        counts.points(clusters.view(np.int64), np.repeat(by_table, np.count_nonzero(present, axis=1)))
    if packed is None:
        return
    start, length = _unpack(image, entries[packed])
    first, last = start >> bits, (start + length - np.uint64(1)) >> bits
    each: int | NDArray[np.uint32] = weights[0]
    if not same:
        each = np.repeat(by_table, np.count_nonzero(packed, axis=1))
    while first.size:  # compressed data touches two clusters at most in practice, three by its bits
        counts.points(first.view(np.int64), each, repeated=True)
        more = first < last
        first, last = first[more] + np.uint64(1), last[more]
        if not isinstance(each, int):
            each = each[more]


def copied_mismatches(
    image: Image, rows: Numbers, lo: Cluster, reach: Cluster, ones: bytearray
) -> list[tuple[int, list[int]]]:
    """`wrong_flags` for many tables: (row, indexes), rows without any left out."""
    entries = rows[:, 0::2] if image.extended else rows
    offsets = entries & np.uint64(OFFSET_MASK)
    copied = (entries & np.uint64(COPIED)) != 0
    wrong = (offsets != 0) & ((entries & np.uint64(COMPRESSED)) == 0)
    if image.external:
        wrong &= ~copied
    else:
        clusters = (offsets >> np.uint64(image.bits)).view(np.int64)
        inside = (clusters >= lo) & (clusters < lo + len(ones))
        single = np.zeros(clusters.shape, np.uint8)
        single[inside] = np.frombuffer(ones, np.uint8)[clusters[inside] - lo]
        wrong &= (clusters >= lo) & (clusters < min(reach, 1 << 62))
        wrong &= (single != copied) & (single != UNKNOWN)
    return [(row, np.flatnonzero(wrong[row]).tolist()) for row in np.flatnonzero(wrong.any(axis=1)).tolist()]


def native(buffer: bytearray | memoryview, words: int) -> Numbers:
    """Big-endian 8-byte numbers as rows of `words` numbers in native order (a copy)."""
    return np.frombuffer(buffer, np.dtype(">u8")).reshape(-1, words).astype(np.uint64)
