"""A guest in real QEMU, its COM1 reached through the bridge over each of QEMU's chardevs."""

from __future__ import annotations

import asyncio
import random
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import pytest

from enban.errors import EnbanError
from enban.serial import debug_port
from enban.serial.port import read_spec
from tests.cli.command import command, environment
from tests.serial.boot_sector import GREETING, boot_sector
from tests.serial.lines import Client, bridge, free_port, until
from tests.support import needs_qemu_system

ENOUGH = 100  # exchanges a second


@contextmanager
def guest(folder: Path, *serial: str, stdio: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[bytes]]:
    image = folder / "boot.img"
    image.write_bytes(boot_sector())
    command = [
        "qemu-system-x86_64",
        "-accel",
        "tcg",
        "-m",
        "16",
        "-nodefaults",
        "-display",
        "none",
        "-snapshot",
    ]
    command += ["-drive", f"file={image},format=raw,if=ide", *serial]
    with (folder / "qemu.log").open("wb") as log:
        out = log if stdio == subprocess.DEVNULL else stdio
        process = subprocess.Popen(command, stdin=stdio, stdout=out, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def talk(debugger: Client) -> float:
    """The greeting whole, then every byte comes back as it went.

    Returns exchanges of 16 bytes a second, by the best 25 in a row: a machine with other work makes most
    of them wait, so where they were fewer than ENOUGH it is tried again for a while.
    """
    assert debugger.receive(len(GREETING)) == GREETING
    data = random.Random(3).randbytes(2000)
    for start in range(0, len(data), 16):
        debugger.send(data[start : start + 16])
        assert debugger.receive(len(data[start : start + 16])) == data[start : start + 16]
    best, deadline = 0.0, monotonic() + 120
    while best < ENOUGH and (not best or monotonic() < deadline):
        started = monotonic()
        for _ in range(25):
            debugger.send(b"0123456789abcdef")
            assert debugger.receive(16) == b"0123456789abcdef"
        best = max(best, 25 / (monotonic() - started))
    return best


def chardevs(folder: Path) -> dict[str, tuple[str, str]]:
    """How the bridge and QEMU each name the line; in all of them the bridge is there first."""
    port = free_port()
    path = folder / "line"
    return {
        "unix, QEMU connects": (f"unix:{path},listen", f"socket,id=s,path={path}"),
        "unix, QEMU listens": (f"unix:{path}", f"socket,id=s,path={path},server=on,wait=on"),
        "tcp, QEMU connects": (f"tcp:{port},listen", f"socket,id=s,host=127.0.0.1,port={port},nodelay=on"),
        "tcp, QEMU listens": (
            f"tcp:127.0.0.1:{port}",
            f"socket,id=s,host=127.0.0.1,port={port},server=on,wait=on,nodelay=on",
        ),
        "pipe": (f"fifo:{path}", f"pipe,id=s,path={path}"),
        "serial": (f"pty:{path}", f"serial,id=s,path={path}"),
    }


@needs_qemu_system
@pytest.mark.parametrize("name", list(chardevs(Path())))
def test_no_byte_is_lost_and_a_hundred_exchanges_a_second(name: str, tmp_path: Path) -> None:
    ours, theirs = chardevs(tmp_path)[name]
    with bridge(ours, f"unix:{tmp_path / 'd'},listen") as running:
        debugger = Client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        with guest(tmp_path, "-chardev", theirs, "-serial", "chardev:s"):
            rate = talk(debugger)
        running.expect("is gone")
        debugger.close()
    print(f"{name}: {rate:.0f} exchanges a second")
    assert rate >= ENOUGH


@needs_qemu_system
def test_stdio_of_both(tmp_path: Path) -> None:
    """QEMU's standard input and output are the bridge's, as in a shell pipeline that goes in a circle."""
    ours, theirs = socket.socketpair()
    words = ("serial", "bridge", "stdio", f"unix:{tmp_path / 'd'},listen")
    with (tmp_path / "told").open("wb") as told, ours, theirs:
        fd = ours.fileno()
        running = subprocess.Popen(command(*words), env=environment(), stdin=fd, stdout=fd, stderr=told)
        try:
            until(lambda: "ready: unix" in (tmp_path / "told").read_text(), "the bridge")
            debugger = Client(f"unix:{tmp_path / 'd'}").connect()
            until(lambda: "is the active" in (tmp_path / "told").read_text(), "the debugger")
            chardev = ("-chardev", "stdio,id=s,signal=off", "-serial", "chardev:s")
            with guest(tmp_path, *chardev, stdio=theirs.fileno()):
                rate = talk(debugger)
            debugger.close()
        finally:
            running.terminate()
            running.wait(30)
    assert running.returncode == 0, (tmp_path / "told").read_text()
    assert rate >= ENOUGH


@pytest.mark.long
@needs_qemu_system
def test_a_pty_of_qemus_own(tmp_path: Path) -> None:
    """QEMU makes the pty, and drops what the guest says until it has seen somebody there: it stands still
    until the bridge is (-S), and is given the second that QEMU takes to look."""
    qmp = tmp_path / "qmp"
    with guest(
        tmp_path,
        "-S",
        "-chardev",
        "pty,id=s",
        "-serial",
        "chardev:s",
        "-qmp",
        f"unix:{qmp},server=on,wait=off",
    ):
        log = tmp_path / "qemu.log"
        until(lambda: "/dev/pts/" in log.read_text(), "QEMU tells the name of the pty")
        device = next(word for word in log.read_text().split() if word.startswith("/dev/pts/"))
        with bridge(f"tty:{device}", f"unix:{tmp_path / 'd'},listen") as running:
            debugger = Client(f"unix:{tmp_path / 'd'}").connect()
            running.expect("is the active debugger")
            running.expect_guest()
            monitor = Client(f"unix:{qmp}").connect()
            monitor.send(b'{"execute": "qmp_capabilities"}\n')
            monitor.rest(1.5)
            monitor.send(b'{"execute": "cont"}\n')
            talk(debugger)
            debugger.close()
            monitor.close()


@needs_qemu_system
@pytest.mark.parametrize(
    "spec", ["kd:unix={path}", "kd:tcp={port}", "kd:pipe={path}", "kd:tty={path},baud=115200"]
)
def test_the_debug_port_is_connected_before_the_guest_runs(spec: str, tmp_path: Path) -> None:
    port = free_port()
    path = tmp_path / "kd"
    names = {
        "kd:unix": f"unix:{path}",
        "kd:tcp": f"tcp:{port}",
        "kd:pipe": f"fifo:{path},swap",
        "kd:tty": f"pty:{path}",
    }
    debugger = Client(names[spec.partition("=")[0]])
    record = tmp_path / "rec"
    log: list[str] = []

    async def run() -> None:
        chardev, carrying = debug_port(
            spec.format(path=path, port=port) + f",record={record},doctor", log=log.append
        )
        task = asyncio.create_task(carrying)
        await asyncio.to_thread(debugger.connect)
        await asyncio.to_thread(until, lambda: any("is the active" in line for line in log), "active")
        with guest(tmp_path, *chardev):
            await asyncio.to_thread(talk, debugger)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(asyncio.wait_for(run(), 120))
    debugger.close()
    assert (record / "target.raw").read_bytes().startswith(GREETING)
    assert not (path.exists() and spec.startswith("kd:unix"))


@needs_qemu_system
def test_enban_run_gives_a_debug_port(tmp_path: Path) -> None:
    (tmp_path / "boot.img").write_bytes(boot_sector())
    words = [
        "run",
        "-f",
        "raw",
        "--bus",
        "ide",
        "--accel",
        "tcg",
        "-m",
        "16M",
        "--grace",
        "1",
        "--name",
        tmp_path.name,
    ]
    words += ["--no-terminal", "--serial", f"kd:unix={tmp_path / 'kd'},record={tmp_path / 'rec'}"]
    with (tmp_path / "told").open("wb") as told:
        process = subprocess.Popen(
            command(*words, str(tmp_path / "boot.img")), env=environment(), stdout=told, stderr=told
        )
    try:
        # A socket that is there before QEMU is: nothing the guest says can be missed.
        until((tmp_path / "kd").exists, "the debug port")
        debugger = Client(f"unix:{tmp_path / 'kd'}").connect()
        assert talk(debugger) > 0
        debugger.close()
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()
    assert process.returncode == 143 or process.returncode == 0, (tmp_path / "told").read_text()
    assert (tmp_path / "rec" / "target.raw").read_bytes().startswith(GREETING)
    assert not (tmp_path / "kd").exists()


@needs_qemu_system
def test_a_debug_port_of_a_guest_that_does_not_start_leaves_nothing(tmp_path: Path) -> None:
    """The second port cannot be had: the first is given back, the folder of its socket too."""
    image, port = tmp_path / "boot.img", f"kd:unix={tmp_path / 'kd'}"
    image.write_bytes(boot_sector())
    words = ("run", "-f", "raw", "--no-terminal", "--name", tmp_path.name, "--serial", port, "--serial", port)
    with TemporaryDirectory() as room:  # its name is short, as those of sockets must be
        done = subprocess.run(
            command(*words, str(image)),
            env={**environment(), "TMPDIR": room, "XDG_RUNTIME_DIR": room},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert list(Path(room).glob("enban-kd-*")) == []
    assert done.returncode == 1
    assert "kd: cannot listen: address already in use" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "kd").exists()


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("kd:unix=/a", ("unix:/a,listen", "", False)),
        ("tcp=5000", ("tcp:5000,listen", "", False)),
        ("kd:tcp=*:5000,record=a,,b,pace=9600", ("tcp:*:5000,listen,pace=9600", "a,b", False)),
        ("kd:pipe=/a,,b,doctor", ("fifo:/a,,b", "", True)),
        ("kd:tty=/dev/ttyS0,baud=115200", ("tty:/dev/ttyS0,baud=115200", "", False)),
    ],
)
def test_texts_of_debug_ports(spec: str, text: tuple[str, str, bool]) -> None:
    assert read_spec(spec) == text


@pytest.mark.parametrize("spec", ["kd:", "kd:usb=1", "kd:unix", "kd:tcp=", "kd:tcp=x", "kd:unix=/a,listen"])
def test_debug_ports_that_are_refused(spec: str) -> None:
    with pytest.raises(EnbanError) as caught:
        debug_port(spec)
    assert len(str(caught.value).splitlines()) == 1
