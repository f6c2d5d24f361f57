"""`enban run` and `enban ctl` as a user has them, with the guest of one sector."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import signal
import socket
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import enban
from enban.errors import EnbanError
from enban.guest import Machine, Settings, control, places
from tests.cli.command import command, environment, refused
from tests.cli.command import enban as run
from tests.guest.machines import boot_disk
from tests.support import MIB, needs_qemu_system, qemu_check


def enban_(*words: str | Path, code: int = 0) -> str:
    """Run the command; what it printed, or with another exit code what it complained of in one line."""
    return run(*words).out if code == 0 else refused(*words, code=code) + "\n"


def small(*words: str | Path) -> list[str]:
    return ["run", "--accel", "tcg", "-m", "16M", *map(str, words)]


@contextmanager
def background(*words: str | Path) -> Iterator[str]:
    name = enban_(*small("--detach", *words)).strip()
    try:
        yield name
    finally:
        with contextlib.suppress(EnbanError):  # it may be ending already
            control.ask(name, "shutdown", force=True)
        for _ in range(100):
            if name not in places.running():
                break
            time.sleep(0.05)


def number(log: Path) -> int:
    """The guest's present number, from its serial log."""
    size = log.stat().st_size
    for _ in range(400):
        lines = log.read_bytes()[size:].split(b"\r\n")[1:-1]
        if lines:
            words = lines[-1].split()
            assert words[1] == words[3]
            return int(words[1])
        time.sleep(0.05)
    raise AssertionError("the guest says nothing")


@needs_qemu_system
def test_every_request_by_name(tmp_path: Path) -> None:
    base = boot_disk(tmp_path / "base.qcow2", "qcow2")
    disk, log = tmp_path / "guest.qcow2", tmp_path / "serial"
    enban.create(disk, "qcow2", {"backing_file": "base.qcow2", "backing_fmt": "qcow2"})
    (tmp_path / "disc.iso").write_bytes(bytes(4096))
    with background("--serial", f"file:{log}", disk) as name:
        assert name == "guest"
        number(log)
        assert "guest: running, tcg, ran for" in enban_("ctl", name, "status")
        facts = json.loads(enban_("ctl", name, "status", "--output", "json"))
        assert facts["memory"] == 16 * MIB and facts["accel"] == "tcg"
        assert f"disk0  {disk} (qcow2, virtio, 1 MiB)\ncdrom  empty\n" == enban_("ctl", name, "disks")

        enban_("ctl", name, "pause")
        assert "paused" in enban_("ctl", name, "status")
        enban_("ctl", name, "resume")
        enban_("ctl", name, "snapshot", "save", "clean")
        saved = number(log)
        while number(log) < saved + 3:
            pass
        assert "clean " in enban_("ctl", name, "snapshot", "list")
        enban_("ctl", name, "snapshot", "load", "clean")
        assert number(log) <= saved + 2
        assert "no state 'other'" in enban_("ctl", name, "snapshot", "load", "other", code=1)
        enban_("ctl", name, "snapshot", "delete", "clean")
        assert enban_("ctl", name, "snapshot", "list") == ""

        enban_("ctl", name, "cdrom", "insert", tmp_path / "disc.iso")
        assert "disc.iso" in enban_("ctl", name, "disks")
        enban_("ctl", name, "cdrom", "eject")
        assert "no such file" in enban_("ctl", name, "cdrom", "insert", tmp_path / "none.iso", code=1)
        enban_("ctl", name, "screenshot", tmp_path / "screen.png")
        assert (tmp_path / "screen.png").read_bytes().startswith(b"\x89PNG")
        enban_("ctl", name, "keys", "ctrl-alt-f1")
        enban_("ctl", name, "type", "hello")
        enban_("ctl", name, "type", "-k", "ja", "C:\\dir")
        assert "'é'" in enban_("ctl", name, "type", "-k", "ja", "café", code=1)
        assert "klingon" in enban_("ctl", name, "type", "-k", "klingon", "x", code=1)
        assert "no such" in enban_("ctl", name, "screenshot", tmp_path / "no" / "screen.png", code=1)

        enban_("ctl", name, "disk", "resize", "disk0", "2M")
        assert "2 MiB" in enban_("ctl", name, "disks")
        assert "cannot shrink" in enban_("ctl", name, "disk", "resize", "disk0", "1M", code=1)
        enban_("ctl", name, "disk", "pull", "guest.qcow2")
        enban_("ctl", name, "disk", "snapshot", "0", "alone")
        assert "alone" in enban_("ctl", name, "snapshot", "list")
        assert "without the machine's memory" in enban_("ctl", name, "snapshot", "load", "alone", code=1)
        assert "has no disk 'disk7'" in enban_("ctl", name, "disk", "pull", "disk7", code=1)
        assert "run it with --snapshot" in enban_("ctl", name, "commit", code=1)
        enban_("ctl", name, "reset")
        assert number(log) >= 1
        assert "takes TAG" in enban_("ctl", name, "snapshot", "save", code=1)
        assert "keys takes KEYS..." in enban_("ctl", name, "keys", code=1)
        assert "does not know 'dance'" in enban_("ctl", name, "dance", code=1)
        assert "these do: guest" in enban_("ctl", "nobody", "status", code=1)
        assert "'guest' runs already" in enban_(*small("--name", "guest", base), code=1)
        enban_("ctl", name, "shutdown", "--force")
    assert "start one with" in enban_("ctl", "guest", "status", code=1)
    assert not enban.image_info(str(disk))[0].get("backing-filename")
    for path in (base, disk):
        qemu_check(path)


