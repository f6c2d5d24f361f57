"""Storm: many requests at once, overlapping, some cancelled, on a slow storage.

Every request ends exactly once, nothing stays behind (the ledger balances, no lock and no
reservation is left), and what is read, in between and at the end, is what some serial order of
the requests would show. The same load recorded is cut into crash states.
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

from enban.aio import AsyncDisk, AsyncioRuntime
from enban.errors import EnbanError
from enban.filters import writelog
from enban.filters.delay import Delay
from enban.filters.writelog import WriteLog
from enban.formats.qcow2.node import Qcow2Node

from .crash_states import Replay
from .history import CELL, History
from .images import EXTERNAL, IMAGES, KIB, OTHERS, Image, Medium
from .oracle import CORRUPT, ENGINE, FOREIGN, LEAK, Violation
from .qcow2_reader import Memo

if TYPE_CHECKING:
    from collections.abc import Callable

    from enban.block.door import Door

KINDS = (*IMAGES, EXTERNAL, *(image for image in OTHERS if image.name in ("raw", "qcow-4k-chain", "1k-v2")))
STUCK_S = 30.0  # a storm that is not over by then hangs


def nothing_remains(door: Door) -> None:
    """No request is in flight, and no lock, pin or reservation of one that has ended is left."""
    ledger, node = door.ledger, door.node
    assert not ledger.in_flight
    assert ledger.started == ledger.done + ledger.failed + ledger.cancelled
    assert not len(node.ranges)
    if isinstance(node, Qcow2Node):
        assert not node.mutex.held and not node.barrier_mutex.held
        assert not any(table.pins or table.busy for table in node.cache.tables.values())
        assert not any(block.busy for block in node.refcounts.blocks.values())


class Storm:
    """Random requests on a disk, with a history of what they did."""

    def __init__(self, seed: int, size: int, initial: bytes) -> None:
        self.random = Random(seed)
        self.size = size
        self.history = History(initial)
        self.reads: list[tuple[int, int, int, bytes]] = []
        self.flushes: list[tuple[int, int]] = []  # (began, ended) of those that were answered

    def draw(self) -> tuple[str, int, int]:
        random = self.random
        operation = random.choices(("write", "read", "zero", "discard", "flush"), (50, 20, 12, 12, 6))[0]
        length = random.choice((CELL, 512, 3 * CELL, 4096, 6 * KIB, 20 * KIB))
        offset = random.randrange(self.size // CELL) * CELL
        return operation, offset, min(length, self.size - offset)


async def request(storm: Storm, disk: AsyncDisk, operation: str, offset: int, length: int) -> None:
    """One request, entered in the storm's history as it begins and ends."""
    history = storm.history
    began = history.now()
    if operation == "flush":
        await disk.flush()
        storm.flushes.append((began, history.now()))
    elif operation == "read":
        data = await disk.pread(length, offset)
        storm.reads.append((began, history.now(), offset, data))
    else:
        value = history.stamp() if operation == "write" else bytes(CELL)
        event = history.begin(offset, length, value)
        certain = False
        try:
            if operation == "write":
                await disk.pwrite(value * (length // CELL), offset)
            elif operation == "zero":
                await disk.write_zeroes(offset, length, unmap=offset % 128 == 0)
            else:
                await disk.discard(offset, length)
            certain = operation != "discard"
        finally:
            history.end(event, certain=certain)


async def _waves(
    storm: Storm, disk: AsyncDisk, *, waves: int, tasks: int, cancel: float, window_s: float
) -> None:
    """Within a wave all run at once, and a part of them is cancelled at random moments."""
    loop = asyncio.get_running_loop()
    for _ in range(waves):
        running = [asyncio.create_task(request(storm, disk, *storm.draw())) for _ in range(tasks)]
        for task in running:
            if storm.random.random() < cancel:
                loop.call_later(storm.random.random() ** 2 * window_s, task.cancel)
        done, stuck = await asyncio.wait(running, timeout=STUCK_S)
        if stuck:
            for task in stuck:
                task.cancel()
            raise Violation(ENGINE, f"{len(stuck)} of {tasks} requests did not end in {STUCK_S:.0f} seconds")
        for task in done:
            error = None if task.cancelled() else task.exception()
            if error is not None:
                raise Violation(ENGINE, f"a request failed: {error}") from error
        try:
            nothing_remains(disk.door)
        except AssertionError as error:
            raise Violation(ENGINE, "something of a request that has ended is left") from error


def storm(image: Image, seed: int, *, waves: int = 4, tasks: int = 250) -> int:
    """One storm on an image in memory. Returns how many requests there were. Raises Violation."""
    size = image.size // CELL * CELL
    initial = image.shown()[:size]
    weather = Storm(seed, size, initial)

    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=2)
        medium = Medium(runtime, image.empty())
        data = Medium(runtime) if image.external else None
        slow = Delay(data, seed + 1, most_s=0.0005, share=0.2) if data is not None else None
        door = await image.open(Delay(medium, seed, most_s=0.0005, share=0.2), slow)
        disk = AsyncDisk(door, runtime)
        await _waves(weather, disk, waves=waves, tasks=tasks, cancel=0.25, window_s=0.05)
        content = await disk.pread(size, 0)
        try:
            weather.history.check(content, weather.reads)
        except AssertionError as error:
            raise Violation(FOREIGN, f"{image}, seed {seed}: {error}") from error
        await disk.close()
        view = image.view(medium.content, None if data is None else data.content)
        report = view.check()
        what = f"{image}, seed {seed}: closed"
        if report.corruptions:
            raise Violation(CORRUPT, f"{what}: {report.corruptions[:4]}", image=medium.content)
        if report.leaks:
            raise Violation(LEAK, f"{what}: {len(report.leaks)} leaked clusters", image=medium.content)
        if view.read()[:size] != content:
            raise Violation(FOREIGN, f"{what}: it reads differently", image=medium.content)

    try:
        asyncio.run(scenario())
    except EnbanError as error:
        raise Violation(ENGINE, f"{image}, seed {seed}: {error}") from error
    return waves * tasks


# -- power cuts in a crowd -------------------------------------------------------------------

CROWDED = [image for image in IMAGES if image.name in ("512", "4k-v2-chain", "16k-ext-chain")]


def crowd(image: Image, seed: int) -> tuple[bytes, list[writelog.Entry], Storm]:
    """Overlapping requests, some cancelled, on a slow recorded storage: (the image at the start, the
    record, the storm)."""
    image = Image(image.name, 48 * KIB, backing=image.backing, **image.options)
    start = bytes(image.empty())
    weather = Storm(seed, image.size, image.shown())

    async def scenario() -> list[writelog.Entry]:
        runtime = AsyncioRuntime(2)
        log = WriteLog(Delay(Medium(runtime, start), seed, most_s=0.0005, share=0.3))
        weather.history.tick = log.mark
        disk = AsyncDisk(await image.open(log), runtime)
        await _waves(weather, disk, waves=4, tasks=30, cancel=0.17, window_s=0.02)
        await request(weather, disk, "flush", 0, 0)
        await disk.close()
        return log.entries

    record = asyncio.run(scenario())
    weather.history.tick = None
    return start, record, weather


def explore_crowd(
    image: Image,
    seed: int,
    *,
    subsets: int = 2,
    scattered: int = 1,
    tick: Callable[[int], None] | None = None,
) -> int:
    """All points of a crowd's record. Returns the number of states. Raises Violation."""
    try:
        start, record, weather = crowd(image, seed)
    except EnbanError as error:
        raise Violation(ENGINE, f"{image}, seed {seed}: {error}") from error
    cells, random, memo = weather.history.by_cell(), Random(seed), Memo()
    replay, now, states = Replay(start, record), 0, 0
    for number, entry in enumerate(replay.steps()):
        if entry.kind == writelog.MARK:
            assert isinstance(entry.note, int)
            now = entry.note
            continue
        flushed = max((began for began, ended in weather.flushes if ended <= now), default=0)
        found = [replay.everything(), *replay.subsets(random, subsets)]
        found += [replay.scattered(random) for _ in range(scattered)]
        for state in found:
            view = image.view(state, memo=memo)
            report = view.check()
            what = f"{image} in a crowd, seed {seed}, at entry {number}"
            if report.corruptions:
                raise Violation(CORRUPT, f"{what}: {report.corruptions[:4]}", image=state)
            try:
                weather.history.check_crash(view.read(), flushed, now, cells)
            except AssertionError as error:
                raise Violation(FOREIGN, f"{what}: {error}", image=state) from error
            states += 1
        if tick is not None:
            tick(states)
    return states
