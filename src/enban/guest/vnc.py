"""A VNC front: any VNC client in front, QEMU's VNC server behind, the keyboard put right in between.

    client --- RFB ---> VncFront --- RFB, physical keys ---> QEMU (a unix socket, no password, no `-k`)
           <--------- everything else, as it is -----------

QEMU is told physical keys only (extended key events). A client that sends them itself has them passed on,
translated by the table of keys; a client that sends keysyms only has them looked up in the guest's layout
(`keyboard.keysyms`). The rule: what is not a key event passes unread, in both directions, so every encoding
and extension still works between the two; and a client that breaks the protocol loses its own connection,
nothing more.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
from typing import TYPE_CHECKING

from enban.errors import EnbanError, PeerError, UsageError, from_oserror
from enban.exports import sockets
from enban.guest.keyboard.keys import Key, from_vnc
from enban.guest.keyboard.keysyms import KeysymTranslator
from enban.guest.keyboard.layouts import layout as find_layout
from enban.wire.rfb import (
    ClientHandshake,
    ClientMessages,
    KeyMessage,
    ServerHandshake,
    extended_key_event,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_CHUNK = 1 << 16
_HANDSHAKE_S = 20.0
_MAX_CLIENTS = 32
# Between two key events: a PC's keyboard holds 16 bytes, and nothing tells how fast the guest reads them.
_GAP_S = 0.002

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class VncFront:
    """The front. `start` it, tell people `address`, `close` it.

    settle: awaited between key events, in place of a pause of 2 ms: `Pacer.settle` of the guest's
    monitor, with a short timeout, makes pasted text exact on a busy guest too. What it raises counts as "go
    on". report: called with one line about a connection that failed.
    """

    def __init__(
        self,
        *,
        settle: Callable[[], Awaitable[None]] | None = None,
        report: Callable[[str], None] | None = None,
    ) -> None:
        self.address = ""
        self._settle = settle
        self._report = report
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._upstream = ""
        self._layout = ""
        self._backslash_key = "yen"
        self._path = ""

    async def start(
        self, listen: str, upstream: str, layout: str, *, backslash_key: str = "yen", anyone: bool = False
    ) -> None:
        """Listen for clients. Returns at once; `address` is then where.

        listen, upstream: `unix:PATH` or `HOST:PORT` (port 0: any that is free). upstream: QEMU's VNC
        server, without password and started without `-k`. layout: the guest's keyboard layout.
        backslash_key: the Japanese key that a keysym `backslash` means, yen or ro. anyone: listen on an
        address that other machines reach; nobody is asked for a password. Raises UsageError, HostError.
        """
        if self._server is not None:
            raise UsageError("this VNC front is listening already")
        find_layout(layout)
        KeysymTranslator(layout, backslash_key=backslash_key)
        self._upstream, self._layout, self._backslash_key = upstream, layout, backslash_key
        split_address(upstream)
        path, host, port = split_address(listen)
        if not path and not anyone and not _is_loopback(host):
            raise UsageError(
                f"VNC on {host} would be open to everybody, without a password",
                hint="listen on 127.0.0.1, and reach it through an ssh tunnel",
            )
        if path:
            # Bound by us: asyncio would take the path from a front that still listens there.
            taken = sockets.listen_unix(path, mode=0o600)
            self._server = await asyncio.start_unix_server(self._accept, sock=taken)
            self._path = path
            self.address = listen
            return
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            hint = "give another port; 0 is any that is free" if error.errno == errno.EADDRINUSE else ""
            raise from_oserror(error, "listen for VNC clients", listen, hint=hint) from error
        found = self._server.sockets[0].getsockname()
        self.address = f"[{found[0]}]:{found[1]}" if ":" in found[0] else f"{found[0]}:{found[1]}"

    async def close(self) -> None:
        """Stop listening and hang up on every client. May be called twice."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        for task in list(self._clients):
            task.cancel()
        await asyncio.gather(*self._clients, return_exceptions=True)
        await server.wait_closed()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    # -- one client -----------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._clients) >= _MAX_CLIENTS:
            self._tell(f"more than {_MAX_CLIENTS} VNC clients")
            writer.close()
            return
        self._clients.add(task)
        try:
            await self._serve((reader, writer))
        except (EnbanError, OSError, TimeoutError) as error:
            self._tell(str(error) or "a VNC client took too long to begin")
        except asyncio.CancelledError:
            pass  # closing; asyncio's own handler would call it an error
        finally:
            self._clients.discard(task)
            writer.close()

    def _tell(self, line: str) -> None:
        if self._report is not None:
            self._report(line)

    async def _serve(self, client: Streams) -> None:
        async with asyncio.timeout(_HANDSHAKE_S):
            hello = ServerHandshake()
            await _converse(hello, client, "VNC client")
            server = await _connect(self._upstream)
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                ours = ClientHandshake(shared=hello.shared)
                await _converse(ours, server, "VNC server")
            assert ours.init is not None
            client[1].write(ours.init.to_bytes() + ours.rest)
            session = _Session(
                KeysymTranslator(self._layout, backslash_key=self._backslash_key), server[1], self._settle
            )
            await _first(_pump(server[0], client[1]), session.run(client[0], hello.rest))
        finally:
            server[1].close()


