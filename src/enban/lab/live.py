"""Jobs on a disk in use, in a storm: committing a temporary overlay, pulling in the backing file.

Reads and writes go on meanwhile, and must not notice. The disks are files, as the jobs need them to be.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import enban.aio
from enban.errors import EnbanError

from .images import KIB, Image, pattern
from .oracle import CORRUPT, ENGINE, FOREIGN, Violation
from .storm import STUCK_S, Storm, stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from enban.aio import AsyncDisk

CLIENTS = 12
REQUESTS = 20  # of each client, three times over
ROUNDS = 3
KINDS = (
    Image("live-4k", 192 * KIB, cluster_size=4096, backing=pattern(150 * KIB, 3), backing_fmt="raw"),
    Image(
        "live-ext",
        192 * KIB,
        cluster_size=16384,
        extended_l2=True,
        backing=pattern(150 * KIB, 4),
        backing_fmt="raw",
    ),
)


def commit_in_a_storm(image: Image, seed: int) -> int:
    """A temporary overlay is committed again and again. Returns the number of requests. Raises Violation."""

    async def job(disk: AsyncDisk, _: int) -> None:
        for _ in range(4):
            await asyncio.sleep(0.02)
            await disk.commit()

    async def end(disk: AsyncDisk) -> None:
        await disk.commit()

    return _run(image, seed, "commit", job, end, temporary=True)


def pull_in_a_storm(image: Image, seed: int) -> int:
    """The backing file is pulled in; the image stands alone then. As above."""

    async def job(disk: AsyncDisk, round_number: int) -> None:
        if round_number == 1:
            await asyncio.sleep(0.005)
            await disk.pull()

    async def end(disk: AsyncDisk) -> None:
        pass

    return _run(image, seed, "pull", job, end, temporary=False)


def _run(
    image: Image,
    seed: int,
    what: str,
    job: Callable[[AsyncDisk, int], Awaitable[None]],
    end: Callable[[AsyncDisk], Awaitable[None]],
    *,
    temporary: bool,
) -> int:
    directory = Path(tempfile.mkdtemp(prefix="enban-live-"))
    path = directory / "image"
    path.write_bytes(image.empty())
    (directory / "below").write_bytes(image.backing)
    weather = Storm(seed, image.size, image.shown())
    what = f"{what} of {image} in a storm, seed {seed}"

    async def scenario() -> bytes:
        disk = await enban.aio.open(
            path,
            writable=True,
            cache="unsafe",
            snapshot=temporary,
            snapshot_dir=str(directory) if temporary else None,
        )
        for number in range(ROUNDS):
            clients = [stream(weather, disk, REQUESTS, 0.1) for _ in range(CLIENTS)]
            tasks = [asyncio.create_task(work) for work in (*clients, _as_coroutine(job(disk, number)))]
            done, stuck = await asyncio.wait(tasks, timeout=STUCK_S)
            for error in [task.exception() for task in done]:
                if error is not None:
                    raise Violation(ENGINE, f"{what}: {error}") from error
            if stuck:
                for task in stuck:
                    task.cancel()
                raise Violation(ENGINE, f"{what}: {len(stuck)} clients did not end")
        content = await disk.pread(image.size, 0)
        await end(disk)
        await disk.close()
        return content

    try:
        content = asyncio.run(scenario())
        weather.history.check(content, weather.reads)
        after = path.read_bytes()
        backing = image.backing if temporary else b""
        view = Image(image.name, image.size, backing=backing, cluster_size=image.cluster).view(after)
        report = view.check()
        if report.corruptions or (report.leaks and not temporary):
            raise Violation(CORRUPT, f"{what}: {report}", image=after)
        if view.read() != content:
            raise Violation(FOREIGN, f"{what}: the image reads differently", image=after)
    except EnbanError as error:
        raise Violation(ENGINE, f"{what}: {error}") from error
    except Violation:
        raise
    except AssertionError as error:
        raise Violation(FOREIGN, f"{what}: {error}") from error
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    return ROUNDS * CLIENTS * REQUESTS


async def _as_coroutine(work: Awaitable[None]) -> None:
    await work
