"""A real VNC client on a real X server (TigerVNC in Xvfb, keys hit with xdotool) in front of our front.

TigerVNC reads the X keycode and sends extended key events: the guest gets the key that was hit, whatever
layout the host has.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from enban.guest.keyboard import from_x
from enban.guest.keyboard.keys import by_name
from enban.guest.vnc import VncFront
from tests.guest.keyboard.boot_guest import boot_guest, scancodes
from tests.support import needs, needs_qemu_system

# Not F8, which is TigerVNC's menu, nor Escape: its keycode is one digit, which xdotool takes for that
# character.
NAMES = [
    "1",
    "0",
    "minus",
    "equal",
    "q",
    "p",
    "bracket_left",
    "bracket_right",
    "a",
    "semicolon",
    "apostrophe",
    "backslash",
    "z",
    "slash",
    "spc",
    "tab",
    "ret",
    "grave_accent",
    "yen",
    "ro",
    "henkan",
    "muhenkan",
    "katakanahiragana",
    "hiragana",
    "f1",
    "f12",
    "up",
    "left",
    "pgup",
    "delete",
    "kp_enter",
    "ctrl_r",
    "alt_r",
    "meta_l",
    "compose",
]


async def tool(*words: str, display: str) -> str:
    """Run a program on the display; its output."""
    process = await asyncio.create_subprocess_exec(
        *words,
        env={**os.environ, "DISPLAY": display},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    async with asyncio.timeout(20):
        return (await process.communicate())[0].decode()


@contextlib.asynccontextmanager
async def x_server() -> AsyncIterator[str]:
    """Xvfb on a display of its own choice."""
    reading, writing = os.pipe()
    words = [
        "Xvfb",
        "-displayfd",
        str(writing),
        "-screen",
        "0",
        "1024x768x24",
        "-nolisten",
        "tcp",
        "-noreset",
    ]
    process = await asyncio.create_subprocess_exec(
        *words, pass_fds=[writing], stderr=asyncio.subprocess.DEVNULL
    )
    os.close(writing)
    try:
        number = await asyncio.to_thread(os.read, reading, 16)
        assert number, "Xvfb did not start"
        yield f":{number.decode().strip()}"
    finally:
        os.close(reading)
        process.kill()
        await process.wait()


@contextlib.asynccontextmanager
async def viewer(address: str, display: str) -> AsyncIterator[None]:
    """TigerVNC showing the guest, with the keyboard."""
    process = await asyncio.create_subprocess_exec(
        "xtigervncviewer",
        address.replace(":", "::"),
        "-SecurityTypes",
        "None",
        env={**os.environ, "DISPLAY": display},
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        found = (await tool("xdotool", "search", "--sync", "--name", "QEMU", display=display)).split()
        await tool("xdotool", "windowfocus", "--sync", found[-1], display=display)
        yield
    finally:
        process.kill()
        await process.wait()


@pytest.mark.long
@needs("xtigervncviewer", "tigervnc-viewer")
@needs("Xvfb", "xvfb")
@needs("xdotool", "xdotool")
@needs("setxkbmap", "x11-xkb-utils")
@needs_qemu_system
@pytest.mark.parametrize("host", [("jp106", "jp"), ("pc105", "us")])
def test_keys_hit_on_an_x_host(tmp_path: Path, host: tuple[str, str]) -> None:
    async def work() -> None:
        front = VncFront()
        async with boot_guest(tmp_path) as guest, x_server() as display:
            await front.start("127.0.0.1:0", f"unix:{guest.vnc}", "ja")
            await tool("setxkbmap", "-model", host[0], "-layout", host[1], display=display)
            async with viewer(front.address, display):
                # The first key shows when the viewer listens.
                while not await guest.read(2, timeout_s=1):
                    await tool("xdotool", "key", "38", display=display)
                await tool("xdotool", "key", "96", display=display)  # F12: the last of these
                await guest.until(b"\x58\xd8")
                for name in NAMES:
                    key = by_name(name)
                    assert key.x is not None and from_x(key.x) is key
                    await tool("xdotool", "key", str(key.x), display=display)
                    wanted = scancodes(key, True) + scancodes(key, False)
                    got = await guest.read(len(wanted))
                    assert got == wanted, (name, got.hex(" "))
            await front.close()

    asyncio.run(asyncio.wait_for(work(), 120))
