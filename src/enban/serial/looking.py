"""Looking at what a bridge has forwarded: afterwards, when there is nothing to forward.

What went through is kept in order, up to a bound, then counted, searched for the packet a latecomer needs,
and shown to the observers. An observer that fails sees no more; the line goes on.
"""

from __future__ import annotations

from collections import deque
from time import monotonic_ns

from .counters import DEBUGGER, TARGET, Counters
from .frames import Latest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class Observer(Protocol):
        """side: 0 the target (guest), 1 the debugger. when_ns: of time.monotonic_ns."""

        def opened(self, side: int, when_ns: int) -> None: ...
        def closed(self, side: int, when_ns: int) -> None: ...
        def saw(self, side: int, data: bytes, when_ns: int) -> None: ...
        def injected(self, side: int, data: bytes, why: str, when_ns: int) -> None: ...
        def tick(self, when_ns: int) -> None: ...


# More than this does not wait for a pause.
_LATER_BYTES = 1 << 20


class Looking:
    def __init__(self, observers: Sequence[Observer], log: Callable[[str], None]) -> None:
        self.counters = Counters()
        self.latest = Latest()
        self._observers = list(observers)
        self._log = log
        self._pending: deque[tuple[int, bytes, int]] = deque()
        self._pending_bytes = 0

    @property
    def pending(self) -> bool:
        return bool(self._pending)

    @property
    def is_slow(self) -> bool:
        """Somebody else looks, too."""
        return bool(self._observers)

    # -- what happened; the order is kept ------------------------------------------------------

    def saw(self, side: int, data: bytes) -> None:
        self.counters.bytes[side] += len(data)
        self._pending.append((side, data, monotonic_ns()))
        self._pending_bytes += len(data)
        while self._pending_bytes > _LATER_BYTES:
            self.look()

    def opened(self, side: int) -> None:
        self.catch_up()
        self._tell("opened", side, monotonic_ns())

    def closed(self, side: int) -> None:
        self.catch_up()
        if side == TARGET:
            self.latest.clear()
        else:
            self.latest.debugger.clear()
        self._tell("closed", side, monotonic_ns())

    def injected(self, side: int, data: bytes, why: str) -> None:
        self.catch_up()
        self._tell("injected", side, data, why, monotonic_ns())

    def tick(self) -> None:
        self.catch_up()
        self._tell("tick", monotonic_ns())

    # -- looking -------------------------------------------------------------------------------

    def look(self) -> None:
        """At the oldest."""
        side, data, when_ns = self._pending.popleft()
        self._pending_bytes -= len(data)
        frames = self.latest.from_target(data) if side == TARGET else self.latest.from_debugger(data)
        for frame in frames:
            self.counters.packet(side, frame.is_data, when_ns)
        if self._observers:
            self._tell("saw", side, data, when_ns)

    def catch_up(self) -> None:
        while self._pending:
            self.look()

    def _tell(self, what: str, *facts: object) -> None:
        for observer in list(self._observers):
            try:
                getattr(observer, what)(*facts)
            except Exception as error:
                self._observers.remove(observer)
                self._log(f"{type(observer).__name__} failed and sees no more: {error}")


__all__ = ["DEBUGGER", "TARGET", "Looking"]
