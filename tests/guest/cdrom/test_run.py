"""A disc that `enban run` gives a guest is the disc, byte for byte; a host drive's too."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path
from typing import Any

import pytest

from enban.guest import Machine, Settings
from enban.storage import kernel
from tests.fake_drives import FakeDrive, FakeKernel, iso
from tests.guest.machines import ready, run, shell
from tests.support import needs_all

pytestmark = [pytest.mark.long, *needs_all("qemu-system-x86_64", "qemu-system-x86")]


@pytest.mark.parametrize("where", ["file", "drive"])
def test_the_disc_is_the_disc(
    tmp_path: Path, linux: dict[str, Any], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    disc = iso("SOMETHING", 1000 * 2048)
    path = str(tmp_path / "x.iso")
    Path(path).write_bytes(disc)
    if where == "drive":
        monkeypatch.setattr(kernel, "KERNEL", FakeKernel({"sr0": FakeDrive(), "sr1": FakeDrive(disc)}))
        path = "/dev/sr1"

    async def scenario() -> None:
        async with Machine(Settings(cdrom=path, **linux)) as machine:
            await ready(machine)
            told = (await shell(machine, "sha256sum < /dev/sr0")).split()[0]
            assert told == hashlib.sha256(disc).hexdigest()
            assert await shell(machine, "cat /sys/block/sr0/size") == str(len(disc) // 512)
            await machine.shutdown(60)

    run(scenario(), 240)


async def seen(machine: Machine, command: str, wanted: str) -> None:
    """The guest looks at its drive now and then."""
    found = ""
    for _ in range(40):
        found = await shell(machine, command, ok=False)
        if wanted in found:
            return
        await asyncio.sleep(0.5)
    raise AssertionError(f"{command}: {found}")


def test_a_disc_changed_in_the_host_drive_is_changed_in_the_guest(
    tmp_path: Path, linux: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From an empty drive through two discs and an empty one again to a file, which is not followed."""
    one, two = iso("ONE", 100 * 2048), iso("TWO", 300 * 2048, 9)
    hand = FakeDrive()
    fake = FakeKernel({"sr0": hand})
    monkeypatch.setattr(kernel, "KERNEL", fake)
    (tmp_path / "x.iso").write_bytes(iso("FILE", 50 * 2048, 11))
    log: list[str] = []

    def first(disc: bytes) -> str:
        return hashlib.sha256(disc[:2048]).hexdigest()

    async def scenario() -> None:
        async with Machine(Settings(cdrom="/dev/cdrom", **linux), log=log.append) as machine:
            await ready(machine)
            assert "No medium" in await shell(machine, "head -c 1 /dev/sr0", ok=False)
            hand.put(one)
            await seen(machine, "head -c 2048 /dev/sr0 | sha256sum", first(one))
            assert await shell(machine, "cat /sys/block/sr0/size") == str(len(one) // 512)
            hand.put(two)
            await seen(machine, "head -c 2048 /dev/sr0 | sha256sum", first(two))
            await seen(machine, "sha256sum < /dev/sr0", hashlib.sha256(two).hexdigest())
            hand.open_tray()
            await seen(machine, "head -c 1 /dev/sr0", "No medium")
            hand.put(one)
            await seen(machine, "head -c 2048 /dev/sr0 | sha256sum", first(one))
            await machine.insert_cdrom(str(tmp_path / "x.iso"))
            await asyncio.sleep(1.5)
            hand.put(two)  # that is nothing to the guest any more
            await asyncio.sleep(1.5)
            file = (tmp_path / "x.iso").read_bytes()
            await seen(machine, "head -c 2048 /dev/sr0 | sha256sum", first(file))
            await machine.eject_cdrom()
            await asyncio.sleep(1.5)
            assert "No medium" in await shell(machine, "head -c 1 /dev/sr0", ok=False)
            await machine.shutdown(60)

    run(scenario(), 280)
    assert log[0] == "/dev/sr0: no medium in the drive (no disc)"
    assert [line for line in log if line.startswith("/dev/sr0: ")][1:] == [
        "/dev/sr0: a disc was put in",
        "/dev/sr0: the disc was taken out",
        "/dev/sr0: a disc was put in",
        "/dev/sr0: the disc was taken out",
        "/dev/sr0: a disc was put in",
    ]
    assert not fake.opened
