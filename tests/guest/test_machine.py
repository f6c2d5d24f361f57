"""Machines with a guest of one sector: disks on every bus, states, what is refused, who dies first."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import enban
from enban.errors import EnbanError, HostError, LockedError, NoSpaceError, PeerError, UsageError
from enban.guest import Machine, Settings, program, states
from enban.guest.disks import GuestDisk
from enban.guest.places import Place, name_for, running
from tests.cli.command import refused
from tests.guest.machines import boot_disk, count, run
from tests.support import MIB, needs_qemu_system, qemu_check

SMALL = 16 * MIB


def settings(*disks: Path, **more: object) -> Settings:
    found = Settings(disks=[str(disk) for disk in disks], memory=SMALL, accel="tcg")
    for name, value in more.items():
        setattr(found, name, value)
    return found


@needs_qemu_system
@pytest.mark.parametrize(
    ("format", "bus", "size"),
    [
        ("raw", "ide", MIB),
        ("qcow", "sata", MIB),
        ("qcow2", "virtio", MIB),
        # Less than a cylinder, as the BIOS counts by itself.
        ("raw", "virtio", 1024),
        ("raw", "sata", 1024),
    ],
    ids=str,
)
def test_a_guest_starts_from_each_format_on_each_bus(
    tmp_path: Path, format: str, bus: str, size: int
) -> None:
    disk = boot_disk(tmp_path / "boot", format, size)

    async def scenario() -> int:
        async with Machine(settings(disk, bus=bus)) as machine:
            await count(machine)
            number = await count(machine)
            await machine.kill()
            assert await machine.wait() == 0
            return number

    number = run(scenario(), 60)
    with enban.open(disk, format=format) as image:
        kept = int.from_bytes(image.pread(2, 512), "little")
    assert kept >= number >= 2
    assert not running()


@needs_qemu_system
@pytest.mark.parametrize("bus", ["virtio", "ide"])
def test_a_guest_sees_whole_sectors_alone(tmp_path: Path, bus: str) -> None:
    """QEMU would round up, and report a write to the last sector as a full file system."""
    disk, said = boot_disk(tmp_path / "boot", "raw"), list[str]()
    with disk.open("ab") as file:
        file.write(b"tail")

    async def scenario() -> None:
        async with Machine(settings(disk, bus=bus, paused=True), log=said.append) as machine:
            nodes = await machine.execute("query-named-block-nodes")
            seen = {node["node-name"]: node["image"]["virtual-size"] for node in nodes}
            assert seen["disk0"] == MIB

    run(scenario(), 60)
    assert "the guest sees 2048 whole sectors, not the 4 bytes after them" in said[0]
    assert disk.read_bytes().endswith(b"tail")


@needs_qemu_system
def test_states_bring_back_memory_and_every_disk(tmp_path: Path) -> None:
    disk, second = boot_disk(tmp_path / "boot.qcow2", "qcow2"), tmp_path / "second.qcow2"
    enban.create(second, "qcow2", size=MIB)

    async def scenario() -> None:
        async with Machine(settings(disk, second)) as machine:
            await count(machine)
            machine.disks[1].disk.pwrite(b"one", 0)
            state = await machine.save("one")
            assert state.complete and state.vm_state_size > 100_000
            first = await count(machine)
            while await count(machine) < first + 3:
                pass
            machine.disks[1].disk.pwrite(b"two", 0)
            await machine.save("2")  # a tag that looks like the id of another snapshot
            later = await count(machine)
            with pytest.raises(UsageError, match="already"):
                await machine.save("one")
            with pytest.raises(UsageError, match="no state 'three'"):
                await machine.load("three")
            for bad in ("", "enban-undo", "two\nlines", "x" * 70_000):
                with pytest.raises(UsageError, match="cannot be the tag") as refused:
                    await machine.save(bad)
                assert len(str(refused.value)) < 300 and "\n" not in str(refused.value)

            await machine.load("one")
            assert first <= await count(machine) <= first + 2
            assert machine.disks[1].disk.pread(3, 0) == b"one"
            await machine.load("2")
            assert later <= await count(machine) <= later + 2
            assert machine.disks[1].disk.pread(3, 0) == b"two"
            assert [one.tag for one in await machine.states()] == ["one", "2"]

            await machine.pause()
            await machine.save("paused")
            await machine.save("paused again")
            await machine.load("one")
            assert await machine.status() == "paused"
            await machine.resume()
            assert first <= await count(machine) <= first + 2
            await machine.delete_state("one")
            with pytest.raises(UsageError, match="no state"):
                await machine.delete_state("one")

    run(scenario(), 120)
    for path in (disk, second):
        qemu_check(path)

    async def again() -> None:
        """A machine can begin with a state that an earlier one saved."""
        async with Machine(settings(disk, second, load="2")) as machine:
            assert await count(machine) >= 5
            assert machine.vm_clock_ns > 10**9
            assert machine.disks[1].disk.pread(3, 0) == b"two"

    run(again(), 60)


@needs_qemu_system
def test_a_state_that_is_not_taken_costs_nothing(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2")

    async def save() -> None:
        async with Machine(settings(disk, memory=20 * MIB)) as machine:
            await count(machine)
            await machine.save("larger")

    async def load() -> None:
        said: list[str] = []
        async with Machine(settings(disk), log=said.append) as machine:
            while (before := await count(machine)) < 4:
                pass
            with pytest.raises(PeerError, match="goes on as it was"):
                await machine.load("larger")
            assert before <= await count(machine) <= before + 3
            assert [one.tag for one in await machine.states()] == ["larger"]
            await machine.save("fits")
            await machine.load("fits")
            await count(machine)

    run(save(), 60)
    run(load(), 90)
    qemu_check(disk)


@needs_qemu_system
def test_a_full_disk_while_saving_leaves_the_guest_and_older_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2")

    async def scenario() -> None:
        async with Machine(settings(disk)) as machine:
            await count(machine)
            await machine.save("old")

            def full(data: bytes, offset: int) -> int:
                raise NoSpaceError("cannot write: no space left", path=str(disk))

            with monkeypatch.context() as patch:
                patch.setattr(
                    "enban.block.disk.Disk.write_vm_state", lambda self, data, offset: full(data, offset)
                )
                with pytest.raises(NoSpaceError):
                    await machine.save("new")
            await count(machine)
            assert [one.tag for one in await machine.states()] == ["old"]
            await machine.load("old")
            await count(machine)

    run(scenario(), 60)
    qemu_check(disk)


@needs_qemu_system
def test_a_load_that_was_cut_short_is_undone(tmp_path: Path) -> None:
    """All the moments between the steps of a load, as a crash leaves them."""
    first, second = tmp_path / "a.qcow2", tmp_path / "b.qcow2"

    def disks() -> list[GuestDisk]:
        return [
            GuestDisk(f"disk{n}", enban.open(path, writable=True), "virtio")
            for n, path in enumerate((first, second))
        ]

    for moment in range(6):
        for path in (first, second):
            path.unlink(missing_ok=True)
            enban.create(path, "qcow2", size=MIB)
        members = disks()
        for one in members:
            one.disk.pwrite(b"old", 0)
        states.keep(members, "tag", 0)
        for one in members:
            one.disk.pwrite(b"now", 0)
        loaded = False
        if moment == 0:  # UNDO is on the second disk only: `keep` does the keeper last
            states.keep(members[1:], states.UNDO, 0)
        else:
            states.keep(members, states.UNDO, 0)
        if moment >= 2:
            states.go_to(members[:1], "tag")
        if moment >= 3:
            states.go_to(members[1:], "tag")
        if moment >= 4:
            states.forget(members[:1], states.UNDO)
            loaded = True
        if moment >= 5:
            states.forget(members[1:], states.UNDO)
        for one in members:
            one.disk.close()

        members = disks()
        assert states.recover(members) is (1 <= moment <= 3)
        for one in members:
            assert one.disk.pread(3, 0) == (b"old" if loaded else b"now"), moment
            assert [entry.name for entry in one.disk.snapshots] == ["tag"]
            one.disk.close()


def test_what_a_crash_leaves_of_a_save_is_shown_and_deleted(tmp_path: Path) -> None:
    members = []
    for number in range(2):
        enban.create(tmp_path / f"{number}.qcow2", "qcow2", size=MIB)
        members.append(
            GuestDisk(f"disk{number}", enban.open(tmp_path / f"{number}.qcow2", writable=True), "virtio")
        )
    states.keep(members[1:], "half", 0)
    (found,) = states.list_states(members)
    assert found.tag == "half" and not found.complete
    with pytest.raises(UsageError, match="no state 'half'"):
        states.check_whole(members, "half")
    with pytest.raises(UsageError, match="already"):
        states.check_free(members, "half")
    assert states.forget(members, "half")
    assert not states.list_states(members)
    for one in members:
        one.disk.close()


@needs_qemu_system
@pytest.mark.parametrize("victim", ["qemu", "enban"])
def test_whoever_is_killed_what_was_written_and_flushed_is_there(tmp_path: Path, victim: str) -> None:
    """The sector guest's disk is written through (IDE without flushes would not be): its count goes on."""
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2")
    runner = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "enban",
            "run",
            "--name",
            "victim",
            "-t",
            "writethrough",
            "--accel",
            "tcg",
            "-m",
            "16M",
            str(disk),
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert runner.stdout is not None
    told = 0
    for line in runner.stdout:
        if line.startswith(b"memory ") and line.endswith(b"\r\n"):
            told = int(line.split()[3])
            if told >= 4:
                break
    from enban.guest.control import ask

    qemu = ask("victim", "status")["qemu-pid"]
    os.kill(qemu if victim == "qemu" else runner.pid, signal.SIGKILL)
    runner.stdout.close()
    assert runner.wait(30) == (1 if victim == "qemu" else -signal.SIGKILL)
    assert runner.stderr is not None
    if victim == "qemu":
        assert b"SIGKILL" in runner.stderr.read()
    else:
        for _ in range(100):  # QEMU is told by the kernel that we are gone
            if not Path(f"/proc/{qemu}").exists():
                break
            run(asyncio.sleep(0.1))
        else:
            raise AssertionError("QEMU outlived enban")
    runner.stderr.close()
    with enban.open(disk) as image:
        assert int.from_bytes(image.pread(2, 512), "little") >= told
    assert not enban.check(disk).corruptions


