"""KD packets out of bytes, whatever the bytes are; and the bytes of packets.

    data      leader 30303030 | type u16 | count u16 | id u32 | checksum u32 | payload | AA
    control   leader 69696969 | type u16 |     0     | id u32 |      0

A `Parser` reads one direction of a line. It never refuses: what is not a packet becomes an event that says
so, and reading goes on at the next byte that could begin one. Three rules keep it honest:

- The same bytes give the same events, however they are cut into pieces.
- At most one packet (4017 bytes) is held, whatever a header says.
- A packet that fails is searched again from its second byte on: if it was cut short, the packets that
  were taken for its payload are found. Bytes of it that are in no other packet are not reported twice.

A break-in is the raw byte 62 between packets; inside one, in line noise, or from a guest it is just a byte.
"""

from __future__ import annotations

from .constants import (
    BREAK_IN,
    CONTROL_BYTE,
    CONTROL_LEADER,
    CONTROL_TYPES,
    DATA_BYTE,
    DATA_LEADER,
    DATA_TYPES,
    HEADER_BYTES,
    ID_PREFIX,
    ID_PREFIX_MASK,
    INITIAL_ID,
    MAX_PAYLOAD,
    SYNC,
    TRAILER,
    TYPE_NAMES,
)
from .layouts import HEADER

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .layouts import Buffer

# Why a packet was not one.
CHECKSUM, TRAILING, BAD_HEADER, CUT_OFF = "checksum", "trailer", "header", "cut off"
MOST_NOISE = 4096  # noise bytes to one event
SAMPLE = 16  # of which so many are kept to be shown


class Event:
    """Something in the stream. offset: of its first byte from the stream's start. length: in bytes."""

    __slots__ = ("length", "offset")

    def __init__(self, offset: int, length: int) -> None:
        self.offset = offset
        self.length = length

    def _key(self) -> tuple[object, ...]:
        return (self.offset, self.length)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Event) and type(other) is type(self) and other._key() == self._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        return f"{type(self).__name__}{self._key()}"


class Packet(Event):
    """A whole packet, checksum and trailer right. payload: b"" for a control packet."""

    __slots__ = ("id", "payload", "type")

    def __init__(self, offset: int, length: int, type: int, id: int, payload: bytes) -> None:
        super().__init__(offset, length)
        self.type = type
        self.id = id
        self.payload = payload

    def _key(self) -> tuple[object, ...]:
        return (self.offset, self.length, self.type, self.id, self.payload)

    @property
    def is_control(self) -> bool:
        return self.type in CONTROL_TYPES

    @property
    def name(self) -> str:
        return TYPE_NAMES[self.type]

    @property
    def sync(self) -> bool:
        return bool(self.id & SYNC)


class BreakIn(Event):
    """A break-in byte."""

    __slots__ = ()


class Noise(Event):
    """Bytes that belong to no packet. sample: the first of them."""

    __slots__ = ("sample",)

    def __init__(self, offset: int, length: int, sample: bytes) -> None:
        super().__init__(offset, length)
        self.sample = sample

    def _key(self) -> tuple[object, ...]:
        return (self.offset, self.length, self.sample)


class Broken(Event):
    """A packet that failed. reason: CHECKSUM, TRAILING, BAD_HEADER or CUT_OFF; length: what its header says,
    or what there was of it. type and id are as read, 0 if the header was cut off."""

    __slots__ = ("id", "reason", "type")

    def __init__(self, offset: int, length: int, reason: str, type: int, id: int) -> None:
        super().__init__(offset, length)
        self.reason = reason
        self.type = type
        self.id = id

    def _key(self) -> tuple[object, ...]:
        return (self.offset, self.length, self.reason, self.type, self.id)


