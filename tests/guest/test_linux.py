"""Machines with a Linux guest. One boot in the default run; the others belong to the long suite."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.guest import Machine, Settings
from enban.guest.control import ask
from scripts.tiny_guest import CannotBuild, download
from tests.guest.machines import ready, run, shell
from tests.support import MIB, needs, needs_all, qemu_check

pytestmark = needs_all("qemu-system-x86_64", "qemu-system-x86")
FORMATS = ("raw", "qcow", "qcow2")


def file_system(path: Path, format: str, size: int = 48 * MIB, source: Path | None = None) -> Path:
    """A disk of a format with an ext4 file system, filled from a folder."""
    raw = path.with_suffix(".fs")
    with raw.open("wb") as file:
        file.truncate(size)
    words = ["mkfs.ext4", "-q", "-F", *(["-d", str(source)] if source else []), str(raw)]
    subprocess.run(words, check=True, timeout=120)
    enban.convert(raw, path, source_format="raw", target_format=format)
    raw.unlink()
    return path


def content(path: Path, format: str, folder: Path) -> Path:
    """The bytes of a disk, through our reader, as a file for e2fsprogs; its file system is sound."""
    raw = folder / f"{path.name}.read"
    with enban.open(path, format=format) as disk, raw.open("wb") as file:
        for offset in range(0, disk.size, MIB):
            file.write(disk.pread(min(MIB, disk.size - offset), offset))
    fsck = subprocess.run(["e2fsck", "-fn", raw], capture_output=True, text=True, timeout=120, check=False)
    assert fsck.returncode == 0, fsck.stdout
    return raw


def dump(raw: Path, name: str) -> bytes:
    out = raw.with_suffix(".dump")
    subprocess.run(["debugfs", "-R", f"dump {name} {out}", raw], check=True, capture_output=True, timeout=60)
    return out.read_bytes()


@needs("mkfs.ext4", "e2fsprogs")
def test_a_guest_writes_file_systems_on_every_format_sees_a_disc_and_a_larger_disk(
    tmp_path: Path, linux: dict[str, Any]
) -> None:
    """One guest, three disks: ext4, sync, states, resize, a disc that is changed, the power button."""
    disks = [file_system(tmp_path / f"disk.{format}", format) for format in FORMATS]
    enban.create(tmp_path / "state.qcow2", "qcow2", size=MIB)
    (tmp_path / "disc").write_bytes(b"disc one".ljust(4096))
    (tmp_path / "other").write_bytes(b"disc two".ljust(8192))

    async def scenario() -> list[str]:
        settings = Settings(
            disks=[str(disk) for disk in disks], cdrom=str(tmp_path / "disc"), snapshot=False, **linux
        )
        sums = []
        async with Machine(settings) as machine:
            await ready(machine)
            for letter in "abc":
                await shell(machine, f"mkdir /mnt/{letter} && mount /dev/vd{letter} /mnt/{letter}")
                await shell(machine, f"dd if=/dev/urandom of=/mnt/{letter}/data bs=64k count=64 2>/dev/null")
                await shell(machine, "sync; echo 3 > /proc/sys/vm/drop_caches")
                sums.append((await shell(machine, f"sha256sum < /mnt/{letter}/data")).split()[0])
            assert (await shell(machine, "head -c 8 /dev/sr0")) == "disc one"
            await machine.insert_cdrom(str(tmp_path / "other"))
            for _ in range(20):  # the guest looks at its drive now and then
                if "disc two" in await shell(machine, "head -c 8 /dev/sr0", ok=False):
                    break
            else:
                raise AssertionError("the guest does not see the new disc")
            await machine.eject_cdrom()
            await machine.resize_disk("disk2", 64 * MIB)
            assert await shell(machine, "cat /sys/block/vdc/size") == str(64 * MIB // 512)
            await machine.backup_disk("disk2", str(tmp_path / "backup.qcow2"))
            await machine.screenshot(str(tmp_path / "screen.png"))
            assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
            await machine.shutdown(60)
            assert await machine.wait() == 0
        return sums

    for disk, format, told in zip(disks, FORMATS, run(scenario(), 240), strict=True):
        raw = content(disk, format, tmp_path)
        assert hashlib.sha256(dump(raw, "/data")).hexdigest() == told
    qemu_check(disks[2])
    qemu_check(tmp_path / "backup.qcow2")
    backup = enban.open(tmp_path / "backup.qcow2")
    assert backup.size == 64 * MIB
    backup.close()


@pytest.mark.long
@needs("mkfs.ext4", "e2fsprogs")
def test_memory_and_files_come_back_together(tmp_path: Path, linux: dict[str, Any]) -> None:
    disk = file_system(tmp_path / "disk.qcow2", "qcow2")

    async def scenario() -> None:
        async with Machine(Settings(disks=[str(disk)], **linux)) as machine:
            await ready(machine)
            await shell(machine, "mount /dev/vda /mnt; count=0")
            steps = "count=$((count+1)); echo $count > /mnt/count; echo $count > /tmp/count"
            await shell(machine, steps)
            await machine.save("one")
            for _ in range(3):
                await shell(machine, steps)
            await shell(machine, "rm /mnt/count; dd if=/dev/urandom of=/mnt/junk bs=64k count=100; sync")
            await machine.save("four")
            for tag, number in (("one", "1"), ("four", "4"), ("one", "1")):
                await machine.load(tag)
                assert await shell(machine, "echo $count") == number
                assert await shell(machine, "cat /tmp/count") == number
                found = await shell(machine, "echo 3 > /proc/sys/vm/drop_caches; cat /mnt/count", ok=False)
                assert found == "1" if tag == "one" else "No such file" in found
            await shell(machine, "umount /mnt")
            await machine.shutdown(60)

    run(scenario())
    content(disk, "qcow2", tmp_path)
    qemu_check(disk)


@pytest.mark.long
@needs("mkfs.ext4", "e2fsprogs")
@pytest.mark.parametrize("victim", ["qemu", "enban"])
def test_synced_files_survive_a_kill_in_the_middle_of_writes(
    tmp_path: Path, linux: dict[str, Any], victim: str
) -> None:
    disk = file_system(tmp_path / "disk.qcow2", "qcow2", 128 * MIB)
    log = tmp_path / "serial"
    runner = subprocess.Popen(
        [
            *(sys.executable, "-m", "enban", "run", "--name", "victim", "--accel", "tcg", "-m", "256M"),
            *("--kernel", linux["kernel"], "--initrd", linux["initrd"], "--append", linux["append"]),
            str(disk),
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert runner.stdin is not None and runner.stdout is not None
    told: dict[str, str] = {}
    typed = False
    for line in iter(lambda: runner.stdout.readline() if runner.stdout else b"", b""):
        log.open("ab").write(line)
        if b"The guest is ready." in line and not typed:
            typed = True
            runner.stdin.write(
                b"mount /dev/vda /mnt; n=0; while true; do n=$((n+1)); "
                b"dd if=/dev/urandom of=/mnt/f$n bs=16k count=20 2>/dev/null; "
                b"sync; echo SY'NCED' f$n $(sha256sum < /mnt/f$n) .; done\n"
            )
            runner.stdin.flush()
        found = re.search(rb"SYNCED (f\d+) ([0-9a-f]{64})", line)
        if found:
            told[found[1].decode()] = found[2].decode()
            if len(told) >= 8:
                break
    qemu = int(ask("victim", "status")["qemu-pid"])
    os.kill(qemu if victim == "qemu" else runner.pid, signal.SIGKILL)
    runner.stdout.close()
    runner.stdin.close()
    runner.wait(60)
    for _ in range(100):
        if not Path(f"/proc/{qemu}").exists():
            break
        run(asyncio.sleep(0.1))
    result = enban.check(disk)
    assert not result.corruptions
    raw = tmp_path / "after.raw"
    with enban.open(disk, writable=True) as image, raw.open("wb") as file:
        for offset in range(0, image.size, MIB):
            file.write(image.pread(MIB, offset))
    # The guest's journal is played back, as a guest would at its next start.
    fsck = subprocess.run(["e2fsck", "-fy", raw], capture_output=True, text=True, timeout=120, check=False)
    assert fsck.returncode in (0, 1), fsck.stdout
    for name, digest in told.items():
        assert hashlib.sha256(dump(raw, f"/{name}")).hexdigest() == digest, name


@pytest.mark.long
@needs("mmdebstrap", "mmdebstrap")
@needs("mkfs.ext4", "e2fsprogs")
def test_a_debian_root_file_system_verifies_itself(tmp_path: Path, linux: dict[str, Any]) -> None:
    root = tmp_path / "root"
    made = subprocess.run(
        ["mmdebstrap", "--variant=essential", "--mode=root", "bookworm", root],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no Debian packages: {made.stderr[-300:]}")
    disk = file_system(tmp_path / "root.qcow2", "qcow2", 800 * MIB, root)
    shutil.rmtree(root)

    async def scenario() -> str:
        async with Machine(Settings(disks=[str(disk)], **linux)) as machine:
            await ready(machine)
            await shell(machine, "mount /dev/vda /mnt")
            packages = await shell(machine, "chroot /mnt dpkg -l | grep -c ^ii")
            assert int(packages) > 50
            found = await shell(machine, "chroot /mnt dpkg --verify", 240)
            await shell(machine, "umount /mnt")
            await machine.shutdown(60)
            return found

    assert run(scenario(), 500) == ""
    content(disk, "qcow2", tmp_path)


@pytest.mark.long
def test_a_bootable_disc_boots(tmp_path: Path) -> None:
    """The disc of memtest86+: it is read far beyond its boot sector, then its clock runs on the screen."""
    try:
        (package,) = download(tmp_path, "memtest86+")
    except CannotBuild as error:
        pytest.skip(str(error))
    subprocess.run(["dpkg-deb", "-x", package, tmp_path / "root"], check=True, timeout=60)
    disc = next((tmp_path / "root").rglob("memtest86+x64.iso"))

    async def scenario() -> None:
        settings = Settings(cdrom=str(disc), boot="d", memory=64 * MIB, accel="tcg")
        async with Machine(settings) as machine:
            ledger = machine.disk_set.cdrom.disk.door.ledger if machine.disk_set.cdrom else None
            assert ledger is not None
            before = b""
            async with asyncio.timeout(120):
                while True:
                    await asyncio.sleep(2)
                    await machine.screenshot(str(tmp_path / "screen.png"))
                    now = (tmp_path / "screen.png").read_bytes()
                    if ledger.done > 100 and now != before and before:
                        break  # it runs: its clock and its progress change the picture
                    before = now

    run(scenario(), 150)
