"""The NBD protocol as pure bytes: bytes in, events out, no sockets, no waiting, for both roles.

    constants           the protocol's numbers and limits
    errors              what goes wrong, and which number says so on the wire
    messages            transmission messages: layouts and the primitives for hot loops
    session             what the handshake ends in: export, message style, the rules for requests
    options             bodies of the handshake's options and replies
    handshake, handshake_server, handshake_client
                        the handshake's two state machines, each with its table on top
    negotiator          a client's usual way through the handshake
    server, client      the transmission phase's two state machines
    replies             a client's requests on their way, and the events that answer them

A connection runs one handshake machine to its `session`, and a transmission machine from there.
Every machine has `receive(bytes)`, `next_event()` (None: more bytes, or our turn) and
`end_of_stream()`. They raise ProtocolError when the peer breaks a rule (hang up) and
OutOfTurnError when the call does not fit the state (nothing happened).

By the NBD protocol specification; the layout is mirrored in docs/formats/nbd.md.
"""

from __future__ import annotations

from .client import ClientTransmission
from .errors import OutOfTurnError, ProtocolError, RefusedError, TooLargeError, WrongMagicError
from .handshake_client import ClientHandshake
from .handshake_server import ServerHandshake
from .messages import CODECS, Codec
from .negotiator import Negotiator
from .server import ServerTransmission
from .session import Export, Session

__all__ = [
    "CODECS",
    "ClientHandshake",
    "ClientTransmission",
    "Codec",
    "Export",
    "Negotiator",
    "OutOfTurnError",
    "ProtocolError",
    "RefusedError",
    "ServerHandshake",
    "ServerTransmission",
    "Session",
    "TooLargeError",
    "WrongMagicError",
]
