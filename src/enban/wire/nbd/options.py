"""The bodies of option requests and option replies, as plain functions both ways.

    Option request               Option reply
    0   8 magic IHAVEOPT         0   8 magic 3e889045565a9
    8   4 option                 8   4 option
    12  4 length                 12  4 reply type
    16    data                   16  4 length
                                 20    data

Parsers raise `BadOption` (the peer's data does not parse); the server turns it into an
error reply, the client into a ProtocolError.

Source: NBD protocol, "Option types", "Option reply types".
"""

from __future__ import annotations

from struct import Struct

from .constants import (
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    MAGIC_OPTION,
    MAGIC_OPTION_REPLY,
    MAX_CONTEXT_QUERIES,
    MAX_STRING,
    REP_ERR_INVALID,
    REP_ERR_TOO_BIG,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .session import Export

OPTION = Struct(">QII")
OPTION_REPLY = Struct(">QIII")
GREETING_LAYOUT = Struct(">QQH")
CLIENT_FLAGS = Struct(">I")
EXPORT_NAME_REPLY = Struct(">QH")
EXPORT_NAME_PADDING = 124

_U16 = Struct(">H")
_U32 = Struct(">I")
_INFO_EXPORT = Struct(">HQH")
_INFO_BLOCK_SIZE = Struct(">HIII")


class BadOption(Exception):
    """Data of an option or of its reply that does not parse. reply: the REP_ERR_ number that says so."""

    def __init__(self, text: str, reply: int = REP_ERR_INVALID) -> None:
        super().__init__(text)
        self.text = text
        self.reply = reply


def parse_string(data: bytes, what: str) -> str:
    """A string of the protocol: UTF-8 without NUL, at most 4096 bytes."""
    if len(data) > MAX_STRING:
        raise BadOption(f"{what} of {len(data)} bytes is over the limit of {MAX_STRING}", REP_ERR_TOO_BIG)
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise BadOption(f"{what} is not UTF-8") from None
    if "\0" in text:
        raise BadOption(f"{what} contains a NUL")
    return text


def _counted_string(data: bytes, pos: int, what: str) -> tuple[str, int]:
    """A string after its 32-bit length, at `pos`; returns it and the index after it."""
    if pos + 4 > len(data):
        raise BadOption(f"the length of {what} is cut off")
    length = _U32.unpack_from(data, pos)[0]
    pos += 4
    if length > len(data) - pos:
        raise BadOption(f"{what} of {length} bytes does not fit its message")
    return parse_string(data[pos : pos + length], what), pos + length


# ---- requests -----------------------------------------------------------------------------------


def pack_option(option: int, data: bytes = b"") -> bytes:
    return OPTION.pack(MAGIC_OPTION, option, len(data)) + data


def pack_export_query(name: bytes, infos: Sequence[int]) -> bytes:
    """The data of INFO and GO."""
    return _U32.pack(len(name)) + name + _U16.pack(len(infos)) + b"".join(map(_U16.pack, infos))


def parse_export_query(data: bytes) -> tuple[str, list[int]]:
    """The data of INFO and GO: export name, kinds of information asked for."""
    name, pos = _counted_string(data, 0, "export name")
    if pos + 2 > len(data):
        raise BadOption("the number of information requests is cut off")
    count = _U16.unpack_from(data, pos)[0]
    pos += 2
    if len(data) - pos != 2 * count:
        raise BadOption(f"{count} information requests do not fit their message")
    return name, list(Struct(f">{count}H").unpack_from(data, pos))


def pack_context_query(name: bytes, queries: Sequence[bytes]) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    parts = [_U32.pack(len(name)), name, _U32.pack(len(queries))]
    for query in queries:
        parts += (_U32.pack(len(query)), query)
    return b"".join(parts)


def parse_context_query(data: bytes) -> tuple[str, list[str]]:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT: export name, queries."""
    name, pos = _counted_string(data, 0, "export name")
    if pos + 4 > len(data):
        raise BadOption("the number of queries is cut off")
    count = _U32.unpack_from(data, pos)[0]
    pos += 4
    if count > MAX_CONTEXT_QUERIES:
        raise BadOption(f"{count} queries are over the limit of {MAX_CONTEXT_QUERIES}", REP_ERR_TOO_BIG)
    queries = []
    for _ in range(count):
        query, pos = _counted_string(data, pos, "context query")
        queries.append(query)
    if pos != len(data):
        raise BadOption(f"{len(data) - pos} bytes follow the last query")
    return name, queries


# ---- replies ------------------------------------------------------------------------------------


def pack_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(MAGIC_OPTION_REPLY, option, reply, len(data)) + data


def pack_server(name: bytes, description: bytes) -> bytes:
    """The data of a SERVER reply, one line of an export list."""
    return _U32.pack(len(name)) + name + description


def parse_server(data: bytes) -> tuple[str, str]:
    """The data of a SERVER reply: export name, description."""
    name, pos = _counted_string(data, 0, "export name")
    return name, parse_string(data[pos:], "export description")


def pack_context(context: int, name: bytes) -> bytes:
    """The data of a META_CONTEXT reply."""
    return _U32.pack(context) + name


def parse_context(data: bytes) -> tuple[int, str]:
    """The data of a META_CONTEXT reply: context id, name."""
    if len(data) < 4:
        raise BadOption("a metadata context without an id")
    return _U32.unpack_from(data)[0], parse_string(data[4:], "context name")


def pack_info_export(export: Export) -> bytes:
    return _INFO_EXPORT.pack(INFO_EXPORT, export.size, export.flags)


def pack_info_text(kind: int, text: bytes) -> bytes:
    return _U16.pack(kind) + text


def pack_info_block_size(export: Export) -> bytes:
    return _INFO_BLOCK_SIZE.pack(INFO_BLOCK_SIZE, export.min_block, export.preferred_block, export.max_block)


def parse_info(data: bytes, export: Export) -> int:
    """Enter the data of an INFO reply into `export`; returns the kind. Unknown kinds change nothing."""
    if len(data) < 2:
        raise BadOption("an information reply without its kind")
    kind: int = _U16.unpack_from(data)[0]
    if kind == INFO_EXPORT:
        if len(data) != _INFO_EXPORT.size:
            raise BadOption(f"export information of {len(data)} bytes instead of {_INFO_EXPORT.size}")
        _, export.size, export.flags = _INFO_EXPORT.unpack(data)
    elif kind == INFO_NAME:
        export.name = parse_string(data[2:], "export name")
    elif kind == INFO_DESCRIPTION:
        export.description = parse_string(data[2:], "export description")
    elif kind == INFO_BLOCK_SIZE:
        if len(data) != _INFO_BLOCK_SIZE.size:
            raise BadOption(f"block sizes of {len(data)} bytes instead of {_INFO_BLOCK_SIZE.size}")
        _, export.min_block, export.preferred_block, export.max_block = _INFO_BLOCK_SIZE.unpack(data)
    return kind
