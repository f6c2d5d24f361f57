"""A disk as a Python file object, so that other libraries can read and write it."""

from __future__ import annotations

import io

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .disk import Disk


class DiskStream(io.RawIOBase):
    """A seekable raw stream over a range of a disk. It cannot grow the disk; closing it leaves
    the disk open. Wrap it in io.BufferedReader or io.BufferedRandom for small reads."""

    def __init__(self, disk: Disk, start: int, length: int) -> None:
        super().__init__()
        self._disk = disk
        self._start = start
        self._length = length
        self._position = 0

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return self._disk.writable

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}.get(whence)
        if base is None:
            raise ValueError(f"invalid whence {whence}")
        if base + offset < 0:
            raise ValueError(f"negative seek position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        n = max(0, min(len(view), self._length - self._position))
        self._disk.readinto(view[:n], self._start + self._position)
        self._position += n
        return n

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        n = max(0, min(len(view), self._length - self._position))
        if len(view) and not n:
            raise OSError(28, "end of the disk")
        self._disk.pwrite(view[:n], self._start + self._position)
        self._position += n
        return n

    def flush(self) -> None:
        if not self.closed and not self._disk.door.closed and self._disk.writable:
            self._disk.flush()
