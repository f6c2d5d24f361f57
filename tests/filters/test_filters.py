"""Filters: passing everything on, faults at the right call, delays that follow a seed, an exact record."""

from __future__ import annotations

import asyncio
import errno
import inspect
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from enban.aio import AsyncioRuntime
from enban.block.runtime import BLOCKING, drive
from enban.block.storage import Storage
from enban.errors import FlushFailedError, HostError, NoSpaceError, UnsupportedOperationError
from enban.filters import faults, writelog
from enban.filters.base import Filter
from enban.filters.delay import Delay
from enban.filters.faults import Call, Fault, Faults, fail_at
from enban.filters.writelog import WriteLog
from enban.storage.file import open_file
from enban.storage.memory import MemoryStorage
from tests.support import KIB, pattern

# -- passing on ------------------------------------------------------------------------------


class Spy(MemoryStorage):
    """Notes which of its methods are called."""

    def __init__(self) -> None:
        super().__init__(BLOCKING)
        self.called: list[str] = []

    def __getattribute__(self, name: str) -> object:
        value = super().__getattribute__(name)
        if inspect.ismethod(value) and not name.startswith("_"):
            super().__getattribute__("called").append(name)
        return value


def test_everything_is_passed_on_but_the_short_cuts_past_write() -> None:
    """A method added to the contract of storages must be thought of here."""
    spy = Spy()
    filter_ = Filter(spy)
    buffer = bytearray(4)
    drive(filter_.write(b"data", 0))
    drive(filter_.read_into(buffer, 0))
    assert filter_.read_now(buffer, 0) and buffer == b"data"
    drive(filter_.write_zeroes(0, 2))
    drive(filter_.discard(0, 2))
    drive(filter_.truncate(100))
    drive(filter_.allocate(0, 10))
    drive(filter_.status(0, 10))
    drive(filter_.flush())
    filter_.lay_out(0, 10)
    filter_.write_behind(0, 10)
    filter_.zeroes_fast()
    drive(filter_.hold(writing=True))
    with pytest.raises(UnsupportedOperationError):
        drive(filter_.bitmaps(0, 10))
    assert filter_.size() == 100 and filter_.allocated() == spy.allocated()
    assert filter_.identity == spy.identity
    drive(filter_.close())
    assert not filter_.write_now(b"data", 0) and filter_.plain_fd() == -1
    assert drive(filter_.copy_from(spy, 0, 0, 4)) == 0
    not_passed = {"write_now", "plain_fd", "copy_from", "read"}  # `read` is made of read_into
    contract = {
        name for name, _ in inspect.getmembers(Storage, inspect.isfunction) if not name.startswith("_")
    }
    assert set(spy.called) >= contract - not_passed
    assert contract - not_passed <= set(vars(Filter))


def test_facts_are_those_below(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(bytes(8192))
    below = open_file(str(path), BLOCKING, writable=False)
    filter_ = Filter(below)
    assert (filter_.name, filter_.writable, filter_.fixed_size) == (below.name, False, False)
    assert filter_.runtime is BLOCKING and filter_.identity == below.identity
    drive(filter_.close())
    with pytest.raises(HostError):
        drive(below.read(0, 1))


# -- faults ----------------------------------------------------------------------------------


def test_the_call_that_was_named_fails_and_no_other() -> None:
    storage = Faults(MemoryStorage(BLOCKING), fail_at(2, operations=(faults.WRITE,)))
    drive(storage.write(b"one", 0))
    with pytest.raises(HostError) as info:
        drive(storage.write(b"two", 3))
    assert (info.value.errno, info.value.offset) == (errno.EIO, 3)
    drive(storage.write(b"three", 6))
    assert drive(storage.read(0, 11)) == b"one\0\0\0three"
    assert (storage.calls, storage.injected) == (4, 1)


def test_sticky_faults_stay() -> None:
    storage = Faults(MemoryStorage(BLOCKING), fail_at(1, operations=(faults.FLUSH,), sticky=True))
    for _ in range(3):
        with pytest.raises(FlushFailedError):
            drive(storage.flush())
    drive(storage.write(b"x", 0))


def test_each_kind_of_call_can_fail() -> None:
    calls: dict[str, Callable[[Storage], Coroutine[Any, Any, object]]] = {
        faults.READ: lambda s: s.read(0, 4),
        faults.WRITE: lambda s: s.write(b"x", 0),
        faults.FLUSH: lambda s: s.flush(),
        faults.ZERO: lambda s: s.write_zeroes(0, 4),
        faults.DISCARD: lambda s: s.discard(0, 4),
        faults.TRUNCATE: lambda s: s.truncate(9),
        faults.ALLOCATE: lambda s: s.allocate(0, 9),
    }
    for operation in calls:
        storage = Faults(
            MemoryStorage(BLOCKING, b"abcd"), fail_at(1, operations=(operation,), errno=errno.ENOSPC)
        )
        for other, call in calls.items():
            if other == operation:
                with pytest.raises(HostError) as info:
                    drive(call(storage))
                assert isinstance(info.value, FlushFailedError if operation == faults.FLUSH else NoSpaceError)
            else:
                drive(call(storage))


def test_torn_writes_and_short_reads_move_what_they_say() -> None:
    memory = MemoryStorage(BLOCKING, b"........")
    storage = Faults(memory, lambda call: Fault(done=3))
    with pytest.raises(HostError):
        drive(storage.write(b"abcdefgh", 0))
    assert memory.content == b"abc....."
    with pytest.raises(HostError):
        drive(storage.write_zeroes(4, 4))
    assert memory.content == b"abc.\0\0\0."
    with pytest.raises(HostError):
        storage.write_now(b"xyzxyz", 1)
    assert memory.content == b"axyz\0\0\0."
    buffer = bytearray(b"-" * 8)
    with pytest.raises(HostError):
        drive(storage.read_into(buffer, 0))
    assert buffer == b"axy-----"


def test_every_read_is_decided_once() -> None:
    seen: list[Call] = []
    storage = Faults(MemoryStorage(BLOCKING, b"abcd"), lambda call: seen.append(call))
    buffer = bytearray(4)
    if not storage.read_now(buffer, 0):  # as the engine does it
        drive(storage.read_into(buffer, 0))
    assert buffer == b"abcd"
    assert [repr(call) for call in seen] == ["<#1 read 0x0+0x4>"]
    storage.decide = None
    assert drive(storage.read(0, 4)) == b"abcd" and storage.calls == 2


# -- delay -----------------------------------------------------------------------------------


def test_delays_follow_from_the_seed_and_change_nothing() -> None:
    async def times(seed: int) -> list[float]:
        slept: list[float] = []
        runtime = AsyncioRuntime(1)
        storage = Delay(MemoryStorage(runtime), seed, most_s=0.001, share=0.5)

        async def note(seconds: float) -> None:
            slept.append(seconds)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "sleep", note)
            await storage.write(pattern(100), 5)
            await storage.write_zeroes(10, 10)
            await storage.discard(0, 1)
            await storage.allocate(0, 1)
            await storage.truncate(200)
            await storage.flush()
            assert not storage.read_now(bytearray(1), 0)
            content = await storage.read(0, 200)
        assert content == bytes(5) + pattern(100)[:5] + bytes(10) + pattern(100)[15:] + bytes(95)
        runtime.close()
        return slept

    one, two, three = (asyncio.run(times(seed)) for seed in (1, 1, 2))
    assert one == two != three
    assert len(one) == 14 and 0 < sum(seconds > 0 for seconds in one) < 14
    assert all(0 <= seconds <= 0.001 for seconds in one)


