"""Many overlapping requests at once: asyncio tasks with cancellations over a slow storage, and
threads on the blocking face. Every request ends once, nothing stays behind, and what is read, in
between and at the end, is what some serial order of the requests would show."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import enban
import enban.aio
from enban.aio import AsyncDisk, AsyncioRuntime
from enban.block.runtime import BLOCKING, drive
from enban.errors import ClosedError
from enban.filters.delay import Delay
from enban.lab.history import CELL, History
from enban.lab.images import Image
from enban.lab.qcow2_reader import Qcow2Reader
from enban.lab.storm import KINDS, Storm, request, storm
from enban.storage.memory import MemoryStorage
from tests.support import (
    KIB,
    check_bytes,
    empty_image,
    make_qcow2,
    nothing_remains,
    open_memory,
    pattern,
    raw_node,
)

SIZE = 192 * KIB
IMAGES: dict[str, dict[str, Any]] = {
    "512": {"cluster_size": 512},
    "4k": {"cluster_size": 4096},
    "4k-v2-chain": {"cluster_size": 4096, "compat": "0.10", "backing_file": "b"},
    "4k-chain": {"cluster_size": 4096, "backing_file": "b"},
    "16k-ext-chain": {"cluster_size": 16384, "extended_l2": True, "backing_file": "b"},
    "4k-data": {"cluster_size": 4096, "data_file": "d"},
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("image", KINDS, ids=repr)
def test_storm_of_tasks_with_cancellations(image: Image, seed: int) -> None:
    assert storm(image, seed) == 1000


def test_every_task_cancelled_at_once_leaves_a_working_disk() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=2)
        memory = MemoryStorage(runtime, empty_image(SIZE, cluster_size=512))
        door = await open_memory(Delay(memory, 5, most_s=0.001))
        disk = AsyncDisk(door, runtime)
        for round_number in range(8):
            storm = Storm(round_number, SIZE, bytes(SIZE))
            tasks = [asyncio.create_task(request(storm, disk, *storm.draw())) for _ in range(60)]
            await asyncio.sleep(0.002 * round_number)
            for task in tasks:
                task.cancel()
            for task in tasks:  # once more, while the first cancellation is still waiting for its end
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            nothing_remains(door)
        await disk.pwrite(b"still works", 1000)
        assert await disk.pread(11, 1000) == b"still works"
        await disk.close()
        check_bytes(memory.content)

    asyncio.run(scenario())


def test_close_waits_for_what_is_in_flight() -> None:
    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=2)
        memory = MemoryStorage(runtime, empty_image(SIZE, cluster_size=4096))
        door = await open_memory(Delay(memory, 6, most_s=0.005))
        disk = AsyncDisk(door, runtime)
        writes = [asyncio.create_task(disk.pwrite(bytes([i + 1]) * 5000, i * 5000)) for i in range(20)]
        await asyncio.sleep(0)
        await disk.close()
        assert all(write.done() for write in writes)
        with pytest.raises(ClosedError):
            await disk.pread(1, 0)
        check_bytes(memory.content)
        guest = Qcow2Reader(memory.content).read()
        assert guest[:100000] == b"".join(bytes([i + 1]) * 5000 for i in range(20))

    asyncio.run(scenario())


# -- threads ---------------------------------------------------------------------------------


@pytest.fixture
def many_switches() -> Iterator[None]:
    """Let threads take turns after a few instructions, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("many_switches")
@pytest.mark.parametrize("name", IMAGES)
def test_threads_on_the_blocking_face(name: str) -> None:
    options = IMAGES[name]
    backing = pattern(SIZE // 2 + 512, 3) if "backing_file" in options else b""
    memory = MemoryStorage(BLOCKING, empty_image(SIZE, **options))
    data = MemoryStorage(BLOCKING) if "data_file" in options else None
    below = raw_node(backing) if backing else None
    door = drive(open_memory(memory, backing=below, data=data))
    history = History(backing.ljust(SIZE, b"\0"))
    storms = [Storm(seed, SIZE, history.initial) for seed in range(6)]
    errors: list[BaseException] = []

    def work(storm: Storm) -> None:
        disk = enban.Disk(door)
        storm.history = history
        try:
            for _ in range(120):
                operation, offset, length = storm.draw()
                if operation == "flush":
                    disk.flush()
                elif operation == "read":
                    began = history.now()
                    content = disk.pread(length, offset)
                    storm.reads.append((began, history.now(), offset, content))
                else:
                    value = history.stamp() if operation == "write" else bytes(CELL)
                    event = history.begin(offset, length, value)
                    if operation == "write":
                        disk.pwrite(value * (length // CELL), offset)
                    elif operation == "zero":
                        disk.write_zeroes(offset, length)
                    else:
                        disk.discard(offset, length)
                    history.end(event, certain=operation != "discard")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(storm,), daemon=True) for storm in storms]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a thread hangs"
    assert not errors, errors[0]
    nothing_remains(door)
    content = enban.Disk(door).pread(SIZE, 0)
    history.check(content, [read for storm in storms for read in storm.reads])
    drive(door.close())
    check_bytes(memory.content, data_file=None if data is None else data.content)
    reader = Qcow2Reader(memory.content, data_file=None if data is None else data.content)
    assert reader.read(backing=backing) == content


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_buffers_are_never_shared_between_requests(tmp_path: Path, cache: str) -> None:
    """Requests in threads on a real file, each with bytes of its own, unaligned: nobody sees another's."""
    path = make_qcow2(tmp_path / "a.qcow2", 4 * 1024 * KIB, cluster_size=65536)
    disk = enban.open(path, writable=True, cache=cache)
    wrong: list[int] = []

    def work(number: int) -> None:
        mine = bytes([number + 1]) * 10007
        for turn in range(25):
            at = (turn * 8 + number) * 10007
            buffer = bytearray(mine)
            disk.pwrite(buffer, at)
            buffer[:] = bytes(len(buffer))  # ours again as soon as pwrite has returned
            if disk.pread(len(mine), at) != mine:
                wrong.append(at)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    whole = disk.pread(200 * 10007, 0)
    assert whole == b"".join(bytes([i % 8 + 1]) * 10007 for i in range(200))
    disk.close()


def test_overlapping_reads_and_writes_on_a_real_file(tmp_path: Path) -> None:
    """The asyncio face with its thread pool, no filter between."""
    path = make_qcow2(tmp_path / "a.qcow2", SIZE, cluster_size=4096)
    storm = Storm(9, SIZE, bytes(SIZE))

    async def scenario() -> None:
        disk = await enban.aio.open(path, writable=True, cache="unsafe")
        tasks = [asyncio.create_task(request(storm, disk, *storm.draw())) for _ in range(600)]
        for task in tasks[::7]:
            asyncio.get_running_loop().call_later(storm.random.random() * 0.1, task.cancel)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert not [r for r in results if isinstance(r, Exception)]
        storm.history.check(await disk.pread(SIZE, 0), storm.reads)
        nothing_remains(disk.door)
        await disk.close()

    asyncio.run(scenario())
    check_bytes(path.read_bytes())
