"""A disc that `enban run` gives a guest is the disc, byte for byte; a host drive's too."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enban.guest import Machine, Settings
from enban.storage import kernel
from tests.fake_drives import FakeDrive, FakeKernel, iso
from tests.guest.machines import linux, private_runtime, ready, run, shell

__all__ = ["linux"]  # a fixture

pytestmark = [
    pytest.mark.interop,
    pytest.mark.long,
    pytest.mark.skipif(
        shutil.which("qemu-system-x86_64") is None,
        reason="qemu-system-x86_64 is missing (package qemu-system-x86)",
    ),
]


@pytest.fixture(autouse=True)
def runtime() -> Iterator[str]:
    with private_runtime() as folder:
        yield folder


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
