"""L2 tables in memory, and tables of big-endian numbers on disk.

An L2 table is an array of the entries as numbers (two numbers an entry in an image with
extended L2 entries). Tables are loaded on demand and kept up to a limit; a table that is
changed, being written by a barrier or named by a reservation stays. `TakenTables` is what a
barrier makes of the changed ones.
"""

from __future__ import annotations

import sys
from array import array

from ...units import SECTOR

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...units import HostOffset

SECTOR_ENTRIES = 64  # numbers of 8 bytes in a 512-byte sector


def sector_runs(sectors: set[int]) -> list[tuple[int, int]]:
    """Byte ranges [start, end) covering a set of sector numbers, adjacent ones joined."""
    found: list[tuple[int, int]] = []
    for sector in sorted(sectors):
        start = sector * SECTOR
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], start + SECTOR)
        else:
            found.append((start, start + SECTOR))
    return found


def from_big_endian(raw: bytes | bytearray) -> array[int]:
    """Big-endian 64-bit numbers as an array."""
    numbers = array("Q", bytes(raw))
    if sys.byteorder == "little":
        numbers.byteswap()
    return numbers


def to_big_endian(numbers: array[int], start: int = 0, end: int | None = None) -> bytes:
    part = numbers[start:end]
    if sys.byteorder == "little":
        part.byteswap()
    return part.tobytes()


def toggle(numbers: array[int], first: int, count: int, flag: int, step: int) -> None:
    """Flip a flag in the `count` entries from entry `first` on, every entry `step` numbers long."""
    start, end = first * step, (first + count) * step
    pattern = flag.to_bytes(8, sys.byteorder) + bytes(8 * (step - 1))
    flipped = int.from_bytes(numbers[start:end], sys.byteorder) ^ int.from_bytes(
        pattern * count, sys.byteorder
    )
    numbers[start:end] = array("Q", flipped.to_bytes(8 * (end - start), sys.byteorder))


class L2Table:
    """One L2 table. `fresh`: the L1 table on disk does not point here yet, so the whole table
    may be written at any time. `pins`: reservations that will publish into it. `writable`:
    it is ours alone and its entries were checked against the metadata."""

    __slots__ = ("busy", "dirty", "entries", "fresh", "offset", "pins", "writable")

    def __init__(self, offset: HostOffset, entries: array[int], *, fresh: bool) -> None:
        self.offset = offset
        self.entries = entries
        self.dirty: set[int] = set()  # changed 512-byte sectors
        self.fresh = fresh
        self.pins = 0
        self.busy = 0
        self.writable = fresh


class TableCache:
    """L2 tables by L1 index.

    readable, overwritable: the entries alone, for the hot paths: any table in memory, and those
        that may be written in place without a further look.
    limit: bytes of tables to keep; dirty_limit: bytes of changed tables that call for a barrier.
    """

    def __init__(self, table_bytes: int, limit: int = 32 << 20) -> None:
        self.tables: dict[int, L2Table] = {}
        self.readable: dict[int, array[int]] = {}
        self.overwritable: dict[int, array[int]] = {}
        self.most = max(4, limit // (table_bytes + 1024))  # a small table costs more than its entries
        self.most_dirty = max(2, self.most // 2)
        self.dirty: set[int] = set()  # L1 indexes of changed tables

    def insert(self, index: int, table: L2Table) -> None:
        self.tables[index] = table
        self.readable[index] = table.entries
        if table.writable:
            self.overwritable[index] = table.entries
        else:
            self.overwritable.pop(index, None)
        if len(self.tables) > self.most:
            self._trim(index)

    def remove(self, index: int) -> None:
        self.tables.pop(index, None)
        self.readable.pop(index, None)
        self.overwritable.pop(index, None)
        self.dirty.discard(index)

    def clear(self) -> None:
        for index in list(self.tables):
            self.remove(index)

    def allow_overwrite(self, index: int) -> None:
        table = self.tables[index]
        table.writable = True
        self.overwritable[index] = table.entries

    def _trim(self, keep: int) -> None:
        idle = [
            i for i, t in self.tables.items() if not (t.dirty or t.fresh or t.pins or t.busy) and i != keep
        ]
        for index in idle[: len(self.tables) - self.most + self.most // 8]:
            self.remove(index)

    def touch(self, index: int, first: int, count: int) -> None:
        """Numbers [first, first+count) of a table were changed."""
        table = self.tables[index]
        table.dirty.update(range(first // SECTOR_ENTRIES, (first + count - 1) // SECTOR_ENTRIES + 1))
        self.dirty.add(index)


class TakenTables:
    """The changes of all tables of a cache at one moment, taken by a barrier that writes them.

    whole: (offset, bytes) of tables that nobody on disk points to yet, so they may be written at any time.
    parts: of the others, the sectors that changed.
    """

    def __init__(self, cache: TableCache) -> None:
        self._cache = cache
        self.whole: list[tuple[HostOffset, bytes]] = []
        self.parts: list[tuple[HostOffset, bytes]] = []
        self._tables: list[tuple[int, L2Table, set[int], bool]] = []
        for index in sorted(cache.dirty):
            table = cache.tables[index]
            if table.fresh:
                self.whole.append((table.offset, to_big_endian(table.entries)))
            else:
                self.parts.extend(
                    (table.offset + start, to_big_endian(table.entries, start // 8, end // 8))
                    for start, end in sector_runs(table.dirty)
                )
            self._tables.append((index, table, table.dirty, table.fresh))
            table.busy += 1
            table.dirty = set()
            table.fresh = False
        cache.dirty.clear()

    def release(self) -> None:
        """The barrier is over."""
        for _, table, _, _ in self._tables:
            table.busy -= 1

    def restore(self, *, settled: bool) -> None:
        """Put back among the changes what may not have reached the disk. settled: whole tables are durable
        there and may be pointed to already, so from now on they are changed like any other."""
        for index, table, dirty, fresh in self._tables:
            if not (fresh and settled):
                table.dirty |= dirty
                table.fresh |= fresh
                self._cache.dirty.add(index)
