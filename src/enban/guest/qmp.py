"""The monitor connection to QEMU, over the library `qemu.qmp` (extra `guest`).

QEMU connects to us, so nothing has to be waited for or tried again. Errors of the library are translated
here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import PeerError, UsageError

try:
    from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, QMPClient, QMPError, StateError
except ImportError as error:
    raise UsageError(
        "guests need the Python package qemu.qmp", hint="install it with: pip install 'enban[guest]'"
    ) from error


class Monitor:
    """Commands to QEMU and its events.

    on_event: called with the name and the data of each event.
    """

    def __init__(self, name: str, on_event: Callable[[str, Mapping[str, Any]], None]) -> None:
        self._client = QMPClient(name)
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._on_event = on_event
        self._reader: asyncio.Task[None] | None = None

    async def listen(self, path: str) -> None:
        """Open the socket that QEMU will connect to."""
        await self._client.start_server(path)

    async def accept(self) -> None:
        """Wait for QEMU and greet it. Raises PeerError if it goes away meanwhile."""
        try:
            await self._client.accept()
        except QMPError as error:
            raise PeerError(f"QEMU's monitor does not answer: {error}") from error
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        async for event in self._listener:
            data = event.get("data")
            self._on_event(str(event["event"]), data if isinstance(data, dict) else {})

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one command and return its result.

        Raises PeerError with QEMU's reason, or when the connection ends first.
        """
        try:
            return await self._client.execute(command, dict(arguments or {}))
        except ExecuteError as error:
            raise PeerError(f"QEMU refuses {command}: {error}") from error
        except (ExecInterruptedError, StateError, OSError, EOFError) as error:
            raise PeerError(f"QEMU ended before it answered {command}") from error

    async def close(self) -> None:
        """End the connection; QEMU goes on."""
        if self._reader is not None:
            self._reader.cancel()
        try:
            await self._client.disconnect()
        except (QMPError, OSError, EOFError):
            pass  # the other end went first, which is an end too
