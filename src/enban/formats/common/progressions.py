"""Long runs of adjacent clusters in a table, found many entries at a time."""

from __future__ import annotations

from array import array
from sys import byteorder

# Long runs are recognised 512 entries at a time: read as one big number, adjacent clusters are an
# arithmetic progression, first * (1, 1, 1, ...) + (0, step, 2 * step, ...). Ten times as fast as
# a loop over entries, without any library.
BATCH = 512
_ONES = int.from_bytes((1).to_bytes(8, byteorder) * BATCH, byteorder)
_progressions: dict[int, int] = {}


def run_ahead(entries: array[int], index: int, end: int, first: int, step: int) -> int:
    """How many entries from `index` on, in whole batches, are exactly first, first + step, ..."""
    count = 0
    while index + count + BATCH <= end and entries[index + count] == first:
        progression = _progressions.get(step)
        if progression is None:
            numbers = array("Q", range(0, BATCH * step, step) if step else bytes(8 * BATCH))
            progression = _progressions[step] = int.from_bytes(numbers, byteorder)
        batch = int.from_bytes(entries[index + count : index + count + BATCH], byteorder)
        if batch != first * _ONES + progression:
            break
        count += BATCH
        first += BATCH * step
    return count


class Consecutive:
    """Recognises, as it is stored, a table whose entries are clusters that follow one another.

    Such tables are what an image that was written in order consists of. All of them are parts of one long
    sequence of numbers, in which only the high bytes are not the same for all; so one comparison of bytes
    tells, ten times as fast as taking the numbers apart.

    bits: cluster size = 1 << bits. entries: how many a table has, of 8 bytes, big-endian.
    """

    __slots__ = ("_bits", "_entries", "_high", "_low_bytes", "_mask", "_sequence", "_span")

    def __init__(self, bits: int, entries: int) -> None:
        self._bits = bits
        self._entries = entries
        width = entries.bit_length()
        width += -(bits + width) % 8  # so that what the sequence does not say fills whole bytes
        self._span = 1 << width
        self._mask = self._span - 1
        self._low_bytes = bits + width >> 3
        self._sequence = bytearray()
        self._high = b""

    def first(self, raw: bytearray, flags: int) -> int:
        """The first entry, if the others follow it, all with the same ones of `flags` set, else 0."""
        start = int.from_bytes(raw[:8], "big")
        cluster = (start & ~flags) >> self._bits
        # A look at the last one saves the comparison of most tables that are otherwise.
        last = int.from_bytes(raw[-8:], "big")
        if last - start != self._entries - 1 << self._bits or not cluster or start & (1 << self._bits) - 1:
            return 0
        place, above = cluster & self._mask, start >> 8 * self._low_bytes
        inside = min(self._entries, self._span - place)
        if inside == self._entries:
            return start if self._same(raw, place, above) else 0
        one, other = raw[: inside * 8], raw[inside * 8 :]
        return start if self._same(one, place, above) and self._same(other, 0, above + 1) else 0

    def build(self, start: int) -> bytearray:
        """The table whose first entry is `start`, as it is stored."""
        place, above = start >> self._bits & self._mask, start >> 8 * self._low_bytes
        inside = min(self._entries, self._span - place)
        self._set_high(above)
        raw = self._sequence[place * 8 : (place + inside) * 8]
        if inside < self._entries:
            self._set_high(above + 1)
            raw += self._sequence[: (self._entries - inside) * 8]
        return raw

    def _same(self, raw: bytearray, place: int, above: int) -> bool:
        """Whether `raw` is the sequence from `place` on, with these high bytes."""
        self._set_high(above)
        # With a bytearray on the left this compares at the speed of memory, and nothing is copied.
        return raw == memoryview(self._sequence)[place * 8 : place * 8 + len(raw)]

    def _set_high(self, above: int) -> None:
        if not self._sequence:
            self._sequence = _sequence(self._bits, self._span)
            self._high = bytes(8 - self._low_bytes)
        high = above.to_bytes(8 - self._low_bytes, "big")
        if high != self._high:
            for column, (new, old) in enumerate(zip(high, self._high, strict=True)):
                if new != old:
                    self._sequence[column::8] = bytes((new,)) * self._span
            self._high = high


def _sequence(bits: int, span: int) -> bytearray:
    """0, 1 << bits, 2 << bits, ... as stored."""
    if bits % 8 or span % 256:
        numbers = array("Q", range(0, span << bits, 1 << bits))
        if byteorder == "little":
            numbers.byteswap()
        return bytearray(numbers.tobytes())
    sequence = bytearray(8 * span)
    repeat, column = 1, 7 - bits // 8
    while repeat < span:  # byte by byte: each value `repeat` times, over and over
        period = b"".join([bytes((value,)) * repeat for value in range(256)])
        sequence[column::8] = period * (span // len(period)) if len(period) <= span else period[:span]
        repeat *= 256
        column -= 1
    return sequence
