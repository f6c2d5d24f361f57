"""What a power cut may leave: contents of a storage made up from the record of its changes.

The model: a flush that ended makes durable every change that had ended when the flush began. Of
the changes after that, each 512-byte sector holds any one of the contents it has had in time,
each sector for itself: so any subset of the changes, in any order, torn at sectors, is among the
states. A change of a part of a sector carries the rest of the sector along, as a page cache does.
A flush counts from where it began; a disk may be early.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from enban.filters import writelog
from enban.filters.writelog import Entry

SECTOR = 512


class Change:
    """A change that may be lost: the new contents of the sectors it touched, as they were after it."""

    __slots__ = ("ended", "sectors")

    def __init__(self, ended: int, sectors: dict[int, bytes]) -> None:
        self.ended = ended
        self.sectors = sectors


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
            if entry.kind == writelog.FLUSH:
                if entry.ended:
                    self._settle(entry.began)
            elif entry.kind != writelog.MARK:
                self._apply(entry)
            yield entry

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
                _put(self.durable, change.sectors)
                for older in kept:
                    for number in change.sectors.keys() & older.sectors.keys():
                        del older.sectors[number]
            else:
                kept.append(change)
        self.pending = [change for change in kept if change.sectors]

    # -- states ----------------------------------------------------------------------------

    def everything(self) -> bytearray:
        """All changes so far arrived: what killing the process leaves."""
        return bytearray(self._now)

    def subset(self, changes: list[Change]) -> bytearray:
        content = bytearray(self.durable)
        for change in changes:
            _put(content, change.sectors)
        return content

    def torn(self, random: Random) -> bytearray:
        """All but the last change, and of that one some sectors."""
        content = self.subset(self.pending[:-1])
        last = self.pending[-1].sectors
        _put(content, {n: last[n] for n in last if random.random() < 0.5})
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
                options.setdefault(number, []).append(data)
        content = bytearray(self.durable)
        for number, contents in options.items():
            choice = random.randrange(len(contents) + 1)
            if choice:
                _put(content, {number: contents[choice - 1]})
        return content


def _put(content: bytearray, sectors: dict[int, bytes]) -> None:
    for number, data in sectors.items():
        start = number * SECTOR
        content.extend(bytes(max(0, start + len(data) - len(content))))
        content[start : start + len(data)] = data
