"""A storage that tells of every call made to it, when it has ended.

One line of JSON a call: `us` since the filter was made, `op`, `offset` and `length` in bytes, how
long it `took` in microseconds, and `error` if it failed. (`enban serve --trace` shows whole
requests; this shows what reaches one storage.)
"""

from __future__ import annotations

import _thread
import time

from ..errors import from_oserror
from .base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from ..block.storage import ReadBuffer, Storage, WriteBuffer
    from ..units import HostOffset


class Trace(Filter):
    """tell: called with each line, without its end; from any thread, one at a time. close: called with
    nothing when the storage is closed."""

    def __init__(
        self, below: Storage, tell: Callable[[str], object], close: Callable[[], object] | None = None
    ) -> None:
        super().__init__(below)
        self._tell = tell
        self._close = close
        self._began = time.monotonic_ns()
        self._guard = _thread.allocate_lock()

    async def _watch(self, op: str, offset: int, length: int, work: Coroutine[Any, Any, None]) -> None:
        start = time.monotonic_ns()
        try:
            await work
        except BaseException as error:
            self._say(op, offset, length, start, error)
            raise
        self._say(op, offset, length, start, None)

    def _say(self, op: str, offset: int, length: int, start: int, error: BaseException | None) -> None:
        from json import dumps

        now = time.monotonic_ns()
        line: dict[str, object] = {
            "us": (start - self._began) // 1000,
            "op": op,
            "offset": offset,
            "length": length,
            "took": (now - start) // 1000,
        }
        if error is not None:
            line["error"] = str(error) or type(error).__name__
        text = dumps(line)
        with self._guard:
            self._tell(text)

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        return False

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self._watch("read", offset, len(buffer), self.below.read_into(buffer, offset))

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self._watch("write", offset, len(buffer), self.below.write(buffer, offset))

    async def flush(self) -> None:
        await self._watch("flush", 0, 0, self.below.flush())

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        await self._watch("zero", offset, length, self.below.write_zeroes(offset, length, unmap=unmap))

    async def discard(self, offset: HostOffset, length: int) -> None:
        await self._watch("discard", offset, length, self.below.discard(offset, length))

    async def truncate(self, size: int) -> None:
        await self._watch("truncate", size, 0, self.below.truncate(size))

    async def allocate(self, offset: HostOffset, length: int) -> None:
        await self._watch("allocate", offset, length, self.below.allocate(offset, length))

    async def close(self) -> None:
        try:
            await self.below.close()
        finally:
            if self._close is not None:
                self._close()


def trace_to_file(below: Storage, path: str) -> Trace:
    """A trace into a file, which is made anew. Raises HostError."""
    from io import FileIO, TextIOWrapper

    try:
        file = TextIOWrapper(FileIO(path, "w"), encoding="utf-8")
    except OSError as error:
        raise from_oserror(error, "write the trace", path) from None
    return Trace(below, lambda line: file.write(line + "\n"), file.close)
