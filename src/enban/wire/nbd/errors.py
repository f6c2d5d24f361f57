"""What can go wrong on an NBD connection, and which error number says it on the wire.

A `ProtocolError` means the byte stream can no longer be trusted: hang up. A
`RefusedError` is an answer: the connection is fine, the server said no.
"""

from __future__ import annotations

import errno as _errno

from enban.errors import (
    ClosedError,
    HostError,
    NoSpaceError,
    PeerError,
    ReadOnlyError,
    UsageError,
)

from .constants import (
    EINVAL,
    EIO,
    ENOMEM,
    ENOSPC,
    EPERM,
    ERROR_WORDS,
    ESHUTDOWN,
    MAX_STRING,
    OPTION_NAMES,
    REFUSAL_WORDS,
)


class ProtocolError(PeerError):
    """The peer broke a rule of the protocol; the only thing left is to hang up."""


class WrongMagicError(ProtocolError):
    """A message does not start with its magic number: not NBD, or the stream lost step."""


class TooLargeError(ProtocolError):
    """The peer announced more bytes than was agreed; none of them were taken in.

    announced, limit: bytes.
    """

    def __init__(self, what: str, announced: int, limit: int) -> None:
        super().__init__(f"{what} of {announced} bytes is over the limit of {limit}")
        self.announced = announced
        self.limit = limit


class RefusedError(PeerError):
    """The server answered an option with an error reply.

    option: the OPT_ number. reply: the REP_ERR_ number. message: the server's own words, or "".
    """

    def __init__(self, option: int, reply: int, message: str = "", *, hint: str = "") -> None:
        words = REFUSAL_WORDS.get(reply, f"refused with reply {reply:#x}")
        name = OPTION_NAMES.get(option, str(option))
        told = f" ({message})" if message else ""
        super().__init__(f"server's answer to {name}: {words}{told}", hint=hint)
        self.option = option
        self.reply = reply
        self.message = message


class OutOfTurnError(UsageError):
    """The call does not fit the state of the connection or what was negotiated."""


_NUMBERS = {
    _errno.EPERM: EPERM,
    _errno.EACCES: EPERM,
    _errno.EROFS: EPERM,
    _errno.ENOSPC: ENOSPC,
    _errno.EDQUOT: ENOSPC,
    _errno.EFBIG: ENOSPC,
    _errno.ENOMEM: ENOMEM,
    _errno.EINVAL: EINVAL,
}


def number_for(error: BaseException) -> int:
    """The NBD error number with which a server reports `error`; EIO if nothing fits better."""
    if isinstance(error, ReadOnlyError):
        return EPERM
    if isinstance(error, NoSpaceError):
        return ENOSPC
    if isinstance(error, ClosedError):
        return ESHUTDOWN
    if isinstance(error, HostError):
        return _NUMBERS.get(error.errno or 0, EIO)
    if isinstance(error, UsageError):
        return EINVAL
    if isinstance(error, MemoryError):
        return ENOMEM
    if isinstance(error, OSError):
        return _NUMBERS.get(error.errno or 0, EIO)
    return EIO


def known_number(number: int) -> int:
    """`number` if the protocol defines it, else EINVAL, as a client must take it."""
    return number if number in ERROR_WORDS else EINVAL


def message_bytes(text: str) -> bytes:
    """A message for a person as the protocol's string: UTF-8, no NUL, at most 4096 bytes."""
    raw = text.replace("\0", "").encode("utf-8", "replace")
    if len(raw) <= MAX_STRING:
        return raw
    # Cutting may split a character; dropping the broken tail keeps it valid.
    return raw[:MAX_STRING].decode("utf-8", "ignore").encode()
