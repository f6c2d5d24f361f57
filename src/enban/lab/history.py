"""What a disk may hold after (or during) requests that overlap in time.

The disk is seen as cells of 64 bytes. Each write puts its own stamp into its cells. A request
is known by the moment it was begun and the moment its end was known. A cell may hold the value
of a write unless another write that is certain to have happened began after that one had ended
(and, for a read, had ended before the read began). A cancelled write and a discard are not
certain to have happened.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

CELL = 64


class Event:
    """A change of some cells. value: their content. certain: False for a request that may have had
    no effect. ended: None while it runs."""

    __slots__ = ("began", "certain", "ended", "first", "last", "value")

    def __init__(self, began: int, first: int, last: int, value: bytes) -> None:
        self.began = began
        self.ended: int | None = None
        self.certain = False
        self.first = first
        self.last = last
        self.value = value


class History:
    """All changes of one disk. Safe to use from many threads."""

    def __init__(self, content: bytes | bytearray) -> None:
        assert not len(content) % CELL
        self.initial = bytes(content)
        self._clock = count(1)
        self._stamps = count(1)
        self.events: list[Event] = []
        self.tick: Callable[[int], None] | None = None  # told of each moment

    def now(self) -> int:
        moment = next(self._clock)
        if self.tick is not None:
            self.tick(moment)
        return moment

    def stamp(self) -> bytes:
        """The content of one cell, different each time."""
        return next(self._stamps).to_bytes(8, "big") * (CELL // 8)

    def begin(self, offset: int, length: int, value: bytes) -> Event:
        assert not offset % CELL and not length % CELL
        event = Event(self.now(), offset // CELL, (offset + length) // CELL, value)
        self.events.append(event)
        return event

    def end(self, event: Event, *, certain: bool) -> None:
        event.certain = certain
        event.ended = self.now()

    def by_cell(self) -> list[list[Event]]:
        cells: list[list[Event]] = [[] for _ in range(len(self.initial) // CELL)]
        for event in self.events:
            for cell in range(event.first, event.last):
                cells[cell].append(event)
        return cells

    def check_crash(self, content: bytes, flushed: int, now: int, cells: list[list[Event]]) -> None:
        """content: the whole disk after a power cut at the moment `now`, when the last acknowledged
        flush had begun at `flushed`; what had ended by then must be there. cells: from `by_cell`."""
        for cell, events in enumerate(cells):
            self._check_cell(cell, events, content[cell * CELL : cell * CELL + CELL], flushed, now + 1)

    def check(self, content: bytes, reads: list[tuple[int, int, int, bytes]]) -> None:
        """content: the whole disk when nothing runs any more. reads: (began, ended, offset, bytes)."""
        cells = self.by_cell()
        end = self.now()
        for cell, events in enumerate(cells):
            self._check_cell(cell, events, content[cell * CELL : cell * CELL + CELL], end, end + 1)
        self.check_reads(reads)

    def check_reads(self, reads: list[tuple[int, int, int, bytes]]) -> None:
        """reads: (began, ended, offset, bytes)."""
        cells = self.by_cell()
        for began, ended, offset, data in reads:
            for cell in range(offset // CELL, (offset + len(data)) // CELL):
                at = cell * CELL - offset
                self._check_cell(cell, cells[cell], data[at : at + CELL], began, ended)

    def _check_cell(self, cell: int, events: list[Event], seen: bytes, began: int, ended: int) -> None:
        settled = [e for e in events if e.certain and e.ended is not None and e.ended < began]
        newest_start = max((e.began for e in settled), default=0)
        if newest_start == 0 and seen == self.initial[cell * CELL : cell * CELL + CELL]:
            return
        for event in events:
            not_overwritten = event.ended is None or event.ended >= newest_start
            if event.value == seen and event.began < ended and not_overwritten:
                return
        raise AssertionError(
            f"cell at {cell * CELL:#x} holds {seen[:8].hex()}, which no order of the requests explains"
        )
