"""How far a job is, for a person: part done, rate, time left.

A job calls `update` as often as it likes, from any of its threads; drawing happens at most
ten times a second. On a terminal one line is redrawn; elsewhere, if wanted, plain lines come
once a second.
"""

from __future__ import annotations

import _thread
import sys
from time import monotonic

from enban.units import format_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    # How every job reports: bytes (or units of work) done, and in all, 0 if that is not known. May be
    # called from several threads; an exception it raises cancels the job, which cleans up.
    Report = Callable[[int, int], None]

AUTO, PLAIN, SILENT = "auto", "plain", "silent"
_REDRAW_S = 0.1
_LINE_S = 1.0
_RATE_WINDOW_S = 5.0


class Progress:
    """Shows the progress of one job, and how it ended: `with progress: ...`.

    label: what the job does, one word. stream: where to draw, standard error by default.
    mode: AUTO draws on a terminal and nowhere else, PLAIN prints lines where there is no
        terminal, SILENT shows nothing.
    unit: "bytes", or "" for work that is not measured in bytes: then there is no rate.
    """

    def __init__(
        self, label: str = "", stream: TextIO | None = None, mode: str = AUTO, *, unit: str = "bytes"
    ) -> None:
        self.label = label
        self._stream = sys.stderr if stream is None else stream
        self._unit = unit
        try:
            terminal = self._stream.isatty()
        except (AttributeError, ValueError):
            terminal = False
        self._terminal = terminal and mode != SILENT
        self._plain = mode == PLAIN
        self._active = self._terminal or self._plain
        self._interval = _REDRAW_S if self._terminal else _LINE_S
        self._guard = _thread.allocate_lock()
        self._started = monotonic()
        self._next = self._started + self._interval
        self._drawn = False
        # A few (time, done) points of the last seconds: the rate is that of now, not of the start,
        # and what a resumed job found done already is not in it.
        self._points: list[tuple[float, int]] = []
        self._width = 0
        self._first = (self._started, 0)
        self._last = (0, 0)

    def update(self, done: int, total: int) -> None:
        """`done` of `total` (0 if it is not known). Threads may report out of order."""
        if not self._active:
            return
        now = monotonic()
        if not self._points:
            self._first = (now, done)
            self._points.append(self._first)
        self._last = (max(done, self._last[0]), total)
        if now < self._next or (total and done >= total) or not self._guard.acquire(False):
            return
        try:
            self._next = now + self._interval
            self._draw(now, done, total)
        finally:
            self._guard.release()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is None:
            self.finish()
        else:
            self.abort()

    def finish(self) -> None:
        """The job is done: show all of it and end the line."""
        if self._active and (self._drawn or (self._plain and self._points)):
            with self._guard:
                total = self._last[1] or self._last[0]
                self._points = [self._first]  # the rate of the whole job
                self._draw(monotonic(), total, total)
                self._end_line()

    def abort(self) -> None:
        """The job ended early: leave what is shown and end the line."""
        if self._active:
            with self._guard:
                self._end_line()

    def _end_line(self) -> None:
        self._active = False
        if self._terminal and self._width:
            self._write("\n")

    def _draw(self, now: float, done: int, total: int) -> None:
        done = max(done, self._last[0])
        self._drawn = True
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[1][0] > _RATE_WINDOW_S:
            del self._points[0]
        line = self._line(now, done, total)
        if self._terminal:
            self._write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._write(line + "\n")

    def _line(self, now: float, done: int, total: int) -> str:
        parts = [self.label] if self.label else []
        if total:
            parts.append(f"{100 * done // total:3d} %")
        since, before = self._points[0]
        seconds = now - since
        rate = (done - before) / seconds if seconds > 0 else 0.0
        if self._unit:
            parts.append(f"{format_size(done)} of {format_size(total)}" if total else format_size(done))
            parts.append(f"{format_size(int(rate))}/s")
        if total and done < total and rate > 0:
            parts.append(f"{clock((total - done) / rate)} left")
        elif total and done >= total:
            parts.append(f"in {clock(now - self._started)}")
        return "  ".join(parts)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except (OSError, ValueError):  # nobody watches any more; the job goes on
            self._active = False


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss; tenths below ten seconds."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
