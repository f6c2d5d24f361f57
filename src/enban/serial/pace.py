"""A line that is as slow as a baud rate says, and never makes up for lost time.

A byte takes ten bit times on an 8N1 line, and is there when they are over:

    idle --begin(now)--> busy: room grows a byte every byte_s; passed(n) takes n of it --rest()--> idle

An idle line earns nothing, and a busy one whose user came late has at most `LATE_S` worth of room. Nothing is
stored here, so no backlog arises that would be sent later in one burst; whoever feeds the line has to stop
reading its source while there is no room, as a real cable would make it do. (A relay that takes everything
and paces it then lets the time-outs of a kernel pass, and the kernel sends everything again.)
"""

from __future__ import annotations

BITS_A_BYTE = 10
# So late a user may come to a busy line without slowing it down.
LATE_S = 0.02
# Waking up for less than this is not worth it.
WORTH_S = 0.001
_LEAST = 16  # what a UART holds


class Pace:
    """baud: bits a second. All times are of time.monotonic, in seconds."""

    __slots__ = ("_begun", "byte_s", "idle", "most")

    def __init__(self, baud: int) -> None:
        self.byte_s = BITS_A_BYTE / baud
        # Bytes that may ever be on their way at once.
        self.most = max(_LEAST, int(LATE_S / self.byte_s))
        self.idle = True
        self._begun = 0.0  # when the byte now on the line was begun

    def begin(self, now: float) -> None:
        """There is something to carry."""
        if self.idle:
            self.idle = False
            self._begun = max(self._begun, now)

    def room(self, now: float) -> int:
        """Bytes that have had their time and may pass."""
        if self.idle:
            return 0
        return min(self.most, int((now - self._begun) / self.byte_s + 1e-6))

    def passed(self, count: int, now: float) -> None:
        self._begun = max(self._begun, now - self.most * self.byte_s) + count * self.byte_s

    def rest(self) -> None:
        """There is nothing to carry any more."""
        self.idle = True

    def due(self) -> float:
        """When it is worth looking again."""
        return self._begun + max(self.byte_s, WORTH_S)
