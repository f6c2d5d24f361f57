"""The usual way of a client through the handshake, and what it falls back to:

    1 STARTTLS           if TLS is wanted; refused: give up, or go on in plain
    2 EXTENDED_HEADERS   refused: 3
    3 STRUCTURED_REPLY   refused: simple replies, no contexts
    4 SET_META_CONTEXT   if contexts are wanted; refused: none
    5 GO                 not supported: 6; refused otherwise: give up
    6 EXPORT_NAME        the server hangs up if it refuses

Rule kept: nothing is asked for twice, so it comes to an end whatever the server answers.

Source: NBD protocol, "Fixed newstyle negotiation", "Option types".
"""

from __future__ import annotations

from .constants import (
    EXTENDED,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    REP_ERR_TLS_REQD,
    REP_ERR_UNSUP,
    STRUCTURED,
    TLS_OFF,
    TLS_REQUIRED,
)
from .errors import RefusedError
from .handshake import OPTIONS, TLS, TRANSMISSION
from .handshake_client import Declined

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .handshake_client import ClientHandshake

# What `Negotiator.advance` asks its caller to do.
NEED_BYTES = "need bytes"
START_TLS = "start TLS"
READY = "ready"


class Negotiator:
    """Takes a `ClientHandshake` from the greeting into an export, by the table at the top.

    name: the export. style: the best message style to ask for. contexts: metadata contexts to
    choose, if the server has them. tls: TLS_REQUIRED gives up without it.

        while (step := negotiator.advance()) is not READY:
            send(hs.to_send())
            if step is START_TLS: wrap the connection; hs.tls_is_up()
            else: hs.receive(recv())
        send(hs.to_send())      # EXPORT_NAME servers: nothing; then hs.session is set
    """

    def __init__(
        self,
        handshake: ClientHandshake,
        name: str = "",
        *,
        style: int = EXTENDED,
        contexts: Sequence[str] = (),
        tls: int = TLS_OFF,
    ) -> None:
        self.handshake = handshake
        self.name = name
        self._style = style
        self._contexts = contexts
        self._tls = tls
        self._done: set[int] = set()

    def advance(self) -> str:
        """Go as far as the bytes at hand allow; NEED_BYTES, START_TLS or READY.

        Raises RefusedError when the server will not let us in, ProtocolError to hang up.
        """
        handshake = self.handshake
        while True:
            if handshake.state == TRANSMISSION:
                return READY
            if handshake.state == TLS:
                return START_TLS
            event = handshake.next_event()
            if event is None:
                if handshake.state != OPTIONS:
                    return NEED_BYTES
                self._ask_next()
            elif isinstance(event, Declined):
                self._fall_back(event)

    def _ask_next(self) -> None:
        """Send the first option of the table that is wanted, possible and not done."""
        handshake, done = self.handshake, self._done
        if not handshake.fixed:
            if self._tls == TLS_REQUIRED:
                raise RefusedError(OPT_STARTTLS, REP_ERR_UNSUP, "the server knows EXPORT_NAME only")
            handshake.export_name(self.name)
        elif self._tls and not handshake.tls and OPT_STARTTLS not in done:
            done.add(OPT_STARTTLS)
            handshake.start_tls()
        elif self._style >= EXTENDED and OPT_EXTENDED_HEADERS not in done:
            done.add(OPT_EXTENDED_HEADERS)
            handshake.request_extended()
        elif self._style >= STRUCTURED > handshake.style and OPT_STRUCTURED_REPLY not in done:
            done.add(OPT_STRUCTURED_REPLY)
            handshake.request_structured()
        elif self._contexts and handshake.style >= STRUCTURED and OPT_SET_META_CONTEXT not in done:
            done.add(OPT_SET_META_CONTEXT)
            handshake.set_contexts(self.name, self._contexts)
        elif OPT_GO not in done:
            done.add(OPT_GO)
            handshake.go(self.name)
        else:
            handshake.export_name(self.name)

    def _fall_back(self, event: Declined) -> None:
        if event.option == OPT_STARTTLS and self._tls == TLS_REQUIRED:
            raise event.error()
        if event.reply == REP_ERR_TLS_REQD:
            raise event.error()
        if event.option == OPT_GO and not (event.reply == REP_ERR_UNSUP and self.handshake.style < EXTENDED):
            raise event.error()
