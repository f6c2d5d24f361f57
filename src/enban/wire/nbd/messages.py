"""The messages of the transmission phase: layouts, and the primitives a hot loop is made of.

Everything here works in place on a caller's buffer: requests are parsed out of the
receive buffer without copying payloads, reply headers are packed into the send buffer
where the payload is (or will be) lying. The state machines in `server` and `client`
use these same functions; there is no second implementation.

A server loop in short:

    requests, start, need = codec.parse_requests(buffer, start, end, max_payload)
    for flags, kind, cookie, offset, length, payload in requests:
        ...                          # payload: index of the first payload byte in buffer
        body = codec.pack_read_header_into(out, pos, cookie, offset, length)
        preadv(fd, [view[body:body + length]], offset)

    Request, compact                       Request, extended
    0   4 magic 25609513                   0   4 magic 21e41c71
    4   2 command flags                    4   2 command flags
    6   2 command                          6   2 command
    8   8 cookie                           8   8 cookie
    16  8 offset                           16  8 offset
    24  4 length                           24  8 length
    28    payload of WRITE                 32    payload, if PAYLOAD_LEN is set

    Simple reply        Structured chunk         Extended chunk
    0  4 67446698       0  4 668e33ef            0  4 6e8a278c
    4  4 error          4  2 reply flags         4  2 reply flags
    8  8 cookie         6  2 chunk type          6  2 chunk type
    16   data of READ   8  8 cookie              8  8 cookie
                        16 4 length              16 8 offset of the request
                        20   payload             24 8 length
                                                 32   payload

Source: NBD protocol, "Transmission" and "Structured reply types".
"""

from __future__ import annotations

from struct import Struct

from .constants import (
    CMD_FLAG_PAYLOAD_LEN,
    CMD_READ,
    CMD_WRITE,
    EXTENDED,
    MAGIC_EXTENDED_REPLY,
    MAGIC_EXTENDED_REQUEST,
    MAGIC_REQUEST,
    MAGIC_SIMPLE_REPLY,
    MAGIC_STRUCTURED_REPLY,
    MAX_MIN_BLOCK,
    MAX_STRING,
    REPLY_FLAG_DONE,
    REPLY_TYPE_BLOCK_STATUS,
    REPLY_TYPE_BLOCK_STATUS_EXT,
    REPLY_TYPE_ERROR,
    REPLY_TYPE_ERROR_OFFSET,
    REPLY_TYPE_NONE,
    REPLY_TYPE_OFFSET_DATA,
    REPLY_TYPE_OFFSET_HOLE,
    SIMPLE,
    STRUCTURED,
)
from .errors import OutOfTurnError, ProtocolError, TooLargeError, WrongMagicError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Buffer = bytes | bytearray | memoryview
    WritableBuffer = bytearray | memoryview
    # flags, command, cookie, offset, length, index of the payload
    ParsedRequest = tuple[int, int, int, int, int, int]
    # length in bytes, status flags
    StatusExtent = tuple[int, int]

COMPACT_REQUEST = Struct(">IHHQQI")
EXTENDED_REQUEST = Struct(">IHHQQQ")
COMPACT_GLANCE = Struct(">QQQI")  # the same with magic, flags and type in one number
EXTENDED_GLANCE = Struct(">QQQQ")
SIMPLE_REPLY = Struct(">IIQ")
STRUCTURED_CHUNK = Struct(">IHHQI")
EXTENDED_CHUNK = Struct(">IHHQQQ")

STRUCTURED_DATA = Struct(">IHHQIQ")  # a chunk header and the offset that opens its payload
EXTENDED_DATA = Struct(">IHHQQQQ")
HOLE = Struct(">QI")
ERROR = Struct(">IH")
U64 = Struct(">Q")
U32 = Struct(">I")
STATUS_HEAD_EXT = Struct(">II")
STATUS_EXTENT = Struct(">II")
STATUS_EXTENT_EXT = Struct(">QQ")

# No reply without data is longer than this (an error chunk with offset and the longest message).
MAX_ERROR_REPLY = EXTENDED_CHUNK.size + ERROR.size + MAX_STRING + U64.size

# A 32-bit extent longer than this is told in part. The limit is a multiple of every
# possible minimum block size, so the part told stays aligned.
MAX_STATUS_LENGTH = (1 << 32) - MAX_MIN_BLOCK


# ---- requests, seen by the server ---------------------------------------------------------------


