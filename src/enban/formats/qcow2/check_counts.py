"""Counting references to host clusters, one window of clusters at a time.

References of a window are kept as spans (first, end, weight) as long as those are few: an
image written in order has about one for each L2 table. If they become many they are laid
out flat, four bytes a cluster (`check_numpy` has a faster flat form). So a window takes a
bounded amount of memory, whatever the image holds.

Refcounts on disk (specification, "Refcounts") are big-endian numbers of 1 to 64 bits;
those narrower than a byte start at the lowest bit.
"""

from __future__ import annotations

import sys
from array import array
from bisect import bisect_right

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ...units import Cluster

MOST_SPANS = 1 << 16
PART = 1 << 18  # refcounts looked at one by one at a time; a block may hold 2^24
MOST_REFERENCES = (1 << 32) - 1  # of one cluster in the flat form; more are not told apart
_TYPECODES = {3: "B", 4: "H", 5: "I", 6: "Q"}
_unpacked: dict[int, list[bytes]] = {}


def expand(raw: bytes | bytearray | memoryview, order: int) -> bytes | bytearray | memoryview:
    """Refcounts of less than a byte as a byte each; wider ones as they are."""
    if order >= 3:
        return raw
    if order not in _unpacked:
        bits = 1 << order
        _unpacked[order] = [
            bytes(byte >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)) for byte in range(256)
        ]
    return b"".join(map(_unpacked[order].__getitem__, raw))


def decode(raw: bytes | bytearray | memoryview, order: int) -> Sequence[int]:
    """Refcounts as stored, as numbers."""
    raw = expand(raw, order)
    if order <= 3:
        return bytes(raw)
    numbers = array(_TYPECODES[order], bytes(raw))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def encode(values: Sequence[int], order: int) -> bytes:
    """Numbers as refcounts are stored; for widths below a byte they must fill whole bytes."""
    if order < 3:
        bits, per_byte = 1 << order, 8 >> order
        return bytes(
            sum(value << place * bits for place, value in enumerate(values[i : i + per_byte]))
            for i in range(0, len(values), per_byte)
        )
    numbers = array(_TYPECODES[order], values)
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers.tobytes()


def parts(raw: memoryview, first: Cluster, order: int) -> Iterator[tuple[Cluster, memoryview]]:
    """A refcount block in parts of at most PART refcounts: (first cluster, bytes)."""
    length = PART << order >> 3
    for start in range(0, len(raw), length):
        yield first + (start << 3 >> order), raw[start : start + length]


class Difference:
    """Where refcounts and references differ. leaks, low: clusters counted too high, too low.
    past: leaks behind the end of the file. missing: some cluster in use has refcount 0.
    top: the last cluster before the end whose refcount is not 0, or -1.
    examples: (cluster, refcount, references) of the first few, in order."""

    __slots__ = ("examples", "leaks", "low", "missing", "past", "top")

    def __init__(self) -> None:
        self.leaks = 0
        self.low = 0
        self.past = 0
        self.missing = False
        self.top = -1
        self.examples: list[tuple[Cluster, int, int]] = []


