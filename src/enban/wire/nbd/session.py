"""What both sides know once the handshake is over, and what a request may then ask.

`Export` is what a server offers under one name. `Session` is one connection to it: the
style of the messages, the metadata contexts chosen, and the rule book that says for
each command which flags, range and length are allowed.
"""

from __future__ import annotations

from .constants import (
    CMD_BLOCK_STATUS,
    CMD_CACHE,
    CMD_DISC,
    CMD_FLAG_DF,
    CMD_FLAG_FAST_ZERO,
    CMD_FLAG_FUA,
    CMD_FLAG_NO_HOLE,
    CMD_FLAG_PAYLOAD_LEN,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_RESIZE,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    DEFAULT_MAX_PAYLOAD,
    EINVAL,
    ENOSPC,
    EPERM,
    EXTENDED,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_HAS_FLAGS,
    FLAG_READ_ONLY,
    FLAG_SEND_CACHE,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_RESIZE,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    MAX_MIN_BLOCK,
    SIMPLE,
    UNLIMITED_BLOCK,
)
from .messages import CODECS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .messages import Codec

_NO_LIMIT = (1 << 64) - 1


class Export:
    """One export, as a server describes it.

    name, description: text, at most 4096 bytes of UTF-8 each.
    size: bytes. flags: transmission flags (FLAG_...).
    min_block, preferred_block, max_block: block size constraints in bytes; all 0 if the
        server does not state any. max_block bounds the payload of one message.
    """

    __slots__ = ("description", "flags", "max_block", "min_block", "name", "preferred_block", "size")

    def __init__(
        self,
        name: str,
        size: int,
        flags: int = FLAG_HAS_FLAGS,
        *,
        description: str = "",
        min_block: int = 0,
        preferred_block: int = 0,
        max_block: int = 0,
    ) -> None:
        self.name = name
        self.size = size
        self.flags = flags | FLAG_HAS_FLAGS
        self.description = description
        self.min_block = min_block
        self.preferred_block = preferred_block
        self.max_block = max_block

    @property
    def read_only(self) -> bool:
        return bool(self.flags & FLAG_READ_ONLY)

    def __repr__(self) -> str:
        return f"<Export {self.name!r} {self.size} bytes, flags {self.flags:#x}>"


def block_size_fault(minimum: int, preferred: int, maximum: int) -> str:
    """What is wrong with three block sizes by "Block size constraints"; "" if nothing is."""
    if not 0 < minimum <= MAX_MIN_BLOCK or minimum & (minimum - 1):
        return f"minimum block size {minimum} is not a power of two up to {MAX_MIN_BLOCK}"
    if preferred < minimum or preferred & (preferred - 1):
        return f"preferred block size {preferred} is not a power of two of at least the minimum, {minimum}"
    if maximum != UNLIMITED_BLOCK and (maximum < minimum or maximum % minimum):
        return f"maximum block size {maximum} is not a multiple of the minimum, {minimum}"
    return ""


# One line a command: the transmission flag that offers it (HAS_FLAGS: always), the flags of its
# own with the transmission flag that offers each, the error for a range beyond the export
# (0: it has no range, both fields must be zero), whether it changes the export.
_COMMANDS: tuple[tuple[int, int, tuple[tuple[int, int], ...], int, bool], ...] = (
    (CMD_READ, FLAG_HAS_FLAGS, ((CMD_FLAG_DF, FLAG_SEND_DF),), EINVAL, False),
    (CMD_WRITE, FLAG_HAS_FLAGS, (), ENOSPC, True),
    (CMD_DISC, FLAG_HAS_FLAGS, (), 0, False),
    (CMD_FLUSH, FLAG_SEND_FLUSH, (), 0, False),
    (CMD_TRIM, FLAG_SEND_TRIM, (), EINVAL, True),
    (CMD_CACHE, FLAG_SEND_CACHE, (), EINVAL, False),
    (
        CMD_WRITE_ZEROES,
        FLAG_SEND_WRITE_ZEROES,
        ((CMD_FLAG_NO_HOLE, FLAG_SEND_WRITE_ZEROES), (CMD_FLAG_FAST_ZERO, FLAG_SEND_FAST_ZERO)),
        ENOSPC,
        True,
    ),
    (
        CMD_BLOCK_STATUS,
        FLAG_HAS_FLAGS,
        ((CMD_FLAG_REQ_ONE, FLAG_HAS_FLAGS), (CMD_FLAG_PAYLOAD_LEN, FLAG_BLOCK_STATUS_PAYLOAD)),
        EINVAL,
        False,
    ),
    (CMD_RESIZE, FLAG_SEND_RESIZE, (), 0, True),
)


class Session:
    """One connection in the transmission phase.

    export: what is being served, with the transmission flags valid for this connection.
    style: SIMPLE, STRUCTURED or EXTENDED; `codec` has the messages for it.
    contexts: the metadata contexts chosen, names by id; empty without block status.
    max_payload: the most payload bytes taken in with one message; a request for more than the
        export's max_block is refused even below that.
    tls: whether the handshake moved to TLS.
    """

    __slots__ = ("_rules", "codec", "contexts", "export", "max_payload", "style", "tls")

    def __init__(
        self,
        export: Export,
        style: int = SIMPLE,
        contexts: dict[int, str] | None = None,
        *,
        max_payload: int = DEFAULT_MAX_PAYLOAD,
        tls: bool = False,
    ) -> None:
        self.export = export
        self.style = style
        self.contexts = contexts or {}
        self.max_payload = max_payload
        self.tls = tls
        self.codec: Codec = CODECS[style]
        self._rules = self._book()

    def _book(self) -> tuple[tuple[int, int, int, bool], ...]:
        """For each command: allowed flags (-1: not offered), longest range, error beyond the end, writes."""
        flags = self.export.flags
        most = min(self.max_payload, self.export.max_block or self.max_payload)
        book = []
        for kind, offer, own, beyond, writes in _COMMANDS:
            allowed = CMD_FLAG_FUA if flags & FLAG_SEND_FUA else 0
            for flag, needed in own:
                if flags & needed:
                    allowed |= flag
            if kind == CMD_WRITE and self.style == EXTENDED:
                allowed |= CMD_FLAG_PAYLOAD_LEN
            offered = flags & offer and (kind != CMD_BLOCK_STATUS or self.contexts)
            longest = most if kind in (CMD_READ, CMD_WRITE) else _NO_LIMIT
            book.append((allowed if offered else -1, longest, beyond, writes))
        return tuple(book)

    def refusal(self, flags: int, kind: int, offset: int, length: int) -> int:
        """The NBD error number a request deserves before anything is tried, 0 if it may go on.

        For BLOCK_STATUS with a payload, `length` is the effect length from that payload. A range
        of no bytes is refused: the protocol leaves it open, and no reply can carry its data.
        """
        if kind >= len(_COMMANDS):
            return EINVAL
        allowed, longest, beyond, writes = self._rules[kind]
        if allowed < 0 or flags & ~allowed:
            return EINVAL
        if writes and self.export.flags & FLAG_READ_ONLY:
            return EPERM
        if beyond:
            if offset + length > self.export.size:
                return beyond
            if not 0 < length <= longest:
                return EINVAL
            mask = (self.export.min_block or 1) - 1
            return EINVAL if (offset | length) & mask else 0
        if kind == CMD_FLUSH:
            return EINVAL if offset or length else 0
        # RESIZE carries the new size where others have an offset.
        return EINVAL if kind == CMD_RESIZE and length else 0

    def __repr__(self) -> str:
        return f"<Session {self.export!r} style {self.style} contexts {sorted(self.contexts.values())}>"