@needs_qemu_system
def test_disks_that_vanish_and_disks_that_are_kept(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "boot.raw", "raw")
    before = disk.read_bytes()

    async def scenario(commit: bool) -> None:
        async with Machine(settings(disk, snapshot=True)) as machine:
            await count(machine)
            if commit:
                assert await machine.commit() > 0
                assert await machine.status() == "running"
            await machine.save("even of a raw disk")
            await count(machine)
            await machine.load("even of a raw disk")
            await count(machine)

    run(scenario(False), 60)
    assert disk.read_bytes() == before
    run(scenario(True), 60)
    assert int.from_bytes(disk.read_bytes()[512:514], "little") >= 1


# -- what is refused, in one line ------------------------------------------------------------


def fake_qemu(folder: Path, text: str) -> str:
    path = folder / "qemu"
    path.write_text(f"#!/bin/sh\necho '{text}'\n")
    path.chmod(0o755)
    return str(path)


def test_a_missing_or_old_qemu_is_named_with_its_package(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not installed; install the Debian package qemu-system-x86"):
        program.find_qemu(str(tmp_path / "nothing"))
    with pytest.raises(UsageError, match=r"QEMU 6\.2, too old; install qemu-system-x86 7\.2 or newer"):
        program.find_qemu(fake_qemu(tmp_path, "QEMU emulator version 6.2.0 (Debian)"))
    assert program.find_qemu(fake_qemu(tmp_path, "QEMU emulator version 10.1.2"))
    with pytest.raises(UsageError, match="does not say"):
        program.find_qemu(fake_qemu(tmp_path, "hello"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"accel": "magic"}, "accelerator"),
        ({"memory": 5}, "no memory"),
        ({"cpus": 0}, "processors"),
        ({"append": "x"}, "needs a kernel"),
        ({"layout": "klingon"}, "no keyboard layout 'klingon'"),
        ({"display": "vnc", "extra": ("-k", "ja")}, "with a -k of its own QEMU ignores the keys"),
        ({"bus": "floppy"}, "no bus"),
        ({"disks": ["x"] * 4, "bus": "ide"}, "3 disks fit"),
    ],
)
def test_settings_no_machine_can_have(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Machine(settings(**wrong))


def test_an_address_for_a_display_that_there_is_not() -> None:
    for words in ((), ("--display", "gtk")):
        said = refused("run", *words, "--vnc", "127.0.0.1:0", "disk.raw")
        assert said.endswith("--vnc is where a VNC display listens, and there is none; give --display vnc")


@needs_qemu_system
def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "boot.raw", "raw")

    async def start(wanted: Settings) -> None:
        async with Machine(wanted):
            pass

    with pytest.raises(HostError, match="no such file"):
        run(start(settings(disk, tmp_path / "none.raw")))
    with pytest.raises(PeerError, match=r"QEMU does not start: .*no-such-option"):
        run(start(settings(disk, extra=("-no-such-option",))))
    with pytest.raises(UsageError, match=r"raw image has no snapshots"):
        run(start(settings(disk, load="x")))
    assert not running()
    with enban.open(disk, writable=True):
        pass  # no lock is left