def parse_requests(
    buffer: Buffer, start: int, end: int, max_payload: int
) -> tuple[list[ParsedRequest], int, int]:
    """Find every complete compact request in `buffer[start:end]`.

    Returns (requests, next, need). A request is (flags, command, cookie, offset, length,
    payload): `payload` is the index of its first payload byte, `length` bytes of which are in
    the buffer if the command is WRITE. The next request begins at index `next` and will be
    complete once `need` bytes stand from there: parse again only when they do. `need` never
    exceeds the header size plus `max_payload`, so a buffer of that size always makes progress.

    Raises WrongMagicError or TooLargeError if the first request is bad. If a later one is, the
    good ones before it are returned with `need` 0, and the next call raises.
    """
    unpack = COMPACT_REQUEST.unpack_from
    found: list[ParsedRequest] = []
    append = found.append
    last = end - 28
    while start <= last:
        magic, flags, kind, cookie, offset, length = unpack(buffer, start)
        if magic != MAGIC_REQUEST:
            if found:
                return found, start, 0
            raise _not_a_request(magic)
        body = start + 28
        if kind == CMD_WRITE:
            if length > max_payload:
                if found:
                    return found, start, 0
                raise TooLargeError("payload of a WRITE request", length, max_payload)
            if body + length > end:
                return found, start, 28 + length
            append((flags, kind, cookie, offset, length, body))
            start = body + length
        else:
            append((flags, kind, cookie, offset, length, body))
            start = body
    return found, start, 28


def parse_extended_requests(
    buffer: Buffer, start: int, end: int, max_payload: int
) -> tuple[list[ParsedRequest], int, int]:
    """As `parse_requests` for extended headers: a payload is there if the flag PAYLOAD_LEN is set.

    A WRITE without that flag leaves open where the next request begins; it is a ProtocolError.
    """
    unpack = EXTENDED_REQUEST.unpack_from
    found: list[ParsedRequest] = []
    append = found.append
    last = end - 32
    while start <= last:
        magic, flags, kind, cookie, offset, length = unpack(buffer, start)
        if magic != MAGIC_EXTENDED_REQUEST:
            if found:
                return found, start, 0
            raise _not_a_request(magic)
        body = start + 32
        if flags & CMD_FLAG_PAYLOAD_LEN:
            if length > max_payload:
                if found:
                    return found, start, 0
                raise TooLargeError("payload of a request", length, max_payload)
            if body + length > end:
                return found, start, 32 + length
            append((flags, kind, cookie, offset, length, body))
            start = body + length
        elif kind == CMD_WRITE:
            if found:
                return found, start, 0
            raise ProtocolError("an extended WRITE request does not set the flag PAYLOAD_LEN")
        else:
            append((flags, kind, cookie, offset, length, body))
            start = body
    return found, start, 32


def _not_a_request(magic: int) -> WrongMagicError:
    return WrongMagicError(f"a request begins with {magic:#010x} instead of its magic number")


def parse_status_payload(buffer: Buffer, start: int, length: int) -> tuple[int, list[int]] | None:
    """The payload of a BLOCK_STATUS request: (effect length in bytes, context ids), None if malformed."""
    if length < 8 or length % 4:
        return None
    effect = U64.unpack_from(buffer, start)[0]
    ids = list(Struct(f">{(length - 8) // 4}I").unpack_from(buffer, start + 8))
    return effect, ids


# ---- requests, made by the client ---------------------------------------------------------------


def pack_request_into(
    buffer: WritableBuffer, pos: int, flags: int, kind: int, cookie: int, offset: int, length: int
) -> int:
    """A compact request header at `pos`; returns the index after it, where a payload goes."""
    COMPACT_REQUEST.pack_into(buffer, pos, MAGIC_REQUEST, flags, kind, cookie, offset, length)
    return pos + 28


def pack_extended_request_into(
    buffer: WritableBuffer, pos: int, flags: int, kind: int, cookie: int, offset: int, length: int
) -> int:
    """An extended request header at `pos`; returns the index after it, where a payload goes."""
    EXTENDED_REQUEST.pack_into(buffer, pos, MAGIC_EXTENDED_REQUEST, flags, kind, cookie, offset, length)
    return pos + 32


def pack_status_payload(effect_length: int, ids: Sequence[int]) -> bytes:
    """The payload of a BLOCK_STATUS request that asks for some contexts only."""
    return U64.pack(effect_length) + Struct(f">{len(ids)}I").pack(*ids)


# ---- replies, made by the server ----------------------------------------------------------------


def pack_simple_reply_into(buffer: WritableBuffer, pos: int, error: int, cookie: int) -> int:
    """A simple reply at `pos`; returns the index after it, where the data of a READ goes."""
    SIMPLE_REPLY.pack_into(buffer, pos, MAGIC_SIMPLE_REPLY, error, cookie)
    return pos + 16