def test_other_tasks_run_while_a_storage_is_slow() -> None:
    async def scenario() -> list[str]:
        runtime = AsyncioRuntime(1)
        storage, order = Delay(MemoryStorage(runtime, bytes(100)), most_s=0.02), ["begun"]

        async def use() -> None:
            await storage.read(0, 10)
            order.append("read")

        task = asyncio.create_task(use())
        await asyncio.sleep(0)
        order.append("meanwhile")
        await task
        runtime.close()
        return order

    assert asyncio.run(scenario()) == ["begun", "meanwhile", "read"]


def test_the_blocking_runtime_sleeps_in_line(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    storage = Delay(MemoryStorage(BLOCKING), 3)
    drive(storage.write(b"x", 0))
    assert len(slept) == 2


# -- write log -------------------------------------------------------------------------------


def test_the_record_holds_every_change_in_order() -> None:
    log = WriteLog(MemoryStorage(BLOCKING))
    buffer = bytearray(b"abc")
    drive(log.write(buffer, 5))
    buffer[:] = b"xxx"  # the record has its own copy
    assert log.write_now(b"now", 8)
    log.mark("here")
    drive(log.write_zeroes(0, 4))
    drive(log.flush())
    drive(log.discard(2, 3))
    drive(log.truncate(64 * KIB))
    assert [(e.kind, e.offset, e.length, e.data) for e in log.entries] == [
        (writelog.WRITE, 5, 3, b"abc"),
        (writelog.WRITE, 8, 3, b"now"),
        (writelog.MARK, 0, 0, b""),
        (writelog.ZERO, 0, 4, b""),
        (writelog.FLUSH, 0, 0, b""),
        (writelog.DISCARD, 2, 3, b""),
        (writelog.TRUNCATE, 64 * KIB, 0, b""),
    ]
    assert log.entries[2].note == "here"
    moments = [moment for e in log.entries for moment in (e.began, e.ended)]
    assert moments == sorted(moments) and all(moments)
    assert drive(log.read(5, 6)) == b"abcnow"


def test_a_failed_change_has_no_end() -> None:
    log = WriteLog(Faults(MemoryStorage(BLOCKING), fail_at(1)))
    with pytest.raises(HostError):
        drive(log.write(b"abc", 0))
    drive(log.flush())
    assert [bool(e.ended) for e in log.entries] == [False, True]


def test_a_write_now_that_could_not_is_not_recorded() -> None:
    log = WriteLog(Filter(MemoryStorage(BLOCKING)))
    assert not log.write_now(b"abc", 0)
    assert not log.entries


def test_changes_that_overlap_in_time_show_it() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(1)
        log = WriteLog(Delay(MemoryStorage(runtime), 5, most_s=0.003))
        await asyncio.gather(log.write(b"a" * 10, 0), log.write(b"b" * 10, 10), log.flush())
        one, two, flush = log.entries
        assert max(one.began, two.began, flush.began) < min(one.ended, two.ended, flush.ended)
        runtime.close()

    asyncio.run(scenario())
