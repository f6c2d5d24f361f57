"""How a coroutine of the engine is driven: straight through, or inside an event loop.

The engine is written once, as coroutines. What differs between the blocking and the
asyncio face is only how a coroutine waits, and that is a Runtime:

- `Blocking`: a wait blocks the calling thread in line, so no `await` ever suspends
  and `drive` finishes a coroutine with one `send(None)`. Many threads may do so.
- `enban.aio.AsyncioRuntime`: a wait suspends the task; host calls that may block run
  in a thread pool.

A Runtime is chosen when a disk is opened and never changes.
"""

from __future__ import annotations

import _thread
import sys

from ..errors import InternalError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import FrameType
    from typing import Any, Protocol, TypeVar, TypeVarTuple

    T = TypeVar("T")
    Ts = TypeVarTuple("Ts")

    class Waiter(Protocol):
        """A wait that ends once: `set` ends it, `wait` returns after that."""

        def set(self) -> None: ...

        async def wait(self) -> None: ...

    class Runtime(Protocol):
        """How the engine waits. `blocking` is True where waits happen in line."""

        blocking: bool

        def waiter(self) -> Waiter: ...

        async def offload(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
            """Run a host call that may block. It is never left running: a cancelled
            caller resumes only when the call has ended."""
            ...

        async def finish(self, work: Coroutine[Any, Any, T]) -> T:
            """Run `work` to its end even if the caller is cancelled meanwhile."""
            ...


# The functions in which a signal may raise an exception in a blocking call: they wait for the host and hold
# nothing that would have to be given back. Of code objects, as frames have them.
INTERRUPTIBLE: set[object] = set()
# Raises, in the main thread, what a signal asked for while that thread was elsewhere in the engine.
deferred: Callable[[], None] | None = None


def interruptible(function: T) -> T:
    """Decorator: name a function that may be interrupted. It stays as it is."""
    INTERRUPTIBLE.add(getattr(function, "__code__", None))
    return function


class BlockingWaiter:
    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._lock.acquire()

    def set(self) -> None:
        self._lock.release()

    @interruptible
    async def wait(self) -> None:
        self._lock.acquire()


class Blocking:
    """Waits block the calling thread; host calls run in line."""

    blocking = True

    def waiter(self) -> BlockingWaiter:
        return BlockingWaiter()

    async def offload(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        return call(*args)

    async def finish(self, work: Coroutine[Any, Any, T]) -> T:
        return await work


BLOCKING = Blocking()


def drive(work: Coroutine[Any, Any, T]) -> T:
    """Finish a coroutine of the blocking runtime and return its value."""
    try:
        work.send(None)
    except StopIteration as stop:
        if deferred is not None and not inside(sys._getframe(1)):
            deferred()
        value: T = stop.value
        return value
    work.close()
    raise InternalError("a blocking operation suspended", hint="please report this")


def inside(frame: FrameType | None) -> bool:
    """Whether a frame is one of the engine, or was called from one."""
    while frame is not None:
        if frame.f_code is drive.__code__:
            return True
        frame = frame.f_back
    return False
