"""Where KD packets begin and end, for the bridge: as fast as can be, and without judging them.

The doctor reads packets with care (`wire.kd`); the bridge only has to know which packet the target sent last
and whether somebody acknowledged it, and to count. So here a packet is what has a leader, a header that could
be one, and a trailer in its place. Anything else is passed over; at most one packet is held.
"""

from __future__ import annotations

import re
import struct

DATA_TYPES = frozenset({1, 2, 3, 7, 9, 10, 11})
CONTROL_TYPES = frozenset({4, 5, 6})
ACK = 4
SYNC = 0x800
MAX_PAYLOAD = 4000
TRAILER = 0xAA
_HEADER = struct.Struct("<IHHII")
_DATA_LEADER = 0x30303030
_LEADERS = (b"0000", b"iiii")
_LEADER_RUN = re.compile(rb"0+|i+")


class Frame:
    """A packet that came to its end. data: its bytes, b"" for a control packet."""

    __slots__ = ("data", "id", "type")

    def __init__(self, type: int, id: int, data: bytes) -> None:
        self.type = type
        self.id = id
        self.data = data

    @property
    def is_data(self) -> bool:
        return self.type in DATA_TYPES


class Framing:
    """One direction of a line."""

    __slots__ = ("_held", "_need")

    def __init__(self) -> None:
        self._held = bytearray()
        self._need = 0

    @property
    def partial(self) -> bytes:
        """What there is of a packet that has not come to its end."""
        return bytes(self._held)

    @property
    def between(self) -> bool:
        """No packet is under way."""
        return not self._held

    def clear(self) -> None:
        self._held.clear()
        self._need = 0

    def receive(self, data: bytes) -> list[Frame]:
        held = self._held
        if not held:
            if len(data) == _HEADER.size and data.startswith(b"iiii"):  # mostly an ACK, alone
                _, type, count, id, _ = _HEADER.unpack(data)
                if type in CONTROL_TYPES and not count:
                    return [Frame(type, id, b"")]
            elif b"0" not in data and b"i" not in data:
                return []
        held += data
        if len(held) < self._need:
            return []
        self._need = 0
        found: list[Frame] = []
        at = self._scan(found)
        del held[:at]
        return found

    def _scan(self, found: list[Frame]) -> int:
        """Appends what is complete, returns how much of what is held is done with."""
        held, end = self._held, len(self._held)
        at = 0
        while True:
            if end - at < _HEADER.size or held[at : at + 4] not in _LEADERS:
                at = _leader(held, at)
                if end - at < _HEADER.size:
                    self._need = _HEADER.size if end - at >= 4 else 0
                    return at
            leader, type, count, id, _ = _HEADER.unpack_from(held, at)
            if leader == _DATA_LEADER:
                length = _HEADER.size + count + 1
                if type in DATA_TYPES and count <= MAX_PAYLOAD:
                    if end - at < length:
                        self._need = length
                        return at
                    if held[at + length - 1] == TRAILER:
                        found.append(Frame(type, id, bytes(held[at : at + length])))
                        at += length
                        continue
            elif type in CONTROL_TYPES and not count:
                found.append(Frame(type, id, b""))
                at += _HEADER.size
                continue
            # One byte on; in a long run of a leader's byte, to its last four.
            at = _leader(held, at + 1)
            if end - at < 4:
                self._need = 0
                return at


def _leader(held: bytearray, at: int) -> int:
    """Where the next leader is, or could be once more bytes come; the end if nowhere."""
    end = len(held)
    data, control = held.find(b"0000", at), held.find(b"iiii", at)
    if data < 0 and control < 0:
        # The beginning of one may be the last thing there is.
        tail = max(at, end - 3)
        rest = bytes(held[tail:end])
        keep = max(len(rest) - len(rest.rstrip(b"0")), len(rest) - len(rest.rstrip(b"i")))
        return end - keep
    at = min(place for place in (data, control) if place >= 0)
    run = _LEADER_RUN.match(held, at)
    assert run is not None
    # No type begins with a leader's byte, so of a long run only the last four can be one.
    return run.end() - 4


class Latest:
    """The newest packet of the target that nobody has acknowledged, for a debugger who comes late.

    Without it such a debugger would wait until the target repeats itself, or for ever if the target has
    given up; and it would be given the rest of a packet whose beginning it never saw.
    """

    __slots__ = ("_packet", "_wanted", "debugger", "target")

    def __init__(self) -> None:
        self.target = Framing()
        self.debugger = Framing()
        self._packet = b""
        self._wanted = 0

    def from_target(self, data: bytes) -> list[Frame]:
        frames = self.target.receive(data)
        for frame in frames:
            if frame.is_data:
                self._packet, self._wanted = frame.data, frame.id & ~SYNC
        return frames

    def from_debugger(self, data: bytes) -> list[Frame]:
        frames = self.debugger.receive(data)
        for frame in frames:
            # To a target that waits for an acknowledgment, data is one too.
            if frame.is_data or (frame.type == ACK and frame.id == self._wanted):
                self._packet = b""
        return frames

    def for_latecomer(self) -> bytes:
        return self._packet + self.target.partial

    def clear(self) -> None:
        """The guest is another one, or was started anew."""
        self.target.clear()
        self.debugger.clear()
        self._packet = b""
