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
            (address,) = [line.removeprefix("VNC: ") for line in lines if line.startswith("VNC: ")]
            async with vnc_client(address) as client:
                await client.keysym(True, ord("@"))
                await client.keysym(False, ord("@"))
                await arrived(machine, "1a 9a")
            await control.close()
            await machine.kill()

    run(scenario(), 60)
