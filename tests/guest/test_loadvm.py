"""Whole-machine states and QEMU's own `savevm` and `-loadvm`: each reads what the other has written."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enban.guest import Machine, Settings
from enban.guest.control import ask
from tests.guest.machines import boot_disk, count, run
from tests.support import MIB, needs_qemu_system, qemu_check

TAG = "ours"


def direct(words: list[str], disk: Path, serial: Path) -> list[str]:
    """The command line of a machine's QEMU, changed to open the disk itself, without us."""
    found = []
    for place, word in enumerate(words):
        before = words[place - 1] if place else ""
        if before == "-blockdev" and json.loads(word)["driver"] == "nbd":
            node = json.loads(word)["node-name"]
            word = json.dumps(
                {"driver": "file", "node-name": node, "filename": str(disk), "discard": "unmap"}
            )
        elif before == "-blockdev":
            word = json.dumps({**json.loads(word), "driver": "qcow2"})
        elif word.startswith("socket,id=monitor"):
            word = "stdio,id=monitor"
        elif word.startswith("socket,id=console"):
            word = f"file,id=console,path={serial}"
        elif before == "-mon":
            word = "chardev=monitor,mode=readline"
        if word != "-S":
            found.append(word)
    return found


def cmdline(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]


@contextmanager
def qemu(words: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def counts(serial: Path, least: int, timeout_s: float = 30) -> list[int]:
    """The numbers in a serial log once there are so many."""
    for _ in range(round(timeout_s / 0.05)):
        lines = serial.read_bytes().split(b"\r\n") if serial.exists() else []
        found = [line.split() for line in lines[:-1] if line.startswith(b"memory ")]
        if len(found) >= least:
            assert all(words[1] == words[3] for words in found)
            return [int(words[1]) for words in found]
        time.sleep(0.05)
    raise AssertionError(f"{least} numbers were expected on the serial line: {serial.read_bytes()[-300:]!r}")


@needs_qemu_system
def test_loadvm_reads_our_state_and_we_read_that_of_savevm(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "boot.qcow2", "qcow2")
    wanted = Settings(disks=[str(disk)], memory=16 * MIB, accel="tcg")
    words: list[str] = []

    async def ours() -> int:
        async with Machine(wanted) as machine:
            words.extend(cmdline(machine.pid))
            while await count(machine) < 3:
                pass
            await machine.save(TAG)
            number = await count(machine)
            while await count(machine) < number + 4:
                pass
            return number

    saved = run(ours(), 60)
    qemu_check(disk)

    serial = tmp_path / "serial"
    with qemu([*direct(words, disk, serial), "-loadvm", TAG]) as process:
        assert process.stdin is not None
        found = counts(serial, 3)
        assert saved - 1 <= found[0] <= saved, "QEMU goes on where the state was saved"
        process.stdin.write("savevm theirs\nquit\n")
        process.stdin.flush()
        process.wait(30)
        theirs = counts(serial, 1)[-1]
    qemu_check(disk)

    async def again() -> None:
        async with Machine(wanted) as machine:
            await machine.load("theirs")
            assert theirs <= await count(machine) <= theirs + 2
            await machine.load(TAG)
            assert await count(machine) <= saved + 1
            assert {one.tag for one in await machine.states() if one.complete} == {TAG, "theirs"}

    run(again(), 60)
    with pytest.raises(Exception, match="no machine"):
        ask("boot", "status")
