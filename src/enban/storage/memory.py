"""Bytes in memory as a storage: for tests, scratch disks and small images."""

from __future__ import annotations

from ..block.storage import Storage
from ..errors import NoSpaceError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.runtime import Runtime
    from ..block.storage import ReadBuffer, WriteBuffer
    from ..units import HostOffset


class MemoryStorage(Storage):
    """A growing run of bytes, at most `limit` long. Everything completes in line."""

    def __init__(
        self, runtime: Runtime, data: bytes | bytearray = b"", *, name: str = "memory", limit: int = 1 << 40
    ) -> None:
        self.name = name
        self.runtime = runtime
        self.writable = True
        self.limit = limit
        self.content = bytearray(data)

    def size(self) -> int:
        return len(self.content)

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        view = memoryview(buffer)
        part = self.content[offset : offset + len(view)]
        view[: len(part)] = part
        if len(part) < len(view):
            view[len(part) :] = bytes(len(view) - len(part))
        return True

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        self.read_now(buffer, offset)

    def write_now(self, buffer: ReadBuffer, offset: HostOffset) -> bool:
        self._reach(offset + len(buffer), offset)
        self.content[offset : offset + len(buffer)] = buffer
        return True

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        self.write_now(buffer, offset)

    def _reach(self, end: int, offset: HostOffset) -> None:
        if end > self.limit:
            raise NoSpaceError("cannot write: no space left", path=self.name, offset=offset, errno=28)
        if end > len(self.content):
            self.content.extend(bytes(end - len(self.content)))

    async def flush(self) -> None:
        pass

    async def truncate(self, size: int) -> None:
        self._reach(size, size)
        del self.content[size:]
