"""Storm: many requests at once, overlapping, some cancelled, on a slow storage.

Every request ends exactly once, nothing stays behind (the ledger balances, no lock and no
reservation is left), and what is read, in between and at the end, is what some serial order of
the requests would show. The same load recorded is cut into crash states.
"""

from __future__ import annotations

import asyncio
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from enban.aio import AsyncDisk, AsyncioRuntime
from enban.errors import EnbanError
from enban.filters import writelog
from enban.filters.base import Filter
from enban.filters.delay import Delay
from enban.filters.writelog import WriteLog
from enban.formats.qcow2.node import Qcow2Node

from .crash_states import Replay
from .history import CELL, History
from .images import EXTERNAL, IMAGES, KIB, OTHERS, SNAPSHOTS, Image, Medium
from .oracle import CORRUPT, ENGINE, FOREIGN, LEAK, Violation
from .qcow2_reader import Memo

if TYPE_CHECKING:
    from collections.abc import Callable

    from enban.block.door import Door
    from enban.block.storage import ReadBuffer, Storage, WriteBuffer

KINDS = (
    *IMAGES,
    EXTERNAL,
    *SNAPSHOTS,
    *(image for image in OTHERS if image.name in ("raw", "qcow-4k-chain", "1k-v2")),
)
SIZE = 128 * KIB
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
    """Random requests on a disk, with a history of what they did.

    snapshots: whether internal snapshots come and go meanwhile. shots: when each was being made."""

    def __init__(self, seed: int, size: int, initial: bytes, *, snapshots: bool = False) -> None:
        self.random = Random(seed)
        self.size = size
        self.history = History(initial)
        self.reads: list[tuple[int, int, int, bytes]] = []
        self.flushes: list[tuple[int, int]] = []  # (began, ended) of those that were answered
        self.snapshots = snapshots
        self.shots: dict[str, tuple[int, int]] = {}
        self.past_shots: dict[str, tuple[int, int]] = {}  # of those that were deleted again
        self._named = count(1)

    def draw(self) -> tuple[str, int, int]:
        random = self.random
        kinds = ("write", "read", "zero", "discard", "flush", "snapshot")
        operation = random.choices(kinds, (50, 20, 12, 12, 6, 2 * self.snapshots))[0]
        length = random.choice((CELL, 512, 3 * CELL, 4096, 6 * KIB, 20 * KIB))
        offset = random.randrange(self.size // CELL) * CELL
        return operation, offset, min(length, self.size - offset)

    async def keep(self, disk: AsyncDisk, began: int) -> None:
        """Make a snapshot, or delete one if there are some."""
        if len(self.shots) > 2:
            name = next(iter(self.shots))
            self.past_shots[name] = self.shots.pop(name)
            await disk.delete_snapshot(name)
            return
        name = f"s{next(self._named)}"
        try:
            await disk.create_snapshot(name)
        finally:  # cancelled, there may be one all the same
            if any(snapshot.name == name for snapshot in disk.snapshots):
                self.shots[name] = began, self.history.now()

    def check_snapshots(self, shown: dict[str, bytes]) -> None:
        """What a snapshot shows is what a read of the whole disk could have seen while it was made."""
        shots = {**self.past_shots, **self.shots}
        reads = [(*shots[name], 0, content) for name, content in shown.items() if name in shots]
        self.history.check_reads(reads)


async def request(storm: Storm, disk: AsyncDisk, operation: str, offset: int, length: int) -> None:
    """One request, entered in the storm's history as it begins and ends."""
    history = storm.history
    began = history.now()
    if operation == "snapshot":
        await storm.keep(disk, began)
    elif operation == "flush":
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


async def stream(storm: Storm, disk: AsyncDisk, requests: int, cancel: float) -> None:
    """A client that sends one request after the other."""
    for _ in range(requests):
        task = asyncio.create_task(request(storm, disk, *storm.draw()))
        if storm.random.random() < cancel:
            asyncio.get_running_loop().call_later(storm.random.random() ** 2 * 0.002, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            if not task.cancelled():
                raise  # it is we who were cancelled


async def _waves(
    storm: Storm, disk: AsyncDisk, *, waves: int, tasks: int, cancel: float, window_s: float, streams: int = 0
) -> None:
    """Within a wave all run at once, and a part of them is cancelled at random moments. Then, with
    `streams`, so many clients do as much one request after the other: barriers come and go meanwhile."""
    loop = asyncio.get_running_loop()
    for wave in range(waves):
        if streams and wave % 2:
            running = [
                asyncio.create_task(stream(storm, disk, tasks // streams, cancel)) for _ in range(streams)
            ]
        else:
            running = [asyncio.create_task(request(storm, disk, *storm.draw())) for _ in range(tasks)]
            for task in running:
                if storm.random.random() < cancel:
                    loop.call_later(storm.random.random() ** 2 * window_s, task.cancel)
        done, stuck = await asyncio.wait(running, timeout=STUCK_S)
        if stuck:
            for task in stuck:
                task.cancel()
            raise Violation(ENGINE, f"{len(stuck)} of {tasks} requests did not end in {STUCK_S:.0f} seconds")
        for error in [None if task.cancelled() else task.exception() for task in done]:
            if error is not None:
                raise Violation(ENGINE, f"a request failed: {error}") from error
        try:
            nothing_remains(disk.door)
        except AssertionError as error:
            raise Violation(ENGINE, "something of a request that has ended is left") from error


def _weather(medium: Medium, seed: int) -> Delay:
    """Calls take a random time; some reads and writes are overtaken by flushes."""
    return Delay(Delay(medium, seed, most_s=0.02, share=0.02), seed + 2, most_s=0.0005, share=0.2)


def storm(image: Image, seed: int, *, waves: int = 4, tasks: int = 250) -> int:
    """One storm on an image in memory. Returns how many requests there were. Raises Violation."""
    snapshots = image.snapshots
    image = Image(image.name, SIZE, format=image.format, backing=image.backing, **image.options)
    size, initial = SIZE, image.shown()
    weather = Storm(seed, size, initial, snapshots=snapshots)

    async def scenario() -> None:
        runtime = AsyncioRuntime(threads=2)
        medium = Medium(runtime, image.empty())
        data = Medium(runtime) if image.external else None
        door = await image.open(_weather(medium, seed), _weather(data, seed + 1) if data else None)
        disk = AsyncDisk(door, runtime)
        await _waves(weather, disk, waves=waves, tasks=tasks, cancel=0.25, window_s=0.05, streams=25)
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
            weather.check_snapshots(view.snapshots())
        except AssertionError as error:
            raise Violation(FOREIGN, f"{what}, in a snapshot: {error}", image=medium.content) from error

    try:
        asyncio.run(scenario())
    except EnbanError as error:
        raise Violation(ENGINE, f"{image}, seed {seed}: {error}") from error
    return waves * tasks


# -- ambush ----------------------------------------------------------------------------------


class Hold(Filter):
    """Holds back one read or write until it is let go; all other calls pass."""

    def __init__(self, below: Storage) -> None:
        super().__init__(below)
        self._armed = False
        self._free = asyncio.Event()

    def arm(self) -> None:
        """The next read or write is held."""
        self._armed = True
        self._free.clear()

    def release(self) -> None:
        self._armed = False
        self._free.set()

    async def _pass(self) -> None:
        if self._armed:
            self._armed = False
            await self._free.wait()

    def read_now(self, buffer: WriteBuffer, offset: int) -> bool:
        return False

    async def read_into(self, buffer: WriteBuffer, offset: int) -> None:
        await self._pass()
        await self.below.read_into(buffer, offset)

    async def write(self, buffer: ReadBuffer, offset: int) -> None:
        await self._pass()
        await self.below.write(buffer, offset)


def ambush(image: Image, seed: int, *, rounds: int = 20) -> int:
    """One request is held at the storage while others take its ground away: they discard or zero its
    range, flush, and write elsewhere, so that what it was about to touch might be given to them.
    Returns how many requests there were. Raises Violation."""
    size = image.size // CELL * CELL
    weather = Storm(seed, size, image.shown()[:size])
    random = weather.random
    requests = 0

    async def scenario() -> None:
        nonlocal requests
        runtime = AsyncioRuntime(threads=1)
        medium = Medium(runtime, image.empty())
        hold = Hold(medium)
        disk = AsyncDisk(await image.open(hold), runtime)

        def start(kind: str, offset: int, length: int) -> asyncio.Task[None]:
            nonlocal requests
            requests += 1
            return asyncio.create_task(request(weather, disk, kind, offset, min(length, size - offset)))

        def place() -> int:
            return random.randrange(size // CELL) * CELL

        for _ in range(rounds):
            offset, length = place(), random.choice((CELL, 512, 2048))
            await start("write", offset, length)
            hold.arm()
            tasks = [start(random.choice(("read", "read", "write")), offset, length)]
            await asyncio.sleep(0)
            others = [(random.choice(("discard", "zero")), offset // image.cluster * image.cluster, 8192)]
            others += [("flush", 0, 0)]
            others += [("write", place(), random.choice((512, 4096))) for _ in range(4)]
            others += [("flush", 0, 0), ("read", 0, size)]
            if (
                image.snapshots and random.random() < 0.5
            ):  # its cluster becomes another one's too, and is copied
                cluster = offset // image.cluster * image.cluster
                beside = min(cluster + random.randrange(image.cluster // CELL) * CELL, size - CELL)
                others[:1] = [("snapshot", 0, 0), ("write", beside, CELL)]
            for kind, at, span in others:
                tasks.append(start(kind, at, span))
                await asyncio.wait(tasks[-1:], timeout=0.002)  # it may have to wait for the one that is held
            hold.release()
            done, stuck = await asyncio.wait(tasks, timeout=STUCK_S)
            for error in [task.exception() for task in done]:
                if error is not None:
                    raise Violation(ENGINE, f"a request failed: {error}") from error
            if stuck:
                for task in stuck:
                    task.cancel()
                raise Violation(ENGINE, f"{len(stuck)} requests did not end in {STUCK_S:.0f} seconds")
        content = await disk.pread(size, 0)
        weather.history.check(content, weather.reads)
        await disk.close()
        weather.check_snapshots(image.view(medium.content).snapshots())

    try:
        asyncio.run(scenario())
    except EnbanError as error:
        raise Violation(ENGINE, f"{image}, ambush {seed}: {error}") from error
    except Violation:
        raise
    except AssertionError as error:
        raise Violation(FOREIGN, f"{image}, ambush {seed}: {error}") from error
    return requests


# -- power cuts in a crowd -------------------------------------------------------------------

CROWDED = [
    image
    for image in (*IMAGES, *SNAPSHOTS)
    if image.name in ("512", "4k-v2-chain", "16k-ext-chain", "512-snap")
]


def crowd(image: Image, seed: int) -> tuple[bytes, list[writelog.Entry], Storm]:
    """Overlapping requests, some cancelled, on a slow recorded storage: (the image at the start, the
    record, the storm)."""
    snapshots = image.snapshots
    image = Image(image.name, 48 * KIB, backing=image.backing, **image.options)
    start = bytes(image.empty())
    weather = Storm(seed, image.size, image.shown(), snapshots=snapshots)

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
                if image.snapshots and not states % 20:
                    weather.check_snapshots(view.snapshots())
            except AssertionError as error:
                raise Violation(FOREIGN, f"{what}: {error}", image=state) from error
            states += 1
        if tick is not None:
            tick(states)
    return states
