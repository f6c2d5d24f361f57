"""Whether to look for the next request for a moment before sleeping.

Looking answers sooner than being woken, if the driver is quick and a processor is free. Both are learned:

    in vain   a driver that did not come so often is slow: no more, until a wait was short
    crowded   a thread that was kept from running while it looked has company on its processor, and who looks
              all the time is the last to be let in again: no more for a while, longer each time
"""

from __future__ import annotations

import _thread
from time import perf_counter_ns

# From its answer to its next request a guest on TCG takes some 50 us: a shorter spin would be in vain.
SPIN_US = 150
_MOST_MISSES = 8
_SHORT_WAIT = 4  # a wait of up to so many times the spin makes spinning worth a try
_GAP_NS = 250_000  # nobody who runs is silent for so long
_REST_NS = 50_000_000, 5_000_000_000  # the least and the most
_spinning = _thread.allocate_lock()  # one thread of this process spins at most


class Spin:
    """What one thread knows of its spinning. length_ns: how long it looks; 0 is never."""

    __slots__ = ("_crowded_ns", "_misses", "_rest_ns", "_seen_ns", "length_ns")

    def __init__(self, spin_us: int) -> None:
        self.length_ns = spin_us * 1000
        self._misses = 0
        self._rest_ns = _REST_NS[0]
        self._crowded_ns = -_REST_NS[1]
        self._seen_ns = 0

    def begin(self) -> bool:
        """Whether to spin now; then `end` must follow. When it was quick work since the last `look`, a long
        time in between counts as being kept from running."""
        if not self.length_ns or self._misses >= _MOST_MISSES:
            return False
        now = perf_counter_ns()
        if self._seen_ns and now - self._seen_ns > _GAP_NS:
            self._crowded(now)
        self._seen_ns = now
        return now - self._crowded_ns > self._rest_ns and _spinning.acquire(blocking=False)

    def end(self, found: bool) -> None:
        _spinning.release()
        self._misses = 0 if found else self._misses + 1

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
        """The thread has slept, and so long."""
        self._seen_ns = 0
        if ns < _SHORT_WAIT * self.length_ns:
            self._misses = 0

    def _crowded(self, now: int) -> None:
        again = now - self._crowded_ns < 4 * self._rest_ns
        self._rest_ns = min(_REST_NS[1], self._rest_ns * 2) if again else _REST_NS[0]
        self._crowded_ns = self._seen_ns = now
