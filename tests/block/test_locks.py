"""Mutex and range locks: exclusion, order of arrival, cancellation, both runtimes."""

from __future__ import annotations

import asyncio
import threading

from hypothesis import given
from hypothesis import strategies as st

from enban.aio import AsyncioRuntime
from enban.block.locks import Mutex, RangeLocks
from enban.block.runtime import BLOCKING, drive


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_mutex_is_first_come_first_served() -> None:
    async def scenario() -> list[int]:
        mutex, order = Mutex(AsyncioRuntime(1)), []

        async def worker(number: int) -> None:
            async with mutex:
                order.append(number)
                await asyncio.sleep(0)
                assert order[-1] == number, "two hold it"

        await asyncio.gather(*(worker(n) for n in range(20)))
        assert not mutex.held
        return order

    assert asyncio.run(scenario()) == list(range(20))


def test_mutex_waiter_cancelled_before_and_after_the_handover() -> None:
    async def scenario() -> None:
        mutex = Mutex(AsyncioRuntime(1))

        async def hold() -> None:
            async with mutex:
                await asyncio.sleep(1000)

        holder = asyncio.create_task(hold())
        await settle()
        waiting = [asyncio.create_task(hold()) for _ in range(3)]
        await settle()
        waiting[0].cancel()
        await settle()
        holder.cancel()
        waiting[1].cancel()  # the lock is being handed to it in this very moment
        await settle()
        assert mutex.held  # by the third
        waiting[2].cancel()
        await settle()
        async with mutex:  # it is free again
            pass

    asyncio.run(scenario())


def test_mutex_try_acquire() -> None:
    mutex = Mutex(BLOCKING)
    assert mutex.try_acquire() and not mutex.try_acquire()
    mutex.release()
    assert mutex.try_acquire()


def test_mutex_between_threads() -> None:
    mutex, total = Mutex(BLOCKING), [0]

    async def add() -> None:
        async with mutex:
            before = total[0]
            for _ in range(20):
                pass
            total[0] = before + 1

    def work() -> None:
        for _ in range(300):
            drive(add())

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert total[0] == 1800 and not mutex.held


def test_ranges_that_do_not_overlap_do_not_wait() -> None:
    async def scenario() -> None:
        locks = RangeLocks(AsyncioRuntime(1))
        held = [await locks.acquire(n * 10, n * 10 + 10) for n in range(5)]
        assert len(locks) == 5
        for one in held:
            locks.release(one)
        assert not len(locks)

    asyncio.run(scenario())


def test_ranges_are_granted_in_order_of_arrival() -> None:
    """A narrow request behind a wide one that waits must not overtake it, even if its own range is free."""

    async def scenario() -> list[str]:
        locks, order = RangeLocks(AsyncioRuntime(1)), []

        async def take(name: str, start: int, end: int) -> None:
            held = await locks.acquire(start, end)
            order.append(name)
            await asyncio.sleep(0.001)
            locks.release(held)

        first = await locks.acquire(0, 10)
        tasks = [
            asyncio.create_task(take("wide", 0, 100)),
            asyncio.create_task(take("narrow", 50, 60)),
            asyncio.create_task(take("apart", 200, 210)),
        ]
        await settle()
        assert order == ["apart"]
        locks.release(first)
        await asyncio.gather(*tasks)
        return order

    assert asyncio.run(scenario()) == ["apart", "wide", "narrow"]


def test_a_cancelled_waiter_lets_those_behind_it_pass() -> None:
    async def scenario() -> None:
        locks = RangeLocks(AsyncioRuntime(1))
        first = await locks.acquire(0, 10)
        wide = asyncio.create_task(locks.acquire(5, 100))
        await settle()
        narrow = asyncio.create_task(locks.acquire(50, 60))
        await settle()
        assert not narrow.done()
        wide.cancel()
        await settle()
        assert narrow.done()
        locks.release(narrow.result())
        locks.release(first)
        assert not len(locks)

    asyncio.run(scenario())


def test_try_acquire_never_jumps_the_queue() -> None:
    locks = RangeLocks(BLOCKING)
    held = locks.try_acquire(0, 10)
    assert held is not None
    assert locks.try_acquire(9, 20) is None
    other = locks.try_acquire(10, 20)
    assert other is not None
    locks.release(held)
    locks.release(other)
    assert not len(locks)


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(1, 12), st.booleans()), max_size=24))
def test_ranges_exclude_each_other_and_none_is_forgotten(
    requests: list[tuple[int, int, bool]],
) -> None:
    async def scenario() -> None:
        locks = RangeLocks(AsyncioRuntime(1))
        inside: set[int] = set()

        async def use(start: int, length: int) -> None:
            held = await locks.acquire(start, start + length)
            mine = set(range(start, start + length))
            try:
                assert not inside & mine, "two hold one byte"
                inside.update(mine)
                await asyncio.sleep(0)
                inside.difference_update(mine)
            except asyncio.CancelledError:
                inside.difference_update(mine)
                raise
            finally:
                locks.release(held)

        tasks = [(asyncio.create_task(use(start, length)), cancel) for start, length, cancel in requests]
        await asyncio.sleep(0)
        for task, cancel in tasks:
            if cancel:
                task.cancel()
        done = await asyncio.gather(*(task for task, _ in tasks), return_exceptions=True)
        assert all(result is None or isinstance(result, asyncio.CancelledError) for result in done), done
        assert not len(locks) and not inside

    asyncio.run(asyncio.wait_for(scenario(), 20))


def test_ranges_between_threads() -> None:
    locks, cells = RangeLocks(BLOCKING), [0] * 40
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(200):
            start = (seed * 7 + turn * 5) % 32
            held = drive(locks.acquire(start, start + 6))
            for cell in range(start, start + 6):
                cells[cell] = seed
            if any(cells[cell] != seed for cell in range(start, start + 6)):
                wrong.append(turn)
            locks.release(held)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not len(locks)
