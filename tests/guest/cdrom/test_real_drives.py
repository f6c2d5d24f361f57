"""Real drives: enban's own Python inside a guest with three of them, discs changed from outside by QMP.

What only a kernel and a drive can tell: which sizes are stale, what a read meets when the disc is
gone, whether a change is noticed between two reads, and that eject really opens the tray.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import QMPClient

from scripts.tiny_guest import CACHE, CannotBuild, download, fetch, initramfs
from tests.fake_drives import BOGUS_SIZE, iso
from tests.support import needs_qemu_system

AGENT = Path(__file__).with_name("agent.py")
SOURCE = Path(__file__).parents[3] / "src"
PACKAGES = (
    "python3.11-minimal",
    "libpython3.11-minimal",
    "libpython3.11-stdlib",
    "libc6",
    "libgcc-s1",  # a thread that ends with its process needs it
    "libexpat1",
    "zlib1g",
    "libffi8",
    "libssl3",
)
INIT = r"""#!/bin/busybox sh
export PATH=/bin:/usr/bin HOME=/ PYTHONDONTWRITEBYTECODE=1
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for module in @modules@; do insmod /modules/$module.ko || echo "no module $module"; done
echo 0 > /proc/sys/kernel/printk
stty -echo
/usr/bin/python3.11 -S /enban/agent.py
poweroff -f
"""
ONE, TWO, THREE = (
    iso(name, sectors * 2048, seed)
    for name, sectors, seed in (("DISC_ONE", 300, 1), ("DISC_TWO", 500, 5), ("DISC_THREE", 120, 7))
)


def python_files() -> dict[str, tuple[int, bytes]]:
    """Debian's Python without its tests, and enban, as files of an initramfs. Raises CannotBuild."""
    root = CACHE / "python-2"  # a new name when PACKAGES change
    if not (root / "complete").exists():
        work = CACHE / "making-python"
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        for package in download(work, *PACKAGES):
            subprocess.run(["dpkg-deb", "-x", package, work / "root"], check=True, timeout=120)
        (work / "root" / "complete").touch()
        shutil.rmtree(root, ignore_errors=True)
        (work / "root").rename(root)
        shutil.rmtree(work)
    files: dict[str, tuple[int, bytes]] = {}
    left_out = re.compile(
        r"share/|/test/|__pycache__|gconv|idlelib|lib2to3|tkinter|pydoc_data|ensurepip|engines"
    )
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if left_out.search(name) or path.is_dir():
            continue
        if path.is_symlink():
            files[name] = (0o120777, str(path.readlink()).encode())
        else:
            files[name] = (0o100755 if path.stat().st_mode & 0o100 else 0o100644, path.read_bytes())
    for path in sorted(SOURCE.rglob("*.py")):
        files[f"enban/src/{path.relative_to(SOURCE)}"] = (0o100644, path.read_bytes())
    files["enban/agent.py"] = (0o100644, AGENT.read_bytes())
    folders: dict[str, tuple[int, bytes]] = {}
    for name in files:
        for parent in reversed(Path(name).parents[:-1]):
            folders.setdefault(str(parent), (0o040755, b""))
    return folders | files


