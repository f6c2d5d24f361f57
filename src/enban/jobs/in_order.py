"""Results that several threads make, taken on in their order by whichever thread is at hand.

Pieces of work differ in cost: threads that each waited for the piece before their own would stand
idle for much of the time. So a result is left here and its thread goes on, until too many wait.
"""

from __future__ import annotations

from .threads import Condition

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class Stopped(Exception):
    """Another thread has failed; nothing more is taken on."""


class InOrder:
    """take: called with the results numbered 0, 1, 2, ..., one after the other, on any of the threads.
    most: how many may wait for an earlier one."""

    def __init__(self, take: Callable[[Any], None], most: int) -> None:
        self._take = take
        self._most = most
        self._changed = Condition()
        self._waiting: dict[int, Any] = {}
        self._next = 0
        self._taking = False
        self._stopped = False

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def bring(self, number: int, result: Any) -> None:
        """Leave a result. Takes it, and those that waited for it, if it is the next. Raises Stopped, and
        what `take` raises."""
        with self._changed:
            self._waiting[number] = result
            while self._taking or self._next not in self._waiting:
                if self._stopped:
                    raise Stopped
                if len(self._waiting) <= self._most:
                    return
                self._changed.wait()
            self._taking = True
        try:
            while (found := self._following()) is not None:
                self._take(found)
        except BaseException:
            with self._changed:
                self._taking = False
                self._changed.notify_all()
            raise

    def _following(self) -> Any:
        with self._changed:
            if self._stopped:
                raise Stopped
            found = self._waiting.pop(self._next, None)
            if found is None:
                # Under the lock that `bring` takes: what comes later finds that nobody is taking.
                self._taking = False
            else:
                self._next += 1
            self._changed.notify_all()
            return found
