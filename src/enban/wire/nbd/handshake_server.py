"""The server's side of the handshake: bytes in, questions out, answers in, bytes out.

What the protocol settles by itself (TLS rules, structured replies, malformed options) is
answered here; what depends on the exports is handed out as an event and answered through
`accept`, `refuse`, `answer_list` or `answer_contexts`. One question is open at a time.

    hs = ServerHandshake()
    while hs.session is None:
        send(hs.to_send())
        event = hs.next_event()
        if event is None: hs.receive(recv())
        elif isinstance(event, ExportRequested): hs.accept(export)
        ...

Rule kept: no more than one option request (MAX_OPTION bytes of data) is ever held, besides
what one `receive` brought.

Source: NBD protocol, "Fixed newstyle negotiation", "TLS support", "Option types".
"""

from __future__ import annotations

from .constants import (
    DEFAULT_MAX_PAYLOAD,
    EXTENDED,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_FIXED_NEWSTYLE,
    FLAG_NO_ZEROES,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_WRITE_ZEROES,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_NAME,
    MAGIC_NBD,
    MAGIC_OPTION,
    MAX_OPTION,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_NAMES,
    REP_ACK,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    SIMPLE,
    STRUCTURED,
    TLS_OFF,
    TLS_REQUIRED,
)
from .errors import OutOfTurnError, ProtocolError, TooLargeError, WrongMagicError, message_bytes
from .handshake import ANSWERING, CLOSED, GREETING, OPTIONS, TLS, TRANSMISSION, Handshake
from .options import (
    CLIENT_FLAGS,
    EXPORT_NAME_PADDING,
    EXPORT_NAME_REPLY,
    GREETING_LAYOUT,
    OPTION,
    BadOption,
    pack_context,
    pack_info_block_size,
    pack_info_export,
    pack_info_text,
    pack_reply,
    pack_server,
    parse_context_query,
    parse_export_query,
    parse_string,
)
from .session import Export, Session

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

# Where each step leads. A step that is not in the table is out of turn.
_NEXT = {
    (GREETING, "client flags"): OPTIONS,
    (OPTIONS, "answered here"): OPTIONS,
    (OPTIONS, "ask"): ANSWERING,
    (OPTIONS, "grant TLS"): TLS,
    (OPTIONS, "hang up"): CLOSED,
    (ANSWERING, "answer"): OPTIONS,
    (ANSWERING, "accept"): TRANSMISSION,
    (ANSWERING, "hang up"): CLOSED,
    (TLS, "TLS is up"): OPTIONS,
}


class ExportRequested:
    """INFO, GO or EXPORT_NAME: answer with `accept` or `refuse`.

    option: the OPT_ number. name: the export wanted, "" for the default one.
    infos: INFO_ kinds the client asked for; with INFO_BLOCK_SIZE in it, it will obey the block sizes.
    """

    __slots__ = ("infos", "name", "option")

    def __init__(self, option: int, name: str, infos: list[int]) -> None:
        self.option = option
        self.name = name
        self.infos = infos


class ListRequested:
    """LIST: answer with `answer_list` or `refuse`."""

    __slots__ = ()


class ContextsRequested:
    """LIST_META_CONTEXT or SET_META_CONTEXT: answer with `answer_contexts` or `refuse`.

    option: the OPT_ number. name: the export. queries: names or patterns of contexts; for
    LIST an empty list asks for all, for SET for none.
    """

    __slots__ = ("name", "option", "queries")

    def __init__(self, option: int, name: str, queries: list[str]) -> None:
        self.option = option
        self.name = name
        self.queries = queries


class TlsGranted:
    """STARTTLS was granted: send what is to send, run TLS on the connection, call `tls_is_up`."""

    __slots__ = ()


class OptionRefused:
    """An option was refused here, for the record: nothing to do.

    option, reply: OPT_ and REP_ERR_ numbers. message: the reason, as the client got it.
    """

    __slots__ = ("message", "option", "reply")

    def __init__(self, option: int, reply: int, message: str) -> None:
        self.option = option
        self.reply = reply
        self.message = message