class Codec:
    """The transmission messages of one style. Use the three instances in `CODECS`, by style.

    Every `pack_..._into(buffer, pos, ...)` writes at `pos` and returns the index after what
    it wrote. `offset` is always that of the request; chunks name their own place, `at`.
    Methods that need chunks raise OutOfTurnError where only simple replies were agreed.

    style: SIMPLE, STRUCTURED or EXTENDED. The sizes are bytes: of a request header, of what
    pack_read_header_into and pack_done_into write, and of a chunk header (0 if there are none).
    """

    __slots__ = ()

    style: int
    request_size: int
    read_header_size: int
    done_size: int
    chunk_size: int

    parse_requests = staticmethod(parse_requests)
    pack_request_into = staticmethod(pack_request_into)

    # A request whose kind is seen at a glance: (kind, cookie, offset, length) at an index of a buffer, and
    # the kind of a READ without flags.
    unpack_glance = staticmethod(COMPACT_GLANCE.unpack_from)
    plain_read = MAGIC_REQUEST << 32 | CMD_READ

    def pack_read_header_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, length: int
    ) -> int:
        """All of a successful READ's reply but its data: `length` bytes, at least one, which follow."""
        raise NotImplementedError

    def pack_read_header(self, cookie: int, offset: int, length: int) -> bytes:
        """What pack_read_header_into writes."""
        raise NotImplementedError

    def pack_done_into(self, buffer: WritableBuffer, pos: int, cookie: int, offset: int) -> int:
        """Success without data; in the chunked styles also the end of a READ sent in pieces."""
        raise NotImplementedError

    def pack_error_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, error: int, message: bytes = b""
    ) -> int:
        """Failure: at most MAX_ERROR_REPLY bytes. Simple replies drop the message."""
        raise NotImplementedError

    def pack_chunk_into(
        self, buffer: WritableBuffer, pos: int, flags: int, kind: int, cookie: int, offset: int, length: int
    ) -> int:
        """A chunk header announcing `length` bytes of payload."""
        raise OutOfTurnError("reply chunks were not agreed on this connection")

    def pack_error_at_into(
        self,
        buffer: WritableBuffer,
        pos: int,
        flags: int,
        cookie: int,
        offset: int,
        error: int,
        at: int,
        message: bytes = b"",
    ) -> int:
        """A chunk saying that the byte `at` of the export failed."""
        size = 14 + len(message)
        pos = self.pack_chunk_into(buffer, pos, flags, REPLY_TYPE_ERROR_OFFSET, cookie, offset, size)
        pos = _pack_error_body(buffer, pos, error, message)
        U64.pack_into(buffer, pos, at)
        return pos + 8

    def pack_data_header_into(
        self, buffer: WritableBuffer, pos: int, flags: int, cookie: int, offset: int, at: int, length: int
    ) -> int:
        """A chunk of `length` data bytes of the export from `at` on, without the data, which follow."""
        pos = self.pack_chunk_into(buffer, pos, flags, REPLY_TYPE_OFFSET_DATA, cookie, offset, length + 8)
        U64.pack_into(buffer, pos, at)
        return pos + 8

    def pack_hole_into(
        self, buffer: WritableBuffer, pos: int, flags: int, cookie: int, offset: int, at: int, length: int
    ) -> int:
        """A chunk saying that `length` bytes (below 4 GiB) from `at` on read as zeros."""
        pos = self.pack_chunk_into(buffer, pos, flags, REPLY_TYPE_OFFSET_HOLE, cookie, offset, 12)
        HOLE.pack_into(buffer, pos, at, length)
        return pos + 12

    def pack_status(
        self, flags: int, cookie: int, offset: int, context: int, extents: Sequence[StatusExtent]
    ) -> bytes:
        """A block status chunk: the extents from `offset` on, seen by one context.

        Structured replies hold 32-bit lengths: an extent that does not fit is told in part
        and ends the chunk, as the protocol allows.
        """
        body = bytearray(U32.pack(context))
        for length, status in extents:
            body += STATUS_EXTENT.pack(min(length, MAX_STATUS_LENGTH), status)
            if length > MAX_STATUS_LENGTH:
                break
        head = bytearray(self.chunk_size)
        self.pack_chunk_into(head, 0, flags, REPLY_TYPE_BLOCK_STATUS, cookie, offset, len(body))
        return bytes(head + body)


class _SimpleCodec(Codec):
    __slots__ = ()
    style = SIMPLE
    request_size = 28
    read_header_size = 16
    done_size = 16
    chunk_size = 0

    def pack_read_header_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, length: int
    ) -> int:
        SIMPLE_REPLY.pack_into(buffer, pos, MAGIC_SIMPLE_REPLY, 0, cookie)
        return pos + 16

    def pack_read_header(self, cookie: int, offset: int, length: int) -> bytes:
        return SIMPLE_REPLY.pack(MAGIC_SIMPLE_REPLY, 0, cookie)

    def pack_done_into(self, buffer: WritableBuffer, pos: int, cookie: int, offset: int) -> int:
        SIMPLE_REPLY.pack_into(buffer, pos, MAGIC_SIMPLE_REPLY, 0, cookie)
        return pos + 16

    def pack_error_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, error: int, message: bytes = b""
    ) -> int:
        SIMPLE_REPLY.pack_into(buffer, pos, MAGIC_SIMPLE_REPLY, error, cookie)
        return pos + 16


