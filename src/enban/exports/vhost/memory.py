"""The guest's memory in this process, and the log of the pages that were written.

Who passes a file could cut it off later, and touching what is gone would end this process (SIGBUS). QEMU
seals its memory against that; any other front-end is trusted as far as whoever may connect to the socket is.
"""

from __future__ import annotations

import mmap
import os

from ...errors import PeerError
from ...wire.vhost_user import LOG_PAGE, Region
from ...wire.virtqueue import Memory


class GuestMemory:
    """The regions of a memory table, mapped. memory: by the guest's addresses. Closes no descriptor."""

    def __init__(self, regions: list[Region], fds: list[int]) -> None:
        if len(fds) != len(regions):
            raise PeerError(f"a memory table of {len(regions)} regions with {len(fds)} descriptors")
        self._by_user: list[tuple[int, int, memoryview]] = []
        parts = []
        for region, fd in zip(regions, fds, strict=True):
            view = _map(fd, region.file_offset, region.size)
            parts.append((region.guest, region.guest + region.size, view))
            self._by_user.append((region.user, region.user + region.size, view))
        parts.sort(key=lambda part: part[0] - part[1])  # the largest is asked for most
        self.memory = Memory(parts)

    def at_user(self, address: int, length: int) -> memoryview | None:
        """The bytes of a range in the front-end's addresses, if it lies in one region."""
        return Memory(self._by_user).at(address, length)


class Log:
    """Which pages of the guest were written: one bit each, shared with the front-end.

    The front-end takes and clears bits while others set them, and Python has no atomic "or". So whole
    bytes are stored, without reading: eight pages are marked for one, and none is ever missed.
    """

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._bits = _map(fd, offset, size)

    def mark(self, address: int, length: int) -> None:
        """The guest's bytes at `address` have changed. What the log does not cover cannot be migrated."""
        first = address // LOG_PAGE >> 3
        last = min(len(self._bits), ((address + length - 1) // LOG_PAGE >> 3) + 1)
        if first < last:
            self._bits[first:last] = b"\xff" * (last - first)


def _map(fd: int, offset: int, size: int) -> memoryview:
    try:
        status = os.fstat(fd)
        # Files of huge pages are mapped from the start of a huge page only.
        start = offset - offset % max(mmap.ALLOCATIONGRANULARITY, status.st_blksize)
        if offset + size > status.st_size:
            raise PeerError(f"memory of {size} bytes at {offset:#x} in a file of {status.st_size} bytes")
        view = memoryview(mmap.mmap(fd, offset + size - start, offset=start))
    except (OSError, ValueError, OverflowError) as error:
        raise PeerError(f"the guest's memory cannot be mapped: {error}") from error
    return view[offset - start :]
