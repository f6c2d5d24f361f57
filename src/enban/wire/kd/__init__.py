"""KD, the protocol of Windows' kernel debugger on a serial line, as pure bytes: bytes in, events out.

    constants   the protocol's numbers, and words for them
    layouts     the structures as tables of named fields
    parser      packets, break-ins and noise out of one direction of a line; the bytes of packets
    messages    what packets say: payloads to fields and back

It reads any bytes whatsoever and holds at most one packet. By what ReactOS, ntoseye and rizin agree on;
docs/formats/kd.md tells it in our words.
"""

from __future__ import annotations

from .messages import Message, decode
from .parser import (
    BreakIn,
    Broken,
    Event,
    Noise,
    Packet,
    Parser,
    ack_id,
    checksum,
    control_packet,
    data_packet,
    next_id,
)

__all__ = [
    "BreakIn",
    "Broken",
    "Event",
    "Message",
    "Noise",
    "Packet",
    "Parser",
    "ack_id",
    "checksum",
    "control_packet",
    "data_packet",
    "decode",
    "next_id",
]
