"""Whether it pays to look for something again and again for a moment, before sleeping until it comes.

To be woken takes longer than many a request or packet. But who looks takes a processor from others, so a few
looks in vain end it, until something comes soon after all.
"""

from __future__ import annotations

import os

MOST_MISSES = 8


def _stay() -> None:
    pass


give_way = getattr(os, "sched_yield", _stay)  # let others have this processor first, if any wait for it


class BusyPoll:
    """What one thread has learned of it. length_ns: how long to look; 0 is never.

    short_wait: a wait of up to so many times that length makes looking worth a try.
    eager: look from the start, not only after the first short wait.
    """

    __slots__ = ("_misses", "_short_ns", "length_ns")

    def __init__(self, spin_us: int, *, short_wait: int, eager: bool = True) -> None:
        self.length_ns = spin_us * 1000
        self._short_ns = short_wait * self.length_ns
        self._misses = 0 if eager else MOST_MISSES

    def pays(self) -> bool:
        return self.length_ns > 0 and self._misses < MOST_MISSES

    def looked(self, found: bool) -> None:
        """A look has ended."""
        self._misses = 0 if found else self._misses + 1

    def waited(self, ns: int) -> None:
        """The thread has slept, and so long."""
        if ns < self._short_ns:
            self._misses = 0