def test_two_machines_do_not_share_a_name() -> None:
    place = Place("one")
    assert running() == ["one"]
    with pytest.raises(LockedError, match="'one' runs already"):
        Place("one")
    place.release()
    assert not running()
    for name in ("", "../x", "a/b", "x" * 33, ".hidden"):
        with pytest.raises(UsageError):
            Place(name)
    assert name_for("/images/My disk (1).qcow2") == "My-disk-1-"
    assert name_for("") == "guest"


def test_a_folder_others_can_enter_is_refused(runtime: str) -> None:
    os.mkdir(os.path.join(runtime, "enban"), 0o755)
    os.chmod(os.path.join(runtime, "enban"), 0o755)
    with pytest.raises(EnbanError, match="not private"):
        Place("one")


@needs_qemu_system
def test_a_guest_runs_whether_or_not_kvm_does(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2")
    said: list[str] = []

    async def scenario() -> str:
        async with Machine(settings(disk, accel="auto"), log=said.append) as machine:
            await count(machine)
            return machine.accel

    accel = run(scenario(), 60)
    assert accel == "kvm" or (accel == "tcg" and any(line.startswith("no KVM here (") for line in said))


@needs_qemu_system
def test_a_full_file_system_pauses_the_guest_until_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2")
    said: list[str] = []
    full = True

    async def scenario() -> None:
        nonlocal full
        async with Machine(settings(disk), log=said.append) as machine:
            door = machine.disks[0].disk.door
            before = await count(machine)

            async def refuse(*args: object, **more: object) -> None:
                raise NoSpaceError("cannot write: no space left", path=str(disk))

            node = door.node
            with monkeypatch.context() as patch:
                # As a full file system does it: nothing is written, on no road.
                patch.setattr(type(node), "locate_write", lambda *args: -1)
                patch.setattr(type(node), "claim", lambda *args: None)
                patch.setattr(type(node), "reserve", refuse)
                for _ in range(200):
                    if any("paused" in line for line in said):
                        break
                    await asyncio.sleep(0.05)
                assert await machine.status() == "io-error"
            await machine.resume()
            assert await count(machine) >= before

    run(scenario(), 60)
    assert any("Make room" in line for line in said)
    qemu_check(disk)


@needs_qemu_system
def test_backups_of_a_running_guest_follow_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2", 4 * MIB)
    full, second, third = (tmp_path / f"{name}.qcow2" for name in ("full", "second", "third"))

    def number(path: Path) -> int:
        with enban.open(path) as image:
            return int.from_bytes(image.pread(2, 512), "little")

    async def scenario() -> None:
        async with Machine(settings(disk)) as machine:
            first = await count(machine)
            with pytest.raises(UsageError, match="no enabled bitmap"):
                await machine.backup_disk("disk0", str(second), bitmap="daily", base=str(full))
            assert (await machine.backup_disk("disk0", str(full), bitmap="daily")).full
            later = await count(machine)
            assert first <= number(full) <= later
            machine.disks[0].disk.pwrite(b"changed", 3 * MIB)

            def fail(*args: object, **more: object) -> None:
                raise NoSpaceError("cannot write: no space left", path=str(second))

            with monkeypatch.context() as patch:
                patch.setattr("enban.guest.backup.copy_changes", fail)
                with pytest.raises(NoSpaceError):
                    await machine.backup_disk("disk0", str(second), bitmap="daily", base=str(full))
            result = await machine.backup_disk("disk0", str(second), bitmap="daily", base=str(full))
            assert not result.full and result.copied <= 3 * 65536
            while await count(machine) < later + 3:
                pass
            await machine.backup_disk("disk0", str(third), bitmap="daily", base=str(second))
            assert not machine.disks[0].disk.snapshots
            assert [info.name for info in machine.disks[0].disk.bitmaps()] == ["daily"]

    run(scenario(), 60)
    assert number(full) < number(third)
    with enban.open(third) as image, enban.open(full) as before:
        assert image.pread(7, 3 * MIB) == b"changed"
        assert before.pread(7, 3 * MIB) == bytes(7)
    qemu_check(disk)
