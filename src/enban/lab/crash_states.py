"""What a power cut may leave: contents of a storage made up from the record of its changes.

The model: a flush that ended makes durable every change that had ended when the flush began. Of
the changes after that, each 512-byte sector holds any one of the contents it has had in time,
each sector for itself: so any subset of the changes, in any order, torn at sectors, is among the
states. A change of a part of a sector carries the rest of the sector along, as a page cache does.
A flush counts from where it began; a disk may be early.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from random import Random

from enban.filters import writelog
from enban.filters.writelog import Entry

SECTOR = 512


class Change:
    """A change that may be lost: the new contents of the sectors it touched, as they were after it.
    runs: the same as (offset, bytes) of adjacent sectors."""

    __slots__ = ("_runs", "ended", "sectors")

    def __init__(self, ended: int, sectors: dict[int, bytes]) -> None:
        self.ended = ended
        self.sectors = sectors
        self._runs: list[tuple[int, bytes]] | None = None

    @property
    def runs(self) -> list[tuple[int, bytes]]:
        if self._runs is None:
            parts: list[tuple[int, list[bytes]]] = []
            last = -2
            for number, data in self.sectors.items():  # in the order of their numbers
                if number == last + 1:
                    parts[-1][1].append(data)
                else:
                    parts.append((number * SECTOR, [data]))
                last = number
            self._runs = [(start, b"".join(pieces)) for start, pieces in parts]
        return self._runs

    def without(self, numbers: set[int]) -> None:
        for number in numbers:
            del self.sectors[number]
        self._runs = None


class Replay:
    """The storage at one moment of the record: what is durable, and the pending changes in order."""

    def __init__(self, content: bytes, record: list[Entry]) -> None:
        self.durable = bytearray(content)
        self.record = record
        self.pending: list[Change] = []
        self._now = bytearray(content)  # all changes in order

    def steps(self) -> Iterator[Entry]:
        """Go through the record; after each entry `pending` and `durable` are as they are then."""
        for entry in self.record:
            self.take(entry)
            yield entry

    def take(self, entry: Entry) -> None:
        """Go on by one entry. (For a record that several storages share, each with its own replay.)"""
        if entry.kind == writelog.FLUSH:
            if entry.ended:
                self._settle(entry.began)
        elif entry.kind != writelog.MARK:
            self._apply(entry)

    def _apply(self, entry: Entry) -> None:
        now, offset, length = self._now, entry.offset, entry.length
        if entry.kind == writelog.TRUNCATE:
            assert offset >= len(now), "shrinking a file is not modelled"
            offset, length = len(now), offset - len(now)
        elif entry.kind == writelog.DISCARD:
            length = max(0, min(length, len(now) - offset))
        end = offset + length
        now.extend(bytes(max(0, end - len(now))))
        now[offset:end] = entry.data if entry.kind == writelog.WRITE else bytes(length)
        touched = range(offset // SECTOR, -(-end // SECTOR))
        self.pending.append(
            Change(entry.ended, {n: bytes(now[n * SECTOR : (n + 1) * SECTOR]) for n in touched})
        )

    def _settle(self, moment: int) -> None:
        """What had ended before `moment` is durable, and nothing older can come over it any more."""
        kept: list[Change] = []
        for change in self.pending:
            if change.ended and change.ended < moment:
                _put(self.durable, change)
                for older in kept:
                    common = change.sectors.keys() & older.sectors.keys()
                    if common:
                        older.without(common)
            else:
                kept.append(change)
        self.pending = [change for change in kept if change.sectors]

    # -- states ----------------------------------------------------------------------------

    def some(self, random: Random) -> bytearray:
        """One state of any kind."""
        choice = random.randrange(4) if self.pending else 0
        if choice == 0:
            return self.everything()
        if choice == 1:
            return self.torn(random)
        return self.scattered(random) if choice == 2 else next(self.subsets(random, 1))

    def everything(self) -> bytearray:
        """All changes so far arrived: what killing the process leaves."""
        return bytearray(self._now)

    def subset(self, changes: list[Change]) -> bytearray:
        content = bytearray(self.durable)
        for change in changes:
            _put(content, change)
        return content

    def torn(self, random: Random) -> bytearray:
        """All but the last change, and of that one some sectors."""
        content = self.subset(self.pending[:-1])
        last = self.pending[-1].sectors
        mask = random.getrandbits(len(last))
        for place, (number, data) in enumerate(last.items()):
            if mask >> place & 1:
                _put_sector(content, number, data)
        return content

    def subsets(self, random: Random, most: int) -> Iterator[bytearray]:
        """Whole changes missing: all subsets if they are few, else random ones."""
        count = len(self.pending)
        if 1 << count <= most:
            chosen: list[int] = list(range(1 << count))
        else:
            chosen = [random.getrandbits(count) for _ in range(most)]
        for mask in chosen:
            yield self.subset([change for i, change in enumerate(self.pending) if mask >> i & 1])

    def scattered(self, random: Random) -> bytearray:
        """Each sector holds any of the contents it had since the last flush."""
        options: dict[int, list[bytes]] = {}
        for change in self.pending:
            for number, data in change.sectors.items():
                have = options.get(number)
                if have is None:
                    options[number] = [data]
                else:
                    have.append(data)
        content = bytearray(self.durable)
        numbers = array("I", random.randbytes(4 * len(options)))
        for (number, contents), dice in zip(options.items(), numbers, strict=True):
            choice = dice % (len(contents) + 1)
            if choice:
                _put_sector(content, number, contents[choice - 1])
        return content


def _put(content: bytearray, change: Change) -> None:
    for start, data in change.runs:
        if start > len(content):
            content.extend(bytes(start - len(content)))
        content[start : start + len(data)] = data


def _put_sector(content: bytearray, number: int, data: bytes) -> None:
    start = number * SECTOR
    if start > len(content):
        content.extend(bytes(start - len(content)))
    content[start : start + len(data)] = data
