"""The storage over an NBD export: several links, reconnecting, and what the server says is zero.

When a connection is lost its requests are sent again on another one, within `reconnect_s`
seconds; reads and writes may be repeated without harm. What may not be pretended is that
earlier writes are safe: a server that went away may have lost what it had acknowledged but not
flushed. So if there was any such write, flushing fails from then on, as after a failed fsync.
"""

from __future__ import annotations

import _thread
import time
from bisect import bisect_right

from ...block.storage import Storage
from ...errors import (
    FlushFailedError,
    HostError,
    PeerError,
    ReadOnlyError,
    UnsupportedOperationError,
    UsageError,
    from_oserror,
)
from ...units import align_down, align_up
from ...wire.nbd.constants import (
    BASE_ALLOCATION,
    CMD_BLOCK_STATUS,
    CMD_FLAG_NO_HOLE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    ENOSPC,
    ERROR_WORDS,
    ESHUTDOWN,
    FLAG_CAN_MULTI_CONN,
    FLAG_SEND_FLUSH,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    STATE_ZERO,
)
from . import link as links
from .address import Address, from_options, from_uri
from .link import Link, LinkLostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable
    from typing import Any

    from ...block.bitmaps import Bitmaps
    from ...block.runtime import Runtime
    from ...block.storage import ReadBuffer, WriteBuffer
    from ...units import HostOffset
    from ...wire.nbd import Session
    from .link import Ticket

CONNECTIONS = 4
RECONNECT_S = 10.0
_LONGEST_RANGE = 1 << 30  # bytes in one request without data
_FIRST_DELAY_S, _LONGEST_DELAY_S = 0.05, 1.0
_EMPTY = memoryview(b"")


class _ChangedError(PeerError):
    """The export is another one than before: another size, or read-only now."""


