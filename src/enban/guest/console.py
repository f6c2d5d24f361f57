"""A serial line of the guest whose other end is here: what it prints is kept and passed on.

QEMU connects to our socket, so a machine whose QEMU is replaced (a state was loaded) keeps its console.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable

from ..errors import ClosedError, PeerError

KEPT = 1 << 20
_READ = 1 << 16


class Console:
    """One serial line.

    path: of the socket QEMU connects to. text: the last MiB of what came, as bytes. on_output: called with
    each piece as it arrives, and awaited before more is read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = bytearray()
        self.on_output: Callable[[bytes], Awaitable[None]] | None = None
        self._dropped = 0
        self._seen = 0  # position in all that ever came up to which `wait_for` has looked
        self._news = asyncio.Event()
        self._ended = False
        self._writer: asyncio.StreamWriter | None = None
        self._server: asyncio.Server | None = None

    async def listen(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, self.path)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writer = writer
        try:
            while data := await reader.read(_READ):
                await self._take(data)
        except ConnectionError:
            pass  # QEMU was killed
        finally:
            if self._writer is writer:
                self._writer = None
            writer.close()

    async def _take(self, data: bytes) -> None:
        self.text += data
        surplus = len(self.text) - KEPT
        if surplus > 0:
            del self.text[:surplus]
            self._dropped += surplus
        self._news.set()
        if self.on_output is not None:
            await self.on_output(data)

    async def write(self, data: bytes) -> None:
        """Type `data` into the line. Raises ClosedError where no guest is connected."""
        writer = self._writer
        if writer is None:
            raise ClosedError("the guest's console is not connected")
        try:
            writer.write(data)
            await writer.drain()
        except ConnectionError as error:
            raise ClosedError("the guest's console is not connected") from error

    async def wait_for(self, pattern: bytes, timeout_s: float = 60) -> re.Match[bytes]:
        """The next match of a regular expression in what comes, or has come since the last match.

        Text comes in bits, and the first bit that matches is taken: end the pattern with what follows
        the wanted text.
        Raises TimeoutError, or PeerError if the machine ends first.
        """
        expression = re.compile(pattern)
        async with asyncio.timeout(timeout_s):
            while True:
                self._news.clear()
                found = expression.search(self.text, max(0, self._seen - self._dropped))
                if found is not None:
                    self._seen = self._dropped + found.end()
                    return found
                if self._ended:
                    raise PeerError(f"the machine ended before its console said {pattern!r}")
                await self._news.wait()

    def skip(self) -> None:
        """`wait_for` shall look only at what comes from now on."""
        self._seen = self._dropped + len(self.text)

    def ended(self) -> None:
        """Nothing more will come: who waits is told."""
        self._ended = True
        self._news.set()

    async def close(self) -> None:
        self.ended()
        if self._writer is not None:
            self._writer.close()
        if self._server is not None:
            self._server.close()
            try:
                os.unlink(self.path)
            except FileNotFoundError:
                pass
