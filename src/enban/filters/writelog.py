"""A storage that keeps a record of every change made to it.

From the record and the content at the start, the content after a power cut at any moment can
be made up. The rule that decides what may be missing then: a flush that ended makes durable
the changes that had *ended* when the flush began; a change that was still under way may be
lost. So the record has the moment each entry began and the moment it ended, counted in steps.
"""

from __future__ import annotations

import _thread

from .base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.storage import ReadBuffer, Storage
    from ..units import HostOffset

WRITE = "write"
ZERO = "zero"
DISCARD = "discard"
TRUNCATE = "truncate"
FLUSH = "flush"
MARK = "mark"


class Entry:
    """One call. offset, length: its range in bytes (for TRUNCATE the new size as `offset`). data: the
    bytes of a WRITE. note: what a MARK says. began, ended: steps of the log; `ended` is 0 while the call
    is under way and stays 0 if it failed."""

    __slots__ = ("began", "data", "ended", "kind", "length", "note", "offset")

    def __init__(
        self,
        kind: str,
        began: int,
        offset: HostOffset = 0,
        length: int = 0,
        *,
        data: bytes = b"",
    ) -> None:
        self.kind = kind
        self.began = began
        self.ended = 0
        self.offset = offset
        self.length = length
        self.data = data
        self.note: object = None

    def __repr__(self) -> str:
        return f"<{self.kind} {self.offset:#x}+{self.length:#x} {self.began}..{self.ended or '?'}>"


class WriteLog(Filter):
    """entries: the record, in the order the calls began."""

    def __init__(self, below: Storage) -> None:
        super().__init__(below)
        self.entries: list[Entry] = []
        self._step = 0
        self._guard = _thread.allocate_lock()

    def _begin(self, kind: str, offset: HostOffset = 0, length: int = 0, data: bytes = b"") -> Entry:
        with self._guard:
            self._step += 1
            entry = Entry(kind, self._step, offset, length, data=data)
            self.entries.append(entry)
        return entry

    def _end(self, entry: Entry) -> None:
        with self._guard:
            self._step += 1
            entry.ended = self._step

    def mark(self, note: object) -> None:
        """Tie what the caller knows at this moment (a request began, a flush was answered) to the record."""
        entry = self._begin(MARK)
        entry.note = note
        entry.ended = entry.began

    def write_now(self, buffer: ReadBuffer, offset: HostOffset) -> bool:
        entry = self._begin(WRITE, offset, len(buffer), bytes(buffer))
        if not self.below.write_now(buffer, offset):
            with self._guard:
                self.entries.remove(entry)  # nothing was written
            return False
        self._end(entry)
        return True

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        entry = self._begin(WRITE, offset, len(buffer), bytes(buffer))
        await self.below.write(buffer, offset)
        self._end(entry)

    async def flush(self) -> None:
        entry = self._begin(FLUSH)
        await self.below.flush()
        self._end(entry)

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        entry = self._begin(ZERO, offset, length)
        await self.below.write_zeroes(offset, length, unmap=unmap)
        self._end(entry)

    async def discard(self, offset: HostOffset, length: int) -> None:
        entry = self._begin(DISCARD, offset, length)
        await self.below.discard(offset, length)
        self._end(entry)

    async def truncate(self, size: int) -> None:
        entry = self._begin(TRUNCATE, size)
        await self.below.truncate(size)
        self._end(entry)