class NbdStorage(Storage):
    """An export as a storage of fixed size. Made by `open_nbd`. Safe from many threads.

    connections: how many to open at most, if the server says that several are safe.
    reconnect_s: how long to try to come back when a connection is lost; 0 is not at all.
    losses: how often a request met a lost connection.
    """

    fixed_size = True

    def __init__(
        self,
        address: Address,
        runtime: Runtime,
        *,
        writable: bool,
        connections: int = CONNECTIONS,
        reconnect_s: float = RECONNECT_S,
    ) -> None:
        self.name = address.uri
        self.runtime = runtime
        self.writable = writable
        self.address = address
        self.reconnect_s = reconnect_s
        first = links.connect(address)
        self._session = first.session
        export = first.session.export
        if writable and export.read_only:
            first.close()
            raise ReadOnlyError("the export is read-only", path=self.name)
        self._most = max(1, connections) if export.flags & FLAG_CAN_MULTI_CONN else 1
        self._links = [first]
        self._connecting = _thread.allocate_lock()
        self._guard = _thread.allocate_lock()  # over what follows
        self._edges = _thread.allocate_lock()  # held while a part of a block is rewritten
        self.losses = 0  # connections lost
        self._written = 0  # writing requests the server acknowledged
        self._flushed = 0  # how many of them are durable
        self._flush_error = ""
        self._known: list[tuple[HostOffset, HostOffset, bool]] = []  # the last block status
        self._changes = 0
        self._closed = False

    @property
    def identity(self) -> Hashable:
        address = self.address
        return "nbd", address.path or (address.host, address.port), address.export

    def allocated(self) -> int:
        return -1  # only the server knows

    def size(self) -> int:
        return self._session.export.size

    # -- links -----------------------------------------------------------------------------

    def _ask(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        *,
        payload: memoryview = _EMPTY,
        buffer: memoryview = _EMPTY,
    ) -> Ticket:
        """One request to its end, whatever happens to connections meanwhile."""
        deadline = 0.0
        while True:
            losses = self.losses
            try:
                link = self._pick(deadline)
                ticket = link.ask(kind, offset, length, flags, payload=payload, buffer=buffer)
                if ticket.error == ESHUTDOWN:
                    raise link.fail(PeerError("the server is shutting down"))
            except LinkLostError as lost:
                deadline = deadline or time.monotonic() + self.reconnect_s
                self._note_loss()
                if self._closed or time.monotonic() >= deadline:
                    raise PeerError(
                        f"lost the connection: {lost.what}", path=self.name, hint="is the server running?"
                    ) from lost
                continue
            if ticket.error:
                raise self._failed(ticket, kind, offset)
            if kind in (CMD_WRITE, CMD_WRITE_ZEROES):
                with self._guard:
                    self._written += 1
                    if losses != self.losses:
                        self._mark_unsafe()
            return ticket

    def _failed(self, ticket: Ticket, kind: int, offset: int) -> HostError:
        doing = f"have the server {COMMAND_NAMES[kind].lower().replace('_', ' ')}"
        if ticket.error == ENOSPC:
            return from_oserror(OSError(ENOSPC, ""), doing, self.name, offset)
        words = ERROR_WORDS.get(ticket.error, "error")
        told = f" ({ticket.message})" if ticket.message and ticket.message != words else ""
        return HostError(f"cannot {doing}: {words}{told}", path=self.name, offset=offset, errno=ticket.error)

    def _pick(self, deadline: float) -> Link:
        """The link with the least to do; a new one if all are busy and more are allowed, or none is left."""
        alive = [link for link in self._links if link.lost is None]
        if alive:
            best = min(alive, key=_load)
            if not best.in_flight or len(alive) >= self._most or not self._connecting.acquire(blocking=False):
                return best
            try:
                return self._add()
            except (HostError, PeerError):
                self._most = len(alive)  # the server does not want more: make do
                return best
            finally:
                self._connecting.release()
        with self._connecting:  # one thread brings the connection back for all
            for link in self._links:
                if link.lost is None:
                    return link
            return self._reconnect(deadline)

    def _add(self) -> Link:
        if self._closed:
            raise LinkLostError("closed")
        link = links.connect(self.address)
        self._check(link)
        with self._guard:
            self._links = [other for other in self._links if other.lost is None] + [link]
        return link

    def _check(self, link: Link) -> None:
        """The export must still be the one we know."""
        before, now = self._session.export, link.session.export
        if now.size != before.size or (self.writable and now.read_only):
            link.close()
            raise _ChangedError(
                f"the export has changed: {before.size} bytes before, {now.size} now", path=self.name
            )

    def _reconnect(self, deadline: float) -> Link:
        delay = _FIRST_DELAY_S
        deadline = deadline or time.monotonic() + self.reconnect_s
        while True:
            try:
                return self._add()
            except _ChangedError:
                raise  # what we were reading is not there any more: waiting does not bring it back
            except (HostError, PeerError) as error:
                if self._closed or time.monotonic() + delay >= deadline:
                    raise PeerError(
                        f"lost the connection and could not come back: {error.what}",
                        path=self.name,
                        hint="is the server running?",
                    ) from error
            time.sleep(delay)
            delay = min(2 * delay, _LONGEST_DELAY_S)

    def _note_loss(self) -> None:
        with self._guard:
            self.losses += 1
            self._known = []
            if self._written != self._flushed:
                self._mark_unsafe()

    def _mark_unsafe(self) -> None:
        if not self._flush_error:
            self._flush_error = "the connection was lost after writes that were not flushed"

    # -- data ------------------------------------------------------------------------------

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        if not self.runtime.blocking:
            return False
        self._read(memoryview(buffer), offset)
        return True

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self.runtime.offload(self._read, memoryview(buffer), offset)

    def _read(self, view: memoryview, offset: HostOffset) -> None:
        n = max(0, min(len(view), self.size() - offset))
        if n < len(view):
            view[n:] = bytes(len(view) - n)
        block = self._session.export.min_block or 1
        start, end = align_down(offset, block), align_up(offset + n, block)
        if (start, end) != (offset, offset + n) and n:
            whole = memoryview(bytearray(end - start))
            self._read_blocks(whole, start)
            view[:n] = whole[offset - start : offset - start + n]
        else:
            self._read_blocks(view[:n], offset)

    def _read_blocks(self, view: memoryview, offset: HostOffset) -> None:
        most = self._most_bytes()
        for start in range(0, len(view), most):
            part = view[start : start + most]
            self._ask(CMD_READ, offset + start, len(part), buffer=part)

    def _most_bytes(self) -> int:
        """Bytes of data in one request: as much as the server takes, in whole blocks."""
        session: Session = self._session
        most = min(session.max_payload, session.export.max_block or session.max_payload)
        return max(1, align_down(most, session.export.min_block or 1))

    def write_now(self, buffer: ReadBuffer, offset: HostOffset) -> bool:
        if not self.runtime.blocking:
            return False
        self._write(memoryview(buffer), offset)
        return True

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        await self.runtime.offload(self._write, memoryview(buffer), offset)

    def _write(self, view: memoryview, offset: HostOffset) -> None:
        self._change(offset, len(view))
        block = self._session.export.min_block or 1
        start, end = align_down(offset, block), align_up(offset + len(view), block)
        if (start, end) == (offset, offset + len(view)):
            self._write_blocks(view, offset)
        else:
            with self._edges:
                whole = memoryview(bytearray(end - start))
                self._read_blocks(whole, start)
                whole[offset - start : offset - start + len(view)] = view
                self._write_blocks(whole, start)
        self._changed()

    def _write_blocks(self, view: memoryview, offset: HostOffset) -> None:
        most = self._most_bytes()
        for start in range(0, len(view), most):
            part = view[start : start + most]
            self._ask(CMD_WRITE, offset + start, len(part), payload=part)

    def _change(self, offset: HostOffset, length: int) -> None:
        if offset + length > self.size():
            raise from_oserror(OSError(ENOSPC, ""), "write past the end of the export", self.name, offset)
        self._changed()

    def _changed(self) -> None:
        """What was known of zeros is not so any more: said before a change and after it."""
        with self._guard:
            self._changes += 1
            self._known = []

    async def flush(self) -> None:
        if self.writable:
            await self.runtime.offload(self._flush)

    def _flush(self) -> None:
        with self._guard:
            written = self._written
        if not self._flush_error and self._session.export.flags & FLAG_SEND_FLUSH:
            try:
                self._ask(CMD_FLUSH)
            except (HostError, PeerError) as error:
                self._flush_error = self._flush_error or error.what
        if self._flush_error:
            raise FlushFailedError(
                f"flush failed: {self._flush_error}",
                path=self.name,
                hint="writes since the last flush may be lost; check the server and open the disk again",
            )
        with self._guard:
            self._flushed = max(self._flushed, written)

    async def write_zeroes(self, offset: HostOffset, length: int, *, unmap: bool = True) -> None:
        block = self._session.export.min_block or 1
        if not self._session.export.flags & FLAG_SEND_WRITE_ZEROES or (offset | length) % block:
            await super().write_zeroes(offset, length, unmap=unmap)
            return
        await self.runtime.offload(
            self._range, CMD_WRITE_ZEROES, offset, length, 0 if unmap else CMD_FLAG_NO_HOLE
        )

    async def discard(self, offset: HostOffset, length: int) -> None:
        block = self._session.export.min_block or 1
        start, end = align_up(offset, block), align_down(min(offset + length, self.size()), block)
        if self._session.export.flags & FLAG_SEND_TRIM and start < end:
            await self.runtime.offload(self._range, CMD_TRIM, start, end - start, 0)

    def _range(self, kind: int, offset: HostOffset, length: int, flags: int) -> None:
        self._change(offset, length)
        for start in range(offset, offset + length, _LONGEST_RANGE):
            self._ask(kind, start, min(_LONGEST_RANGE, offset + length - start), flags)
        self._changed()

    async def truncate(self, size: int) -> None:
        if size != self.size():
            raise UnsupportedOperationError("an NBD export cannot change its size", path=self.name)

    # -- block status ----------------------------------------------------------------------

    async def status(self, offset: HostOffset, length: int) -> tuple[bool, int]:
        if offset >= self.size():
            return True, length
        length = min(length, self.size() - offset)
        found = self._look_up(offset, length)
        if found is not None:
            return found
        if BASE_ALLOCATION not in self._session.contexts.values():
            return False, length
        return await self.runtime.offload(self._ask_status, offset, length)

    def _look_up(self, offset: HostOffset, length: int) -> tuple[bool, int] | None:
        return _find(self._known, offset, length)

    def _ask_status(self, offset: HostOffset, length: int) -> tuple[bool, int]:
        block = self._session.export.min_block or 1
        start = align_down(offset, block)
        # More than was asked for: the next question is likely to be about what follows.
        end = min(align_up(offset + length, block) + _LONGEST_RANGE, align_down(self.size(), block))
        if start >= end:
            return False, length
        with self._guard:
            changes = self._changes
        ticket = self._ask(CMD_BLOCK_STATUS, start, min(end - start, _LONGEST_RANGE))
        known = []
        for run, state in ticket.extents:
            known.append((start, start + run, bool(state & STATE_ZERO)))
            start += run
        with self._guard:
            # What was written meanwhile may be missing in this answer: it is good for now only.
            if changes == self._changes:
                self._known = known
        return _find(known, offset, length) or (False, length)

    async def bitmaps(self, offset: HostOffset, length: int) -> Bitmaps:
        from .bitmaps import NbdBitmaps

        return NbdBitmaps(self.address, self.runtime, offset, length)

    async def close(self) -> None:
        self._closed = True
        for link in self._links:
            link.close()


