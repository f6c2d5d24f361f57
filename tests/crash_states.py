"""What a power cut may leave: contents of a storage made up from the record of its changes.

The model: a flush that ended makes durable every change that had ended when the flush began.
Of the changes after that, each 512-byte sector holds any one of the contents it had in time,
each sector for itself (so any subset, in any order, torn at sectors, is among the states), and
the file is as long as any of them left it that lets the durable ones stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from enban.filters import writelog
from enban.filters.writelog import Entry

SECTOR = 512


class Replay:
    """The storage at one moment of the record: what is durable and what may be lost."""

    def __init__(self, content: bytes, record: list[Entry]) -> None:
        self.durable = bytearray(content)
        self.record = record
        self.pending: list[Entry] = []
        self._now = bytearray(content)  # all changes in order

    def steps(self) -> Iterator[Entry]:
        """Go through the record; after each entry `pending` and `durable` are as they are then."""
        for entry in self.record:
            if entry.kind == writelog.FLUSH:
                if entry.ended:
                    kept = [e for e in self.pending if not e.ended or e.ended > entry.began]
                    for change in self.pending:
                        if change not in kept:
                            apply(self.durable, change)
                    self.pending = kept
            elif entry.kind != writelog.MARK:
                apply(self._now, entry)
                self.pending.append(self._whole_sectors(entry))
            yield entry

    def _whole_sectors(self, change: Entry) -> Entry:
        """The change as the disk gets it: a write of a part of a sector carries the rest of it along."""
        start = change.offset // SECTOR * SECTOR
        end = -(-(change.offset + change.length) // SECTOR) * SECTOR
        whole = (start, end) == (change.offset, change.offset + change.length)
        if whole or change.kind not in (writelog.WRITE, writelog.ZERO):
            return change
        data = bytes(self._now[start:end])
        widened = Entry(writelog.WRITE, change.began, start, len(data), data=data)
        widened.ended = change.ended
        return widened

    # -- states ----------------------------------------------------------------------------

    def everything(self) -> bytearray:
        """All changes so far arrived: what killing the process leaves."""
        return bytearray(self._now)

    def subset(self, changes: list[Entry]) -> bytearray:
        content = bytearray(self.durable)
        for change in changes:
            apply(content, change)
        return content

    def torn(self, random: Random) -> bytearray:
        """All but the last change, and of that one some sectors."""
        content = self.subset(self.pending[:-1])
        after = bytearray(content)
        apply(after, self.pending[-1])
        return mix([content, after], random)

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
        stages = [bytearray(self.durable)]
        for change in self.pending:
            after = bytearray(stages[-1])
            apply(after, change)
            stages.append(after)
        return mix(stages, random)


def apply(content: bytearray, change: Entry) -> None:
    offset, length = change.offset, change.length
    if change.kind == writelog.TRUNCATE:
        content.extend(bytes(max(0, offset - len(content))))
        del content[offset:]
        return
    if change.kind == writelog.DISCARD:
        length = max(0, min(length, len(content) - offset))
    end = offset + length
    content.extend(bytes(max(0, end - len(content))))
    content[offset:end] = change.data if change.kind == writelog.WRITE else bytes(length)


def mix(stages: list[bytearray], random: Random) -> bytearray:
    """A content of which each sector comes from one of the stages; as long as the longest."""
    size = max(map(len, stages))
    for stage in stages:
        stage.extend(bytes(size - len(stage)))
    content = bytearray(stages[-1])
    for start in range(0, size, SECTOR):
        options = [stage[start : start + SECTOR] for stage in stages]
        if any(option != options[0] for option in options):
            content[start : start + SECTOR] = random.choice(options)
    return content
