"""Whether to look for the next request for a moment before sleeping.

Looking answers sooner than being woken, if the driver is quick, which `BusyPoll` learns, and a processor is
free. That is learned too: a thread that was kept from running while it looked has company on its processor,
and who looks all the time is the last to be let in again. So it looks no more for a while, longer each time.
"""

from __future__ import annotations

import _thread
from time import perf_counter_ns

from ...busy_poll import BusyPoll

# From its answer to its next request a guest on TCG takes some 50 us: a shorter spin would be in vain.
SPIN_US = 150
_GAP_NS = 250_000  # nobody who runs is silent for so long
_REST_NS = 50_000_000, 5_000_000_000  # the least and the most
_spinning = _thread.allocate_lock()  # one thread of this process spins at most


class Spin(BusyPoll):
    """A `BusyPoll` that knows whether it has company."""

    __slots__ = ("_crowded_ns", "_rest_ns", "_seen_ns")

    def __init__(self, spin_us: int) -> None:
        super().__init__(spin_us, short_wait=4)
        self._rest_ns = _REST_NS[0]
        self._crowded_ns = -_REST_NS[1]
        self._seen_ns = 0

    def begin(self) -> bool:
        """Whether to spin now; then `end` must follow. When it was quick work since the last `look`, a long
        time in between counts as being kept from running."""
        if not self.pays():
            return False
        now = perf_counter_ns()
        if self._seen_ns and now - self._seen_ns > _GAP_NS:
            self._crowded(now)
        self._seen_ns = now
        return now - self._crowded_ns > self._rest_ns and _spinning.acquire(blocking=False)

    def end(self, found: bool) -> None:
        _spinning.release()
        self.looked(found)

    def look(self, until_ns: int) -> bool:
        """Between two looks: whether to go on."""
        now = perf_counter_ns()
        if now - self._seen_ns > _GAP_NS:
            self._crowded(now)
            return False
        self._seen_ns = now
        return now < until_ns

    def was_slow(self) -> None:
        """What came in between took its time by itself."""
        self._seen_ns = 0

    def waited(self, ns: int) -> None:
        self._seen_ns = 0
        super().waited(ns)

    def _crowded(self, now: int) -> None:
        again = now - self._crowded_ns < 4 * self._rest_ns
        self._rest_ns = min(_REST_NS[1], self._rest_ns * 2) if again else _REST_NS[0]
        self._crowded_ns = self._seen_ns = now
