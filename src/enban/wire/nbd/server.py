"""The transmission phase, seen from the server: request bytes in, requests out, replies made.

This is the tidy face over the primitives in `messages`. A loop that serves thousands of
requests a second uses those directly; this one is for everything else and shows the rules.

Rule kept: what is buffered never exceeds one request with its payload (at most the
session's max_payload) besides what one `receive` brought.

Source: NBD protocol, "Transmission", "Request types".
"""

from __future__ import annotations

from .constants import (
    CMD_BLOCK_STATUS,
    CMD_DISC,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_READ,
    CMD_WRITE,
    COMMAND_NAMES,
    EINVAL,
    EXTENDED,
    REPLY_FLAG_DONE,
    SIMPLE,
)
from .errors import OutOfTurnError, ProtocolError, message_bytes
from .messages import MAX_ERROR_REPLY, parse_status_payload

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .messages import Buffer, ParsedRequest, StatusExtent
    from .session import Session

# States and where each step leads.
RUNNING = "running"
LEAVING = "leaving"  # the client said DISC: answer what is open, then hang up
BROKEN = "broken"  # the client broke the protocol: hang up

_NEXT = {
    (RUNNING, "DISC"): LEAVING,
    (RUNNING, "violation"): BROKEN,
}


class Request:
    """One request. Answer it exactly once, with one of the `reply_...` methods of the machine.

    kind, flags: CMD_ and CMD_FLAG_ numbers. offset, length: bytes of the export.
    payload: the data of a WRITE, else empty.
    contexts: for BLOCK_STATUS the ids to report on.
    refusal: the NBD error number the rules demand for this request, 0 if it is fine;
        answer a refused one with `reply_error(request, request.refusal)`.
    """

    __slots__ = ("answered", "contexts", "cookie", "flags", "kind", "length", "offset", "payload", "refusal")

    def __init__(
        self,
        kind: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        payload: bytes,
        contexts: Sequence[int],
        refusal: int,
    ) -> None:
        self.kind = kind
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = payload
        self.contexts = contexts
        self.refusal = refusal
        self.answered = False

    @property
    def name(self) -> str:
        return COMMAND_NAMES[self.kind] if self.kind < len(COMMAND_NAMES) else f"command {self.kind}"

    def __repr__(self) -> str:
        return f"<Request {self.name} {self.offset:#x}+{self.length:#x} cookie {self.cookie:#x}>"


class Disconnect:
    """The client says goodbye: answer what is open, then hang up. Nothing is replied to this."""

    __slots__ = ()


