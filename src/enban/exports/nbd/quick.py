"""Answers that take no more than a look into tables in memory and a call or two to the host.

Two sorts of requests are answered here:

- plain reads, from memory that the image's file is mapped to: their data go from the page cache into the
  socket by one call for all of them;
- a single plain read or write, by one call for its data and one for its reply.

`Transmission` answers all others, and all of a server that writes a trace. A file is mapped once a number of
reads in a row have found their data in the page cache, and only where a place in it keeps its meaning
(`ServedExport.stable`). Data that are not there after all are met as page faults that had to wait; if they
are many, reads go the other way again for a while, where many of them can wait at a time.
Only the host touches mapped memory, never this process: so memory that is not there is an error of the call
(EFAULT), not a signal.

A batch is in the ledger while the node is asked for places and while its replies go out as far as the client
has room for them; never while the client is waited for.
"""

from __future__ import annotations

import errno
import os
import socket
from time import perf_counter_ns

from ...block import mover
from ...block.runtime import drive
from ...storage import host
from ...wire.nbd.constants import CMD_FLAG_PAYLOAD_LEN, CMD_READ, CMD_WRITE, EXTENDED

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.node import Node
    from ...wire.nbd import Session
    from ...wire.nbd.messages import ParsedRequest
    from .export import ServedExport
    from .incoming import Incoming, Threads
    from .transmission import Transmission

LARGE = 32 << 10  # reads from this size on are worth calls of their own
CALM = 256  # reads in a row found in the page cache before the file is mapped
_MOST_CALM = 1 << 16  # the same, after it was in vain a few times
_LOOK_EVERY = 256  # reads between two looks at the page faults
_FEW = 64  # one read in so many may have to wait for the medium
_MOST_PARTS = 1024  # sent by one call (IOV_MAX)

NOWAIT = getattr(os, "RWF_NOWAIT", 0) if host.HAVE_PREADV else 0
_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)


def overwrite(node: Node, fd: int, data: memoryview, offset: int) -> bool:
    """Write to a place that is the disk's own already; the request is in the ledger. False if that is not
    all there is to do, or it did not work out: the door then does the whole write again."""
    switches = node.switches
    place = node.locate_write(offset, len(data))
    if place < 0 or place + len(data) > node.data.size():
        return False
    try:
        n = os.pwrite(fd, data, place)
    except OSError:
        return False  # the door will meet it again, and translate it
    # If a snapshot was made meanwhile, the place may not be ours any more.
    return n == len(data) and switches == node.switches


