"""When a queue's thread looks for requests instead of sleeping, by a clock that the test moves."""

from __future__ import annotations

import pytest

from enban.exports.vhost import spin as module
from enban.exports.vhost.spin import Spin

US, MS = 1000, 1_000_000


class Clock:
    def __init__(self) -> None:
        self.now = 10**12

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(module, "perf_counter_ns", made)
    return made


def turn(spin: Spin, clock: Clock, *, found: bool, gap_ns: int = 10 * US) -> bool:
    """One attempt; whether it was made."""
    if not spin.begin():
        return False
    until = clock.now + spin.length_ns
    clock.now += gap_ns
    spin.look(until)
    spin.end(found)
    return True


def test_a_quick_driver_is_looked_for_again_and_again(clock: Clock) -> None:
    spin = Spin(100)
    for _ in range(100):
        assert turn(spin, clock, found=True)
    assert not Spin(0).begin()


def test_a_slow_driver_is_not_until_a_wait_was_short(clock: Clock) -> None:
    spin = Spin(100)
    assert sum(turn(spin, clock, found=False) for _ in range(20)) == 8
    spin.waited(2 * MS)
    assert not spin.begin()
    spin.waited(300 * US)
    assert turn(spin, clock, found=True)


def test_who_is_kept_from_running_rests_longer_each_time(clock: Clock) -> None:
    spin = Spin(100)
    rests = []
    for _ in range(9):
        assert turn(spin, clock, found=True, gap_ns=3 * MS)
        since = clock.now
        while not turn(spin, clock, found=True):
            spin.waited(10 * US)
            clock.now += MS
        rests.append((clock.now - since) // MS)
    assert rests[0] in range(50, 53) and rests[1] > 1.8 * rests[0] and rests[-1] in range(4990, 5010)
    clock.now += 20_000 * MS
    spin.waited(10 * US)
    assert turn(spin, clock, found=True, gap_ns=3 * MS)
    clock.now += 52 * MS
    spin.waited(10 * US)
    assert spin.begin()  # it was long ago: it begins with a short rest again
    spin.end(True)


def test_slow_work_is_no_crowd(clock: Clock) -> None:
    spin = Spin(100)
    assert turn(spin, clock, found=True)
    spin.was_slow()
    clock.now += 50 * MS
    assert turn(spin, clock, found=True)
    clock.now += 50 * MS
    assert not spin.begin()  # nothing slow was done, so somebody else ran


def test_one_thread_of_a_process_spins(clock: Clock) -> None:
    one, other = Spin(100), Spin(100)
    assert one.begin()
    assert not other.begin()
    one.end(True)
    assert turn(other, clock, found=True)