class _Session:
    """One client's messages on their way to QEMU."""

    def __init__(
        self,
        translator: KeysymTranslator,
        server: asyncio.StreamWriter,
        settle: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._translator = translator
        self._server = server
        self._settle = settle

    async def run(self, client: asyncio.StreamReader, begun: bytes) -> None:
        messages = ClientMessages()
        data = begun
        while True:
            try:
                messages.receive(data)
            finally:
                # What was whole before the fault still counts.
                while (message := messages.next_event()) is not None:
                    if isinstance(message, KeyMessage):
                        await self._key(message)
                    else:
                        self._server.write(message.raw)
                await self._server.drain()
            data = await client.read(_CHUNK)
            if not data:
                break
        for key, down in self._translator.release_all():
            await self._send(key, down, 0)

    async def _key(self, message: KeyMessage) -> None:
        if message.keycode is not None:
            key = from_vnc(message.keycode)
            if key is not None:
                await self._send(key, message.down, message.keysym)
                return
            # A client that knows extended events and not this key's number leaves it to the keysym.
        for key, down in self._translator.event(message.down, message.keysym):
            await self._send(key, down, message.keysym if key.name.startswith("kp_") else 0)

    async def _send(self, key: Key, down: bool, keysym: int) -> None:
        # The keysym goes along where QEMU keeps Num Lock and Caps Lock in step by it.
        self._server.write(extended_key_event(down, keysym, key.sent.vnc))
        await self._server.drain()
        if self._settle is None:
            await asyncio.sleep(_GAP_S)
            return
        with contextlib.suppress(EnbanError):  # a guest that reads no keys loses them, as on any PC
            await self._settle()


# -- connections ----------------------------------------------------------------------------------


def split_address(address: str) -> tuple[str, str, int]:
    """`unix:PATH` as (path, "", 0), `HOST:PORT` as ("", host, port). Raises UsageError."""
    if address.startswith("unix:") and len(address) > 5:
        return address[5:], "", 0
    host, colon, port = address.rpartition(":")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"'{address}' is no address", hint="use unix:PATH or HOST:PORT")
    return "", host.removeprefix("[").removesuffix("]"), int(port)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


async def _connect(address: str) -> Streams:
    path, host, port = split_address(address)
    try:
        if path:
            return await asyncio.open_unix_connection(path)
        return await asyncio.open_connection(host, port)
    except OSError as error:
        raise from_oserror(error, "reach QEMU's VNC server", address) from error


async def _converse(machine: ServerHandshake | ClientHandshake, streams: Streams, who: str) -> None:
    """Run a handshake to its end."""
    reader, writer = streams
    while True:
        writer.write(machine.to_send())
        await writer.drain()
        if machine.done:
            return
        data = await reader.read(_CHUNK)
        if not data:
            raise PeerError(f"the {who} hung up in the handshake")
        machine.receive(data)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()


async def _first(*works: Awaitable[None]) -> None:
    """Run all until one ends, then end the others; what that one raised is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        ended = await asyncio.gather(*tasks, return_exceptions=True)
    for outcome in ended:
        if isinstance(outcome, Exception) and not isinstance(outcome, ConnectionError):
            raise outcome
