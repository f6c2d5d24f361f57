"""The contract of a storage: where bytes rest.

A storage is a flat run of bytes: a file, a device, memory, an NBD export, or a filter in
front of one. It knows nothing of formats. All I/O is positioned; there is no cursor.
"""

from __future__ import annotations

from ..errors import UnsupportedOperationError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

    from ..units import HostOffset
    from .bitmaps import Bitmaps
    from .runtime import Runtime

    ReadBuffer = bytes | bytearray | memoryview
    WriteBuffer = bytearray | memoryview


class Storage:
    """Base class of storages; the defaults are what a storage without extras does.

    name: path or URI, for messages.
    writable: whether writes are accepted.
    fixed_size: True where writes past the end do not make the storage longer (devices).
    identity: equal for two storages that are the same bytes (to find loops in a chain).
    """

    name: str
    runtime: Runtime
    writable: bool
    fixed_size: bool = False

    @property
    def identity(self) -> Hashable:
        return id(self)

    def size(self) -> int:
        """Length in bytes. Never waits."""
        raise NotImplementedError

    def allocated(self) -> int:
        """Bytes of the host's medium in use; -1 if nobody here can tell."""
        return self.size()

    def plain_fd(self) -> int:
        """A descriptor to which positioned reads, and writes inside `size()`, may go directly,
        past this storage; -1 if there is none. Valid until `close`."""
        return -1

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        """Fill `buffer` if that needs no waiting; False leaves its content undefined."""
        return False

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        """Fill the whole of `buffer`; what lies past the end reads as zeros.

        Raises HostError or PeerError.
        """
        raise NotImplementedError

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        """Write the whole of `buffer`, growing the storage if need be, or raise.

        After an error any part of the range may hold old or new bytes.
        """
        raise NotImplementedError

    def write_now(self, buffer: ReadBuffer, offset: HostOffset) -> bool:
        """As `write`, if that needs no waiting on this runtime; False: nothing was written."""
        return False

    async def flush(self) -> None:
        """Return once all earlier writes are durable. A failure is sticky (FlushFailedError)."""
        raise NotImplementedError

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeros; with `unmap` its space may be given back."""
        piece = bytes(min(length, 1 << 20))
        while length:
            n = min(length, len(piece))
            await self.write(memoryview(piece)[:n], offset)
            offset += n
            length -= n

    def zeroes_fast(self) -> bool:
        """Whether `write_zeroes` is sure not to write the zeros one by one."""
        return False

    async def discard(self, offset: HostOffset, length: int) -> None:
        """Advise that a range is not needed; its content is undefined afterwards."""

    async def truncate(self, size: int) -> None:
        """Set the length. Grown space reads as zeros."""
        raise UnsupportedOperationError("this storage cannot change its size", path=self.name)

    async def allocate(self, offset: HostOffset, length: int) -> None:
        """Reserve space so that later writes to the range do not run out of it; content is kept."""

    def lay_out(self, offset: HostOffset, length: int) -> bool:
        """Advice: all of this range will be written soon, so its place may be found at once. Neither content
        nor size change; what is not written after all is given back at `close`. False: no use to ask."""
        return False

    def write_behind(self, offset: HostOffset, length: int) -> None:
        """Advice: this range was written and will be flushed, so the medium may have it now. Never waits for
        it, and takes nothing of the flush's duty to report errors."""

    async def status(self, offset: HostOffset, length: int) -> tuple[bool, int]:
        """(reads as zeros for certain, for how many bytes from `offset` on, at least 1)."""
        return False, length

    async def copy_from(
        self, source: Storage, source_offset: HostOffset, offset: HostOffset, length: int
    ) -> int:
        """Copy inside the host without moving bytes through Python; how many were copied, 0 if it cannot."""
        return 0

    async def bitmaps(self, offset: HostOffset, length: int) -> Bitmaps:
        """The dirty bitmaps that are kept of a range by whoever is behind this storage."""
        raise UnsupportedOperationError("a raw image has no dirty bitmaps", path=self.name)

    async def hold(self, *, writing: bool) -> None:
        """Have the image's lock for writing, or go back to that of a reader. For a storage that is open for
        writing but written only now and then. Raises LockedError."""

    async def close(self) -> None:
        """Release the storage. Does not flush."""

    async def read(self, offset: HostOffset, length: int) -> bytearray:
        """`length` bytes in a new buffer. Callers bound `length`."""
        buffer = bytearray(length)
        await self.read_into(buffer, offset)
        return buffer
