"""Guests whose disks are on the bus vhost: QEMU shares the guest's memory with us."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.errors import NoSpaceError, PeerError, UsageError
from enban.extent import DATA
from enban.guest import Machine, Settings
from tests.cli.command import refused
from tests.guest.machines import boot_disk, count, ready, run, shell
from tests.guest.test_linux import content, dump, file_system
from tests.support import MIB, needs, needs_all, qemu_check

pytestmark = needs_all("qemu-system-x86_64", "qemu-system-x86")


def settings(disk: Path, **more: Any) -> Settings:
    return Settings(disks=[str(disk)], memory=16 * MIB, accel="tcg", **{"bus": "vhost", **more})


def test_everything_a_machine_offers_works_on_vhost(tmp_path: Path) -> None:
    """The guest of one sector, which counts in memory and on the disk; both must always agree."""
    boot_disk(tmp_path / "base.qcow2", "qcow2")
    disk = tmp_path / "disk.qcow2"
    enban.create(disk, "qcow2", {"backing_file": "base.qcow2", "backing_fmt": "qcow2"})

    async def scenario() -> None:
        async with Machine(settings(disk)) as machine:
            assert await count(machine) >= 1
            await machine.pause()
            done = machine.disks[0].disk.door.ledger.done
            await asyncio.sleep(0.3)
            assert machine.disks[0].disk.door.ledger.done == done  # nothing is taken while it is paused
            await machine.resume()
            await machine.pull_disk("disk0")
            await machine.save("one")
            saved = await count(machine)
            while await count(machine) < saved + 6:
                pass
            await machine.save("two")
            await machine.load("one")
            assert await count(machine) <= saved + 3
            await machine.load("two")
            assert await count(machine) >= saved + 6
            assert [state.tag for state in await machine.states()] == ["one", "two"]
            await machine.backup_disk("disk0", str(tmp_path / "backup.qcow2"), bitmap="changes")
            await machine.backup_disk(
                "disk0", str(tmp_path / "next.qcow2"), bitmap="changes", base=str(tmp_path / "backup.qcow2")
            )
            await machine.snapshot_disk("disk0", "alone")
            await machine.delete_state("one")
            await machine.resize_disk("disk0", 2 * MIB)
            await machine.reset()
            assert await count(machine) <= 5
            machine.kill_now()
            assert await machine.wait() != 0
        async with Machine(settings(disk, load="two")) as machine:
            assert await count(machine) >= saved + 6

    run(scenario(), 120)
    assert not enban.image_info(str(disk))[0].get("backing-filename")
    for name in ("base", "disk", "backup", "next"):
        qemu_check(tmp_path / f"{name}.qcow2")


def test_writes_of_a_temporary_guest_vanish_or_are_committed(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "disk.raw", "raw")

    async def scenario() -> int:
        async with Machine(settings(disk, snapshot=True)) as machine:
            await count(machine)
            assert disk.read_bytes() == before
            assert await machine.commit() > 0
            committed = int.from_bytes(disk.read_bytes()[512:514], "little")
            assert await count(machine) >= committed > 0
        return committed

    before = disk.read_bytes()
    committed = run(scenario(), 60)
    assert int.from_bytes(disk.read_bytes()[512:514], "little") == committed


def test_a_state_of_other_devices_is_refused_and_the_machine_goes_on(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "disk.qcow2", "qcow2")

    async def scenario() -> None:
        async with Machine(settings(disk, bus="virtio")) as machine:
            await count(machine)
            await machine.save("other")
        async with Machine(settings(disk)) as machine:
            before = await count(machine)
            with pytest.raises(PeerError, match="goes on as it was"):
                await machine.load("other")
            assert await count(machine) >= before
            with pytest.raises(UsageError, match="cannot shrink"):
                await machine.resize_disk("disk0", MIB // 2)

    run(scenario(), 90)
    qemu_check(disk)


def test_a_guest_that_runs_moves_to_another_qemu(tmp_path: Path) -> None:
    """A live migration: while it runs, QEMU asks which pages of the guest's memory we write."""
    disk = boot_disk(tmp_path / "disk.qcow2", "qcow2")
    stream = tmp_path / "stream"

    async def scenario() -> None:
        async with Machine(settings(disk)) as machine:
            before = await count(machine)
            await machine.execute("migrate-set-parameters", {"max-bandwidth": 8 << 20})
            await machine.execute("migrate", {"uri": f"exec:cat > {stream}"})
            for _ in range(300):
                found = await machine.execute("query-migrate")
                if found["status"] not in ("setup", "active", "device"):
                    break
                await asyncio.sleep(0.1)
            assert found["status"] == "completed", found
        async with Machine(settings(disk, extra=("-incoming", f"exec:cat {stream}"))) as machine:
            assert await count(machine) > before

    run(scenario(), 90)
    qemu_check(disk)


