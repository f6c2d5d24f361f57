"""Black box: any NBD server, through nothing but its export.

A workload with an oracle, one request after the other; a storm of overlapping requests, some of
them cancelled; then the connection is closed, opened again, and everything is compared. The content
of the export is overwritten, up to 16 MiB of it. (To kill a server as well: `torture kill --server`.)
"""

from __future__ import annotations

import asyncio
from random import Random
from typing import TYPE_CHECKING

import enban
import enban.aio
from enban.block.runtime import drive
from enban.errors import EnbanError, UsageError

from .findings import Finding
from .images import KIB, Image
from .oracle import ENGINE, FOREIGN, SECTOR, Oracle, Violation
from .parts import Part
from .storm import Storm, request
from .workload import Operation, operations, perform, see

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from enban.block.disk import Disk

LARGEST = 16 << 20
STORM = 256 * KIB
OPERATIONS = 120
TASKS = 200


class BlackBoxPart(Part):
    """Each piece: a workload and a storm on one export. uri: where it is; its content is overwritten."""

    name = "blackbox"

    def __init__(self, seed: int, uri: str, tick: Callable[[], None] | None = None) -> None:
        super().__init__(seed, "", tick)
        self.uri = uri
        with self._open() as disk:
            size = min(disk.size, LARGEST) // SECTOR * SECTOR
        if size < 64 * KIB:
            raise UsageError(f"the export has {size} bytes: 64 KiB are the least", path=uri)
        # Operations are drawn as for a raw image; the size of its clusters gives theirs.
        self.kinds: Sequence[Image] = (Image("export", size, format="raw", cluster_size=64 * KIB),)

    def _open(self) -> Disk:
        return enban.open(self.uri, writable=True, format="raw")

    def work(self, image: Image, seed: int) -> None:
        try:
            content = self._workload(image, seed)
            self._storm(content, seed)
        except EnbanError as error:
            raise Violation(ENGINE, f"seed {seed}: {error}") from error

    def _workload(self, image: Image, seed: int) -> bytes:
        disk = self._open()
        try:
            oracle = Oracle(disk.pread(image.size, 0))
            for operation in operations(image, seed, OPERATIONS):
                self._perform(disk, oracle, operation)
                self.count("requests")
                self.beat()
            disk.flush()
        finally:
            disk.close()
        with self._open() as disk:
            content = disk.pread(image.size, 0)
        oracle.check_now(content, f"seed {seed}, connected again")
        self.count("reconnects")
        return content

    def _perform(self, disk: Disk, oracle: Oracle, operation: Operation) -> None:
        oracle.begin(operation)
        if operation.kind == "discard":  # as a trim, which the raw format would turn into zeros
            drive(disk.node.file.discard(operation.offset, operation.length))
            oracle.observe(operation, disk.pread(len(oracle.model), 0), what=str(operation))
            return
        if operation.kind == "read":
            oracle.check_now(disk.pread(len(oracle.model), 0), "read")
            return
        perform(disk, operation)
        oracle.done(operation)

    def _storm(self, content: bytes, seed: int) -> None:
        size = min(len(content), STORM)
        weather = Storm(seed, size, content[:size])
        random = Random(seed)

        async def scenario() -> None:
            disk = await enban.aio.open(self.uri, writable=True, format="raw")
            tasks = []
            for _ in range(TASKS):
                kind, offset, length = weather.draw()
                # Whole sectors: two requests inside one sector would be a race of the client's making.
                offset, length = offset // SECTOR * SECTOR, -(-length // SECTOR) * SECTOR
                length = min(length, size - offset)
                tasks.append(asyncio.create_task(request(weather, disk, kind, offset, length)))
            for task in tasks:
                if random.random() < 0.1:
                    asyncio.get_running_loop().call_later(random.random() ** 2 * 0.1, task.cancel)
            results = await asyncio.gather(*tasks, return_exceptions=True)
            for result in results:
                if isinstance(result, Exception) and not isinstance(result, asyncio.CancelledError):
                    raise Violation(ENGINE, f"seed {seed}: a request failed: {result}") from result
            await disk.flush()
            await disk.close()

        asyncio.run(scenario())
        self.count("requests", TASKS)
        with self._open() as disk:
            seen = see(disk)[:size]
        try:
            weather.history.check(seen, weather.reads)
        except AssertionError as error:
            raise Violation(FOREIGN, f"seed {seed}, storm: {error}") from error

    def found(self, image: Image, seed: int, violation: Violation) -> Finding:
        again = f"enban torture {self.uri} --overwrite --seed {seed} --count 1"
        return Finding(self.name, image.name, seed, violation, again=again)