@needs_qemu_system
def test_writes_vanish_or_are_committed(tmp_path: Path) -> None:
    disk, log = boot_disk(tmp_path / "guest.qcow2", "qcow2"), tmp_path / "serial"
    before = disk.read_bytes()
    with background("--snapshot", "--serial", f"file:{log}", disk) as name:
        assert number(log) > 0
        assert "vanish" in enban_("ctl", name, "status")
    assert disk.read_bytes() == before
    with background("--snapshot", "--serial", f"file:{log}", disk) as name:
        told = number(log)
        assert "written into the images" in enban_("ctl", name, "commit")
    with enban.open(disk) as image:
        assert int.from_bytes(image.pread(2, 512), "little") >= told


@needs_qemu_system
def test_the_console_comes_out_and_a_signal_ends_the_guest(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "guest.qcow2", "qcow2")
    runner = subprocess.Popen(
        command(*small("--grace", "1", disk)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert runner.stdout is not None and runner.stderr is not None
    for line in runner.stdout:
        if line.startswith(b"memory 2 disk 2"):
            break
    runner.send_signal(signal.SIGTERM)
    _, complaint = runner.communicate(timeout=30)
    assert runner.returncode == 0
    assert b"has not shut down within 1 s: ending QEMU" in complaint  # it knows no power button
    qemu_check(disk)

    runner = subprocess.Popen(
        command(*small("--grace", "600", disk)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert runner.stdout is not None
    for line in runner.stdout:
        if line.startswith(b"memory 2 disk 2"):
            break
    runner.send_signal(signal.SIGINT)
    time.sleep(0.5)
    runner.send_signal(signal.SIGINT)  # the second does not wait
    runner.communicate(timeout=30)
    assert runner.returncode == 0
    qemu_check(disk)


@needs_qemu_system
def test_a_start_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "guest.qcow2", "qcow2")
    complaint = enban_(*small("--qemu", "/nowhere/qemu", disk), code=1)
    assert complaint.count("\n") == 1 and "Debian package qemu-system-x86" in complaint
    complaint = enban_(*small("--detach", tmp_path / "none.qcow2"), code=1)
    assert complaint.count("\n") == 1 and "does not start" in complaint and "no such file" in complaint
    with enban.open(disk, writable=True):
        assert "another process is using the image" in enban_(*small(disk), code=1)
    complaint = enban_(*small(disk, "--", "-bogus"), code=1)
    assert complaint.count("\n") == 1 and "bogus" in complaint


def test_what_is_no_request_gets_an_answer() -> None:
    """The control server on its own: junk, and requests with wrong arguments."""
    import asyncio

    machine = Machine(Settings())
    machine.place = place = places.Place("stub")

    async def scenario() -> list[bytes]:
        server = control.ControlServer(machine)
        await server.start()
        answers = []
        for junk in (
            b"\xff\n",
            b"[]\n",
            b'{"do": "nothing"}\n',
            b'{"do": "snapshot-load"}\n',
            b"x" * (control.MOST_LINE + 64),
        ):
            reader, writer = await asyncio.open_unix_connection(place.file(places.CONTROL))
            writer.write(junk)
            answers.append(await reader.readline())
            writer.close()
        await server.close()
        return answers

    for answer in asyncio.run(scenario()):
        assert "error" in json.loads(answer)
    place.release()
    with socket.socket(socket.AF_UNIX) as sock, pytest.raises(OSError):
        sock.connect(place.file(places.CONTROL))


@needs_qemu_system
def test_in_a_terminal_keys_go_to_the_guest_and_the_escape_ends_it(tmp_path: Path) -> None:
    disk = boot_disk(tmp_path / "guest.qcow2", "qcow2")
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(ours)

    def take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    runner = subprocess.Popen(
        command(*small("--grace", "1", disk)),
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    said = b""

    def until(words: bytes) -> None:
        nonlocal said
        while words not in said:
            said += os.read(ours, 4096)

    until(b"memory 2 disk 2\r\n")
    assert not termios.tcgetattr(ours)[3] & (termios.ECHO | termios.ICANON | termios.ISIG)  # raw
    os.write(ours, b"x\x03")  # to the guest, Ctrl-C too
    until(b"memory 4 disk 4\r\n")
    os.write(ours, b"\x1d")
    until(b"has not shut down within 1 s: ending QEMU")
    assert runner.wait(30) == 0
    assert termios.tcgetattr(ours) == before
    os.close(ours)
    os.close(theirs)
    qemu_check(disk)


@pytest.mark.long
@needs_qemu_system
@pytest.mark.parametrize("victim", ["enban", "qemu"])
def test_killed_in_the_middle_of_a_save_or_a_load_older_states_are_whole(tmp_path: Path, victim: str) -> None:
    """The kill comes at another moment each time: 10 to 400 ms after the request was sent."""
    disk, log = boot_disk(tmp_path / "guest.qcow2", "qcow2"), tmp_path / "serial"
    with background("--serial", f"file:{log}", disk) as name:
        number(log)
        control.ask(name, "snapshot-save", tag="old")
        saved = number(log)
    for turn in range(12):
        with background("--serial", f"file:{log}", disk) as name:
            present = number(log)
            pids = control.ask(name, "status")
            request = (
                {"do": "snapshot-load", "tag": "old"} if turn % 2 else {"do": "snapshot-save", "tag": "new"}
            )
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(Path(places.base()) / name / places.CONTROL))
                sock.sendall(json.dumps(request).encode() + b"\n")
                time.sleep((0.01, 0.03, 0.06, 0.1, 0.2, 0.4)[turn // 2])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pids["pid" if victim == "enban" else "qemu-pid"], signal.SIGKILL)
            for _ in range(200):
                if name not in places.running():
                    break
                time.sleep(0.05)
            else:  # QEMU was replaced by then, so the one that was killed had ended
                control.ask(name, "shutdown", force=True)
        assert not enban.check(disk).corruptions
        with background("--load", "old", "--serial", f"file:{log}", disk) as name:
            assert saved - 1 <= number(log) <= saved + 4, f"turn {turn}, before it {present}"
            states = {one["tag"]: one["complete"] for one in control.ask(name, "snapshot-list")}
            assert states.pop("old") and set(states) <= {"new"}
            if states:
                assert states["new"]
                control.ask(name, "snapshot-delete", tag="new")