class QuickAnswers:
    """Those of one connection. Its `answer` is for the connection's thread alone."""

    def __init__(
        self,
        transmission: Transmission,
        sock: socket.socket,
        session: Session,
        export: ServedExport,
        incoming: Incoming,
        threads: Threads,
    ) -> None:
        self._transmission = transmission
        self._sock = sock
        self._export = export
        self._door = export.door
        self._codec = session.codec
        self._incoming = incoming
        self._threads = threads
        self._dontwait = 0 if session.tls else _DONTWAIT
        self._nowait = NOWAIT
        self._mask = (session.export.min_block or 1) - 1
        most = min(session.max_payload, session.export.max_block or session.max_payload)
        self._most = most if host.HAVE_PREADV else 0
        self._most_read = min(self._most, LARGE - 1)
        self._write_flags = CMD_FLAG_PAYLOAD_LEN if session.style == EXTENDED else 0
        self._may_write = not export.read_only and not self._door.writethrough
        self._out = memoryview(bytearray(64 + self._most_read))
        self._may_map = bool(self._most and export.stable and self._dontwait and host.HAVE_FAULTS)
        self._pages = memoryview(b"")  # what the file is mapped to, while that is used
        self._calm = 0
        self._needed = CALM
        self._faults = 0
        self._unlooked = 0

    def release(self) -> None:
        self._pages = self._out = memoryview(b"")

    def answer(self, batch: list[ParsedRequest]) -> list[ParsedRequest]:
        """Answer what can be answered here and send the replies; returns the other requests, of which
        nothing was done. Raises OSError if the client is gone, and EnbanError."""
        if self._pages:
            batch = self._answer_reads(batch)
        if len(batch) == 1 and self._answer_one(batch):
            return []
        return batch

    # -- reads from mapped memory ------------------------------------------------------------

    def learn(self, batch: list[ParsedRequest], cold: int) -> None:
        """A batch was answered otherwise; `cold` of its reads had to wait for the medium."""
        if not self._may_map or self._pages:
            return
        if cold or not all(request[1] == CMD_READ for request in batch):
            self._calm = 0
            return
        self._calm += len(batch)
        if self._calm >= self._needed:
            self._pages = self._export.pages()
            self._may_map = bool(self._pages)
            self._faults, self._unlooked = host.page_faults(), 0

    def _unlearn(self) -> None:
        self._pages = memoryview(b"")
        self._calm, self._needed = 0, min(2 * self._needed, _MOST_CALM)

    def _answer_reads(self, batch: list[ParsedRequest]) -> list[ParsedRequest]:
        """Answer the plain reads of a batch; returns the other requests."""
        transmission, door, pages = self._transmission, self._door, self._pages
        export, mask, most, room = self._export, self._mask, self._most_read, len(pages)
        base, size, ledger = export.base, export.size, door.ledger
        pack, locate = self._codec.pack_read_header, door.node.locate
        parts: list[bytes | bytearray | memoryview] = []
        others: list[ParsedRequest] = []
        add, leave = parts.append, others.append
        done = total = sent = 0
        transmission.since_ns = perf_counter_ns()
        transmission.batch = batch
        self._threads.busy.add(transmission)
        entry = ledger.begin_batch()
        try:
            if door.closed:
                return batch
            for request in batch:
                flags, kind, cookie, offset, length, _ = request
                if (
                    kind == CMD_READ
                    and not flags
                    and 0 < length <= most
                    and offset + length <= size
                    and not (offset | length) & mask
                ):
                    place = locate(base + offset, length)
                    if 0 <= place <= room - length and len(parts) < _MOST_PARTS:
                        add(pack(cookie, offset, length))
                        add(pages[place : place + length])
                        total += length
                        continue
                leave(request)
            if parts:
                try:
                    sent = self._sock.sendmsg(parts, (), _DONTWAIT)
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    self._give_up()
                    others, total = batch, 0
            done = len(batch) - len(others)
        finally:
            ledger.end_batch(entry, done)
            self._threads.busy.discard(transmission)
        transmission.answered += done
        if done:
            total += done * self._codec.read_header_size
            if sent < total:
                left = set(map(id, others))
                self._send_rest(parts, sent, [request for request in batch if id(request) not in left])
        transmission.batch = []
        self._unlooked += done
        if self._unlooked >= _LOOK_EVERY:
            before, self._faults = self._faults, host.page_faults()
            if (self._faults - before) * _FEW > self._unlooked:
                self._unlearn()
            self._unlooked = 0
            export.bound_pages()
        return others

    def _give_up(self) -> None:
        """Mapped memory is not there: the file has become shorter, or its medium fails."""
        self._pages = memoryview(b"")
        self._may_map = False

    def _send_rest(
        self, parts: list[bytes | bytearray | memoryview], sent: int, reads: list[ParsedRequest]
    ) -> None:
        """Send the replies to `reads`, of which `sent` bytes are gone, as fast as the client takes them."""
        self._transmission.sending = True
        while True:
            whole = 0
            while whole < len(parts) and sent >= len(parts[whole]):
                sent -= len(parts[whole])
                whole += 1
            del parts[:whole]
            if not parts:
                break
            parts[0] = memoryview(parts[0])[sent:]
            try:
                sent = self._sock.sendmsg(parts)
            except OSError as error:
                if error.errno != errno.EFAULT or not self._may_map:
                    raise
                self._give_up()
                self._fetch(parts, reads)
                sent = 0
        self._transmission.sending = False

    def _fetch(self, parts: list[bytes | bytearray | memoryview], reads: list[ParsedRequest]) -> None:
        """Replace mapped memory in what is left to send by data that are read now. Raises EnbanError."""
        for back, (_, _, _, offset, length, _) in enumerate(reversed(reads)):
            index = len(parts) - 1 - 2 * back
            if index < 0:
                break
            data = bytearray(len(parts[index]))
            drive(self._door.read_into(data, self._export.base + offset + length - len(data)))
            parts[index] = data

    # -- one request -------------------------------------------------------------------------

    def _answer_one(self, batch: list[ParsedRequest]) -> bool:
        """A client that has one request out at a time feels each microsecond."""
        flags, kind, cookie, offset, length, payload = batch[0]
        export, transmission = self._export, self._transmission
        reads = kind == CMD_READ and not flags and length <= self._most_read
        writes = kind == CMD_WRITE and flags == self._write_flags and length <= self._most and self._may_write
        if (
            not (reads or writes)
            or not length
            or offset + length > export.size
            or (offset | length) & self._mask
        ):
            return False
        transmission.since_ns = perf_counter_ns()
        transmission.batch = batch
        door, out, busy = self._door, self._out, self._threads.busy
        ledger, node = door.ledger, door.node
        busy.add(transmission)
        entry = ledger.begin_batch()
        done = sent = 0
        try:
            fd = node.data.plain_fd()
            if fd < 0 or door.closed:
                return False
            if reads:
                place = node.locate(export.base + offset, length)
                if place < 0:
                    return False
                end = self._codec.pack_read_header_into(out, 0, cookie, offset, length) + length
                if not self._read(fd, out[end - length : end], place):
                    return False
            else:
                data = self._incoming.buffer[payload : payload + length]
                place = export.base + offset
                if not overwrite(node, fd, data, place) and not mover.write_now(node, data, place):
                    return False
                end = self._codec.pack_done_into(out, 0, cookie, offset)
            done = 1
            if self._dontwait:
                try:
                    sent = self._sock.send(out[:end], self._dontwait)
                except BlockingIOError:
                    pass
        finally:
            ledger.end_batch(entry, done)
            busy.discard(transmission)
        transmission.answered += 1
        if sent < end:
            transmission.sending = True
            self._sock.sendall(out[sent:end])
            transmission.sending = False
        transmission.batch = []
        if self._may_map:
            self.learn(batch, 0)
        return True

    def _read(self, fd: int, buffer: memoryview, place: int) -> bool:
        """Read what is in the page cache."""
        try:
            return os.preadv(fd, (buffer,), place, self._nowait) == len(buffer)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = 0
            elif error.errno == errno.EAGAIN:
                self._calm = 0
            return False  # the door will meet it again, and translate it
