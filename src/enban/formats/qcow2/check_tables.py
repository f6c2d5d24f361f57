"""Walking L2 tables for a check: what each entry refers to, and whether it may.

The plain way, entry by entry; `check_numpy` does tables without anything unusual in bulk
and leaves the others to this. (Specification, "L2 table entry", "Extended L2 Entries".)
"""

from __future__ import annotations

from array import array

from ...wire.qcow2_entries import (
    ALL_ALLOCATED,
    ALL_ZERO,
    COMPRESSED,
    COPIED,
    L2_RESERVED,
    OFFSET_MASK,
    unpack_compressed,
)
from ..common.tables import to_big_endian

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import Cluster, HostOffset
    from ..common.findings import Findings
    from .check_counts import Counts
    from .check_layout import Image


UNKNOWN = 2  # in place of whether a refcount is 1, where it cannot be read


class Tally:
    """Figures of the active image, and what later steps need to know.

    not_copied: data clusters of the active image without the COPIED flag.
    past_end: some entry of the active image points past the end of the file.
    """

    __slots__ = ("allocated", "compressed", "fragmented", "not_copied", "past_end")

    def __init__(self) -> None:
        self.allocated = 0
        self.fragmented = 0
        self.compressed = 0
        self.not_copied = 0
        self.past_end = False


def scan_table(
    image: Image,
    words: array[int],
    place: HostOffset,
    active: int,
    weight: int,
    counts: Counts,
    tally: Tally | None,
    findings: Findings | None,
) -> None:
    """Count what one L2 table refers to.

    place: where the table is. active, weight: how many L1 entries of the active image, and of
        all, point to it. tally, findings: None when only counting.
    """
    cluster, bits, mask, file_size = image.cluster, image.bits, image.mask, image.file_size
    external, extended = image.external, image.extended
    entries = words[::2] if extended else words
    bitmaps = words[1::2] if extended else bytes(len(words))
    step = 16 if extended else 8
    expected = 0  # the offset that would follow the last one without a break
    first = end = 0  # a run of referenced clusters not yet counted
    for index, (entry, bitmap) in enumerate(zip(entries, bitmaps, strict=True)):
        if not entry and not bitmap:
            continue
        if entry & COMPRESSED:
            _scan_packed(image, entry, bitmap, place + index * step, active, weight, counts, tally, findings)
            continue
        offset = entry & OFFSET_MASK
        odd = not offset or entry & L2_RESERVED or offset & mask or bitmap
        if (odd or (entry & ALL_ZERO and image.no_zero_flag)) and findings is not None:
            _report(image, entry, bitmap, place + index * step, weight, findings)
        if not offset and not (external and at_start(image, entry)):
            continue
        if tally is not None:
            tally.allocated += active
            if expected and offset != expected:
                tally.fragmented += active
            expected = offset + cluster
            if not entry & COPIED:
                tally.not_copied += active
        if external:
            continue
        if offset >= file_size:
            image.outside(offset, cluster)
            if findings is not None and tally is not None:
                text = f"data cluster at {offset:#x} lies past the end of the file"
                findings.add("l2-past-end", place + index * step, text, weight)
                tally.past_end = tally.past_end or active > 0
            continue
        start = offset >> bits
        if start == end and not offset & mask:
            end += 1
            continue
        if first < end:
            counts.add(first, end, weight)
        first, end = start, (offset + mask >> bits) + 1
        if end > image.clusters:
            image.grown = True
    if first < end:
        counts.add(first, end, weight)


def at_start(image: Image, entry: int) -> bool:
    """Whether an entry with offset 0 means the first cluster of the external data file."""
    return image.external and bool(entry & COPIED) and (image.extended or not entry & ALL_ZERO)


def _report(
    image: Image, entry: int, bitmap: int, place: HostOffset, weight: int, findings: Findings
) -> None:
    """What is wrong with an entry that is not compressed."""
    offset = entry & OFFSET_MASK
    if entry & L2_RESERVED:
        findings.add("l2-reserved", place, f"L2 entry {entry:#x} has reserved bits set", weight)
    if entry & ALL_ZERO and image.no_zero_flag:
        text = f"L2 entry {entry:#x} has a zero flag, which this image cannot have"
        findings.add("zero-flag", place, text, weight)
    if not offset and not at_start(image, entry):
        if entry & COPIED:
            text = f"L2 entry {entry:#x} has the COPIED flag but no cluster"
            findings.add("copied-no-cluster", place, text, weight)
        if bitmap & ALL_ALLOCATED:
            text = f"L2 entry {entry:#x} has no cluster but subclusters {bitmap & ALL_ALLOCATED:#x}"
            findings.add("subclusters-no-cluster", place, text, weight)
        return
    if bitmap >> 32 & bitmap:
        text = f"subclusters {bitmap >> 32 & bitmap:#x} are called both data and zero"
        findings.add("subclusters-both", place, text, weight)
    if offset & image.mask:
        text = f"L2 entry points to {offset:#x}, which is not a cluster"
        findings.add("l2-unaligned", place, text, weight)