class HandshakeEnded:
    """The handshake is over without a session: send what is to send and hang up. reason: one clause."""

    __slots__ = ("reason",)

    def __init__(self, reason: str) -> None:
        self.reason = reason


if TYPE_CHECKING:
    ServerEvent = (
        ExportRequested | ListRequested | ContextsRequested | TlsGranted | OptionRefused | HandshakeEnded
    )

# Options without data, and whether data is an error (ABORT ignores it).
_NO_DATA = {OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS}
_KNOWN = frozenset(OPTION_NAMES)


_GREETING = GREETING_LAYOUT.pack(MAGIC_NBD, MAGIC_OPTION, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)


class ServerHandshake(Handshake):
    """One connection's handshake, seen from the server.

    tls: TLS_OFF, TLS_ALLOWED or TLS_REQUIRED.
    style: the best message style to offer; SIMPLE and STRUCTURED make an old-fashioned server.
    max_payload: bytes of payload taken in one message; also told to clients that ask for
        block sizes of an export that has none.
    shutting_down: set it to turn clients away from now on.
    """

    def __init__(
        self, *, tls: int = TLS_OFF, style: int = EXTENDED, max_payload: int = DEFAULT_MAX_PAYLOAD
    ) -> None:
        super().__init__(_NEXT, _GREETING)
        self.shutting_down = False
        self._tls_mode = tls
        self._best_style = style
        self._max_payload = max_payload
        self._fixed = False
        self._no_zeroes = False
        self._tls = False
        self._question: ExportRequested | ListRequested | ContextsRequested | None = None
        self._option = 0
        self._forget()

    def _forget(self) -> None:
        """Nothing agreed before TLS counts afterwards."""
        self._style = SIMPLE
        self._contexts: dict[int, str] = {}
        self._contexts_of: str | None = None

    # ---- the stream ----

    def end_of_stream(self) -> None:
        """The client hung up: raises ProtocolError if that cut a message in two."""
        if self._in and self.state in (GREETING, OPTIONS):
            raise self._broken(ProtocolError("client hung up in the middle of a handshake message"))

    def next_event(self) -> ServerEvent | None:
        """The next thing to decide or to know; None: more bytes are needed, or it is over.

        Raises ProtocolError (hang up), or OutOfTurnError while an answer is owed.
        """
        if self.state == ANSWERING:
            raise OutOfTurnError("the client's last option is not answered yet")
        if self.state == GREETING:
            if len(self._in) < CLIENT_FLAGS.size:
                return None
            self._greet(CLIENT_FLAGS.unpack_from(self._in)[0])
            del self._in[: CLIENT_FLAGS.size]
        while self.state == OPTIONS and len(self._in) >= OPTION.size:
            magic, option, length = OPTION.unpack_from(self._in)
            if magic != MAGIC_OPTION:
                raise self._broken(WrongMagicError(f"an option begins with {magic:#018x}, not its magic"))
            if length > MAX_OPTION:
                raise self._broken(TooLargeError(f"data of option {option}", length, MAX_OPTION))
            if len(self._in) < OPTION.size + length:
                return None
            data = bytes(self._in[OPTION.size : OPTION.size + length])
            del self._in[: OPTION.size + length]
            event = self._handle(option, data)
            if event is not None:
                return event
        return None

    def _greet(self, flags: int) -> None:
        if flags & ~(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES):
            raise self._broken(ProtocolError(f"client sets unknown flags {flags:#x}"))
        self._fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        self._step("client flags")

    # ---- options ----

    def _handle(self, option: int, data: bytes) -> ServerEvent | None:
        self._option = option
        if option == OPT_EXPORT_NAME:
            return self._export_name(data)
        if not self._fixed:
            # Without fixed newstyle there is no way to answer any other option.
            raise self._broken(ProtocolError(f"option {option} from a client without fixed newstyle"))
        if option == OPT_ABORT:
            self._reply(REP_ACK)
            return self._hang_up("client ended the handshake")
        if self.shutting_down:
            return self._turn_down(REP_ERR_SHUTDOWN, "server is shutting down")
        if self._tls_mode == TLS_REQUIRED and not self._tls and option != OPT_STARTTLS:
            return self._turn_down(REP_ERR_TLS_REQD, "this server wants TLS first")
        if option not in _KNOWN or (option == OPT_EXTENDED_HEADERS and self._best_style < EXTENDED):
            return self._turn_down(REP_ERR_UNSUP, "unknown option")
        if option in _NO_DATA and data:
            return self._turn_down(REP_ERR_INVALID, "this option takes no data")
        try:
            return self._act(option, data)
        except BadOption as bad:
            return self._turn_down(bad.reply, bad.text)

    def _act(self, option: int, data: bytes) -> ServerEvent | None:
        if option == OPT_STARTTLS:
            return self._start_tls()
        if option == OPT_STRUCTURED_REPLY:
            return self._agree_style(STRUCTURED)
        if option == OPT_EXTENDED_HEADERS:
            return self._agree_style(EXTENDED)
        if option == OPT_LIST:
            return self._ask(ListRequested())
        if option in (OPT_INFO, OPT_GO):
            name, infos = parse_export_query(data)
            return self._ask(ExportRequested(option, name, infos))
        # One of the two about metadata contexts. SET forgets the old choice even when it fails.
        if option == OPT_SET_META_CONTEXT:
            self._contexts, self._contexts_of = {}, None
        if self._style < STRUCTURED:
            return self._turn_down(REP_ERR_INVALID, "metadata contexts need structured replies first")
        name, queries = parse_context_query(data)
        return self._ask(ContextsRequested(option, name, queries))

    def _export_name(self, data: bytes) -> ServerEvent | None:
        """EXPORT_NAME cannot be refused in words: whatever is wrong ends the connection."""
        if self._style == EXTENDED:
            raise self._broken(ProtocolError("EXPORT_NAME after extended headers were agreed"))
        try:
            name = parse_string(data, "export name")
        except BadOption as bad:
            raise self._broken(ProtocolError(bad.text)) from None
        if self.shutting_down:
            return self._hang_up("server is shutting down")
        if self._tls_mode == TLS_REQUIRED and not self._tls:
            return self._hang_up("client asked for an export without TLS")
        return self._ask(ExportRequested(OPT_EXPORT_NAME, name, []))

    def _start_tls(self) -> ServerEvent:
        if self._tls:
            return self._turn_down(REP_ERR_INVALID, "TLS is up already")
        if self._tls_mode == TLS_OFF:
            return self._turn_down(REP_ERR_UNSUP, "this server has no TLS")
        if self._in:
            # Plain bytes behind STARTTLS would be taken for part of the protected stream.
            raise self._broken(ProtocolError("client sent plain bytes after STARTTLS"))
        self._reply(REP_ACK)
        self._step("grant TLS")
        return TlsGranted()

    def tls_is_up(self) -> None:
        """The TLS handshake succeeded; from now on bytes are the decrypted ones."""
        self._step("TLS is up")
        self._tls = True
        self._forget()

    def _agree_style(self, style: int) -> ServerEvent | None:
        if self._best_style < style:
            return self._turn_down(REP_ERR_UNSUP, "unknown option")
        if style < self._style:
            return self._turn_down(REP_ERR_EXT_HEADER_REQD, "extended headers are agreed already")
        self._style = style
        self._reply(REP_ACK)
        self._step("answered here")
        return None

    # ---- replies ----

    def _reply(self, reply: int, data: bytes = b"") -> None:
        self._out += pack_reply(self._option, reply, data)

    def _turn_down(self, reply: int, message: str) -> OptionRefused:
        self._reply(reply, message_bytes(message))
        self._step("answered here")
        return OptionRefused(self._option, reply, message)

    def _hang_up(self, reason: str) -> HandshakeEnded:
        self._step("hang up")
        self._in.clear()
        return HandshakeEnded(reason)

    def _ask(self, question: ExportRequested | ListRequested | ContextsRequested) -> ServerEvent:
        self._step("ask")
        self._question = question
        return question

    def refuse(self, reply: int, message: str = "") -> None:
        """Answer the open question with an error reply (REP_ERR_...); EXPORT_NAME ends in state closed."""
        if self._question is None:
            raise OutOfTurnError("no question is open")
        self._question = None
        if self._option == OPT_EXPORT_NAME:
            self._hang_up(message)
            return
        self._reply(reply, message_bytes(message))
        self._step("answer")

    def answer_list(self, exports: Sequence[tuple[str, str]]) -> None:
        """Answer LIST with (name, description) pairs."""
        if not isinstance(self._question, ListRequested):
            raise OutOfTurnError("the open question is not about the list of exports")
        for name, description in exports:
            self._reply(REP_SERVER, pack_server(message_bytes(name), message_bytes(description)))
        self._reply(REP_ACK)
        self._question = None
        self._step("answer")

    def answer_contexts(self, contexts: Sequence[tuple[int, str]]) -> None:
        """Answer with (id, name) pairs; for SET they are what BLOCK_STATUS then reports, ids distinct."""
        question = self._question
        if not isinstance(question, ContextsRequested):
            raise OutOfTurnError("the open question is not about metadata contexts")
        chosen = question.option == OPT_SET_META_CONTEXT
        for number, name in contexts:
            self._reply(REP_META_CONTEXT, pack_context(number if chosen else 0, message_bytes(name)))
        if chosen:
            self._contexts = dict(contexts)
            self._contexts_of = question.name
        self._reply(REP_ACK)
        self._question = None
        self._step("answer")

    def accept(self, export: Export) -> Session | None:
        """Answer INFO, GO or EXPORT_NAME with this export.

        The flags that depend on the connection (DF, BLOCK_STATUS_PAYLOAD) are set here. Returns
        the session if the transmission phase begins, None after INFO.
        """
        question = self._question
        if not isinstance(question, ExportRequested):
            raise OutOfTurnError("the open question is not about an export")
        contexts = self._contexts if self._contexts_of == question.name else {}
        served = Export(
            export.name,
            export.size,
            self._flags(export.flags, bool(contexts)),
            description=export.description,
            min_block=export.min_block or 1,
            preferred_block=export.preferred_block or max(4096, export.min_block),
            max_block=min(export.max_block or self._max_payload, self._max_payload),
        )
        if question.option == OPT_EXPORT_NAME:
            self._out += EXPORT_NAME_REPLY.pack(served.size, served.flags)
            if not self._no_zeroes:
                self._out += bytes(EXPORT_NAME_PADDING)
        else:
            self._describe(served, question.infos, bool(export.max_block or export.min_block))
            self._reply(REP_ACK)
        self._question = None
        if question.option == OPT_INFO:
            self._step("answer")
            return None
        self._step("accept")
        self.session = Session(
            served, self._style, dict(contexts), max_payload=self._max_payload, tls=self._tls
        )
        return self.session

    def _flags(self, flags: int, contexts: bool) -> int:
        flags &= ~(FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD)
        if self._style >= STRUCTURED:
            flags |= FLAG_SEND_DF
        if self._style == EXTENDED and contexts:
            flags |= FLAG_BLOCK_STATUS_PAYLOAD
        if not flags & FLAG_SEND_WRITE_ZEROES:
            flags &= ~FLAG_SEND_FAST_ZERO
        return flags

    def _describe(self, export: Export, infos: list[int], has_sizes: bool) -> None:
        self._reply(REP_INFO, pack_info_export(export))
        if INFO_NAME in infos:
            self._reply(REP_INFO, pack_info_text(INFO_NAME, message_bytes(export.name)))
        if INFO_DESCRIPTION in infos and export.description:
            self._reply(REP_INFO, pack_info_text(INFO_DESCRIPTION, message_bytes(export.description)))
        if INFO_BLOCK_SIZE in infos or has_sizes:
            self._reply(REP_INFO, pack_info_block_size(export))
