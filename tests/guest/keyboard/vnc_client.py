"""A VNC client for tests: sends keys, reads nothing but the handshake."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from enban.wire.rfb import ClientHandshake, ServerInit, extended_key_event, key_event


class VncClient:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, init: ServerInit) -> None:
        self.reader = reader
        self.writer = writer
        self.init = init

    async def keysym(self, down: bool, keysym: int) -> None:
        self.writer.write(key_event(down, keysym))
        await self.writer.drain()

    async def extended(self, down: bool, keysym: int, keycode: int) -> None:
        self.writer.write(extended_key_event(down, keysym, keycode))
        await self.writer.drain()


@contextlib.asynccontextmanager
async def vnc_client(address: str) -> AsyncIterator[VncClient]:
    """Connect to `unix:PATH` or `HOST:PORT` and shake hands."""
    if address.startswith("unix:"):
        reader, writer = await asyncio.open_unix_connection(address[5:])
    else:
        host, _, port = address.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
    try:
        hello = ClientHandshake()
        async with asyncio.timeout(20):
            while not hello.done:
                data = await reader.read(4096)
                assert data, "the server hung up"
                hello.receive(data)
                writer.write(hello.to_send())
                await writer.drain()
        assert hello.init is not None
        yield VncClient(reader, writer, hello.init)
    finally:
        writer.close()