class Guest:
    """A guest with the drives cd0, cd1 and cd2 (sr0, sr1, sr2 inside), its agent and its monitor."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.monitor = QMPClient("test")

    async def start(self) -> None:
        guest = fetch()
        (self.folder / "initrd").write_bytes(initramfs(guest, INIT, python_files()))
        words = ["qemu-system-x86_64", "-accel", "tcg", "-m", "512", "-display", "none", "-nodefaults"]
        words += ["-no-reboot", "-serial", "stdio", "-qmp", f"unix:{self.folder}/qmp,server=on,wait=off"]
        words += ["-kernel", str(guest / "kernel"), "-initrd", str(self.folder / "initrd")]
        words += ["-append", "console=ttyS0 quiet loglevel=1 panic=-1"]
        for number, place in enumerate(("ide.0,unit=0", "ide.0,unit=1", "ide.1,unit=0")):
            words += ["-device", f"ide-cd,id=cd{number},bus={place}"]
        self.process = await asyncio.create_subprocess_exec(
            *words, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 20
        )
        self.shown = ""
        await self._until("AGENT ")
        await self.monitor.connect(str(self.folder / "qmp"))

    async def _until(self, start: str) -> str:
        assert self.process.stdout is not None
        while True:
            line = (await self.process.stdout.readline()).decode(errors="replace")
            assert line, f"the guest ended: {self.shown[-2000:]}"
            self.shown += line
            if line.startswith(start):
                return line.removeprefix(start)

    async def ask(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        answer: dict[str, Any] = json.loads(await self._until("ANSWER "))
        return answer

    async def enban(self, *words: str, code: int = 0) -> str:
        """Run a command in the guest; what it printed, or with a `code` its complaint."""
        done = await self.ask(enban=list(words))
        assert done["code"] == code, done
        return str(done["err"] if code else done["out"])

    async def put(self, drive: int, disc: bytes) -> None:
        """Open the tray from outside, change the disc, close the tray."""
        path = self.folder / f"disc{drive}-{hashlib.md5(disc).hexdigest()}.iso"
        path.write_bytes(disc)
        arguments = {"id": f"cd{drive}", "filename": str(path), "format": "raw", "force": True}
        await self.monitor.execute("blockdev-change-medium", arguments)

    async def take(self, drive: int) -> None:
        await self.monitor.execute("eject", {"id": f"cd{drive}", "force": True})

    async def tray_is_open(self, drive: int) -> bool:
        found: Any = await self.monitor.execute("query-block")
        (one,) = [device for device in found if device["qdev"].endswith(f"cd{drive}")]
        return bool(one["tray_open"])

    async def stop(self) -> None:
        await self.monitor.disconnect()
        if self.process.returncode is None:
            self.process.kill()
        await self.process.wait()


def sha(disc: bytes) -> dict[str, Any]:
    return {"size": len(disc), "sha256": hashlib.sha256(disc).hexdigest()}


@pytest.mark.long
@needs_qemu_system
def test_three_drives(tmp_path: Path) -> None:
    async def scenario() -> None:
        guest = Guest(tmp_path)
        try:
            async with asyncio.timeout(240):
                await guest.start()
                await everything(guest)
        finally:
            await guest.stop()

    try:
        asyncio.run(scenario())
    except CannotBuild as error:
        pytest.skip(str(error))


async def everything(guest: Guest) -> None:
    # Three drives that never had a disc: their sizes are not believed.
    listed = json.loads(await guest.enban("cdrom", "list", "--output=json"))
    assert [(one["device"], one["state"]) for one in listed] == [
        ("/dev/sr0", "no disc"),
        ("/dev/sr1", "no disc"),
        ("/dev/sr2", "no disc"),
    ]
    assert listed[0]["model"] == "QEMU QEMU DVD-ROM" and "size" not in listed[0]
    assert "no medium in the drive (no disc)" in await guest.enban("info", "/dev/sr0", code=1)
    assert "no medium in the drive" in await guest.enban("cdrom", "read", "/tmp/x.iso", code=1)
    assert BOGUS_SIZE > 0

    # Discs come: first drive and first with a disc differ, /dev/cdrom is missing here.
    await guest.put(1, ONE)
    await guest.put(2, TWO)
    listed = json.loads(await guest.enban("cdrom", "list", "--output=json"))
    assert [one.get("volume") for one in listed] == [None, "DISC_ONE", "DISC_TWO"]
    assert [one.get("size") for one in listed] == [None, len(ONE), len(TWO)]
    assert [one.get("lead-out") for one in listed] == [None, len(ONE), len(TWO)]
    assert [(one["first"], one["first-with-disc"]) for one in listed] == [
        (True, False),
        (False, True),
        (False, False),
    ]
    assert "volume: DISC_ONE" in await guest.enban("cdrom", "info")
    assert "/dev/sr0: no medium in the drive (no disc)" in await guest.enban("info", "/dev/cdrom", code=1)
    assert await guest.ask(sha256="/dev/sr1") == sha(ONE)
    assert await guest.ask(sha256="/dev/sr2") == sha(TWO)
    assert f"{len(ONE)} bytes read" in await guest.enban("cdrom", "read", "/tmp/one.iso")
    assert await guest.ask(sha256="/tmp/one.iso") == sha(ONE)
    await guest.enban("convert", "-O", "qcow2", "/dev/sr2", "/tmp/two.qcow2")
    assert "identical" in await guest.enban("compare", "-f", "raw", "/dev/sr2", "/tmp/two.qcow2")

    # Taken out and changed while a disk is open.
    assert await guest.ask(open="/dev/sr1") == {"size": len(ONE)}
    assert (await guest.ask(read=[40_000, 16]))["hex"] == ONE[40_000:40_016].hex()
    assert await guest.ask(changed=1) == {"changed": False}
    await guest.take(1)
    await asyncio.sleep(0.6)
    gone = await guest.ask(read=[100_000, 16])
    assert gone["error"] == "NoMediumError" and "no medium in the drive (tray open)" in gone["text"]
    assert "no medium" in await guest.enban("info", "/dev/sr1", code=1)  # although the size is still there
    await guest.put(1, THREE)
    other = await guest.ask(read=[0, 16])
    assert other["error"] == "HostError" and "the disc was changed" in other["text"]
    assert await guest.ask(adopt=1) == {"size": len(THREE)}
    assert (await guest.ask(read=[40_000, 16]))["hex"] == THREE[40_000:40_016].hex()
    await guest.put(1, TWO)  # between two reads, nobody looked meanwhile
    await asyncio.sleep(0.6)
    other = await guest.ask(read=[40_000, 16])
    assert other.get("error") == "HostError" and "the disc was changed" in other["text"], other
    assert await guest.ask(adopt=1) == {"size": len(TWO)}
    assert (await guest.ask(read=[len(TWO) - 16, 16]))["hex"] == TWO[-16:].hex()
    await guest.ask(close=1)

    # The tray: opened, closed and locked from inside, seen from outside.
    assert await guest.enban("cdrom", "eject", "/dev/sr1") == "/dev/sr1: ejected\n"
    assert await guest.tray_is_open(1)
    assert "state: tray open" in await guest.enban("cdrom", "info", "/dev/sr1")
    assert await guest.enban("cdrom", "close", "/dev/sr1") == "/dev/sr1: disc\n"
    assert not await guest.tray_is_open(1)
    assert await guest.ask(open="/dev/sr1") == {"size": len(TWO)}
    assert (await guest.ask(read=[0, 16]))["hex"] == TWO[:16].hex()
    assert await guest.ask(claim="/dev/sr1") == {}  # as a mounted file system does
    assert "mounted or locked" in await guest.enban("cdrom", "eject", "/dev/sr1", code=1)
    assert not await guest.tray_is_open(1)
    assert await guest.ask(release=1) == {}
    await guest.enban("cdrom", "eject", "/dev/sr1")  # who only reads does not keep it
    assert (await guest.ask(read=[200_000, 16]))["error"] == "NoMediumError"
    await guest.ask(close=1)
    assert await guest.enban("cdrom", "close", "/dev/sr1") == "/dev/sr1: disc\n"
    assert await guest.enban("cdrom", "lock", "/dev/sr1") == "/dev/sr1: locked\n"
    assert "mounted or locked" in await guest.enban("cdrom", "eject", "/dev/sr1", code=1)
    await guest.enban("cdrom", "unlock", "/dev/sr1")
    await guest.enban("cdrom", "eject", "/dev/sr1")
    assert await guest.tray_is_open(1)

    # Served over NBD inside the guest: whoever connects after a change sees the new disc.
    uri = (await guest.ask(start=["serve", "-q", "-r", "-k", "/tmp/nbd", "/dev/sr2"]))["line"]
    assert await guest.ask(sha256=uri) == sha(TWO)
    assert await guest.ask(open=uri) == {"size": len(TWO)}
    await guest.put(2, ONE)
    for _ in range(40):
        found = await guest.ask(sha256=uri)
        if found == sha(ONE):
            break
        await asyncio.sleep(0.25)
    else:
        raise AssertionError(f"the export still shows the old disc: {found}")
    lost = await guest.ask(read=[0, 16])
    assert f"{len(TWO)} bytes before, {len(ONE)} now" in lost.get("text", ""), lost
    assert await guest.ask(stop=1) == {"code": 0}, guest.shown[-3000:]