def _find(
    known: list[tuple[HostOffset, HostOffset, bool]], offset: HostOffset, length: int
) -> tuple[bool, int] | None:
    """What a list of (start, end, reads as zeros) in order says of `offset`."""
    place = bisect_right(known, offset, key=_start) - 1
    if place < 0 or offset >= known[place][1]:
        return None
    return known[place][2], min(length, known[place][1] - offset)


def _start(run: tuple[HostOffset, HostOffset, bool]) -> HostOffset:
    return run[0]


def _load(link: Link) -> int:
    return link.in_flight


def open_nbd(options: dict[str, Any], runtime: Runtime, writable: bool) -> NbdStorage:
    """Open an export by {"filename": URI} or by options of `driver=nbd` (see `address`), and
    `connections`, `reconnect-delay` (seconds). Raises UsageError, HostError, PeerError."""
    filename = options.get("filename")
    address = from_uri(str(filename)) if filename is not None else from_options(options)
    return NbdStorage(
        address,
        runtime,
        writable=writable,
        connections=_number(options, "connections", CONNECTIONS),
        reconnect_s=_number(options, "reconnect-delay", int(RECONNECT_S)),
    )


def _number(options: dict[str, Any], key: str, default: int) -> int:
    text = str(options.get(key, default))
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"option {key}: '{text}' is not a number")
    return int(text)
