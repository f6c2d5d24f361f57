"""Looking before sleeping goes on only while it pays."""

from __future__ import annotations

from enban.busy_poll import BusyPoll


def misses(poll: BusyPoll) -> int:
    count = 0
    while poll.pays():
        poll.looked(False)
        count += 1
        assert count < 100
    return count


def test_looks_in_vain_end_it_until_a_wait_was_short() -> None:
    poll = BusyPoll(50, short_wait=4)
    assert misses(poll) > 1
    poll.waited(4 * 50_000)
    assert not poll.pays()
    poll.waited(4 * 50_000 - 1)
    assert poll.pays()


def test_a_find_forgives_all_misses() -> None:
    poll = BusyPoll(50, short_wait=4)
    most = misses(poll)
    poll.waited(0)
    for _ in range(3 * most):
        for _ in range(most - 1):
            poll.looked(False)
        assert poll.pays()
        poll.looked(True)
    assert misses(poll) == most


def test_who_is_not_eager_waits_for_a_short_wait_first() -> None:
    poll = BusyPoll(100, short_wait=2, eager=False)
    assert not poll.pays()
    poll.waited(1)
    assert poll.pays()


def test_no_length_never_looks() -> None:
    poll = BusyPoll(0, short_wait=4)
    poll.waited(0)
    assert not poll.pays()
