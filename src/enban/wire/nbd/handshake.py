"""What the two sides of the handshake have in common: states, and bytes waiting either way."""

from __future__ import annotations

from .errors import OutOfTurnError, ProtocolError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .session import Session

# States.
GREETING = "greeting"  # the peer's first bytes are awaited
OPTIONS = "options"  # between two options
ANSWERING = "answering"  # server: the application owes an answer to an option
WAITING = "waiting"  # client: the final reply to an option is awaited
TLS = "starting TLS"  # STARTTLS is granted, the TLS handshake runs outside
TRANSMISSION = "transmission"  # over, successfully: `session` is set
CLOSED = "closed"  # over without a session: hang up
BROKEN = "broken"  # over, the peer broke the protocol: hang up


class Handshake:
    """Base of ServerHandshake and ClientHandshake.

    table: where each step leads from each state; a step that is not in it is out of turn.
    state: one of the above. session: set once the transmission phase is entered.
    """

    def __init__(self, table: dict[tuple[str, str], str], greeting: bytes = b"") -> None:
        self._next = table
        self.state = GREETING
        self.session: Session | None = None
        self._in = bytearray()
        self._out = bytearray(greeting)

    def _step(self, step: str) -> None:
        try:
            self.state = self._next[self.state, step]
        except KeyError:
            raise OutOfTurnError(f"cannot '{step}' while the handshake is in state '{self.state}'") from None

    def _broken(self, error: ProtocolError) -> ProtocolError:
        self.state = BROKEN
        self._in.clear()
        return error

    def receive(self, data: bytes | bytearray | memoryview) -> None:
        """Take in bytes from the peer; not between a grant of TLS and `tls_is_up`."""
        if self.state == TLS:
            raise OutOfTurnError("bytes that arrive now belong to TLS")
        if self.state not in (CLOSED, BROKEN):
            self._in += data

    def to_send(self) -> bytes:
        """What has to go to the peer now, once."""
        out = bytes(self._out)
        self._out.clear()
        return out

    def leftover(self) -> bytes:
        """Bytes behind the handshake: the beginning of the transmission phase."""
        if self.state != TRANSMISSION:
            raise OutOfTurnError("the handshake is not over")
        rest = bytes(self._in)
        self._in.clear()
        return rest
