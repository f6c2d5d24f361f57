"""select.poll with a memory: knows what each descriptor is polled for, tells the kernel only of changes."""

from __future__ import annotations

import select

READ, WRITE = select.POLLIN, select.POLLOUT


class Poller:
    def __init__(self) -> None:
        self._poll = select.poll()
        self._wanted: dict[int, int] = {}
        self.poll = self._poll.poll

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
