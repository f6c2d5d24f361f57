"""The transmission phase, seen from the client: requests made, reply bytes in, events out.

Reply data is never gathered here: it comes out in views of the caller's own receive buffer,
in the order it arrives, and `wanted` / `filled` let the caller receive the rest of a large
piece straight into its destination. What a server says is checked against the request it
answers (`replies`): place, length, overlap, completeness.

    head = client.request(CMD_READ, offset, length).header
    send(head)                                # for WRITE, the payload goes right behind it
    client.receive(received)
    while event := client.next_event(): ...   # to None, before the buffer is used again

Rule kept: no more is buffered than a chunk header and a status or error chunk's payload, of
bounded size, and only as far as the bytes have arrived.

Source: NBD protocol, "Transmission", "Structured reply types", "Request types".
"""

from __future__ import annotations

from struct import Struct

from enban.errors import OutOfRangeError, ReadOnlyError, UnsupportedOperationError

from .constants import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_READ,
    CMD_RESIZE,
    CMD_WRITE,
    COMMAND_NAMES,
    ENOSPC,
    EPERM,
    EXTENDED,
    MAGIC_EXTENDED_REPLY,
    MAGIC_SIMPLE_REPLY,
    MAGIC_STRUCTURED_REPLY,
    MAX_STATUS_EXTENTS,
    MAX_STRING,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_IS_ERROR,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE,
    STRUCTURED,
)
from .errors import OutOfTurnError, ProtocolError, TooLargeError, WrongMagicError, known_number
from .messages import (
    ERROR,
    EXTENDED_CHUNK,
    HOLE,
    SIMPLE_REPLY,
    STATUS_HEAD_EXT,
    U32,
    U64,
    pack_status_payload,
)
from .replies import Data, Done, Failed, Hole, Status, Transaction

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .messages import Buffer
    from .replies import ReplyEvent
    from .session import Session

# States and where each step leads.
RUNNING = "running"
LEAVING = "leaving"  # DISC is said: no more requests, open ones may still be answered
BROKEN = "broken"  # the server broke the protocol: hang up

_NEXT = {
    (RUNNING, "DISC"): LEAVING,
    (RUNNING, "violation"): BROKEN,
    (LEAVING, "violation"): BROKEN,
}

_SHORT_HEADER = Struct(">IHHQ")

# The longest payload each kind of chunk may have, data aside. Errors of kinds we do not
# know may carry fields of their own behind the message.
_MAX_STATUS = 8 + 16 * MAX_STATUS_EXTENTS
_MAX_ERROR = ERROR.size + MAX_STRING + 4096


