"""Progress: cheap, on a terminal only, never in the way."""

from __future__ import annotations

import io
import threading

import pytest

from enban.jobs import progress as module
from enban.jobs.progress import AUTO, PLAIN, SILENT, Progress, clock

GIB = 1 << 30


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module, "monotonic", lambda: self.now)


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_on_a_terminal(time: Clock) -> None:
    stream = Terminal()
    progress = Progress("convert", stream)
    progress.update(0, 2 * GIB)
    assert stream.getvalue() == ""  # a job done at once shows nothing
    time.now += 0.5
    progress.update(GIB // 2, 2 * GIB)
    assert stream.getvalue() == "\rconvert   25 %  512 MiB of 2 GiB  1 GiB/s  1.5 s left"
    time.now += 0.5
    progress.update(GIB, 2 * GIB)
    assert stream.getvalue().endswith("\rconvert   50 %  1 GiB of 2 GiB  1 GiB/s  1.0 s left  ")
    time.now += 1
    progress.finish()
    assert stream.getvalue().rstrip(" \n").endswith("100 %  2 GiB of 2 GiB  1 GiB/s  in 2.0 s")
    assert stream.getvalue().endswith("\n")


def test_at_most_ten_times_a_second(time: Clock) -> None:
    stream = Terminal()
    progress = Progress("convert", stream)
    for step in range(10_000):
        time.now += 0.001
        progress.update(step, 10_000)
    assert 90 <= stream.getvalue().count("\r") <= 101


def test_nothing_without_a_terminal(time: Clock) -> None:
    for mode, lines in ((AUTO, 0), (SILENT, 0), (PLAIN, 5)):
        stream = io.StringIO()
        progress = Progress("check", stream, mode)
        for step in range(100):
            progress.update(step, 100)
            time.now += 0.05
        progress.finish()
        assert len(stream.getvalue().splitlines()) == lines, mode
        assert "\r" not in stream.getvalue()
    assert Progress("check", Terminal(), SILENT)._active is False


def test_work_that_is_not_bytes(time: Clock) -> None:
    stream = Terminal()
    progress = Progress("check", stream, unit="")
    progress.update(0, 100)
    time.now += 1
    progress.update(25, 100)
    assert stream.getvalue() == "\rcheck   25 %  3.0 s left"


def test_an_unknown_total(time: Clock) -> None:
    stream = Terminal()
    progress = Progress("convert", stream)
    progress.update(0, 0)
    time.now += 2
    progress.update(GIB, 0)
    assert stream.getvalue() == "\rconvert  1 GiB  512 MiB/s"


def test_going_on_from_the_middle(time: Clock) -> None:
    """A resumed job's rate is what it does now, not what was there already."""
    stream = Terminal()
    progress = Progress("convert", stream)
    time.now += 0.2
    progress.update(GIB, 2 * GIB)
    time.now += 1
    progress.update(GIB + GIB // 4, 2 * GIB)
    assert "  256 MiB/s  3.0 s left" in stream.getvalue().split("\r")[-1]


def test_never_backwards(time: Clock) -> None:
    stream = Terminal()
    progress = Progress("convert", stream)
    for done in (10, 50, 30):  # threads report out of order
        time.now += 1
        progress.update(done, 100)
    assert stream.getvalue().split("\r")[-1].startswith("convert   50 %")


def test_aborted(time: Clock) -> None:
    stream = Terminal()
    progress = Progress("convert", stream)
    time.now += 1
    progress.update(1, 2)
    progress.abort()
    assert stream.getvalue().endswith("\n")
    length = len(stream.getvalue())
    time.now += 1
    progress.update(2, 2)
    progress.finish()
    assert len(stream.getvalue()) == length


def test_a_stream_that_fails_does_not_stop_the_job(time: Clock) -> None:
    class Broken(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    progress = Progress("convert", Broken())
    for step in range(5):
        time.now += 1
        progress.update(step, 5)
    progress.finish()


def test_many_threads() -> None:
    stream = Terminal()
    progress = Progress("convert", stream)

    def work(start: int) -> None:
        for step in range(start, 40_000, 4):
            progress.update(step, 40_000)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    progress.finish()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0.0 s"), (9.94, "9.9 s"), (9.96, "0:10"), (61, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
