"""What a bridge counts: bytes and packets each way, and how long the target takes to answer."""

from __future__ import annotations

from collections import deque
from time import monotonic

TARGET, DEBUGGER = 0, 1
_WINDOW = 256


class Counters:
    """Totals since the start; `rates` tells what changed since it was asked last."""

    def __init__(self) -> None:
        self.bytes = [0, 0]
        self.packets = [0, 0]
        self.round_trips = 0
        self._asked_ns = 0
        self._trips_ns: deque[int] = deque(maxlen=_WINDOW)
        self._since = monotonic()
        self._before: tuple[int, ...] = (0, 0, 0, 0)

    def packet(self, side: int, is_data: bool, when_ns: int) -> None:
        """A packet of a side ended. A trip is from a debugger's data packet to the target's next packet."""
        self.packets[side] += 1
        if side == DEBUGGER:
            if is_data:
                self._asked_ns = when_ns
        elif self._asked_ns:
            self._trips_ns.append(when_ns - self._asked_ns)
            self.round_trips += 1
            self._asked_ns = 0

    def round_trip_ms(self) -> tuple[float, float] | None:
        """Median and longest of the last 256 round trips; None if there was none."""
        if not self._trips_ns:
            return None
        ordered = sorted(self._trips_ns)
        return ordered[len(ordered) // 2] / 1e6, ordered[-1] / 1e6

    def rates(self) -> str:
        """One line for people: rates since the last call."""
        now = monotonic()
        took = max(now - self._since, 1e-6)
        totals = (*self.bytes, *self.packets)
        rates = [(new - old) / took for new, old in zip(totals, self._before, strict=True)]
        self._since, self._before = now, totals
        text = (
            f"guest {_rate(rates[0])}B/s {rates[2]:.0f} packets/s, "
            f"debugger {_rate(rates[1])}B/s {rates[3]:.0f} packets/s"
        )
        trip = self.round_trip_ms()
        return text + (f", round trip {trip[0]:.2f} ms (longest {trip[1]:.2f})" if trip else "")


def _rate(value: float) -> str:
    for unit in ("", "k", "M"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} G"
