"""Text typed on the console of a busy Linux guest arrives exact, with the maps of Debian."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from enban.guest.keyboard import Pacer, layout, send_strokes, text_strokes
from enban.guest.keyboard.layouts import keysym_number
from enban.guest.vnc import VncFront
from tests.guest.keyboard.console_guest import MAPS, ConsoleGuest, console_guest
from tests.guest.keyboard.vnc_client import vnc_client
from tests.support import needs_qemu_system

ASCII = "".join(map(chr, range(0x20, 0x7F)))


async def type_rounds(guest: ConsoleGuest, rounds: int) -> None:
    """Every printable ASCII character, `rounds` times, on every map, while two loops keep the guest's
    processor."""
    pacer = await Pacer.find(guest.qmp)
    await guest.command("load")
    for name, (chosen, _) in MAPS.items():
        await guest.command(f"map {name}")
        for number in range(rounds):
            await send_strokes(guest.qmp, text_strokes(ASCII, chosen), pacer=pacer)
            got = await guest.typed(len(ASCII))
            assert got == ASCII.encode(), (name, number)


async def type_keysyms(guest: ConsoleGuest, folder: Path, host: str) -> None:
    """A keysym-only client on a host with another layout, with its Shift and AltGr, in front of a Japanese
    guest."""
    pacer = await Pacer.find(guest.qmp)
    front = VncFront(settle=pacer.settle)
    await front.start(f"unix:{folder}/front.sock", f"unix:{guest.vnc}", "ja")
    await guest.command("map jp106")
    modifiers = ((1, keysym_number("Shift_L")), (2, keysym_number("ISO_Level3_Shift")))
    async with vnc_client(front.address) as client:
        for character in ASCII:
            key, level = layout(host).ways[character].presses[-1]
            held = [keysym for bit, keysym in modifiers if level & bit]
            for keysym in held:
                await client.keysym(True, keysym)
            await client.keysym(True, ord(character))
            for keysym in held:  # people let go of Shift first
                await client.keysym(False, keysym)
            plain = layout(host).levels[key][0]
            await client.keysym(False, keysym_number(plain))
        got = await guest.typed(len(ASCII))
        assert got == ASCII.encode(), host
    await front.close()


def run(folder: Path, rounds: int, hosts: list[str]) -> None:
    async def work() -> None:
        async with console_guest(folder) as guest:
            for host in hosts:
                await type_keysyms(guest, folder, host)
            await type_rounds(guest, rounds)

    asyncio.run(work())


@needs_qemu_system
def test_ascii_arrives_exact_under_load(tmp_path: Path) -> None:
    run(tmp_path, 1, ["ja", "de"])


@pytest.mark.long
@needs_qemu_system
def test_ascii_arrives_exact_twenty_times(tmp_path: Path) -> None:
    run(tmp_path, 20, ["ja", "en-us", "en-gb", "de", "fr", "es", "sv"])
