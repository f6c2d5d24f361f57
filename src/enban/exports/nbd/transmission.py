"""The loop that answers a client's requests: one thread, blocking calls, two reused buffers.

    receive            as much as there is, behind what is left of the last time
    parse              every complete request in it
    answer             small cached reads, and single requests, the quick way: see `quick`
                       the others straight into the reply buffer:
                         the hot ones by the node's short cuts: map, one preadv or pwrite;
                         whatever is not hot and obviously fine, through the door
    send               all replies at once

Reads whose pages are not in the page cache are only announced to the host while the rest of
the batch is answered, and read at its end, so that a disk works on all of them at a time.

Large reads that are in the page cache go from there to the client without a copy, where nothing
can write over the pages while they wait in the socket for another purpose: see `ServedExport.stable`.

Rules kept: a batch is in the ledger from before its first short cut to after its last, and
never while the client is waited for. Nothing is allocated for a length that was not checked.
A reply is sent for every request that was parsed, in any order, unless the client is gone.
"""

from __future__ import annotations

import errno
import os
import socket
from time import perf_counter_ns

from ...block import mover
from ...block.runtime import drive
from ...busy_poll import give_way
from ...errors import EnbanError
from ...storage import host
from ...wire.nbd.constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    COMMAND_NAMES,
    EINVAL,
    ENOTSUP,
    EXTENDED,
    REPLY_FLAG_DONE,
)
from ...wire.nbd.errors import message_bytes, number_for
from ...wire.nbd.messages import MAX_ERROR_REPLY, parse_status_payload
from .incoming import BUFFER, Incoming, new_buffer
from .quick import LARGE, NOWAIT, QuickAnswers, overwrite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ...block.requests import Request
    from ...wire.nbd import Session
    from ...wire.nbd.messages import ParsedRequest
    from .export import ServedExport
    from .incoming import Threads
    from .trace import Trace

# Replies are sent when this much has collected, so that the client reads while we go on.
SEND_AT = 256 << 10
_REPLY_ROOM = 64 + MAX_ERROR_REPLY  # what a reply needs besides its data, and an error reply at all

_MORE = getattr(socket, "MSG_MORE", 0)


def _is_cached(fd: int, place: int) -> bool:
    try:
        return os.preadv(fd, (bytearray(1),), place, NOWAIT) == 1
    except OSError:
        return False


