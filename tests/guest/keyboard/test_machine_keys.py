"""The keyboard of a machine that `enban run` runs: `ctl NAME type`, `ctl NAME keys`, and its VNC front."""

from __future__ import annotations

import asyncio
from pathlib import Path

from enban.guest import Machine, Settings
from enban.guest.control import ControlServer
from tests.cli.command import enban, refused
from tests.guest.keyboard.boot_guest import boot_sector
from tests.guest.keyboard.vnc_client import vnc_client
from tests.guest.machines import run
from tests.support import needs_qemu_system


async def arrived(machine: Machine, codes: str) -> None:
    await machine.console.wait_for(codes.encode() + b" ", 20)


@needs_qemu_system
def test_keys_of_a_running_machine(tmp_path: Path) -> None:
    disk = tmp_path / "boot.raw"
    disk.write_bytes(boot_sector().ljust(1 << 20, b"\0"))
    settings = Settings(
        disks=[str(disk)],
        memory=16 << 20,
        accel="tcg",
        name="keys",
        display="vnc",
        vnc="127.0.0.1:0",
        layout="ja",
    )

    async def scenario() -> None:
        lines: list[str] = []
        async with Machine(settings, log=lines.append) as machine:
            control = ControlServer(machine)
            await control.start()
            await machine.console.wait_for(b"R", 30)
            await asyncio.to_thread(enban, "ctl", "keys", "type", "a\\")
            await arrived(machine, "1e 9e 73 f3")
            await asyncio.to_thread(enban, "ctl", "keys", "type", "-k", "en-us", "\\")
            await arrived(machine, "2b ab")
            await asyncio.to_thread(enban, "ctl", "keys", "keys", "ctrl-alt-delete", "henkan")
            await arrived(machine, "1d 38 e0 53 e0 d3 b8 9d 79 f9")
            said = await asyncio.to_thread(refused, "ctl", "keys", "type", "aé")
            assert "layout ja cannot type 'é'" in said and "nothing was typed" in said
            said = await asyncio.to_thread(refused, "ctl", "keys", "keys", "x", "ctrl-nokey")
            assert "there is no key 'nokey'; `enban keys show --all` lists them" in said
            said = await asyncio.to_thread(refused, "ctl", "keys", "keys")
            assert said == "enban: keys takes KEYS...; see: enban ctl --help"
            before = len(machine.console.text)  # of x nothing was pressed
            await asyncio.gather(machine.type_text("aaaaaaaa"), machine.type_text("bbbbbbbb"))
            await machine.press("esc f12")
            await arrived(machine, "01 81 58 d8")
            assert bytes(machine.console.text[before:]).decode() in (
                f"{8 * first}{8 * second}01 81 58 d8 "  # never mixed
                for first, second in (("1e 9e ", "30 b0 "), ("30 b0 ", "1e 9e "))
            )
            await machine.pause()
            said = await asyncio.to_thread(refused, "ctl", "keys", "type", "ab")
            assert said.startswith("enban: the guest takes no keys: it does not run; 0 of 2 characters were")
            assert "is it paused? let it go on (`enban ctl NAME resume`" in said
            await machine.resume()
            (address,) = [line.removeprefix("VNC: ") for line in lines if line.startswith("VNC: ")]
            async with vnc_client(address) as client:
                await client.keysym(True, ord("@"))
                await client.keysym(False, ord("@"))
                await arrived(machine, "1a 9a")
            await control.close()
            await machine.kill()

    run(scenario(), 60)