class _StructuredCodec(Codec):
    __slots__ = ()
    style = STRUCTURED
    request_size = 28
    read_header_size = 28
    done_size = 20
    chunk_size = 20

    def pack_read_header_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, length: int
    ) -> int:
        # DONE (1) and OFFSET_DATA (1) in one go: this is the hot one.
        STRUCTURED_DATA.pack_into(buffer, pos, MAGIC_STRUCTURED_REPLY, 1, 1, cookie, length + 8, offset)
        return pos + 28

    def pack_read_header(self, cookie: int, offset: int, length: int) -> bytes:
        return STRUCTURED_DATA.pack(MAGIC_STRUCTURED_REPLY, 1, 1, cookie, length + 8, offset)

    def pack_done_into(self, buffer: WritableBuffer, pos: int, cookie: int, offset: int) -> int:
        STRUCTURED_CHUNK.pack_into(
            buffer, pos, MAGIC_STRUCTURED_REPLY, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, 0
        )
        return pos + 20

    def pack_error_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, error: int, message: bytes = b""
    ) -> int:
        size = 6 + len(message)
        pos = self.pack_chunk_into(buffer, pos, REPLY_FLAG_DONE, REPLY_TYPE_ERROR, cookie, offset, size)
        return _pack_error_body(buffer, pos, error, message)

    def pack_chunk_into(
        self, buffer: WritableBuffer, pos: int, flags: int, kind: int, cookie: int, offset: int, length: int
    ) -> int:
        STRUCTURED_CHUNK.pack_into(buffer, pos, MAGIC_STRUCTURED_REPLY, flags, kind, cookie, length)
        return pos + 20


class _ExtendedCodec(_StructuredCodec):
    __slots__ = ()
    style = EXTENDED
    request_size = 32
    read_header_size = 40
    done_size = 32
    chunk_size = 32

    parse_requests = staticmethod(parse_extended_requests)
    pack_request_into = staticmethod(pack_extended_request_into)
    unpack_glance = staticmethod(EXTENDED_GLANCE.unpack_from)
    plain_read = MAGIC_EXTENDED_REQUEST << 32 | CMD_READ

    def pack_read_header_into(
        self, buffer: WritableBuffer, pos: int, cookie: int, offset: int, length: int
    ) -> int:
        EXTENDED_DATA.pack_into(buffer, pos, MAGIC_EXTENDED_REPLY, 1, 1, cookie, offset, length + 8, offset)
        return pos + 40

    def pack_read_header(self, cookie: int, offset: int, length: int) -> bytes:
        return EXTENDED_DATA.pack(MAGIC_EXTENDED_REPLY, 1, 1, cookie, offset, length + 8, offset)

    def pack_done_into(self, buffer: WritableBuffer, pos: int, cookie: int, offset: int) -> int:
        EXTENDED_CHUNK.pack_into(
            buffer, pos, MAGIC_EXTENDED_REPLY, REPLY_FLAG_DONE, REPLY_TYPE_NONE, cookie, offset, 0
        )
        return pos + 32

    def pack_chunk_into(
        self, buffer: WritableBuffer, pos: int, flags: int, kind: int, cookie: int, offset: int, length: int
    ) -> int:
        EXTENDED_CHUNK.pack_into(buffer, pos, MAGIC_EXTENDED_REPLY, flags, kind, cookie, offset, length)
        return pos + 32

    def pack_status(
        self, flags: int, cookie: int, offset: int, context: int, extents: Sequence[StatusExtent]
    ) -> bytes:
        body = bytearray(STATUS_HEAD_EXT.pack(context, len(extents)))
        for length, status in extents:
            body += STATUS_EXTENT_EXT.pack(length, status)
        head = bytearray(self.chunk_size)
        self.pack_chunk_into(head, 0, flags, REPLY_TYPE_BLOCK_STATUS_EXT, cookie, offset, len(body))
        return bytes(head + body)


def _pack_error_body(buffer: WritableBuffer, pos: int, error: int, message: bytes) -> int:
    ERROR.pack_into(buffer, pos, error, len(message))
    pos += 6
    buffer[pos : pos + len(message)] = message
    return pos + len(message)


CODECS: tuple[Codec, Codec, Codec] = (_SimpleCodec(), _StructuredCodec(), _ExtendedCodec())
