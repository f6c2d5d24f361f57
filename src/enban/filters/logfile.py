"""A storage that writes every change to a log file, in the format of Linux's dm-log-writes.

The log can be replayed by xfstests' `replay-log` and cut into crash states by the lab. Numbers are
little-endian; sectors have 512 bytes:

    sector 0        u64 magic, u64 version 1, u64 number of entries, u32 sector size
    each entry      a sector {u64 sector, u64 sectors, u64 flags, u64 0}, then the sectors' data

An entry is written when its call has ended, so the order is that of the ends. A change of a part of
a sector is logged as the whole sector, read back; zeros are logged as data.
"""

from __future__ import annotations

import _thread

from ..errors import from_oserror
from ..units import SECTOR, align_down, align_up
from .base import Filter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.storage import ReadBuffer, Storage
    from ..units import HostOffset

MAGIC = 0x6A736677736872
FLUSH, DISCARD = 1, 4


class LogFile(Filter):
    """path: of the log, which is made anew. Raises HostError; so do calls if the log cannot be written."""

    def __init__(self, below: Storage, path: str) -> None:
        super().__init__(below)
        self.entries = 0
        from io import BufferedWriter, FileIO

        self._path = path
        self._guard = _thread.allocate_lock()
        try:
            self._file = BufferedWriter(FileIO(path, "w"))
            self._write_start()
        except OSError as error:
            raise from_oserror(error, "write the log", path) from None

    def _write_start(self) -> None:
        fields = (MAGIC.to_bytes(8, "little"), (1).to_bytes(8, "little"), self.entries.to_bytes(8, "little"))
        self._file.seek(0)
        self._file.write(b"".join((*fields, SECTOR.to_bytes(4, "little"))).ljust(SECTOR, b"\0"))
        self._file.seek(0, 2)

    def _log(self, offset: int, length: int, flags: int, data: bytes | bytearray) -> None:
        header = b"".join(n.to_bytes(8, "little") for n in (offset // SECTOR, length // SECTOR, flags, 0))
        try:
            with self._guard:
                self._file.write(header.ljust(SECTOR, b"\0"))
                self._file.write(data)
                self.entries += 1
        except OSError as error:
            raise from_oserror(error, "write the log", self._path) from None

    async def _log_range(self, offset: int, length: int) -> None:
        """The present content of the sectors that a range touches, a piece at a time."""
        end = align_up(offset + length, SECTOR)
        start = align_down(offset, SECTOR)
        while start < end:
            n = min(end - start, 1 << 20)
            self._log(start, n, 0, await self.below.read(start, n))
            start += n

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self.below.write(buffer, offset)
        await self._log_range(offset, len(buffer))

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        await self.below.write_zeroes(offset, length, unmap=unmap)
        await self._log_range(offset, length)

    async def discard(self, offset: HostOffset, length: int) -> None:
        await self.below.discard(offset, length)
        start, end = align_up(offset, SECTOR), align_down(offset + length, SECTOR)
        if start < end:
            self._log(start, end - start, DISCARD, b"")

    async def truncate(self, size: int) -> None:
        old = self.size()
        await self.below.truncate(size)
        if size > old:
            await self._log_range(old, size - old)

    async def flush(self) -> None:
        await self.below.flush()
        self._log(0, 0, FLUSH, b"")

    async def close(self) -> None:
        try:
            await self.below.close()
        finally:
            try:
                with self._guard:
                    self._write_start()
                    self._file.close()
            except OSError as error:
                raise from_oserror(error, "write the log", self._path) from None