def test_a_qemu_of_ones_own_has_a_disk_that_is_served(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "disk.qcow2", "qcow2")
    socket = tmp_path / "socket"
    server = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "enban",
            "serve",
            "--vhost-user",
            socket,
            "--pid-file",
            tmp_path / "pid",
            disk,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert server.stdout is not None
    assert server.stdout.readline() == f"{socket}\n"
    assert (tmp_path / "pid").read_text() == f"{server.pid}\n"
    seen = []
    for _ in range(2):  # a second QEMU goes on where the first one ended
        machine = subprocess.Popen(
            [
                *(
                    "qemu-system-x86_64",
                    "-accel",
                    "tcg",
                    "-nodefaults",
                    "-display",
                    "none",
                    "-serial",
                    "stdio",
                ),
                *(
                    "-object",
                    "memory-backend-memfd,id=m,size=16M,share=on",
                    "-machine",
                    "pc,memory-backend=m",
                ),
                *("-m", "16M", "-chardev", f"socket,id=c,path={socket}"),
                *("-device", "vhost-user-blk-pci,chardev=c,num-queues=1,bootindex=1"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
        )
        assert machine.stdout is not None
        for line in machine.stdout:
            if found := re.match(rb"memory (\d+) disk (\d+)", line):
                assert found[1] == found[2]
                seen.append(int(found[1]))
                if seen[-1] >= 3:
                    break
        machine.kill()
        machine.wait(20)
        machine.stdout.close()
    assert seen == [1, 2, 3, 1, 2, 3]
    server.send_signal(signal.SIGUSR1)
    time.sleep(0.3)
    server.terminate()
    _, said = server.communicate(timeout=20)
    assert server.returncode == 0 and "requests begun" in said, said
    assert not socket.exists() and not (tmp_path / "pid").exists()
    with enban.open(disk) as image:
        assert int.from_bytes(image.pread(2, 512), "little") >= 3
    qemu_check(disk)


def test_flags_of_nbd_are_refused_for_vhost_user(tmp_path: Path) -> None:
    enban.create(tmp_path / "disk", "raw", size=MIB)
    common = ("serve", "--vhost-user", tmp_path / "socket")
    assert "-k does not go with" in refused(*common, "-k", tmp_path / "other", tmp_path / "disk")
    assert "for a single disk" in refused(*common, tmp_path / "disk", tmp_path / "disk")
    assert "no such file" in refused(*common, tmp_path / "none")
    assert not (tmp_path / "socket").exists()


@needs("mkfs.ext4", "e2fsprogs")
def test_linux_writes_a_file_system_starts_again_and_sees_a_larger_disk(
    tmp_path: Path, linux: dict[str, Any]
) -> None:
    disk = file_system(tmp_path / "disk.qcow2", "qcow2")

    async def scenario() -> str:
        async with Machine(Settings(disks=[str(disk)], bus="vhost", cpus=2, **linux)) as machine:
            await ready(machine)
            assert (await shell(machine, "ls /sys/block/vda/mq | wc -l")) == "2"
            await shell(machine, "mount -o discard /dev/vda /mnt")
            await shell(machine, "dd if=/dev/urandom of=/mnt/data bs=64k count=128 2>/dev/null")
            await shell(machine, "dd if=/dev/urandom of=/mnt/gone bs=64k count=128 2>/dev/null; sync")
            told = (await shell(machine, "sha256sum < /mnt/data")).split()[0]
            used = _used(machine)
            await shell(machine, "rm /mnt/gone; sync; fstrim /mnt; umount /mnt")
            assert _used(machine) < used - 6 * MIB
            await machine.resize_disk("disk0", 64 * MIB)
            await _size(machine, 64 * MIB)
            await machine.pause()
            await machine.resize_disk("disk0", 80 * MIB)
            await machine.resume()
            await _size(machine, 80 * MIB)
            await machine.console.write(b"reboot -f\n")
            await ready(machine)
            await shell(machine, "mount /dev/vda /mnt; echo 3 > /proc/sys/vm/drop_caches")
            assert (await shell(machine, "sha256sum < /mnt/data")).split()[0] == told
            await shell(machine, "umount /mnt")
            await machine.shutdown(60)
            assert await machine.wait() == 0
        return told

    told = run(scenario(), 240)
    raw = content(disk, "qcow2", tmp_path)
    assert hashlib.sha256(dump(raw, "/data")).hexdigest() == told
    qemu_check(disk)


def _used(machine: Machine) -> int:
    return sum(extent.length for extent in machine.disks[0].disk.map() if extent.kind == DATA)


async def _size(machine: Machine, size: int) -> None:
    for _ in range(50):
        if await shell(machine, "cat /sys/block/vda/size") == str(size // 512):
            return
        await asyncio.sleep(0.1)
    raise AssertionError("the guest does not see the new size")


@pytest.mark.long
@needs("mkfs.ext4", "e2fsprogs")
def test_synced_files_survive_the_death_of_qemu(tmp_path: Path, linux: dict[str, Any]) -> None:
    disk = file_system(tmp_path / "disk.qcow2", "qcow2", 128 * MIB)
    told: dict[str, str] = {}

    async def scenario() -> None:
        async with Machine(Settings(disks=[str(disk)], bus="vhost", **linux)) as machine:
            await ready(machine)
            await machine.console.write(
                b"mount /dev/vda /mnt; n=0; while true; do n=$((n+1)); "
                b"dd if=/dev/urandom of=/mnt/f$n bs=16k count=20 2>/dev/null; "
                b"sync; echo SY'NCED' f$n $(sha256sum < /mnt/f$n) .; done\n"
            )
            while len(told) < 8:
                found = await machine.console.wait_for(rb"SYNCED (f\d+) ([0-9a-f]{64})", 60)
                told[found[1].decode()] = found[2].decode()
            machine.kill_now()
            assert await machine.wait() != 0

    run(scenario(), 240)
    assert not enban.check(disk).corruptions
    raw = tmp_path / "after.raw"
    with enban.open(disk) as image, raw.open("wb") as file:
        for offset in range(0, image.size, MIB):
            file.write(image.pread(MIB, offset))
    fsck = subprocess.run(["e2fsck", "-fy", raw], capture_output=True, text=True, timeout=120, check=False)
    assert fsck.returncode in (0, 1), fsck.stdout
    for name, digest in told.items():
        assert hashlib.sha256(dump(raw, f"/{name}")).hexdigest() == digest, name
    qemu_check(disk)


@pytest.mark.long
@needs("mkfs.ext4", "e2fsprogs")
def test_a_full_file_system_pauses_the_guest_until_there_is_room(
    tmp_path: Path, linux: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No write is lost and none fails: the one that found no room is done after `resume`."""
    disk = file_system(tmp_path / "disk.qcow2", "qcow2", 64 * MIB)
    lines: list[str] = []

    async def scenario() -> str:
        async with Machine(Settings(disks=[str(disk)], bus="vhost", **linux), log=lines.append) as machine:
            await ready(machine)
            await shell(machine, "mount /dev/vda /mnt")

            async def full(*_: Any) -> Any:
                raise NoSpaceError("cannot write: no space left", path=str(disk))

            with monkeypatch.context() as patch:
                node = type(machine.disks[0].disk.door.node)
                patch.setattr(node, "reserve", full)
                patch.setattr(node, "claim", lambda *_: None)
                await machine.console.write(
                    b"dd if=/dev/urandom of=/mnt/data bs=64k count=200; sync; echo WRI'TTEN'\n"
                )
                for _ in range(600):
                    if await machine.status() == "paused":
                        break
                    await asyncio.sleep(0.1)
            await machine.resume()
            await machine.console.wait_for(rb"WRITTEN", 120)
            told = (await shell(machine, "dmesg | grep -c 'I/O error'; sha256sum < /mnt/data")).split()
            assert told[0] == "0"
            await shell(machine, "umount /mnt")
            await machine.shutdown(60)
            return told[1]

    told = run(scenario(), 240)
    assert any("the guest is paused" in line for line in lines)
    assert hashlib.sha256(dump(content(disk, "qcow2", tmp_path), "/data")).hexdigest() == told
    qemu_check(disk)
