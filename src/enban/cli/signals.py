"""Ctrl-C, SIGTERM and SIGHUP while a verb makes something: its clean-up runs, and finds the engine whole.

Python raises an exception for a signal between any two steps of the main thread, so also between taking a
lock and the block that gives it back; the clean-up would then wait for that lock for ever. Within the engine
the exception is therefore raised only where it waits for the host, as an I/O error may be at any time
(`runtime.interruptible` names those functions), or when the call into the engine ends.
"""

from __future__ import annotations

import _thread
import time

from enban.block import runtime
from enban.cli.common import Terminated

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

signal: Any
try:
    # What `signal` is made of. That one makes an enumeration of the numbers, which takes longer than
    # many a command.
    signal = __import__("_signal")
except ImportError:
    signal = __import__("signal")

_AGAIN = 0.002  # seconds
_PATIENCE = 5.0  # seconds; an engine that never waits for the host is interrupted where it is


def catch() -> None:
    """Let these signals raise KeyboardInterrupt or Terminated, once. Ones that are ignored stay so."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            try:
                signal.signal(number, _arrived)
            except ValueError:
                return  # not the main thread: signals are not our business


def _arrived(number: int, frame: FrameType | None) -> None:
    for name in ("SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)  # the clean-up must not be disturbed
    # A second Ctrl-C is from somebody who does not want to wait for it.
    signal.signal(signal.SIGINT, signal.default_int_handler if number == signal.SIGINT else signal.SIG_IGN)
    import warnings

    # A coroutine that was made and is now never awaited is no news for a user.
    warnings.simplefilter("ignore", RuntimeWarning)
    error = KeyboardInterrupt if number == signal.SIGINT else Terminated
    if not hasattr(signal, "setitimer") or _may_raise(frame):
        raise error
    deadline = time.monotonic() + _PATIENCE
    main_thread = _thread.get_ident()

    def leaving_engine() -> None:
        if _thread.get_ident() == main_thread:
            signal.setitimer(signal.ITIMER_REAL, 0)
            runtime.deferred = None
            raise error

    def again(_number: int, frame: FrameType | None) -> None:
        if _may_raise(frame) or time.monotonic() > deadline:
            leaving_engine()

    runtime.deferred = leaving_engine
    signal.signal(signal.SIGALRM, again)
    signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)


def _may_raise(frame: FrameType | None) -> bool:
    """Whether a thread whose innermost frame this is waits for the host, or is not in the engine at all."""
    return frame is None or frame.f_code in runtime.INTERRUPTIBLE or not runtime.inside(frame)
