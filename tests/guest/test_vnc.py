"""The VNC front: what passes, what is translated, who is refused, and that one client's faults are its
own."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path

import pytest

from enban.errors import HostError, UsageError
from enban.guest.keyboard import by_name
from enban.guest.vnc import VncFront, split_address
from enban.wire.rfb import (
    ClientMessages,
    ServerHandshake,
    ServerInit,
    extended_key_event,
    set_encodings,
    update_request,
)
from tests.guest.keyboard.vnc_client import vnc_client

INIT = ServerInit(640, 480, bytes(16), b"guest")


class Server:
    """A VNC server that writes down what it gets, and says what it is told to."""

    def __init__(self) -> None:
        self.messages: asyncio.Queue[bytes] = asyncio.Queue()
        self.shared: list[bool] = []
        self.greeting = b""  # sent right behind ServerInit
        self.writer: asyncio.StreamWriter | None = None

    async def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        hello, messages = ServerHandshake(), ClientMessages()
        writer.write(hello.to_send())
        while not hello.done and (data := await reader.read(4096)):
            hello.receive(data)
            writer.write(hello.to_send())
        self.shared.append(hello.shared)
        writer.write(INIT.to_bytes() + self.greeting)
        data = hello.rest
        while True:
            messages.receive(data)
            while (message := messages.next_event()) is not None:
                self.messages.put_nowait(message.raw)
            data = await reader.read(4096)
            if not data:
                break
        self.messages.put_nowait(b"")
        writer.close()

    async def next(self) -> bytes:
        return await asyncio.wait_for(self.messages.get(), 10)


@contextlib.asynccontextmanager
async def both(folder: Path, layout: str = "ja") -> AsyncIterator[tuple[VncFront, Server, list[str]]]:
    server, faults = Server(), list[str]()
    listening = await asyncio.start_unix_server(server.accept, folder / "qemu.sock")
    front = VncFront(report=faults.append)
    await front.start("127.0.0.1:0", f"unix:{folder}/qemu.sock", layout)
    try:
        yield front, server, faults
    finally:
        await front.close()
        listening.close()


def run(work: Coroutine[object, object, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def key(name: str, down: bool, keysym: int = 0) -> bytes:
    return extended_key_event(down, keysym, by_name(name).vnc)


def test_what_is_no_key_passes_both_ways(tmp_path: Path) -> None:
    async def work() -> None:
        async with both(tmp_path) as (front, server, faults):
            server.greeting = b"at once"
            async with vnc_client(front.address) as client:
                assert client.init.to_bytes() == INIT.to_bytes()
                sent = [set_encodings([-258, 0]), update_request(0, 0, 9, 9, incremental=False)]
                sent.append(b"\x06\0\0\0" + struct.pack(">i", 3) + b"abc")
                client.writer.write(b"".join(sent))
                assert [await server.next() for _ in sent] == sent
                assert server.writer is not None
                picture = bytes(range(256)) * 4000
                server.writer.write(picture)
                assert await client.reader.readexactly(len(picture)) == picture
            assert await server.next() == b""
            assert server.shared == [True] and not faults

    run(work())


def test_keys_are_translated(tmp_path: Path) -> None:
    async def work() -> None:
        async with both(tmp_path) as (front, server, _), vnc_client(front.address) as client:
            await client.keysym(True, ord("@"))
            await client.keysym(False, ord("@"))
            assert [await server.next() for _ in "du"] == [
                key("bracket_left", True),
                key("bracket_left", False),
            ]
            await client.keysym(True, ord("_"))
            wanted = [key("shift", True), key("ro", True), key("ro", False), key("shift", False)]
            assert [await server.next() for _ in wanted] == wanted
            await client.extended(True, 0x3042, 0x76)  # LANG5, which QEMU drops
            assert await server.next() == key("grave_accent", True, 0x3042)
            await client.extended(True, 0xFF22, 0)  # a client without a number for this key
            assert await server.next() == key("muhenkan", True)
            await client.keysym(True, 0xFFB7)  # keypad keysyms go along: QEMU keeps Num Lock in step by them
            assert await server.next() == key("kp_7", True, 0xFFB7)

    run(work())


def test_a_client_that_leaves_lets_go_of_its_keys(tmp_path: Path) -> None:
    async def work() -> None:
        async with both(tmp_path) as (front, server, _):
            async with vnc_client(front.address) as client:
                await client.keysym(True, 0xFFE1)
                await client.keysym(True, ord("W"))
                assert [await server.next() for _ in "sw"] == [key("shift", True), key("w", True)]
            assert [await server.next() for _ in "ws"] == [key("w", False), key("shift", False)]
            assert await server.next() == b""

    run(work())


@pytest.mark.parametrize(
    "junk", [b"GET / HTTP/1.0\r\n\r\n", b"RFB 003.008\n\x09", b"RFB 003.008\n\x01\x01\x2a"]
)
def test_a_broken_client_harms_nobody_else(tmp_path: Path, junk: bytes) -> None:
    async def work() -> None:
        async with both(tmp_path) as (front, server, faults), vnc_client(front.address) as good:
            host, _, port = front.address.rpartition(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(junk)
            await reader.read()  # to the end: we are hung up on
            writer.close()
            assert len(faults) == 1 and "\n" not in faults[0]
            await good.keysym(True, ord("a"))
            while (got := await server.next()) != key("a", True):
                assert got == b""

    run(work())


def test_what_is_refused_at_the_start(tmp_path: Path) -> None:
    async def work() -> None:
        front = VncFront()
        upstream = f"unix:{tmp_path}/none.sock"
        with pytest.raises(
            UsageError, match=r"open to everybody, .*; listen on 127.0.0.1, and reach it through"
        ):
            await front.start("0.0.0.0:0", upstream, "ja")
        with pytest.raises(UsageError, match="no keyboard layout"):
            await front.start("127.0.0.1:0", upstream, "xx")
        for address in ("5900", ":5900", "host:x", "host:65536", "unix:", "host:²"):
            with pytest.raises(UsageError, match="no address"):
                await front.start(address, upstream, "ja")
        with pytest.raises(HostError, match="cannot listen: no such file or directory"):
            await front.start(f"unix:{tmp_path}/no/folder.sock", upstream, "ja")
        (tmp_path / "file").write_text("precious")
        with pytest.raises(HostError):
            await front.start(f"unix:{tmp_path}/file", upstream, "ja")
        assert (tmp_path / "file").read_text() == "precious"
        path = tmp_path / "front.sock"
        other = VncFront()
        await other.start(f"unix:{path}", upstream, "ja")
        for _ in range(2):  # the socket of a front that lives is not taken from it
            with pytest.raises(HostError, match=r"cannot listen: .*; is another server using it"):
                await front.start(f"unix:{path}", upstream, "ja")
            assert path.is_socket()
        await other.close()
        assert not path.exists()
        await other.start("127.0.0.1:0", upstream, "ja")
        with pytest.raises(HostError, match=r"cannot listen for VNC clients: .*; give another port"):
            await front.start(other.address, upstream, "ja")
        await other.close()
        await front.start("0.0.0.0:0", upstream, "ja", anyone=True)
        with pytest.raises(UsageError, match="listening already"):
            await front.start("127.0.0.1:0", upstream, "ja")
        await front.close()
        await front.close()

    run(work())


def test_no_server_behind(tmp_path: Path) -> None:
    async def work() -> None:
        faults: list[str] = []
        front = VncFront(report=faults.append)
        # A socket that a killed front left does not stop the next.
        for _ in range(2):
            await front.start(f"unix:{tmp_path}/front.sock", f"unix:{tmp_path}/none.sock", "ja")
            assert (tmp_path / "front.sock").stat().st_mode & 0o777 == 0o600
            with pytest.raises(AssertionError, match="hung up"):
                async with vnc_client(front.address):
                    pass
            assert front._server is not None
            front._server.close()
            front._server = None
        assert len(faults) == 2 and "cannot reach QEMU's VNC server" in faults[0]

    run(work())


def test_addresses() -> None:
    assert split_address("unix:/run/a:b") == ("/run/a:b", "", 0)
    assert split_address("localhost:5900") == ("", "localhost", 5900)
    assert split_address("[::1]:5901") == ("", "::1", 5901)
