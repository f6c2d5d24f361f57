"""A disc that QEMU does not take leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from enban.errors import PeerError
from enban.guest import Machine, Settings
from enban.guest.command import DRIVE
from tests.guest.machines import boot_disk, run
from tests.support import needs_qemu_system


@needs_qemu_system
def test_a_disc_that_cannot_be_inserted_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU refuses at any of the steps, and the guest closes the tray: the drive is empty, and the disc can
    be tried again."""
    disk, disc = boot_disk(tmp_path / "boot", "raw"), tmp_path / "x.iso"
    disc.write_bytes(bytes(64 << 10))

    async def scenario() -> None:
        async with Machine(Settings(disks=[str(disk)], memory=16 << 20, accel="tcg")) as machine:
            execute = machine.execute

            async def nodes() -> list[str]:
                found: list[dict[str, str]] = await execute("query-named-block-nodes", {"flat": True})
                return [one["node-name"] for one in found if one["node-name"].startswith("cdrom")]

            for step in ("blockdev-add", "blockdev-insert-medium", "blockdev-close-tray"):

                async def refusing(command: str, arguments: Any = None, step: str = step) -> Any:
                    if command == step:
                        await execute("blockdev-close-tray", {"id": DRIVE})  # as a guest may, meanwhile
                        raise PeerError(f"QEMU refuses {command}")
                    return await execute(command, arguments)

                monkeypatch.setattr(machine, "execute", refusing)
                with pytest.raises(PeerError, match=f"refuses {step}"):
                    await machine.insert_cdrom(str(disc))
                monkeypatch.setattr(machine, "execute", execute)
                assert await nodes() == []
                assert [one for one in machine.disk_set.exports if one.startswith("cdrom")] == []
                await machine.insert_cdrom(str(disc))
                assert len(await nodes()) == 2
                await machine.eject_cdrom()
            await machine.kill()

    run(scenario(), 60)
