"""What an NBD server says of a disk's dirty bitmaps: the contexts `qemu:dirty-bitmap:NAME` of QEMU and ours.

Each question has a connection of its own, for a context must be chosen before an export is
entered. What comes is the bitmap at the time of asking; it cannot be changed from here.
"""

from __future__ import annotations

from ...block.bitmaps import BitmapInfo, Bitmaps, Bits
from ...errors import HostError, PeerError, UnsupportedOperationError, UsageError
from ...wire.nbd.constants import CMD_BLOCK_STATUS
from . import link as links

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.runtime import Runtime
    from .address import Address

CONTEXT = "qemu:dirty-bitmap:"
_STATE_DIRTY = 1
_LONGEST = 1 << 30  # bytes asked about at once
_CHUNK = 4096
_FINEST_BITS, _MOST_BITS = 12, 1 << 28


class NbdBitmaps(Bitmaps):
    """start, size: the part of the export that is the disk, in bytes."""

    def __init__(self, address: Address, runtime: Runtime, start: int, size: int) -> None:
        self._address = address
        self._runtime = runtime
        self._start = start
        self._size = size

    def infos(self) -> list[BitmapInfo]:
        raise UnsupportedOperationError(
            "the bitmaps of a server can be asked for by name only", path=self._address.uri
        )

    async def bits(self, name: str) -> Bits:
        """Granules that the server's do not fit are widened. Raises UsageError, HostError, PeerError."""
        return await self._runtime.offload(self._ask, name)

    def _ask(self, name: str) -> Bits:
        granularity_bits = _FINEST_BITS
        while self._size >> granularity_bits > _MOST_BITS:
            granularity_bits += 1
        bits = Bits(self._size, granularity_bits, _CHUNK)
        try:
            link = links.connect(self._address, CONTEXT + name)
        except PeerError as error:
            error.hint = (
                error.hint or "this takes a second connection: the server must allow one (qemu-nbd -e)"
            )
            raise
        try:
            if CONTEXT + name not in link.session.contexts.values():
                raise UsageError(
                    f"the server shows no bitmap {name!r}",
                    path=self._address.uri,
                    hint="serve it with --bitmap",
                )
            block = link.session.export.min_block or 1
            position = self._start // block * block
            end = min(self._start + self._size, link.session.export.size // block * block)
            while position < end:
                length = -(-min(end - position, _LONGEST) // block) * block
                ticket = link.ask(CMD_BLOCK_STATUS, position, length)
                if ticket.error or not ticket.extents:
                    raise HostError(
                        f"cannot have the server tell what changed: {ticket.message or 'no answer'}",
                        path=self._address.uri,
                        offset=position,
                        errno=ticket.error,
                    )
                for run, state in ticket.extents:
                    first, last = max(position, self._start), min(position + run, end)
                    if state & _STATE_DIRTY and first < last:
                        bits.set(first - self._start, last - first)
                    position += run
        except links.LinkLostError as lost:
            raise PeerError(f"lost the connection: {lost.what}", path=self._address.uri) from lost
        finally:
            link.close()
        if end < self._start + self._size:  # a tail that the server cannot be asked about
            bits.set(end - self._start, self._start + self._size - end)
        return bits

    def _refuse(self) -> UnsupportedOperationError:
        return UnsupportedOperationError(
            "the bitmaps of a server cannot be changed over NBD", path=self._address.uri
        )

    def vet(self, name: str, granularity: int) -> None:
        raise self._refuse()

    async def add(self, name: str, granularity: int, *, enabled: bool) -> None:
        raise self._refuse()

    async def remove(self, name: str) -> None:
        raise self._refuse()

    async def clear(self, name: str) -> None:
        raise self._refuse()

    async def enable(self, name: str, on: bool) -> None:
        raise self._refuse()

    async def merge(self, name: str, source: Bits) -> None:
        raise self._refuse()

    async def restart(self, name: str, granularity: int) -> None:
        raise self._refuse()
