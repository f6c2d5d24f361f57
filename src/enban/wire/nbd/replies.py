"""What a client waits for: requests on their way, and the events that answer them.

Rule kept: what a server tells is entered in the request it answers, and must fit it: data belongs to the
range asked for and comes once, contexts were asked for and come once, and a reply that calls itself
complete is. All else raises ProtocolError.

Source: NBD protocol, "Structured reply types", "Request types".
"""

from __future__ import annotations

from bisect import bisect_right

from .constants import CMD_FLAG_DF, CMD_FLAG_REQ_ONE, CMD_READ, COMMAND_NAMES, MAX_REPLY_PIECES
from .errors import ProtocolError, TooLargeError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .messages import StatusExtent


class Transaction:
    """One request on its way.

    kind, flags: CMD_ and CMD_FLAG_ numbers. offset, length: bytes of the export.
    header: the bytes to send, followed by the payload of a WRITE.
    error: 0, or the first NBD error number the server answered with. message: its words.
    done: the reply is complete.
    pending: of a BLOCK_STATUS, the contexts that were not told yet.
    tag: the caller's own.
    """

    __slots__ = (
        "_covered",
        "_got",
        "_pieces",
        "cookie",
        "done",
        "error",
        "flags",
        "header",
        "kind",
        "length",
        "message",
        "offset",
        "pending",
        "tag",
    )

    def __init__(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.kind = kind
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.header = b""
        self.error = 0
        self.message = ""
        self.done = False
        self.tag: object = None
        self._got = 0  # bytes of a READ that were told
        self._pieces = 0  # content chunks seen
        self._covered: list[int] = []  # of a READ: starts and ends of what was told, joined, sorted
        self.pending: set[int] = set()

    def __repr__(self) -> str:
        return f"<Transaction {COMMAND_NAMES[self.kind]} {self.offset:#x}+{self.length:#x}>"

    def tell(self, at: int, length: int) -> None:
        """Enter `length` bytes from `at` on as told; they must belong to the READ and be new."""
        end = at + length
        if at < self.offset or end > self.offset + self.length:
            raise ProtocolError(f"data {at:#x}+{length:#x} is not part of {self!r}")
        self._pieces += 1
        if self.flags & CMD_FLAG_DF and self._pieces > 1:
            raise ProtocolError(f"more than one piece for {self!r}, which must not be fragmented")
        covered = self._covered
        self._got += length
        if not covered:
            covered += (at, end)
        elif at == covered[-1]:
            covered[-1] = end
        else:
            # Starts stand at even indexes, ends at odd ones: an odd place is inside a piece.
            place = bisect_right(covered, at)
            if place & 1 or (place < len(covered) and covered[place] < end):
                raise ProtocolError(f"data {at:#x}+{length:#x} of {self!r} is told twice")
            joined_left = place > 0 and covered[place - 1] == at
            joined_right = place < len(covered) and covered[place] == end
            first, last = place - joined_left, place + joined_right
            covered[first:last] = ([] if joined_left else [at]) + ([] if joined_right else [end])
            if len(covered) > 2 * MAX_REPLY_PIECES:
                raise TooLargeError(f"scattering of {self!r}", len(covered) // 2, MAX_REPLY_PIECES)

    def tell_status(self, context: int, lengths: Sequence[int]) -> None:
        """Enter a context as told; it must have been asked for, and its extents must fit."""
        if context not in self.pending:
            raise ProtocolError(f"block status of context {context}, not asked for or told already")
        if 0 in lengths:
            raise ProtocolError("block status with an extent of no bytes")
        if self.flags & CMD_FLAG_REQ_ONE and (len(lengths) > 1 or lengths[0] > self.length):
            raise ProtocolError("block status of more than the one extent asked for")
        if sum(lengths) - lengths[-1] >= self.length:
            raise ProtocolError("block status goes on behind the end of what was asked")
        self.pending.remove(context)

    def finish(self) -> None:
        """The reply says it is complete: it must be, or be an error."""
        if not self.error:
            if self.kind == CMD_READ and self._got != self.length:
                missing = self.length - self._got
                raise ProtocolError(f"{self!r} ends without {missing} of its bytes and without an error")
            if self.pending:
                raise ProtocolError(f"{self!r} ends without {len(self.pending)} of its contexts")
        self.done = True


class Data:
    """Data of a READ: bytes of the export from `offset` on. data: a view of what `receive` was given."""

    __slots__ = ("data", "offset", "transaction")

    def __init__(self, transaction: Transaction, offset: int, data: memoryview) -> None:
        self.transaction = transaction
        self.offset = offset
        self.data = data


class Hole:
    """Part of a READ: `length` bytes of the export from `offset` on are zero."""

    __slots__ = ("length", "offset", "transaction")

    def __init__(self, transaction: Transaction, offset: int, length: int) -> None:
        self.transaction = transaction
        self.offset = offset
        self.length = length


class Status:
    """Block status of one context: (length in bytes, status flags) from the transaction's offset on.

    The last extent may reach past the range asked for, or all of them may end before it.
    """

    __slots__ = ("context", "extents", "transaction")

    def __init__(self, transaction: Transaction, context: int, extents: list[StatusExtent]) -> None:
        self.transaction = transaction
        self.context = context
        self.extents = extents


class Failed:
    """Part of a reply is an error. offset: the byte of the export it is about, None for all of it."""

    __slots__ = ("error", "message", "offset", "transaction")

    def __init__(self, transaction: Transaction, error: int, message: str, offset: int | None) -> None:
        self.transaction = transaction
        self.error = error
        self.message = message
        self.offset = offset


class Done:
    """The reply is complete; `transaction.error` tells how it went."""

    __slots__ = ("transaction",)

    def __init__(self, transaction: Transaction) -> None:
        self.transaction = transaction


if TYPE_CHECKING:
    ReplyEvent = Data | Hole | Status | Failed | Done
