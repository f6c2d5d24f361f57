"""Host block devices: a file storage that asks the kernel for what files do not have.

A device has a fixed size and a logical block size, the smallest piece it zeroes, discards and
reads past the page cache; it may be read-only; and it may be somebody's already. Opened for
writing it is claimed (O_EXCL): a mounted file system, an LVM or RAID member is refused, and
nobody can mount it meanwhile.

Zeroing and discarding round inwards to logical blocks: the kernel takes no others.
"""

from __future__ import annotations

import errno

from ..errors import from_oserror
from ..units import align_down, align_up
from . import host
from . import kernel as k
from .file import DIRECT_ALIGNMENT, FileStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..block.runtime import Runtime
    from ..units import HostOffset

_UNABLE = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOTTY, errno.ENOSYS)


class DeviceStorage(FileStorage):
    """A block device. logical_block, physical_block: bytes. read_only: the device takes no writes."""

    def __init__(
        self,
        path: str,
        fd: int,
        runtime: Runtime,
        *,
        writable: bool,
        cache: str,
        kernel: k.Kernel | None = None,
    ) -> None:
        super().__init__(path, fd, runtime, writable=writable, cache=cache)
        self._kernel = kernel or k.KERNEL
        self.logical_block = self._number(k.BLKSSZGET) or 512
        self.physical_block = self._number(k.BLKPBSZGET) or self.logical_block
        self.read_only = bool(self._number(k.BLKROGET))
        self._size = self._number(k.BLKGETSIZE64, 8) or self._size
        self._alignment = max(DIRECT_ALIGNMENT, self.logical_block)

    def _number(self, request: int, width: int = 4) -> int:
        """0 where the device does not tell."""
        try:
            return k.number(self._kernel, self._fd, request, width)
        except OSError as error:
            if error.errno in _UNABLE:
                return 0
            raise

    def _whole_blocks(self, offset: HostOffset, length: int) -> tuple[HostOffset, int]:
        """The whole logical blocks in a range: (where they begin, their length, which may be 0)."""
        first = align_up(offset, self.logical_block)
        return first, max(0, align_down(min(offset + length, self._size), self.logical_block) - first)

    def _zero(self, offset: HostOffset, length: int, unmap: bool) -> bool:
        end = offset + length
        first, inner = self._whole_blocks(offset, length)
        if not inner or end > self._size:
            return False
        try:
            if not (unmap and host.punch_hole(self._fd, first, inner)):
                self._range_ioctl(k.BLKZEROOUT, first, inner)
        except OSError as error:
            if error.errno in _UNABLE:
                return False
            raise from_oserror(error, "write zeroes", self.name, offset) from error
        for start, stop in ((offset, first), (first + inner, end)):
            if start < stop:
                self._write(memoryview(bytes(stop - start)), start)
        return True

    async def discard(self, offset: HostOffset, length: int) -> None:
        first, inner = self._whole_blocks(offset, length)
        if inner:
            try:
                await self.runtime.offload(self._range_ioctl, k.BLKDISCARD, first, inner)
            except OSError as error:
                if error.errno not in _UNABLE:  # a device that cannot discard loses nothing
                    raise from_oserror(error, "discard", self.name, offset) from error

    def _range_ioctl(self, request: int, offset: HostOffset, length: int) -> None:
        from struct import pack

        self._kernel.ioctl(self._fd, request, bytearray(pack("=QQ", offset, length)))
