"""Driving coroutines: straight through when blocking; to their end under asyncio, cancelled or not."""

from __future__ import annotations

import asyncio
import time

import pytest

from enban.aio import AsyncioRuntime
from enban.block.runtime import BLOCKING, drive
from enban.errors import InternalError


def test_drive_returns_and_raises() -> None:
    async def value(number: int) -> int:
        if number < 0:
            raise ValueError(number)
        return await BLOCKING.offload(abs, number)

    assert drive(value(5)) == 5
    with pytest.raises(ValueError, match="-1"):
        drive(value(-1))


def test_a_blocking_operation_that_suspends_is_our_bug() -> None:
    async def suspends() -> None:
        await asyncio.sleep(0)

    with pytest.raises(InternalError):
        drive(suspends())


def test_a_host_call_is_never_left_running() -> None:
    async def scenario() -> None:
        runtime, log = AsyncioRuntime(2), []

        def slow() -> None:
            time.sleep(0.05)
            log.append("ended")

        task = asyncio.create_task(runtime.offload(slow))
        await asyncio.sleep(0.01)
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["ended"], "the task resumed before the call had ended"
        runtime.close()

    asyncio.run(scenario())


def test_finish_goes_on_when_its_caller_is_cancelled() -> None:
    async def scenario() -> None:
        runtime, log = AsyncioRuntime(2), []

        async def work() -> None:
            for step in range(5):
                await asyncio.sleep(0.002)
                log.append(step)

        task = asyncio.create_task(runtime.finish(work()))
        await asyncio.sleep(0.001)
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0.001)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == [0, 1, 2, 3, 4]
        runtime.close()

    asyncio.run(scenario())


def test_finish_hands_on_results_and_errors() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(2)

        async def work(fail: bool) -> int:
            await asyncio.sleep(0)
            if fail:
                raise OSError(28, "full")
            return 7

        assert await runtime.finish(work(False)) == 7
        with pytest.raises(OSError):
            await runtime.finish(work(True))
        runtime.close()

    asyncio.run(scenario())


def test_an_error_of_cancelled_work_is_not_reported_as_never_retrieved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(2)

        async def work() -> None:
            await asyncio.sleep(0.005)
            raise OSError(5, "gone")

        task = asyncio.create_task(runtime.finish(work()))
        await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        runtime.close()

    asyncio.run(scenario())
    assert "never retrieved" not in caplog.text