class ClientTransmission:
    """One connection's transmission phase, seen from the client.

    session: from the handshake. leftover: bytes that arrived behind the handshake.
    state: RUNNING, LEAVING or BROKEN.
    """

    def __init__(self, session: Session, leftover: bytes = b"") -> None:
        self.session = session
        self.state = RUNNING
        self._style = session.style
        self._open: dict[int, Transaction] = {}
        self._cookie = 0
        self._view = memoryview(leftover)
        self._pos = 0
        self._partial = bytearray()  # a header or a small payload that is not complete yet
        self._events: list[ReplyEvent] = []  # never more than a few
        self._header_size = EXTENDED_CHUNK.size if self._style == EXTENDED else SIMPLE_REPLY.size
        self._status_kind = REPLY_TYPE_BLOCK_STATUS
        if self._style == EXTENDED:
            self._status_kind = REPLY_TYPE_BLOCK_STATUS_EXT
        # The chunk being received: whose it is, its flags and type.
        self._current = Transaction(CMD_READ, 0, 0, 0, 0)
        self._flags = 0
        self._kind = 0
        # Data being received: export offset of the next byte, bytes still to come.
        self._in_data = False
        self._at = 0
        self._size = 0
        # Otherwise: whether a header was begun, how many bytes come next in one piece, who takes them.
        self._in_chunk = False
        self._need = 0
        self._expected: Callable[[Buffer], None] = self._on_header
        self._expect_header()

    def _step(self, step: str) -> None:
        self.state = _NEXT[self.state, step]

    @property
    def in_flight(self) -> int:
        """Requests without a complete reply."""
        return len(self._open)

    # ---- requests ----

    def request(
        self,
        kind: int,
        offset: int = 0,
        length: int = 0,
        flags: int = 0,
        *,
        contexts: Sequence[int] | None = None,
    ) -> Transaction:
        """Make a request; send its `header`, for WRITE followed by `length` bytes of payload.

        contexts: for BLOCK_STATUS, report on these ids only (needs BLOCK_STATUS_PAYLOAD).
        For RESIZE, `offset` is the new size.
        Raises UsageError and its kin for what the server did not offer; nothing is sent then.
        """
        if self.state != RUNNING:
            raise OutOfTurnError(f"no request can be made on a connection that is {self.state}")
        if kind == CMD_DISC:
            raise OutOfTurnError("use disconnect() to take leave")
        payload = b""
        wire_length = length
        if (kind == CMD_WRITE and self._style == EXTENDED) or contexts is not None:
            flags |= CMD_FLAG_PAYLOAD_LEN
        if contexts is not None:
            if kind != CMD_BLOCK_STATUS or not set(contexts) <= set(self.session.contexts):
                raise OutOfTurnError("contexts can be given to BLOCK_STATUS, out of those that were chosen")
            payload = pack_status_payload(length, contexts)
            wire_length = len(payload)
        self._check(kind, flags, offset, length)
        self._cookie += 1
        transaction = Transaction(kind, flags, self._cookie, offset, length)
        if kind == CMD_BLOCK_STATUS:
            transaction.pending = set(self.session.contexts if contexts is None else contexts)
        header = bytearray(self.session.codec.request_size)
        self.session.codec.pack_request_into(header, 0, flags, kind, self._cookie, offset, wire_length)
        transaction.header = bytes(header) + payload
        self._open[self._cookie] = transaction
        return transaction

    def _check(self, kind: int, flags: int, offset: int, length: int) -> None:
        session = self.session
        if length >= 1 << 32 and self._style < EXTENDED:
            raise OutOfRangeError(f"{length} bytes in one request need extended headers")
        refusal = session.refusal(flags, kind, offset, length)
        if not refusal:
            return
        name = COMMAND_NAMES[kind] if kind < len(COMMAND_NAMES) else f"command {kind}"
        if refusal == EPERM:
            raise ReadOnlyError(f"the export is read-only, {name} is not possible", path=session.export.name)
        if refusal == ENOSPC or (kind != CMD_RESIZE and offset + length > session.export.size):
            raise OutOfRangeError(
                f"{name} of {length} bytes reaches past the end of the export, {session.export.size}",
                path=session.export.name,
                offset=offset,
            )
        raise UnsupportedOperationError(
            f"the server does not take {name} of {length} bytes with flags {flags:#x}",
            path=session.export.name,
            offset=offset,
            hint=f"at most {session.max_payload} bytes, aligned to {session.export.min_block or 1}",
        )

    def disconnect(self) -> bytes:
        """Take leave: the last bytes to send. Answers to open requests may still come."""
        if self.state != RUNNING:
            raise OutOfTurnError(f"cannot take leave of a connection that is {self.state}")
        self._step("DISC")
        header = bytearray(self.session.codec.request_size)
        self.session.codec.pack_request_into(header, 0, 0, CMD_DISC, 0, 0, 0)
        return bytes(header)

    # ---- the stream ----

    def receive(self, data: Buffer) -> None:
        """Take in bytes from the server: call `next_event` until None before `data` changes."""
        if self._pos < len(self._view):
            raise OutOfTurnError("what was received before is not looked at yet")
        self._view = memoryview(data).toreadonly()
        self._pos = 0

    def next_event(self) -> ReplyEvent | None:
        """The next thing the server said; None: more bytes are needed. Raises ProtocolError: hang up."""
        try:
            while not self._events:
                if self.state == BROKEN:
                    return None
                if self._in_data:
                    if not self._take_data():
                        return None
                else:
                    item = self._take(self._need)
                    if item is None:
                        return None
                    self._expected(item)
        except ProtocolError:
            self._break()
            raise
        return self._events.pop(0)

    def wanted(self) -> tuple[Transaction, int, int] | None:
        """After `next_event` gave None: data that must come next, to be received in place.

        (transaction, export offset, bytes): up to that many bytes may be received straight into
        their destination and reported with `filled`. None if something else comes next.
        """
        if not self._in_data or self._pos < len(self._view):
            return None
        return self._current, self._at, self._size

    def filled(self, count: int) -> None:
        """`count` of the bytes `wanted` spoke of were received in place."""
        if self.wanted() is None or not 0 < count <= self._size:
            raise OutOfTurnError(f"{count} bytes were not wanted")
        self._at += count
        self._size -= count
        if not self._size:
            self._in_data = False
            try:
                self._end_of_chunk()
            except ProtocolError:
                self._break()
                raise

    def end_of_stream(self) -> None:
        """The server hung up: raises ProtocolError if that left something open."""
        if self.state == BROKEN:
            return
        if self._partial or self._in_data or self._in_chunk:
            self._break()
            raise ProtocolError("server hung up in the middle of a reply")
        if self._open:
            count = len(self._open)
            self._break()
            raise ProtocolError(f"server hung up with {count} requests unanswered")

    def _break(self) -> None:
        self._step("violation")
        self._view = memoryview(b"")
        self._pos = 0
        self._in_data = False
        self._partial.clear()
        self._events.clear()

    def _take(self, need: int) -> Buffer | None:
        """The next `need` bytes in one piece, None if they are not all there yet."""
        pos = self._pos
        if not self._partial and len(self._view) - pos >= need:
            self._pos = pos + need
            return self._view[pos : pos + need]
        piece = self._view[pos : pos + need - len(self._partial)]
        self._partial += piece
        self._pos = pos + len(piece)
        if len(self._partial) < need:
            return None
        whole = bytes(self._partial)
        self._partial.clear()
        return whole

    def _take_data(self) -> bool:
        """Hand out what is there of the data being received; False if nothing is."""
        count = min(self._size, len(self._view) - self._pos)
        if not count:
            return False
        data = self._view[self._pos : self._pos + count]
        self._pos += count
        self._events.append(Data(self._current, self._at, data))
        self._at += count
        self._size -= count
        if not self._size:
            self._in_data = False
            self._end_of_chunk()
        return True

    def _expect(self, need: int, then: Callable[[Buffer], None]) -> None:
        self._need = need
        self._expected = then
        self._in_chunk = True

    def _expect_header(self) -> None:
        self._in_chunk = False
        self._need = self._header_size
        self._expected = self._on_extended_header if self._style == EXTENDED else self._on_header

    # ---- headers ----

    def _on_header(self, item: Buffer) -> None:
        """The first 16 bytes, all there is to a simple reply, all but the length of a structured chunk."""
        magic, flags, kind, cookie = _SHORT_HEADER.unpack(item)
        if magic == MAGIC_SIMPLE_REPLY:
            self._simple(cookie, flags << 16 | kind)
            return
        if magic != MAGIC_STRUCTURED_REPLY or self._style != STRUCTURED:
            raise WrongMagicError(f"a reply begins with {magic:#010x} instead of its magic number")
        self._current = self._find(cookie)
        self._flags, self._kind = flags, kind
        self._expect(4, self._on_length)

    def _on_length(self, item: Buffer) -> None:
        self._chunk(U32.unpack(item)[0])

    def _on_extended_header(self, item: Buffer) -> None:
        magic, flags, kind, cookie, offset, length = EXTENDED_CHUNK.unpack(item)
        if magic != MAGIC_EXTENDED_REPLY:
            raise WrongMagicError(f"a reply begins with {magic:#010x} instead of its magic number")
        current = self._find(cookie)
        if offset != current.offset:
            raise ProtocolError(f"reply to {current!r} names the offset {offset:#x}")
        self._current, self._flags, self._kind = current, flags, kind
        self._chunk(length)

    def _find(self, cookie: int) -> Transaction:
        try:
            return self._open[cookie]
        except KeyError:
            raise ProtocolError(f"reply with the cookie {cookie:#x}, which no open request has") from None

    def _simple(self, cookie: int, error: int) -> None:
        current = self._current = self._find(cookie)
        self._flags = REPLY_FLAG_DONE
        if error:
            if current.kind == CMD_READ and self._style != SIMPLE:
                raise ProtocolError(f"simple reply to {current!r} although structured replies are agreed")
            self._fail(error, "", None)
            self._end_of_chunk()
        elif current.kind == CMD_BLOCK_STATUS or (current.kind == CMD_READ and self._style != SIMPLE):
            raise ProtocolError(f"simple reply to {current!r} cannot carry its answer")
        elif current.kind == CMD_READ:
            current.tell(current.offset, current.length)
            self._begin_data(current.offset, current.length)
        else:
            self._end_of_chunk()

    # ---- chunks ----

    def _chunk(self, length: int) -> None:
        """A chunk header is complete: check what it may be, and say what comes next."""
        current, kind = self._current, self._kind
        if kind == REPLY_TYPE_NONE:
            if length or not self._flags & REPLY_FLAG_DONE:
                raise ProtocolError(f"an empty chunk of {length} bytes with flags {self._flags:#x}")
            self._end_of_chunk()
        elif kind & REPLY_TYPE_IS_ERROR:
            self._small(length, ERROR.size, _MAX_ERROR, self._on_error)
        elif kind == REPLY_TYPE_OFFSET_DATA and current.kind == CMD_READ:
            if length > current.length + 8:
                raise TooLargeError(f"data for {current!r}", length - 8, current.length)
            if length <= 8:
                raise ProtocolError(f"a data chunk of {length} bytes, which has no data")
            self._size = length - 8
            self._expect(8, self._on_data)
        elif kind == REPLY_TYPE_OFFSET_HOLE and current.kind == CMD_READ:
            self._small(length, HOLE.size, HOLE.size, self._on_hole)
        elif kind == self._status_kind and current.kind == CMD_BLOCK_STATUS:
            self._small(length, 4 + 8, _MAX_STATUS, self._on_status)
        else:
            raise ProtocolError(f"a chunk of type {kind} does not answer {current!r}")

    def _small(self, length: int, least: int, most: int, then: Callable[[Buffer], None]) -> None:
        if length > most:
            raise TooLargeError(f"payload of a chunk of type {self._kind:#x}", length, most)
        if length < least:
            raise ProtocolError(f"a chunk of type {self._kind:#x} with {length} bytes, it needs {least}")
        self._expect(length, then)

    def _on_data(self, item: Buffer) -> None:
        at = U64.unpack(item)[0]
        self._current.tell(at, self._size)
        self._begin_data(at, self._size)

    def _begin_data(self, at: int, size: int) -> None:
        self._at, self._size, self._in_data = at, size, True

    def _on_hole(self, item: Buffer) -> None:
        at, length = HOLE.unpack(item)
        if not length:
            raise ProtocolError("a hole of no bytes")
        self._current.tell(at, length)
        self._events.append(Hole(self._current, at, length))
        self._end_of_chunk()

    def _on_status(self, item: Buffer) -> None:
        current, size = self._current, len(item)
        if self._style == EXTENDED:
            context, count = STATUS_HEAD_EXT.unpack_from(item)
            if not count or size != 8 + 16 * count:
                raise ProtocolError(f"a block status chunk of {size} bytes with {count} extents")
            fields = Struct(f">{2 * count}Q").unpack_from(item, 8)
        else:
            context = U32.unpack_from(item)[0]
            if size % 8 != 4:
                raise ProtocolError(f"a block status chunk of {size} bytes")
            fields = Struct(f">{(size - 4) // 4}I").unpack_from(item, 4)
        lengths = fields[0::2]
        current.tell_status(context, lengths)
        self._events.append(Status(current, context, list(zip(lengths, fields[1::2], strict=True))))
        self._end_of_chunk()

    def _on_error(self, item: Buffer) -> None:
        error, size = ERROR.unpack_from(item)
        rest = len(item) - ERROR.size
        with_offset = self._kind == REPLY_TYPE_ERROR_OFFSET
        if not error or size > MAX_STRING or size > rest - (8 if with_offset else 0):
            raise ProtocolError(f"an error chunk with error {error} and {size} of {rest} bytes of message")
        # Words for a person only: no reason to hang up if they are not UTF-8.
        message = bytes(item[ERROR.size : ERROR.size + size]).decode("utf-8", "replace")
        offset = None
        if with_offset:
            offset = U64.unpack_from(item, ERROR.size + size)[0]
            if not self._current.offset <= offset < self._current.offset + max(self._current.length, 1):
                raise ProtocolError(f"an error at {offset:#x} is not part of {self._current!r}")
        self._fail(error, message, offset)
        self._end_of_chunk()

    def _fail(self, error: int, message: str, offset: int | None) -> None:
        error = known_number(error)
        current = self._current
        if not current.error:
            current.error, current.message = error, message
        self._events.append(Failed(current, error, message, offset))

    def _end_of_chunk(self) -> None:
        self._expect_header()
        if not self._flags & REPLY_FLAG_DONE:
            return
        current = self._current
        current.finish()
        del self._open[current.cookie]
        self._events.append(Done(current))
