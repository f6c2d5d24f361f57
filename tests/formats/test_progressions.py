"""Runs of adjacent clusters, recognised many at a time."""

from __future__ import annotations

from array import array
from random import Random
from sys import byteorder

import pytest

from enban.formats.common.progressions import Consecutive, run_ahead

COPIED = 1 << 63


def stored(entries: list[int]) -> bytearray:
    numbers = array("Q", entries)
    if byteorder == "little":
        numbers.byteswap()
    return bytearray(numbers.tobytes())


@pytest.mark.parametrize(("bits", "entries"), [(9, 64), (12, 512), (16, 8192), (13, 1024), (17, 16384)])
def test_consecutive_tables(bits: int, entries: int) -> None:
    random = Random(bits)
    known = Consecutive(bits, entries)
    for _ in range(40):
        first = random.choice([1, entries - 3, (1 << 16) - 5, 1 << 20, random.randrange(1, 1 << 55 - bits)])
        start = first << bits | random.choice([0, COPIED])
        table = [start + (place << bits) for place in range(entries)]
        raw = stored(table)
        assert known.first(raw, COPIED) == start
        assert known.build(start) == raw
        assert run_ahead(array("Q", table), 0, entries, start, 1 << bits) == entries // 512 * 512
        # One bit anywhere else makes it something else.
        place = random.randrange(entries)
        table[place] ^= 1 << random.randrange(64)
        if place or (table[0] & ~COPIED) >> bits != first:
            assert known.first(stored(table), COPIED) == 0
    assert known.first(stored([0] * entries), COPIED) == 0
    assert (
        known.first(stored([place << bits for place in range(entries)]), COPIED) == 0
    )  # the header's cluster
    assert known.first(stored([(place + 7 << bits) + 1 for place in range(entries)]), COPIED) == 0