class Counts:
    """References to the clusters [lo, hi).

    Fill with `add` (and, for the flat form of `check_numpy`, `points`), then `finish`, then ask.
    `one_each`: no cluster is referenced more than once.
    """

    def __init__(self, lo: Cluster, hi: Cluster, most_spans: int = MOST_SPANS) -> None:
        self.lo = lo
        self.hi = hi
        self.one_each = True
        self._most_spans = most_spans
        self._spans: list[tuple[Cluster, Cluster, int]] = []
        self._starts: list[Cluster] = []
        self._flat: array[int] | None = None
        self._ones = b""

    def add(self, first: Cluster, end: Cluster, weight: int = 1) -> None:
        """`weight` references to each of the clusters [first, end)."""
        if first < self.lo:
            first = self.lo
        if end > self.hi:
            end = self.hi
        if first < end:
            if self._flat is not None:
                self._add_flat(first - self.lo, end - self.lo, weight)
                return
            self._spans.append((first, end, weight))
            if len(self._spans) > self._most_spans:
                self._spans = sweep(self._spans)
                if len(self._spans) > self._most_spans // 2:
                    self._flatten()

    def _flatten(self) -> None:
        self._flat = array("I", bytes(4 * (self.hi - self.lo)))
        for first, end, weight in self._spans:
            self._add_flat(first - self.lo, end - self.lo, weight)
        self._spans = []

    def _add_flat(self, first: int, end: int, weight: int) -> None:
        flat = self._flat
        assert flat is not None
        for index in range(first, end):
            total = flat[index] + weight
            flat[index] = total if total < MOST_REFERENCES else MOST_REFERENCES

    def finish(self) -> bool:
        """All is added. False: adding was not exact, everything must be counted again."""
        if self._flat is not None:
            self.one_each = max(self._flat, default=0) <= 1
        else:
            self._spans = sweep(self._spans)
            self._starts = [span[0] for span in self._spans]
            self.one_each = all(span[2] <= 1 for span in self._spans)
        return True

    # -- asking ----------------------------------------------------------------------------

    def value(self, cluster: Cluster) -> int:
        """References to one cluster of the window."""
        if self._flat is not None:
            return self._flat[cluster - self.lo]
        index = bisect_right(self._starts, cluster) - 1
        if index >= 0 and cluster < self._spans[index][1]:
            return self._spans[index][2]
        return 0

    def values(self, first: Cluster, count: int) -> Sequence[int]:
        """References to `count` clusters of the window."""
        if self._flat is not None:
            return self._flat[first - self.lo : first - self.lo + count]
        found = [0] * count
        for start, end, weight in self._among(first, first + count):
            found[start - first : end - first] = [weight] * (end - start)
        return found

    def any(self, first: Cluster, count: int) -> bool:
        """Whether any of these clusters is referenced."""
        if self._flat is not None:
            return any(self._flat[first - self.lo : first - self.lo + count])
        return bool(self._among(first, first + count))

    def top(self) -> Cluster:
        """The last referenced cluster, or -1."""
        if self._flat is not None:
            for index in range(len(self._flat) - 1, -1, -1):
                if self._flat[index]:
                    return self.lo + index
            return -1
        return self._spans[-1][1] - 1 if self._spans else -1

    def excess(self, most: int) -> list[tuple[Cluster, Cluster, int]]:
        """(first, end, references) where there are more than `most`."""
        if self._flat is not None:
            if self.one_each:
                return []
            return [
                (self.lo + index, self.lo + index + 1, total)
                for index, total in enumerate(self._flat)
                if total > most
            ]
        return [span for span in self._spans if span[2] > most]

    def _among(self, first: Cluster, end: Cluster) -> list[tuple[Cluster, Cluster, int]]:
        """The spans in [first, end), cut to it."""
        found = []
        for index in range(max(0, bisect_right(self._starts, first) - 1), len(self._spans)):
            start, stop, weight = self._spans[index]
            if start >= end:
                break
            if stop > first:
                found.append((max(start, first), min(stop, end), weight))
        return found

    def compare(
        self, raw: memoryview, first: Cluster, order: int, end: Cluster, room: int
    ) -> Difference | None:
        """Refcounts from a block, `raw` beginning with that of cluster `first`, against the references.

        end: the first cluster behind the end of the file. room: how many examples to bring along.
        """
        count = (len(raw) << 3) >> order
        most = (1 << (1 << order)) - 1
        if self._flat is None:
            width = max(1, 1 << order >> 3)
            spans = self._among(first, first + count)
            if not spans:
                wanted = bytes(width * count)
            elif len(spans) == 1 and spans[0] == (first, first + count, 1):
                if len(self._ones) != width * count:
                    self._ones = (bytes(width - 1) + b"\1") * count
                wanted = self._ones
            else:
                content = bytearray(width * count)
                for start, stop, weight in spans:
                    pattern = min(weight, most).to_bytes(width, "big")
                    content[(start - first) * width : (stop - first) * width] = pattern * (stop - start)
                wanted = bytes(content)
            if wanted == bytes(expand(raw, order)):
                return None
        return differences(decode(raw, order), self.values(first, count), first, most, end, room)


def differences(
    disk: Sequence[int], references: Sequence[int], first: Cluster, most: int, end: Cluster, room: int
) -> Difference | None:
    """One by one; `most` is the largest number a refcount can hold."""
    found = Difference()
    for cluster, (count, wanted) in enumerate(zip(disk, references, strict=True), first):
        if wanted > most:
            wanted = most
        if count and cluster < end:
            found.top = cluster
        if count == wanted:
            continue
        if count < wanted:
            found.low += 1
            found.missing = found.missing or not count
        elif cluster < end:
            found.leaks += 1
        else:
            found.past += 1
        if len(found.examples) < room:
            found.examples.append((cluster, count, wanted))
    return found if found.leaks or found.low or found.past else None


def sweep(spans: list[tuple[Cluster, Cluster, int]]) -> list[tuple[Cluster, Cluster, int]]:
    """Overlapping spans as disjoint ones in order, weights added up, equal neighbours joined."""
    changes: dict[Cluster, int] = {}
    for first, end, weight in spans:
        changes[first] = changes.get(first, 0) + weight
        changes[end] = changes.get(end, 0) - weight
    found: list[tuple[Cluster, Cluster, int]] = []
    start, total = 0, 0
    for place in sorted(changes):
        change = changes[place]
        if change:
            if total:
                found.append((start, place, total))
            start = place
            total += change
    return found
