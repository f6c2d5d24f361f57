"""What one connection that only reads receives at a time."""

from __future__ import annotations

import itertools
import socket
from collections.abc import Iterator
from time import perf_counter_ns
from types import SimpleNamespace
from typing import Any

import pytest

from enban.exports.nbd import reader as readers
from enban.exports.nbd.mapped import MappedReads
from enban.exports.nbd.reader import Reader

WIDTH = 28  # bytes of a request


class Client:
    """A reader, and what its client sends: so many requests at each look."""

    def __init__(self, sock: socket.socket) -> None:
        incoming: Any = SimpleNamespace(buffer=memoryview(bytearray(1 << 16)), start=0, end=0)
        codec: Any = SimpleNamespace(request_size=WIDTH)
        nobody: Any = SimpleNamespace(most=1, busy=set())
        self.reader = Reader(nobody, sock, codec, incoming, nobody, most=4096, spin_us=50)
        self.reader.read_into = self._receive
        self.sends: list[int | None] = []
        self.looked_at: list[int] = []

    def _receive(self, view: Any) -> int | None:
        self.looked_at.append(perf_counter_ns())
        n = self.sends.pop(0)
        return n and min(len(view), n * WIDTH)

    def batch(self, *sends: int | None) -> int:
        """How many requests are answered together, of a first one and these."""
        self.sends = list(sends)
        self.reader.incoming.end = WIDTH
        self.reader.gather()
        whole, rest = divmod(self.reader.incoming.end, WIDTH)
        assert not rest
        return whole


@pytest.fixture
def client() -> Iterator[Client]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Client(ours)


def test_a_part_of_what_is_in_flight_is_waited_for(client: Client) -> None:
    assert client.batch(10, 20, 1, None) == 32  # they are counted first
    assert client.batch(3, 4, 5) == 8 and client.sends == [5]
    assert client.batch(9, 5) == 10 and client.sends == [5]


def test_the_fewest_in_flight_that_are_waited_for(client: Client) -> None:
    assert client.batch(15, None) == 16
    assert client.batch(1, 2, 5) == 4 and client.sends == [5]


@pytest.mark.parametrize("in_flight", [1, 4, 15])
def test_a_client_with_few_requests_in_flight_does_not_wait(client: Client, in_flight: int) -> None:
    assert client.batch(in_flight - 1 or None, None) == in_flight
    for _ in range(1024):
        assert client.batch(5) == 1 and client.sends == [5]
    assert client.batch(30, 1, None) == 32  # counted again: there are more now
    assert client.batch(8, 5) == 9


def test_a_client_that_has_fewer_in_flight_than_before_is_counted_again(client: Client) -> None:
    """What is expected does not come: the next count comes soon."""
    assert client.batch(31, None) == 32
    batches = 0
    while client.reader._enough:
        assert client.batch(1, None, None) == 2
        batches += 1
        assert batches < 32
    assert client.batch(5) == 1


def test_it_is_not_counted_often_while_what_is_expected_comes(client: Client) -> None:
    client.batch(31, None)
    for _ in range(1024):
        assert client.batch(7) == 8
    assert client.batch(7, 60, None) == 68


def test_the_end_of_the_client_is_not_waited_for(client: Client) -> None:
    assert client.batch(31, 0) == 32
    assert client.batch(2, 0) == 3


def test_no_more_than_one_call_can_send(client: Client) -> None:
    assert client.batch(*[100] * 8) == 512
    assert client.reader._enough == 128


def test_between_two_looks_there_is_time(client: Client) -> None:
    started = perf_counter_ns()
    client.batch(1, 1, 1, None)
    before = [started, *client.looked_at]
    assert len(client.looked_at) == 4
    assert all(late - early >= readers._LOOK_NS for early, late in itertools.pairwise(before))


@pytest.mark.parametrize(
    ("spin_us", "clients", "processors", "busy", "may"),
    [
        (50, 1, 2, 0, True),
        (0, 1, 2, 0, False),
        (50, 2, 4, 0, False),
        (50, 1, 1, 0, False),
        (50, 1, 2, 1, False),
    ],
)
def test_who_may_be_kept_waiting(
    client: Client, spin_us: int, clients: int, processors: int, busy: int, may: bool
) -> None:
    """One client, that has a processor of its own, while nobody else needs this one."""
    export: Any = SimpleNamespace(stable=True)
    mapped = MappedReads(export)
    mapped._readers = dict.fromkeys(range(clients), client.reader)
    client.reader.spin_us = spin_us
    client.reader.threads.most = processors - 1
    client.reader.threads.busy = set(range(busy))
    assert mapped._may_gather(client.reader) is may
