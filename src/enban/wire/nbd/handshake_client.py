"""The client's side of the handshake: options out, replies in.

`ClientHandshake` speaks single options, one at a time; the usual order of them is `negotiator`.

Rule kept: no more than one reply (MAX_OPTION bytes of data) is ever held, besides what one
`receive` brought; long lists come out as single events.

Source: NBD protocol, "Fixed newstyle negotiation", "Option types", "Option reply types".
"""

from __future__ import annotations

from .constants import (
    DEFAULT_MAX_PAYLOAD,
    EXTENDED,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    MAGIC_NBD,
    MAGIC_OLDSTYLE,
    MAGIC_OPTION,
    MAGIC_OPTION_REPLY,
    MAX_OPTION,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_NAMES,
    REP_ACK,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    SIMPLE,
    STRUCTURED,
)
from .errors import OutOfTurnError, ProtocolError, RefusedError, TooLargeError, WrongMagicError
from .handshake import BROKEN, CLOSED, GREETING, OPTIONS, TLS, TRANSMISSION, WAITING, Handshake
from .options import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING_LAYOUT,
    OPTION_REPLY,
    BadOption,
    pack_context_query,
    pack_export_query,
    pack_option,
    parse_context,
    parse_info,
    parse_server,
    parse_string,
)
from .session import Export, Session, block_size_fault

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Where each step leads. A step that is not in the table is out of turn.
_NEXT = {
    (GREETING, "greeting"): OPTIONS,
    (OPTIONS, "send option"): WAITING,
    (WAITING, "final reply"): OPTIONS,
    (WAITING, "TLS granted"): TLS,
    (WAITING, "export granted"): TRANSMISSION,
    (WAITING, "aborted"): CLOSED,
    (TLS, "TLS is up"): OPTIONS,
}

# Which replies may come before the final one.
_SERIES = {
    OPT_LIST: REP_SERVER,
    OPT_INFO: REP_INFO,
    OPT_GO: REP_INFO,
    OPT_LIST_META_CONTEXT: REP_META_CONTEXT,
    OPT_SET_META_CONTEXT: REP_META_CONTEXT,
}

_MAX_SIZE = (1 << 63) - 1


class Greeted:
    """The server greeted. fixed: it takes options other than EXPORT_NAME."""

    __slots__ = ("fixed",)

    def __init__(self, fixed: bool) -> None:
        self.fixed = fixed


class ExportListed:
    """One export of the answer to LIST."""

    __slots__ = ("description", "name")

    def __init__(self, name: str, description: str) -> None:
        self.name = name
        self.description = description


class ContextListed:
    """One metadata context of the answer to LIST_META_CONTEXT (id 0) or SET_META_CONTEXT."""

    __slots__ = ("context", "name")

    def __init__(self, context: int, name: str) -> None:
        self.context = context
        self.name = name


class Acknowledged:
    """The server carried an option out.

    option: the OPT_ number. export: after INFO, GO and EXPORT_NAME what the server told; else None.
    After STARTTLS run TLS on the connection and call `tls_is_up`; after GO and EXPORT_NAME
    the handshake's `session` is set.
    """

    __slots__ = ("export", "option")

    def __init__(self, option: int, export: Export | None = None) -> None:
        self.option = option
        self.export = export


class Declined:
    """The server answered an option with an error. message: its words for a person, or ""."""

    __slots__ = ("message", "option", "reply")

    def __init__(self, option: int, reply: int, message: str) -> None:
        self.option = option
        self.reply = reply
        self.message = message

    def error(self) -> RefusedError:
        hint = ""
        if self.reply == REP_ERR_TLS_REQD:
            hint = "connect with TLS (nbds://)"
        elif self.reply == REP_ERR_UNKNOWN:
            hint = "ask the server for the list of its exports"
        return RefusedError(self.option, self.reply, self.message, hint=hint)


if TYPE_CHECKING:
    ClientEvent = Greeted | ExportListed | ContextListed | Acknowledged | Declined


