"""A session on paper: packets of both sides at times of our choosing, told to a doctor (and a recorder).

The times are made up, so a test of verdicts takes no time and says the same each time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from enban.serial.doctor import DEBUGGER, TARGET, Doctor
from enban.serial.tracking import MS
from enban.wire.kd import constants as k
from enban.wire.kd import messages as m
from enban.wire.kd.parser import control_packet, data_packet, next_id

PC = 0xFFFFF80000001234
EXCEPTION = m.exception64(code=k.STATUS_BREAKPOINT, pc=PC, address=PC, first_chance=1)


class Observer(Protocol):
    """What a bridge tells those who watch; the doctor and the recorder have these."""

    def opened(self, side: int, when_ns: int) -> None: ...
    def closed(self, side: int, when_ns: int) -> None: ...
    def saw(self, side: int, data: bytes, when_ns: int) -> None: ...


class Session:
    """Two sides that keep the protocol, until a test makes one break it."""

    def __init__(self, doctor: Doctor | None = None, others: Sequence[Observer] = ()) -> None:
        self.doctor = doctor if doctor is not None else Doctor()
        self.others = others
        self.now_ns = 1_000_000_000
        self.ids = [k.INITIAL_ID | k.SYNC, k.INITIAL_ID]
        self.chunk = 0  # bytes to a piece, 0: whole packets
        self.chunk_ns = 0  # time between two pieces
        for side in (TARGET, DEBUGGER):
            self.doctor.opened(side, self.now_ns)
            for other in others:
                other.opened(side, self.now_ns)

    def wait(self, ms: float) -> None:
        self.now_ns += int(ms * MS)

    def raw(self, side: int, data: bytes) -> None:
        size = self.chunk or max(1, len(data))
        for start in range(0, len(data), size):
            if start:
                self.now_ns += self.chunk_ns
            self.doctor.saw(side, data[start : start + size], self.now_ns)
            for other in self.others:
                other.saw(side, data[start : start + size], self.now_ns)
        self.now_ns += 50_000

    def close(self, side: int) -> None:
        self.doctor.closed(side, self.now_ns)
        for other in self.others:
            other.closed(side, self.now_ns)

    def data(self, side: int, kind: int, payload: bytes, *, acked: bool = True, id: int = -1) -> None:
        """A packet, and its ACK."""
        id = self.ids[side] if id < 0 else id
        self.raw(side, data_packet(kind, id, payload))
        if acked:
            self.ack(side)

    def ack(self, side: int, id: int = -1) -> None:
        """The ACK for what a side sent last."""
        self.raw(1 - side, control_packet(k.ACK, self.ids[side] & ~k.SYNC if id < 0 else id))
        self.ids[side] = next_id(self.ids[side])

    def stop(self, *, acked: bool = True) -> None:
        self.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=acked)

    def ask(self, api: int = k.GET_VERSION, *, answer: bytes = b"", delay_ms: float = 0.2) -> None:
        """A request and its answer."""
        self.data(DEBUGGER, k.MANIPULATE, m.manipulate(api))
        self.wait(delay_ms)
        self.data(TARGET, k.MANIPULATE, m.manipulate(api, answer))

    def go(self) -> None:
        self.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.CONTINUE2, go_status=k.DBG_CONTINUE))

    def clean(self, rounds: int = 10) -> None:
        """Break in, ask, look around, go on, print."""
        self.raw(DEBUGGER, b"b")
        self.wait(10)
        self.stop()
        for number in range(rounds):
            self.ask(answer=bytes(number * 37))
        self.go()
        self.wait(300)
        self.data(TARGET, k.DEBUG_IO, m.print_string(b"running\n"))

    def names(self, after_ms: float = 0) -> list[str]:
        self.wait(after_ms)
        return [verdict.name for verdict in self.doctor.verdicts(self.now_ns)]

    def faults(self, after_ms: float = 0) -> list[str]:
        """The names of what is wrong or slow."""
        self.wait(after_ms)
        return [v.name for v in self.doctor.verdicts(self.now_ns) if v.grade in ("fault", "slow")]


def bytes_of(packets: Iterable[bytes]) -> bytes:
    return b"".join(packets)
