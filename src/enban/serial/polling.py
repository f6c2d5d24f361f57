"""select.poll with a memory and a short patience.

It knows what each descriptor is polled for and tells the kernel only of changes. Before a wait sleeps it asks
again and again for up to `spin_us`, as long as that has paid: to be woken takes longer than to forward a
packet, and a debugger answers a guest's packet within a moment. A line at rest, or a busy machine, ends it.
"""

from __future__ import annotations

import os
import select
from time import perf_counter_ns

from ..busy_poll import BusyPoll

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

READ, WRITE = select.POLLIN, select.POLLOUT

SPIN_US = 100


class Poller:
    """spin_us: the longest time a wait looks before it sleeps; 0 never looks."""

    def __init__(self, spin_us: int = SPIN_US) -> None:
        self._poll = select.poll()
        self._wanted: dict[int, int] = {}
        self._busy_poll = BusyPoll(spin_us if (os.cpu_count() or 1) > 1 else 0, short_wait=2, eager=False)
        self.poll: Callable[[int], list[tuple[int, int]]] = self._poll.poll

    def want(self, fd: int, events: int) -> None:
        """Poll for these events; for none is not at all: an end that was closed would be told for ever."""
        if self._wanted.get(fd, 0) == events:
            return
        if events:
            self._poll.register(fd, events)
            self._wanted[fd] = events
        else:
            self._poll.unregister(fd)
            del self._wanted[fd]

    def wait(self, milliseconds: int) -> list[tuple[int, int]]:
        """What is ready, after at most so long (and one spin)."""
        poll, busy_poll = self.poll, self._busy_poll
        if not busy_poll.length_ns:
            return poll(milliseconds)
        started = perf_counter_ns()
        if busy_poll.pays():
            end = started + busy_poll.length_ns
            while perf_counter_ns() < end:
                if events := poll(0):
                    busy_poll.looked(True)
                    return events
            busy_poll.looked(False)
        if events := poll(milliseconds):
            busy_poll.waited(perf_counter_ns() - started)
        return events