class ServerTransmission:
    """One connection's transmission phase, seen from the server.

    session: from the handshake. leftover: bytes that arrived behind the handshake.
    state: RUNNING, LEAVING or BROKEN.
    """

    def __init__(self, session: Session, leftover: Buffer = b"") -> None:
        self.session = session
        self.state = RUNNING
        self._codec = session.codec
        self._in = bytearray(leftover)
        self._need = 0
        self._parsed: list[Request | Disconnect] = []  # in reverse order

    def _step(self, step: str) -> None:
        self.state = _NEXT[self.state, step]

    # ---- requests ----

    def receive(self, data: Buffer) -> None:
        """Take in bytes from the client. After DISC they are dropped: the client must not send any."""
        if self.state == RUNNING:
            self._in += data

    def next_event(self) -> Request | Disconnect | None:
        """The next request; None: more bytes are needed. Raises ProtocolError: hang up."""
        if not self._parsed and self.state == RUNNING and len(self._in) >= self._need:
            self._parse()
        return self._parsed.pop() if self._parsed else None

    def _parse(self) -> None:
        try:
            requests, rest, self._need = self._codec.parse_requests(
                self._in, 0, len(self._in), self.session.max_payload
            )
        except ProtocolError:
            self._step("violation")
            self._in.clear()
            raise
        for parsed in requests:
            if parsed[1] == CMD_DISC:
                self._parsed.append(Disconnect())
                self._step("DISC")
                rest = len(self._in)
                break
            self._parsed.append(self._request(parsed))
        del self._in[:rest]
        self._parsed.reverse()

    def _request(self, parsed: ParsedRequest) -> Request:
        flags, kind, cookie, offset, length, start = parsed
        payload = b""
        contexts: Sequence[int] = ()
        refusal = 0
        if kind == CMD_WRITE:
            with memoryview(self._in) as view:
                payload = bytes(view[start : start + length])
        elif kind == CMD_BLOCK_STATUS:
            contexts = tuple(self.session.contexts)
            # In compact headers the flag is no more than a flag that is not allowed.
            if flags & CMD_FLAG_PAYLOAD_LEN and self.session.style == EXTENDED:
                selection = parse_status_payload(self._in, start, length)
                if selection is None:
                    refusal = EINVAL
                else:
                    length, contexts = selection
                    if len(set(contexts)) < len(contexts) or not set(contexts) <= set(self.session.contexts):
                        refusal = EINVAL
        refusal = refusal or self.session.refusal(flags, kind, offset, length)
        return Request(kind, flags, cookie, offset, length, payload, contexts, refusal)

    def end_of_stream(self) -> None:
        """The client hung up: raises ProtocolError if that cut a request in two."""
        if self._in and self.state == RUNNING:
            self._step("violation")
            raise ProtocolError(f"client hung up in the middle of a request, {len(self._in)} bytes into it")

    # ---- replies ----

    def _claim(self, request: Request) -> None:
        if request.answered:
            raise OutOfTurnError(f"{request!r} is answered already")
        request.answered = True

    def reply_done(self, request: Request) -> bytes:
        """Success, for every command but READ and BLOCK_STATUS."""
        if request.kind in (CMD_READ, CMD_BLOCK_STATUS):
            raise OutOfTurnError(f"{request.name} succeeds with data only")
        self._claim(request)
        out = bytearray(self._codec.done_size)
        self._codec.pack_done_into(out, 0, request.cookie, request.offset)
        return bytes(out)

    def reply_read(self, request: Request, data: Buffer) -> bytes:
        """The whole data of a READ."""
        if request.kind != CMD_READ or len(data) != request.length:
            raise OutOfTurnError(f"{len(data)} bytes do not answer {request!r}")
        self._claim(request)
        codec = self._codec
        out = bytearray(codec.read_header_size)
        codec.pack_read_header_into(out, 0, request.cookie, request.offset, request.length)
        return b"".join((out, data))

    def reply_piece(self, request: Request, at: int, data: Buffer | int, *, done: bool = False) -> bytes:
        """A piece of a READ from export offset `at` on: its data, or the length of a hole in bytes.

        Pieces must not overlap and must add up; the last has `done`, or `reply_end` follows.
        """
        codec, flags = self._codec, REPLY_FLAG_DONE if done else 0
        length = data if isinstance(data, int) else len(data)
        inside = request.offset <= at and at + length <= request.offset + request.length
        if request.kind != CMD_READ or not length or not inside:
            raise OutOfTurnError(f"a piece {at:#x}+{length:#x} does not belong to {request!r}")
        self._piece(request, done)
        head = bytearray(codec.read_header_size + 4)
        if isinstance(data, int):
            end = codec.pack_hole_into(head, 0, flags, request.cookie, request.offset, at, data)
            return bytes(head[:end])
        end = codec.pack_data_header_into(head, 0, flags, request.cookie, request.offset, at, length)
        return b"".join((head[:end], data))

    def reply_status(
        self, request: Request, context: int, extents: Sequence[StatusExtent], *, done: bool = False
    ) -> bytes:
        """The extents of one context for a BLOCK_STATUS, (length in bytes, status flags) each."""
        if request.kind != CMD_BLOCK_STATUS or context not in request.contexts or not extents:
            raise OutOfTurnError(f"{len(extents)} extents of context {context} do not answer {request!r}")
        self._piece(request, done)
        flags = REPLY_FLAG_DONE if done else 0
        return self._codec.pack_status(flags, request.cookie, request.offset, context, extents)

    def reply_end(self, request: Request) -> bytes:
        """The end of a reply in pieces."""
        self._piece(request, True)
        out = bytearray(self._codec.done_size)
        self._codec.pack_done_into(out, 0, request.cookie, request.offset)
        return bytes(out)

    def reply_error_at(
        self, request: Request, error: int, at: int, message: str = "", *, done: bool = False
    ) -> bytes:
        """A piece of a reply: the byte at export offset `at` failed."""
        self._piece(request, done)
        out = bytearray(MAX_ERROR_REPLY)
        end = self._codec.pack_error_at_into(
            out,
            0,
            REPLY_FLAG_DONE if done else 0,
            request.cookie,
            request.offset,
            error,
            at,
            message_bytes(message),
        )
        return bytes(out[:end])

    def reply_error(self, request: Request, error: int, message: str = "") -> bytes:
        """Failure of the whole request; may also end a reply in pieces."""
        if not error:
            raise OutOfTurnError("error number 0 does not say what failed")
        self._claim(request)
        out = bytearray(MAX_ERROR_REPLY)
        end = self._codec.pack_error_into(
            out, 0, request.cookie, request.offset, error, message_bytes(message)
        )
        return bytes(out[:end])

    def _piece(self, request: Request, done: bool) -> None:
        if self.session.style == SIMPLE:
            raise OutOfTurnError("replies in pieces were not agreed on this connection")
        if request.answered:
            raise OutOfTurnError(f"{request!r} is answered already")
        request.answered = done
