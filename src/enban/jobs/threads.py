"""The threads of one job and where they wait for each other.

What of `threading` a job needs, made of `_thread`: importing that module, with those it needs, takes longer
than converting a small image.
"""

from __future__ import annotations

import _thread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Condition:
    """A lock, as `with condition:`, and within it a wait for what another thread will tell."""

    __slots__ = ("_lock", "_sleepers")

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._sleepers: list[_thread.LockType] = []

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def wait(self) -> None:
        """Give the lock up, wait for `notify_all`, and take it again."""
        sleeper = _thread.allocate_lock()
        sleeper.acquire()
        self._sleepers.append(sleeper)
        self._lock.release()
        try:
            sleeper.acquire()
        finally:
            self._lock.acquire()

    def notify_all(self) -> None:
        for sleeper in self._sleepers:
            sleeper.release()
        self._sleepers.clear()


class Worker:
    """A running thread. work: must not raise. It does not keep the process alive."""

    __slots__ = ("_end", "_ended")

    def __init__(self, work: Callable[[], None]) -> None:
        self._ended = False
        self._end = _thread.allocate_lock()
        self._end.acquire()

        def run() -> None:
            try:
                work()
            finally:
                self._ended = True
                self._end.release()

        _thread.start_new_thread(run, ())

    def join(self, seconds: float = -1) -> bool:
        """Wait for its end, for ever or for some seconds; whether it has ended. For one thread to call."""
        if not self._ended:
            self._end.acquire(timeout=seconds)
        return self._ended
