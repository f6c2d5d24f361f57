"""The two remedies the doctor knows: a break-in byte, and a RESET when both sides are silent.

Off unless asked for, and never hidden: each one is told to the caller with its reason, to be logged and
recorded. An `Injector` only decides; whoever owns the line (the bridge) sends.

    for injection in injector.due(now_ns):
        line.send(injection.side, injection.data)
        doctor.injected(injection.side, injection.data, injection.why, now_ns)
    ...
    data = injector.passed(side, data, now_ns)      # before forwarding what a side sent
    data = injector.released(now_ns)                # now and then: what was kept back for nothing

A RESET makes the guest begin both streams anew and report its last state again, so a debugger that came late
or lost count sees it. The guest answers a RESET with a RESET; a debugger that did not ask takes that for a
request, answers in turn, and the two go on for ever. So the first RESET of the debugger after ours is not
passed on: `passed` leaves these 16 bytes out, and nothing else.
"""

from __future__ import annotations

from ..wire.kd import constants as k
from ..wire.kd.parser import control_packet
from .doctor import RUNNING, STOPPED, Doctor
from .tracking import DEBUGGER, TARGET

RESET_LEADER = b"i" * 4 + bytes((k.RESET, 0, 0, 0))


class Injection:
    """Bytes to send towards a side, and why."""

    __slots__ = ("data", "side", "why")

    def __init__(self, side: int, data: bytes, why: str) -> None:
        self.side = side
        self.data = data
        self.why = why


class Injector:
    """Decides when a remedy is due. break_in, reset: which ones are allowed."""

    def __init__(self, doctor: Doctor, *, break_in: bool = False, reset: bool = False) -> None:
        self.doctor = doctor
        self.break_in = break_in
        self.reset = reset
        self._last_ns = -1
        self._swallow_until_ns = 0
        self._held = b""  # what may be the beginning of the RESET to leave out

    def due(self, now_ns: int) -> list[Injection]:
        """What to send now; mostly nothing. One remedy at a time, at most one in five timeouts."""
        doctor, unit = self.doctor, self.doctor.timeout_ns
        doctor.tick(now_ns)
        if not (self.break_in or self.reset) or (self._last_ns >= 0 and now_ns - self._last_ns < 5 * unit):
            return []
        newest_ns = max(doctor.target.last_ns, doctor.debugger.last_ns)
        if any(sender.parser.pending for sender in doctor.sides) or now_ns - newest_ns < unit // 4:
            return []  # somebody is speaking
        found = self._break_in(now_ns) or self._reset(now_ns)
        if found is None:
            return []
        self._last_ns = now_ns
        return [found]

    def _break_in(self, now_ns: int) -> Injection | None:
        doctor = self.doctor
        waited = now_ns - doctor.break_in_ns
        if not self.break_in or not doctor.break_ins_waiting or waited < 3 * doctor.timeout_ns:
            return None
        return Injection(TARGET, bytes((k.BREAK_IN,)), "the debugger's break-in had no effect")

    def _reset(self, now_ns: int) -> Injection | None:
        """When nothing new has happened for long although somebody waits."""
        doctor, unit = self.doctor, self.doctor.timeout_ns
        if not self.reset or doctor.debugger.present is False or now_ns - doctor.progress_ns < 5 * unit:
            return None
        names = {verdict.name for verdict in doctor.verdicts()}
        if doctor.state == STOPPED and "frozen-exception" in names:
            why = "the guest is frozen at an exception and no debugger goes on"
        elif names & {"wrong-id", "no-answer"} and doctor.state != RUNNING:
            why = "the two ends do not agree about packet ids"
        else:
            return None
        self._swallow_until_ns = now_ns + 2 * unit
        return Injection(TARGET, control_packet(k.RESET, k.INITIAL_ID), why)

    def passed(self, side: int, data: bytes, now_ns: int) -> bytes:
        """What of a side's bytes is to be forwarded."""
        if side != DEBUGGER or not (self._swallow_until_ns or self._held):
            return data
        data, self._held = self._held + data, b""
        if now_ns > self._swallow_until_ns:
            self._swallow_until_ns = 0
            return data
        found = data.find(RESET_LEADER)
        if found >= 0 and len(data) - found >= k.HEADER_BYTES:
            self._swallow_until_ns = 0
            return data[:found] + data[found + k.HEADER_BYTES :]
        # Perhaps it has begun: keep that back until more comes, or `released` lets it go.
        start = found
        if start < 0:
            ends = range(min(len(RESET_LEADER), len(data)), 0, -1)
            start = next((len(data) - n for n in ends if data.endswith(RESET_LEADER[:n])), len(data))
        self._held = data[start:]
        return data[:start]

    def released(self, now_ns: int) -> bytes:
        """Bytes of the debugger that were kept back and are no RESET, for nothing followed them in time."""
        if not self._held or now_ns <= self._swallow_until_ns:
            return b""
        self._swallow_until_ns = 0
        data, self._held = self._held, b""
        return data