class ClientHandshake(Handshake):
    """One connection's handshake, seen from the client.

    max_payload: the most bytes we will ask for or send in one message, whatever the server allows.
    fixed: whether the server takes options other than EXPORT_NAME, known after `Greeted`.
    style, tls: what is agreed so far.
    """

    def __init__(self, *, max_payload: int = DEFAULT_MAX_PAYLOAD) -> None:
        super().__init__(_NEXT)
        self.fixed = False
        self.style = SIMPLE
        self.tls = False
        self._max_payload = max_payload
        self._no_zeroes = False
        self._option = 0
        self._name = ""
        self._export: Export | None = None
        self._described = False
        self._contexts: dict[int, str] = {}
        self._contexts_of: str | None = None

    # ---- the stream ----

    def end_of_stream(self) -> None:
        """The server hung up: raises ProtocolError unless the handshake was over or being aborted."""
        if self.state == WAITING and self._option == OPT_ABORT:
            self._step("aborted")
        if self.state in (CLOSED, BROKEN, TRANSMISSION):
            return
        if self.state == WAITING and self._option == OPT_EXPORT_NAME:
            error = ProtocolError(
                f"server hung up instead of serving export '{self._name}'",
                hint="ask the server for the list of its exports",
            )
        else:
            error = ProtocolError("server hung up during the handshake")
        raise self._broken(error)

    def next_event(self) -> ClientEvent | None:
        """The next thing the server said; None: more bytes are needed, or it is our turn.

        Raises ProtocolError: hang up.
        """
        if self.state == GREETING:
            return self._greeting()
        while self.state == WAITING:
            if self._option == OPT_EXPORT_NAME:
                return self._export_name_reply()
            if len(self._in) < OPTION_REPLY.size:
                return None
            magic, option, reply, length = OPTION_REPLY.unpack_from(self._in)
            if magic != MAGIC_OPTION_REPLY:
                raise self._broken(
                    WrongMagicError(f"an option reply begins with {magic:#018x} instead of its magic number")
                )
            if option != self._option:
                raise self._broken(ProtocolError(f"reply to option {option}, but {self._option} was sent"))
            if length > MAX_OPTION:
                raise self._broken(TooLargeError(f"reply to option {option}", length, MAX_OPTION))
            if len(self._in) < OPTION_REPLY.size + length:
                return None
            data = bytes(self._in[OPTION_REPLY.size : OPTION_REPLY.size + length])
            del self._in[: OPTION_REPLY.size + length]
            try:
                event = self._take(reply, data)
            except BadOption as bad:
                raise self._broken(ProtocolError(f"reply to {OPTION_NAMES[option]}: {bad.text}")) from None
            if event is not None:
                return event
        return None

    def _greeting(self) -> Greeted | None:
        if len(self._in) < GREETING_LAYOUT.size:
            return None
        first, second, flags = GREETING_LAYOUT.unpack_from(self._in)
        if first != MAGIC_NBD:
            raise self._broken(
                WrongMagicError(
                    f"server greets with {first:#018x} instead of NBDMAGIC", hint="is it an NBD server?"
                )
            )
        if second == MAGIC_OLDSTYLE:
            raise self._broken(
                WrongMagicError(
                    "server speaks the oldstyle protocol", hint="use a server with the newstyle protocol"
                )
            )
        if second != MAGIC_OPTION:
            raise self._broken(WrongMagicError(f"server greets with {second:#018x} instead of IHAVEOPT"))
        del self._in[: GREETING_LAYOUT.size]
        self.fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        self._out += CLIENT_FLAGS.pack(flags & (FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES))
        self._step("greeting")
        return Greeted(self.fixed)

    # ---- replies ----

    def _take(self, reply: int, data: bytes) -> ClientEvent | None:
        option = self._option
        if reply & REP_ERROR:
            self._step("final reply")
            return Declined(option, reply, parse_string(data, "error message"))
        if reply == REP_ACK:
            if data:
                raise BadOption(f"an acknowledgement with {len(data)} bytes of data")
            return self._acknowledge(option)
        if reply != _SERIES.get(option):
            raise BadOption(f"unexpected reply type {reply}")
        if reply == REP_SERVER:
            return ExportListed(*parse_server(data))
        if reply == REP_META_CONTEXT:
            return self._context(*parse_context(data))
        export = self._export
        assert export is not None
        kind = parse_info(data, export)
        if kind == INFO_EXPORT:
            self._described = True
            self._check_export(export)
        elif kind == INFO_BLOCK_SIZE:
            fault = block_size_fault(export.min_block, export.preferred_block, export.max_block)
            if fault:
                raise BadOption(fault)
        return None

    def _check_export(self, export: Export) -> None:
        if export.size > _MAX_SIZE:
            raise BadOption(f"an export of {export.size} bytes")
        if not export.flags & FLAG_HAS_FLAGS:
            raise BadOption(f"transmission flags {export.flags:#x} without HAS_FLAGS")

    def _context(self, context: int, name: str) -> ContextListed:
        if self._option == OPT_SET_META_CONTEXT:
            if context in self._contexts:
                raise BadOption(f"metadata context id {context} is given twice")
            if len(self._contexts) >= MAX_OPTION // 4:
                raise BadOption("too many metadata contexts")
            self._contexts[context] = name
        return ContextListed(context, name)

    def _acknowledge(self, option: int) -> Acknowledged:
        if option == OPT_STARTTLS:
            if self._in:
                # Plain bytes behind the grant would be taken for part of the protected stream.
                raise self._broken(ProtocolError("server sent plain bytes after granting TLS"))
            self._step("TLS granted")
        elif option == OPT_ABORT:
            self._step("aborted")
        elif option == OPT_GO:
            return Acknowledged(option, self._begin())
        else:
            if option == OPT_STRUCTURED_REPLY:
                self.style = max(self.style, STRUCTURED)
            elif option == OPT_EXTENDED_HEADERS:
                self.style = EXTENDED
            elif option == OPT_SET_META_CONTEXT:
                self._contexts_of = self._name
            self._step("final reply")
        return Acknowledged(option, self._told() if option == OPT_INFO else None)

    def _told(self) -> Export:
        if self._export is None or not self._described:
            raise BadOption("the server acknowledged an export without describing it")
        return self._export

    def _begin(self) -> Export:
        export = self._told()
        limit = self._max_payload
        if export.max_block:
            limit = min(limit, export.max_block)
        contexts = dict(self._contexts) if self._contexts_of == self._name else {}
        self._step("export granted")
        self.session = Session(export, self.style, contexts, max_payload=limit, tls=self.tls)
        return export

    def _export_name_reply(self) -> Acknowledged | None:
        size = EXPORT_NAME_REPLY.size + (0 if self._no_zeroes else EXPORT_NAME_PADDING)
        if len(self._in) < size:
            return None
        export = Export(self._name, 0)
        export.size, export.flags = EXPORT_NAME_REPLY.unpack_from(self._in)
        del self._in[:size]
        try:
            self._check_export(export)
        except BadOption as bad:
            raise self._broken(ProtocolError(f"reply to EXPORT_NAME: {bad.text}")) from None
        self._export, self._described = export, True
        return Acknowledged(OPT_EXPORT_NAME, self._begin())

    # ---- options ----

    def _send(self, option: int, data: bytes = b"") -> None:
        if option != OPT_EXPORT_NAME and not self.fixed and self.state == OPTIONS:
            raise OutOfTurnError("the server takes no option but EXPORT_NAME")
        self._step("send option")
        self._option = option
        self._out += pack_option(option, data)

    def start_tls(self) -> None:
        """Ask for TLS. What was agreed before will not count any more."""
        if self.tls:
            raise OutOfTurnError("TLS is up already")
        self._send(OPT_STARTTLS)

    def tls_is_up(self) -> None:
        """The TLS handshake succeeded; from now on bytes are the decrypted ones."""
        self._step("TLS is up")
        self.tls = True
        self.style = SIMPLE
        self._contexts, self._contexts_of = {}, None

    def request_structured(self) -> None:
        self._send(OPT_STRUCTURED_REPLY)

    def request_extended(self) -> None:
        self._send(OPT_EXTENDED_HEADERS)

    def list_exports(self) -> None:
        """Ask for the names of all exports: ExportListed each, then Acknowledged."""
        self._send(OPT_LIST)

    def list_contexts(self, name: str, queries: Sequence[str] = ()) -> None:
        """Ask which metadata contexts an export has: ContextListed each, then Acknowledged."""
        self._send(OPT_LIST_META_CONTEXT, self._context_query(name, queries))

    def set_contexts(self, name: str, queries: Sequence[str]) -> None:
        """Choose metadata contexts for the export: ContextListed each, then Acknowledged."""
        query = self._context_query(name, queries)
        self._send(OPT_SET_META_CONTEXT, query)
        self._contexts, self._contexts_of = {}, None
        self._name = name

    def _context_query(self, name: str, queries: Sequence[str]) -> bytes:
        if self.style < STRUCTURED:
            raise OutOfTurnError("metadata contexts need structured replies first")
        return pack_context_query(
            string_bytes(name, "export name"), [string_bytes(query, "context query") for query in queries]
        )

    def info(self, name: str, infos: Sequence[int] = (INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE)) -> None:
        """Ask about an export without entering it: Acknowledged with the answer."""
        self._query(OPT_INFO, name, infos)

    def go(self, name: str, infos: Sequence[int] = (INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE)) -> None:
        """Enter an export: Acknowledged, and `session` is set.

        Asking for INFO_BLOCK_SIZE is a promise to obey the block sizes; the session's rules keep it.
        """
        self._query(OPT_GO, name, infos)

    def _query(self, option: int, name: str, infos: Sequence[int]) -> None:
        self._send(option, pack_export_query(string_bytes(name, "export name"), infos))
        self._name = name
        self._export = Export(name, 0)
        self._described = False

    def export_name(self, name: str) -> None:
        """Enter an export the old way; the server hangs up if it refuses."""
        if self.style == EXTENDED:
            raise OutOfTurnError("EXPORT_NAME is not allowed once extended headers are agreed")
        raw = string_bytes(name, "export name")
        self._send(OPT_EXPORT_NAME, raw)
        self._name = name

    def abort(self) -> None:
        """Take leave: Acknowledged, or the server just hangs up."""
        self._send(OPT_ABORT)


def string_bytes(text: str, what: str) -> bytes:
    """A string for the wire; UsageError if the protocol cannot carry it."""
    raw = text.encode("utf-8", "surrogateescape")
    try:
        parse_string(raw, what)
    except BadOption as bad:
        raise OutOfTurnError(bad.text) from None
    return raw