class Parser:
    """One direction of a line. break_ins: whether the side that sends here may break in."""

    __slots__ = ("_between", "_break_ins", "_covered", "_held", "_noise", "_noise_at", "_sample", "offset")

    def __init__(self, *, break_ins: bool = True) -> None:
        self.offset = 0  # of the first byte held
        self._break_ins = break_ins
        self._held = bytearray()
        self._covered = 0  # bytes before this offset belong to a packet reported as broken
        self._between = True  # nothing but whole packets and break-ins just before
        self._noise = self._noise_at = 0
        self._sample = bytearray()

    @property
    def pending(self) -> int:
        """Bytes that may yet become a packet."""
        return len(self._held)

    @property
    def noise(self) -> int:
        """Bytes of noise not yet reported."""
        return self._noise

    def receive(self, data: Buffer) -> list[Event]:
        """What these bytes complete."""
        events: list[Event] = []
        # A piece at a time, so that what is held stays small whatever is passed.
        with memoryview(data) as view:
            for start in range(0, len(view), 65536):
                self._held += view[start : start + 65536]
                self._scan(events)
        return events

    def idle(self) -> list[Event]:
        """The line has been silent for longer than any sender pauses: what is unfinished stays so."""
        events: list[Event] = []
        while self._held:
            held = self._held
            length = len(held)
            if length >= 4:
                fields = HEADER.read(held) if length >= HEADER_BYTES else {}
                self._report_broken(events, 0, length, CUT_OFF, fields.get("type", 0), fields.get("id", 0))
            else:
                self._drop(events, 0, 1)
            del held[:1]
            self.offset += 1
            self._scan(events)
        self._end_noise(events)
        self._between = True
        return events

    # -- inside --------------------------------------------------------------------------------

    def _scan(self, events: list[Event]) -> None:
        held = self._held
        at, end = 0, len(held)
        while at < end:
            byte = held[at]
            if byte in (DATA_BYTE, CONTROL_BYTE):
                step = self._packet(events, at, end)
                if step == 0:
                    break
                at += step
            elif byte == BREAK_IN and self._break_ins and self._between:
                events.append(BreakIn(self.offset + at, 1))
                at += 1
            else:
                stop = min((place for byte in b"0i" if (place := held.find(byte, at, end)) >= 0), default=end)
                self._drop(events, at, stop - at)
                at = stop
        del held[:at]
        self.offset += at

    def _packet(self, events: list[Event], at: int, end: int) -> int:
        """Try for a packet at `at`. Returns how far to go on from there; 0: more bytes are needed to tell."""
        held = self._held
        leader = held[at : at + 4]
        if leader.count(leader[0]) != len(leader):
            self._drop(events, at, 1)
            return 1
        if end - at > 4 and held[at + 4] == leader[0]:
            # More than four of them: no type begins so, and the leader, if it is one, is the last four.
            rest = held[at:end]
            run = len(rest) - len(rest.lstrip(leader[:1]))
            self._drop(events, at, run - 4)
            return run - 4
        if end - at < HEADER_BYTES:
            return 0
        fields = HEADER.read(held[at : at + HEADER_BYTES])
        type, count, id = fields["type"], fields["count"], fields["id"]
        if fields["leader"] == CONTROL_LEADER:
            if type in CONTROL_TYPES and not count:
                self._report(events, Packet(self.offset + at, HEADER_BYTES, type, id, b""))
                return HEADER_BYTES
        elif type in DATA_TYPES and count <= MAX_PAYLOAD:
            length = HEADER_BYTES + count + 1
            if end - at < length:
                return 0
            payload = bytes(held[at + HEADER_BYTES : at + length - 1])
            if held[at + length - 1] != TRAILER:
                self._report_broken(events, at, length, TRAILING, type, id)
                return 1
            if sum(payload) != fields["checksum"]:
                self._report_broken(events, at, length, CHECKSUM, type, id)
                return 1
            self._report(events, Packet(self.offset + at, length, type, id, payload))
            return length
        if id & ID_PREFIX_MASK == ID_PREFIX:
            self._report_broken(events, at, HEADER_BYTES, BAD_HEADER, type, id)
        else:  # text with four zeros in it, more likely than a packet
            self._drop(events, at, 1)
        return 1

    def _report(self, events: list[Event], packet: Packet) -> None:
        self._end_noise(events)
        events.append(packet)
        self._between = True

    def _report_broken(
        self, events: list[Event], at: int, length: int, reason: str, type: int, id: int
    ) -> None:
        """A broken packet inside of one already reported is not news."""
        offset = self.offset + at
        self._between = False
        if offset >= self._covered:
            self._end_noise(events)
            events.append(Broken(offset, length, reason, type, id))
            self._covered = offset + length

    def _drop(self, events: list[Event], at: int, count: int) -> None:
        """Bytes that belong to nothing."""
        self._between = False
        offset = self.offset + at
        known = min(max(0, self._covered - offset), count)
        at, offset, count = at + known, offset + known, count - known
        while count:
            if not self._noise:
                self._noise_at = offset
            taken = min(count, MOST_NOISE - self._noise)
            self._sample += self._held[at : at + min(taken, SAMPLE - len(self._sample))]
            self._noise += taken
            at, offset, count = at + taken, offset + taken, count - taken
            if self._noise == MOST_NOISE:
                self._end_noise(events)

    def _end_noise(self, events: list[Event]) -> None:
        if self._noise:
            events.append(Noise(self._noise_at, self._noise, bytes(self._sample)))
        self._noise = 0
        self._sample.clear()


# -- bytes of packets --------------------------------------------------------------------------


def checksum(payload: Buffer) -> int:
    """The sum of the bytes, as a u32."""
    return sum(payload) & 0xFFFFFFFF


def data_packet(type: int, id: int, payload: Buffer) -> bytes:
    """A data packet. Raises ValueError for more than 4000 bytes of payload."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a payload has at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    header = HEADER.build(
        leader=DATA_LEADER, type=type, count=len(payload), id=id, checksum=checksum(payload)
    )
    return bytes(header) + bytes(payload) + bytes((TRAILER,))


def control_packet(type: int, id: int = 0) -> bytes:
    """ACK, RESEND or RESET."""
    return bytes(HEADER.build(leader=CONTROL_LEADER, type=type, count=0, id=id, checksum=0))


def ack_id(id: int) -> int:
    """The id that acknowledges a packet's."""
    return id & ~SYNC


def next_id(id: int) -> int:
    """The id after an acknowledged one."""
    return (id & ~SYNC) ^ 1


def restarted(id: int) -> bool:
    """Whether an id is the one both streams begin with."""
    return id & ~SYNC == INITIAL_ID
