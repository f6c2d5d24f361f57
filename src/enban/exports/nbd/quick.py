"""Answers that take no more than a look into tables in memory and a call or two to the host.

Two sorts of requests are answered so:

- a single plain read or write, here, by one call for its data and one for its reply;
- plain reads of a client that has sent nothing else for a while and whose data were in the page cache: see
  `mapped`. Reads that found their data in the page cache are counted here; it takes twice as many each time
  that `mapped` was left soon, or because of data that had to be waited for.

`Transmission` answers all others, and all of a server that writes a trace.

A request is in the ledger while the node is asked for a place and while the reply goes out as far as the
client has room for it; never while the client is waited for.
"""

from __future__ import annotations

import errno
import os
import socket
from time import perf_counter_ns

from ...block import mover
from ...storage import host
from ...wire.nbd.constants import CMD_FLAG_PAYLOAD_LEN, CMD_READ, CMD_WRITE, EXTENDED
from .reader import Reader

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...block.node import Node
    from ...block.requests import Request
    from ...wire.nbd import Session
    from ...wire.nbd.messages import ParsedRequest
    from .export import ServedExport
    from .incoming import Incoming, Threads
    from .transmission import Transmission

LARGE = 32 << 10  # reads from this size on are worth calls of their own
CALM = 256  # reads in a row found in the page cache before a connection takes part in `mapped`
_MOST_CALM = 1 << 16  # the same, after it was in vain a few times

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
        *,
        spin_us: int,
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
        self._reader = Reader(
            transmission, sock, session.codec, incoming, threads, most=self._most_read, spin_us=spin_us
        )
        may_map = self._most and export.stable and self._dontwait and host.HAVE_FAULTS
        self._may_map = bool(may_map and not self._mask)  # `mapped` does not look at how reads are aligned
        self._hot = 0  # reads in a row
        self._needed = CALM
        self._entry: Request | None = None  # the last one in the ledger

    def release(self) -> None:
        self._out = memoryview(b"")
        self._reader.release()

    def answer(self, batch: list[ParsedRequest]) -> list[ParsedRequest]:
        """Answer what can be answered here and send the replies; returns the other requests, of which
        nothing was done. Raises OSError if the client is gone, and EnbanError."""
        return [] if len(batch) == 1 and self._answer_one(batch) else batch

    def in_flight(self) -> list[ParsedRequest]:
        """What is being answered by `mapped`. From any thread."""
        return self._reader.in_flight()

    # -- reads from mapped memory ------------------------------------------------------------

    @property
    def calm(self) -> bool:
        """Whether `take_part` is worth it."""
        return self._may_map and self._hot >= self._needed

    def learn(self, batch: list[ParsedRequest], cold: int) -> None:
        """A batch was answered otherwise; `cold` of its reads had to wait for the medium."""
        if cold or not all(request[1] == CMD_READ for request in batch):
            self._hot = 0
        else:
            self._hot += len(batch)

    def take_part(self) -> None:
        """Have reads answered from mapped memory, until something else is due. Raises OSError if the client
        is gone, and EnbanError."""
        self._hot = 0
        mapped, reader = self._export.mapped, self._reader
        if not mapped.pages():
            self._may_map = False
            return
        mapped.take_part(reader)
        in_vain = reader.cold or reader.answered < self._needed
        self._needed = min(2 * self._needed, _MOST_CALM) if in_vain else CALM

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
        entry = self._entry = ledger.begin_batch(self._entry)
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
                self._hot = 0
            return False  # the door will meet it again, and translate it