class Transmission:
    """One connection in its transmission phase.

    batch, since_ns: the requests that were received and are not answered yet, and when they came.
    current: the one of them that is passing the door, if any. answered: how many were, ever.
    sending: whether all that is missing is a client that takes its replies.
    """

    def __init__(
        self,
        sock: socket.socket,
        session: Session,
        export: ServedExport,
        leftover: bytes,
        *,
        spin_us: int,
        threads: Threads,
        log: Callable[[str], None],
        trace: Trace | None = None,
    ) -> None:
        self._sock = sock
        self._session = session
        self._export = export
        self._door = export.door
        self._codec = session.codec
        self._log = log
        self._trace = trace
        self._threads = threads
        self._incoming = Incoming(sock, session, leftover, spin_us, threads)
        self._out = new_buffer(BUFFER)
        self._pos = 0  # end of the replies in _out
        self._nowait = NOWAIT
        self._by_page = bool(self._nowait and export.stable and not session.tls and hasattr(os, "sendfile"))
        self._pages = -1  # a descriptor of our own for what is sent outside the ledger
        self._mask = (session.export.min_block or 1) - 1
        self._quick = QuickAnswers(self, sock, session, export, self._incoming, threads, spin_us=spin_us)
        self._entry: Request | None = None
        self._hot = 0  # answered by short cuts since _entry was made
        self._leaving = False
        self.batch: list[ParsedRequest] = []
        self.since_ns = 0
        self.current: ParsedRequest | None = None
        self.sending = False
        self.answered = 0

    def release(self) -> None:
        """Give the buffers back at once, not when the garbage collector comes by."""
        self._incoming.buffer = self._out = memoryview(b"")
        self._quick.release()
        if self._pages >= 0:
            os.close(self._pages)
            self._pages = -1

    def run(self) -> None:
        """Answer until the client takes leave or hangs up. Raises OSError, ProtocolError."""
        parse, most = self._codec.parse_requests, self._session.max_payload
        need = self._codec.request_size
        incoming = self._incoming
        while not self._leaving:
            if incoming.end - incoming.start >= need:
                found, incoming.start, need = parse(incoming.buffer, incoming.start, incoming.end, most)
                if found:
                    others = self._quick.answer(found) if self._trace is None else found
                    if others:
                        self._answer(others)
                    give_way()  # clients that wait for a processor go on; their next requests come together
            elif self._quick.calm and need == self._codec.request_size:
                self._quick.take_part()
            elif not incoming.receive(need):
                return

    def in_flight(self) -> list[ParsedRequest]:
        """The requests that were received and are not answered yet. From any thread."""
        return self.batch or self._quick.in_flight()

    # -- a batch ---------------------------------------------------------------------------

    def _answer(self, batch: list[ParsedRequest]) -> None:
        self.since_ns = perf_counter_ns()
        self.batch = batch
        self._threads.busy.add(self)
        self._enter()
        try:
            if self._trace is not None:
                self._run_traced(batch, self._trace)
            else:
                late = self._run(batch, self._nowait if len(batch) > 1 else 0)
                self._quick.learn(batch, len(late))
                if late:
                    self._run(late, 0)
        finally:
            self._leave()
            self._threads.busy.discard(self)
        self._send()
        self.batch = []

    def _enter(self) -> None:
        self._entry = self._door.ledger.begin_batch()

    def _leave(self) -> None:
        entry, self._entry = self._entry, None
        if entry is not None:
            self._door.ledger.end_batch(entry, self._hot)
            self.answered += self._hot
            self._hot = 0

    def _send(self) -> None:
        if self._pos:
            end, self._pos = self._pos, 0
            self.sending = True
            self._sock.sendall(self._out[:end])
            self.sending = False

    def _send_early(self) -> None:
        """Send what there is in the middle of a batch. The ledger is left meanwhile: the client
        may take its time."""
        if self._pos:
            self._leave()
            self._send()
            self._enter()

    def _send_pages(self, fd: int, place: int, length: int) -> None:
        """Send what there is, the header of a read last, and its data from the page cache. Like all
        sending it is not in the ledger, so by a descriptor that nobody else closes."""
        if self._pages < 0:
            self._pages = os.dup(fd)
        self._hot += 1
        self._leave()
        end, self._pos = self._pos, 0
        self.sending = True
        self._sock.sendall(self._out[:end], _MORE)
        to = self._sock.fileno()
        while length and (n := os.sendfile(to, self._pages, place, length)):
            place += n
            length -= n
        if length:  # the file ends here, the disk does not
            self._sock.sendall(bytes(length))
        self.sending = False
        self._enter()

    def _need_out(self, size: int) -> None:
        """Have room for a reply of `size` bytes and an error besides."""
        size += MAX_ERROR_REPLY
        if self._pos + size > len(self._out):
            self._send_early()
            if max(size, BUFFER) != len(self._out):
                self._out = new_buffer(max(size, BUFFER))

    def _run(self, batch: list[ParsedRequest], nowait: int) -> list[ParsedRequest]:
        """Answer requests, hot ones by short cuts. With `nowait`, returns the reads that would
        have to wait for the medium; the host is reading ahead for them."""
        door, export, session = self._door, self._export, self._session
        node = door.node
        data = node.data
        fd = data.plain_fd() if host.HAVE_PREADV and not door.closed else -1
        base, size, mask = export.base, export.size, self._mask
        # By the session's rules such a read or write is fine; any other gets a second look.
        most = min(session.max_payload, session.export.max_block or session.max_payload) if fd >= 0 else 0
        plain = (0, CMD_FLAG_PAYLOAD_LEN if session.style == EXTENDED else 0)
        may_write = not export.read_only and not door.writethrough
        locate = node.locate
        pack_read, pack_done = self._codec.pack_read_header_into, self._codec.pack_done_into
        preadv, write_now = os.preadv, mover.write_now
        by_page = LARGE if self._by_page else session.max_payload + 1
        late: list[ParsedRequest] = []
        source, out, pos = self._incoming.buffer, self._out, self._pos
        hot = 0
        for request in batch:
            flags, kind, cookie, offset, length, payload = request
            if (
                kind <= CMD_WRITE
                and flags == plain[kind]
                and 0 < length <= most
                and offset + length <= size
                and not (offset | length) & mask
            ):
                if pos > SEND_AT or pos + length + _REPLY_ROOM > len(out):
                    self._pos = pos
                    self._hot += hot
                    hot = 0
                    self._send_early()
                    self._need_out(length)
                    out, pos = self._out, self._pos
                if kind == CMD_READ:
                    place = locate(base + offset, length)
                    if place >= 0 and length >= by_page and _is_cached(fd, place + length - 1):
                        self._pos = pack_read(out, pos, cookie, offset, length)
                        self._hot += hot
                        hot = pos = 0
                        self._send_pages(fd, place, length)
                        continue
                    if place >= 0:
                        body = pack_read(out, pos, cookie, offset, length)
                        end = body + length
                        try:
                            n = preadv(fd, (out[body:end],), place, nowait)
                        except OSError as error:
                            n = -1  # the door will meet it again, and translate it
                            if error.errno == errno.EAGAIN:
                                n = 0
                            elif error.errno == errno.EOPNOTSUPP:
                                self._nowait = nowait = 0
                        if n == length:
                            pos = end
                            hot += 1
                            continue
                        if nowait and n >= 0:
                            host.will_need(fd, place, length)
                            late.append(request)
                            continue
                elif may_write:
                    given = source[payload : payload + length]
                    if overwrite(node, fd, given, base + offset) or write_now(node, given, base + offset):
                        pos = pack_done(out, pos, cookie, offset)
                        hot += 1
                        continue
            self._pos = pos
            self._serve(request)
            if self._leaving:
                break
            out, pos = self._out, self._pos
        self._pos = pos
        self._hot += hot
        return late

    def _run_traced(self, batch: list[ParsedRequest], trace: Trace) -> None:
        """As `_run`, by the long way: every request through the door, and on record."""
        for request in batch:
            if request[1] == CMD_DISC:
                self._leaving = True
                return
            with trace.request(request, self.since_ns):
                self._serve(request)

    # -- one request, by all the rules -------------------------------------------------------

    def _serve(self, request: ParsedRequest) -> None:
        flags, kind, cookie, offset, length, payload = request
        if kind == CMD_DISC:
            self._leaving = True
            return
        self.current = request
        contexts: tuple[int, ...] = ()
        refusal = 0
        if kind == CMD_BLOCK_STATUS:
            length, contexts, refusal = self._status_wanted(flags, length, payload)
        refusal = refusal or self._session.refusal(flags, kind, offset, length)
        if kind == CMD_WRITE_ZEROES and flags & CMD_FLAG_FAST_ZERO and not refusal:
            place, unmap = self._export.base + offset, not flags & CMD_FLAG_NO_HOLE
            if not self._export.zeroes_fast(place, length, unmap=unmap):
                refusal = ENOTSUP
        if refusal:
            self._error(cookie, offset, refusal, "")
        else:
            try:
                self._carry_out(flags, kind, cookie, offset, length, payload, contexts)
            except (EnbanError, OSError, MemoryError) as error:
                self._failed(request, error)
        self.answered += 1
        self.current = None

    def _status_wanted(self, flags: int, length: int, payload: int) -> tuple[int, tuple[int, ...], int]:
        """(length, contexts, error) of a BLOCK_STATUS, which may carry a choice of contexts."""
        chosen = tuple(self._session.contexts)
        if not flags & CMD_FLAG_PAYLOAD_LEN or self._session.style != EXTENDED:
            return length, chosen, 0
        selection = parse_status_payload(self._incoming.buffer, payload, length)
        if selection is None:
            return length, (), EINVAL
        effect, wanted = selection
        if len(set(wanted)) < len(wanted) or not set(wanted) <= set(chosen):
            return effect, (), EINVAL
        return effect, tuple(wanted), 0

    def _carry_out(
        self,
        flags: int,
        kind: int,
        cookie: int,
        offset: int,
        length: int,
        payload: int,
        contexts: tuple[int, ...],
    ) -> None:
        door, codec = self._door, self._codec
        place = self._export.base + offset
        if kind == CMD_READ:
            self._need_out(codec.read_header_size + length)
            end = self._pos + codec.read_header_size + length
            drive(door.read_into(self._out[end - length : end], place))
            codec.pack_read_header_into(self._out, self._pos, cookie, offset, length)
            self._pos = end
            return
        if kind == CMD_BLOCK_STATUS:
            found = self._export.block_status(
                place, length, contexts, only_one=bool(flags & CMD_FLAG_REQ_ONE)
            )
            for position, context in enumerate(contexts):
                last = position + 1 == len(contexts)
                chunk = codec.pack_status(
                    REPLY_FLAG_DONE if last else 0, cookie, offset, context, found[context]
                )
                self._need_out(len(chunk))
                self._out[self._pos : self._pos + len(chunk)] = chunk
                self._pos += len(chunk)
            if contexts:
                return
        elif kind == CMD_WRITE:
            data = self._incoming.buffer[payload : payload + length]
            drive(door.write(data, place, fua=bool(flags & CMD_FLAG_FUA)))
        elif kind == CMD_CACHE:
            self._export.prefetch(place, length)
        else:
            self._send_early()  # these may take their time
            if kind == CMD_FLUSH:
                drive(door.flush())
            elif kind == CMD_TRIM:
                drive(door.discard(place, length))
            elif kind == CMD_WRITE_ZEROES:
                unmap = not flags & CMD_FLAG_NO_HOLE
                drive(door.write_zeroes(place, length, unmap=unmap, fua=bool(flags & CMD_FLAG_FUA)))
            if kind == CMD_TRIM and flags & CMD_FLAG_FUA:
                drive(door.flush())
        self._need_out(codec.done_size)
        self._pos = codec.pack_done_into(self._out, self._pos, cookie, offset)

    def _error(self, cookie: int, offset: int, number: int, message: str) -> None:
        self._need_out(0)
        self._pos = self._codec.pack_error_into(
            self._out, self._pos, cookie, offset, number, message_bytes(message)
        )

    def _failed(self, request: ParsedRequest, error: Exception) -> None:
        """A request failed. The client is told what, the log also where."""
        _, kind, cookie, offset, length, _ = request
        name = COMMAND_NAMES[kind]
        self._log(f"{name} {offset:#x}+{length:#x} failed: {error}")
        what = error.what if isinstance(error, EnbanError) else name.lower() + " failed"
        self._error(cookie, offset, number_for(error), what)