def _scan_packed(
    image: Image,
    entry: int,
    bitmap: int,
    place: HostOffset,
    active: int,
    weight: int,
    counts: Counts,
    tally: Tally | None,
    findings: Findings | None,
) -> None:
    if entry & COPIED and findings is not None:
        findings.add(
            "packed-copied", place, f"L2 entry {entry:#x} of a compressed cluster has the COPIED flag", weight
        )
    if image.external or bitmap:
        if findings is not None:
            text = f"L2 entry {entry:#x} is compressed in an image with an external data file"
            if not image.external:
                text = f"L2 entry {entry:#x} is compressed but has subclusters {bitmap:#x}"
            findings.add("packed-external" if image.external else "packed-subclusters", place, text, weight)
    else:
        offset, length = unpack_compressed(entry, image.bits)
        if image.outside(offset, length):
            if findings is not None:
                text = f"compressed data at {offset:#x} of {length} bytes lies past the end of the file"
                findings.add("packed-past-end", place, text, weight)
        else:
            counts.add(*image.span(offset, length), weight)
        if tally is not None:
            tally.allocated += active
            tally.compressed += active
            tally.fragmented += active


def repaired_entry(image: Image, entry: int, bitmap: int) -> tuple[int, int]:
    """What a repair makes of an L2 entry; most stay as they are.

    Let go is only what cannot hold data: a sound entry whose cluster lies past the end of the
    file (so it never was durable) becomes unallocated, subclusters without a cluster too, and a
    misplaced cluster kept for zeros becomes plain zeros. Anything odder may be a damaged pointer
    to good data and stays.
    """
    offset = entry & OFFSET_MASK
    if entry & COMPRESSED:
        if image.external or bitmap or not image.outside(*unpack_compressed(entry, image.bits)):
            return entry & ~COPIED, bitmap
        return (entry if entry & COPIED else 0), bitmap
    if entry & L2_RESERVED or (entry & ALL_ZERO and image.no_zero_flag):
        return entry, bitmap
    if not offset and not at_start(image, entry):
        entry &= ~COPIED
    past_end = offset >= image.file_size and not image.external and not offset & image.mask
    if image.extended:
        data = bitmap & ALL_ALLOCATED
        present = offset or at_start(image, entry)
        if (data and not present) or (offset and past_end) or (offset & image.mask and not data):
            return 0, bitmap & ~ALL_ALLOCATED
    elif offset and (past_end or (offset & image.mask and entry & ALL_ZERO)):
        return entry & ALL_ZERO, 0
    return entry, bitmap


def wrong_flags(image: Image, words: array[int], lo: Cluster, reach: Cluster, ones: bytearray) -> list[int]:
    """Indexes of entries with a wrong COPIED flag, of those whose cluster is in [lo, reach).

    ones: for each cluster from `lo` on whether its refcount is 1, or UNKNOWN; behind those it is not.
    """
    bits, external = image.bits, image.external
    hi = lo + len(ones)
    found = []
    for index, entry in enumerate(words[::2] if image.extended else words):
        if entry & COMPRESSED:
            continue
        offset = entry & OFFSET_MASK
        if external:
            if offset and not entry & COPIED:
                found.append(index)
        elif offset:
            cluster = offset >> bits
            if cluster < hi:
                if cluster >= lo and entry >> 63 != ones[cluster - lo] != UNKNOWN:
                    found.append(index)
            elif cluster < reach and entry >> 63:
                found.append(index)
    return found


class RunTemplate:
    """Recognises whole L2 tables that map adjacent host clusters, by comparing bytes.

    The low bytes of such a table's entries repeat with a fixed period; `_bytes` holds one
    period of entries with the high bytes of the last table seen.
    """

    def __init__(self, cluster_bits: int) -> None:
        self._bits = cluster_bits
        self._low_bytes = 3 if cluster_bits <= 14 else 4
        self._period = 1 << 8 * self._low_bytes - cluster_bits
        entries = array("Q", range(0, self._period << cluster_bits, 1 << cluster_bits))
        self._bytes = bytearray(to_big_endian(entries))
        self._view = memoryview(self._bytes)
        self._high = 0

    def matches(self, buffer: bytearray, position: int, count: int) -> bool:
        """Whether `count` entries in the buffer go up by one cluster each, from the first one on."""
        entry = int.from_bytes(buffer[position : position + 8], "big")
        while count:
            high, low = entry >> 8 * self._low_bytes, entry & (1 << 8 * self._low_bytes) - 1
            if high != self._high:
                self._set_high(high)
            index = low >> self._bits
            part = min(count, self._period - index)
            if not buffer.startswith(self._view[index * 8 : (index + part) * 8], position):
                return False
            count -= part
            position += part * 8
            entry += part << self._bits
        return True

    def _set_high(self, high: int) -> None:
        length = 8 - self._low_bytes
        old, new = self._high.to_bytes(length, "big"), high.to_bytes(length, "big")
        for place in range(length):
            if old[place] != new[place]:
                self._bytes[place::8] = bytes((new[place],)) * self._period
        self._high = high
