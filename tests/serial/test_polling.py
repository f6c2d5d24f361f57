"""A wait looks before it sleeps, as long as that pays."""

from __future__ import annotations

import os
from collections.abc import Iterator
from time import monotonic, process_time

import pytest

from enban.busy_poll import MOST_MISSES
from enban.serial.polling import READ, Poller


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_only_what_is_wanted_is_told(pipe: tuple[int, int]) -> None:
    poller = Poller()
    assert poller.wait(0) == []
    poller.want(pipe[0], READ)
    os.write(pipe[1], b"x")
    assert poller.wait(1000) == [(pipe[0], READ)]
    poller.want(pipe[0], 0)
    assert poller.wait(0) == []


@pytest.mark.parametrize("spin_us", [0, 100])
def test_a_line_at_rest_costs_nothing(pipe: tuple[int, int], spin_us: int) -> None:
    poller = Poller(spin_us)
    poller.want(pipe[0], READ)
    os.write(pipe[1], b"x")
    for _ in range(20):  # traffic: spinning pays
        assert poller.wait(1000)
    os.read(pipe[0], 1)
    started, used = monotonic(), process_time()
    for _ in range(10):
        assert poller.wait(50) == []
    assert monotonic() - started >= 0.49
    assert process_time() - used < 0.1


def test_it_looks_while_waits_are_short_and_then_no_more(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    poller = Poller(spin_us=50_000)  # far more than a busy machine takes for a call
    poller.want(pipe[0], READ)
    waits: list[int] = []
    poll = poller.poll

    def spy(milliseconds: int) -> list[tuple[int, int]]:
        waits.append(milliseconds)
        return poll(milliseconds)

    poller.poll = spy
    os.write(pipe[1], b"x")
    poller.wait(7)
    assert waits == [7], "nothing says yet that waits are short"
    waits.clear()
    poller.wait(7)
    assert waits == [0], "the one before was short"
    os.read(pipe[0], 1)
    for _ in range(MOST_MISSES):
        waits.clear()
        poller.wait(7)
        assert waits.count(0) > 1 and waits[-1] == 7
    waits.clear()
    poller.wait(7)
    assert waits == [7], "it has not paid"
    waits.clear()
    os.write(pipe[1], b"x")
    poller.wait(7)
    poller.wait(7)
    assert waits == [7, 0], "a short wait makes it worth a try again"


def test_one_processor_is_left_alone(pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    poller = Poller(spin_us=2000)
    waits: list[int] = []

    def spy(milliseconds: int) -> list[tuple[int, int]]:
        waits.append(milliseconds)
        return []

    poller.poll = spy
    for _ in range(5):
        poller.wait(3)
    assert waits == [3] * 5
