"""The books of a disk: every request ends once, draining waits for the right ones, batches count."""

from __future__ import annotations

import asyncio
import threading

import pytest

from enban.aio import AsyncioRuntime
from enban.block import requests
from enban.block.requests import Ledger
from enban.block.runtime import BLOCKING, drive
from enban.errors import HostError, InternalError


def books_balance(ledger: Ledger) -> bool:
    return ledger.started == ledger.done + ledger.failed + ledger.cancelled + len(ledger.in_flight)


def test_each_end_goes_to_its_own_account() -> None:
    ledger = Ledger(BLOCKING)
    one, two, three = (ledger.begin(requests.WRITE, n * 512, 512) for n in range(3))
    assert [r.number for r in ledger.in_flight] == [1, 2, 3] and ledger.oldest == 1
    ledger.end(two, HostError("no"))
    ledger.end(one)
    ledger.end(three, asyncio.CancelledError())
    assert (ledger.done, ledger.failed, ledger.cancelled) == (1, 1, 1)
    assert (one.state, two.state, three.state) == (requests.DONE, requests.FAILED, requests.CANCELLED)
    assert not ledger.in_flight and ledger.oldest == 4 and books_balance(ledger)


def test_a_second_end_is_a_bug() -> None:
    ledger = Ledger(BLOCKING)
    request = ledger.begin(requests.READ, 0, 512)
    ledger.end(request)
    with pytest.raises(InternalError):
        ledger.end(request)
    assert ledger.done == 1 and books_balance(ledger)


def test_a_request_shows_what_it_does_and_for_how_long() -> None:
    ledger = Ledger(BLOCKING)
    request = ledger.begin(requests.DISCARD, 4096, 8192)
    assert repr(request) == "<discard #1 0x1000+0x2000 submitted>"
    assert 0 <= request.age_ns <= ledger.in_flight[0].age_ns


def test_drain_waits_for_earlier_requests_only() -> None:
    async def scenario() -> None:
        ledger = Ledger(AsyncioRuntime(1))
        early = ledger.begin(requests.WRITE, 0, 1)
        drain = asyncio.create_task(ledger.drain())
        await asyncio.sleep(0)
        late = ledger.begin(requests.WRITE, 0, 1)
        assert not drain.done()
        ledger.end(early)
        await asyncio.wait_for(drain, 5)
        assert ledger.in_flight == [late]
        ledger.end(late)

    asyncio.run(scenario())


def test_rest_waits_for_all_but_batches() -> None:
    async def scenario() -> None:
        ledger = Ledger(AsyncioRuntime(1))
        batch = ledger.begin_batch()
        one = ledger.begin(requests.WRITE, 0, 1)
        rest = asyncio.create_task(ledger.rest())
        await asyncio.sleep(0)
        two = ledger.begin(requests.WRITE, 0, 1)
        ledger.end(one)
        await asyncio.sleep(0)
        assert not rest.done()
        ledger.withdraw(two)
        await asyncio.wait_for(rest, 5)
        assert books_balance(ledger) or ledger.in_flight == [batch]
        ledger.end_batch(batch, 0)
        await asyncio.wait_for(ledger.rest(), 5)

    asyncio.run(scenario())


@pytest.mark.parametrize("hot", [0, 1, 32])
def test_drain_after_batches_of_any_size(hot: int) -> None:
    """The numbers of entries and the count of requests go apart; draining must not mix them up."""

    async def scenario() -> None:
        ledger = Ledger(AsyncioRuntime(1))
        for _ in range(3):
            ledger.end_batch(ledger.begin_batch(), hot)
        request = ledger.begin(requests.READ, 0, 1)
        drain = asyncio.create_task(ledger.drain())
        await asyncio.sleep(0)
        ledger.end(request)
        await asyncio.wait_for(drain, 5)
        assert ledger.started == 3 * hot + 1 == ledger.done
        assert ledger.oldest == ledger.newest + 1

    asyncio.run(scenario())


def test_a_batch_ends_once() -> None:
    ledger = Ledger(BLOCKING)
    batch = ledger.begin_batch()
    ledger.end_batch(batch, 5)
    with pytest.raises(InternalError):
        ledger.end_batch(batch, 5)
    assert ledger.done == 5


def test_an_entry_of_a_batch_that_is_used_again_is_as_new() -> None:
    ledger = Ledger(BLOCKING)
    first = ledger.begin_batch()
    number, began = first.number, first.started_ns
    ledger.end_batch(first, 5)
    again = ledger.begin_batch(first)
    assert again is first and again.number == number + 1 and again.started_ns > began
    assert again.state == requests.IN_FLIGHT and ledger.in_flight == [again]
    ledger.end_batch(again, 1)
    assert ledger.done == 6 and books_balance(ledger)


def test_cancelled_drain_leaves_no_trace() -> None:
    async def scenario() -> None:
        ledger = Ledger(AsyncioRuntime(1))
        request = ledger.begin(requests.READ, 0, 1)
        drain = asyncio.create_task(ledger.drain())
        await asyncio.sleep(0)
        drain.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drain
        ledger.end(request)
        await asyncio.wait_for(ledger.drain(), 5)

    asyncio.run(scenario())


def test_drain_across_threads() -> None:
    ledger = Ledger(BLOCKING)
    request = ledger.begin(requests.READ, 0, 1)
    drained = threading.Event()

    def wait() -> None:
        drive(ledger.drain())
        drained.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not drained.wait(0.05)
    ledger.end(request)
    assert drained.wait(10)
    thread.join()
