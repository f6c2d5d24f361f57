"""`enban serial` as a user meets it."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from enban.serial.ports import serial_ports
from tests.cli.command import command, enban, environment, refused
from tests.serial.lines import Client, free_port, until


@contextmanager
def running(folder: Path, *words: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command as a process; what it tells is in folder/told."""
    with (folder / "told").open("wb") as told:
        process = subprocess.Popen(
            command("serial", "bridge", *words),
            env=environment(),
            stderr=told,
            stdin=options.get("stdin", subprocess.PIPE),  # type: ignore[call-overload]
            stdout=options.get("stdout", subprocess.PIPE),
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                stream.close()


def told(folder: Path) -> str:
    return (folder / "told").read_text()


def expect(folder: Path, text: str) -> None:
    until(lambda: text in told(folder), f"{text!r} in {told(folder)}")


def test_a_bridge_from_start_to_end(tmp_path: Path) -> None:
    record = tmp_path / "record"
    ends = (f"unix:{tmp_path / 'g'},listen", "tcp:0,listen", f"file:{tmp_path / 'log'}")
    with running(tmp_path, "--record", str(record), "--doctor", "--rates", *ends) as process:
        expect(tmp_path, "ready: tcp:127.0.0.1:")
        port = int(told(tmp_path).split("ready: tcp:127.0.0.1:")[1].split()[0])
        guest = Client(f"unix:{tmp_path / 'g'}").connect()
        debugger = Client(f"tcp:{port}").connect()
        expect(tmp_path, "is the active debugger")
        guest.send(b"hello\r\n")
        assert debugger.receive(7) == b"hello\r\n"
        debugger.send(b"b")
        assert guest.receive(1) == b"b"
        process.send_signal(signal.SIGUSR1)
        expect(tmp_path, "from the guest 7 bytes")
        expect(tmp_path, "B/s 0 packets/s, debugger")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        guest.close()
        debugger.close()
    assert "doctor: " in told(tmp_path)
    assert all(line.startswith(("enban: ", "guest ")) for line in told(tmp_path).splitlines())
    assert not (tmp_path / "g").exists()
    assert (tmp_path / "log").read_bytes() == b"hello\r\n"
    assert (record / "target.raw").read_bytes() == b"hello\r\n"
    assert (record / "debugger.raw").read_bytes() == b"b"


def test_standard_input_and_output(tmp_path: Path) -> None:
    everything = bytes(range(256)) * 40
    with running(tmp_path, "-q", f"unix:{tmp_path / 'g'},listen", "stdio") as process:
        until(lambda: (tmp_path / "g").exists(), "the socket")
        guest = Client(f"unix:{tmp_path / 'g'}").connect()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(everything)
        process.stdin.flush()
        assert guest.receive(len(everything)) == everything
        process.stdin.close()  # the end of the input is not the end of the line
        guest.send(everything)
        assert process.stdout.read(len(everything)) == everything
        guest.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert told(tmp_path) == ""


def test_whoever_reads_standard_output_goes_away(tmp_path: Path) -> None:
    with running(tmp_path, f"unix:{tmp_path / 'g'},listen", "stdio") as process:
        until(lambda: (tmp_path / "g").exists(), "the socket")
        guest = Client(f"unix:{tmp_path / 'g'}").connect()
        expect(tmp_path, "guest: ")
        assert process.stdout is not None
        process.stdout.close()
        guest.send(b"x")
        assert process.wait(20) == 0
        guest.close()
    assert "Traceback" not in told(tmp_path)


def test_a_terminal(tmp_path: Path) -> None:
    """Keys go through as typed, Ctrl-C too; Ctrl-] ends, and the terminal is as before."""
    import termios

    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with running(tmp_path, f"unix:{tmp_path / 'g'},listen", "stdio", stdin=slave, stdout=slave) as process:
        until(lambda: (tmp_path / "g").exists(), "the socket")
        guest = Client(f"unix:{tmp_path / 'g'}").connect()
        expect(tmp_path, "is connected")
        until(lambda: not termios.tcgetattr(slave)[3] & termios.ICANON, "raw")
        os.write(master, b"dir\r\x03")
        assert guest.receive(5) == b"dir\r\x03"
        guest.send(b"\x1b[2Jok\n")
        poll = select.poll()
        poll.register(master, select.POLLIN)
        assert poll.poll(20_000)
        assert os.read(master, 100) == b"\x1b[2Jok\n"
        os.write(master, b"\x1d")
        assert process.wait(20) == 0
        guest.close()
    assert termios.tcgetattr(slave) == before
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "0 names do not fit"),
        (("unix:/a",), "1 names do not fit"),
        (("unix:/a", "nothing"), "'nothing' names no transport"),
        (("stdio", "stdio"), "stdio can be one end only"),
        (("tty:/dev/null", "unix:/a"), "/dev/null: is not a serial line"),
        (("unix:/no/such/folder/s,listen", "stdio"), "/no/such/folder/s: cannot listen"),
        (("unix:/no/such/folder/s,listen", "stdio"), "make the folder first"),
        (("tcp:192.0.2.1:5000,listen", "stdio"), "give an address of this machine"),
        (("file:/no/such/log", "unix:/a"), "may only look on: it is no guest"),
        (("unix:/a,watch", "unix:/b"), "may only look on: it is no guest"),
    ],
)
def test_what_is_refused(words: tuple[str, ...], says: str) -> None:
    assert says in refused("serial", "bridge", *words)


def test_a_taken_port_leaves_nothing(tmp_path: Path) -> None:
    port = free_port()
    listener = Client(f"tcp:{port},listen")
    assert "is another server using it?" in refused(
        "serial", "bridge", f"unix:{tmp_path / 'g'},listen", f"tcp:{port},listen"
    )
    assert not (tmp_path / "g").exists()
    listener.close()


def test_serial_alone_names_its_parts() -> None:
    assert "enban serial bridge" in refused("serial")
    assert "enban serial bridge" in refused("serial", "frobnicate")
    text = enban("serial", "--help").out
    assert text == enban("help", "serial").out
    for part in ("bridge", "doctor", "list"):
        assert f"serial {part}" in text


def test_ports_by_sysfs(tmp_path: Path) -> None:
    sysfs, by_id, drivers = tmp_path / "tty", tmp_path / "by-id", tmp_path / "drivers"
    for name, driver, kind in (
        ("ttyS0", "serial8250", "4"),
        ("ttyS1", "serial8250", "0"),  # a place without a port
        ("ttyUSB10", "ftdi_sio", ""),
        ("ttyUSB2", "pl2303", ""),
        ("tty1", "", ""),  # a console
    ):
        (sysfs / name).mkdir(parents=True)
        if driver:
            (drivers / driver).mkdir(parents=True, exist_ok=True)
            (sysfs / name / "device").mkdir()
            (sysfs / name / "device" / "driver").symlink_to(drivers / driver)
        if kind:
            (sysfs / name / "type").write_text(kind + "\n")
    by_id.mkdir()
    (by_id / "usb-FTDI-if00").symlink_to("../../ttyUSB10")
    found = [(port.device, port.driver, port.link) for port in serial_ports(str(sysfs), str(by_id))]
    assert found == [
        ("/dev/ttyS0", "serial8250", ""),
        ("/dev/ttyUSB2", "pl2303", ""),
        ("/dev/ttyUSB10", "ftdi_sio", str(by_id / "usb-FTDI-if00")),
    ]
    assert serial_ports(str(tmp_path / "no"), str(by_id)) == []


def test_list() -> None:
    assert enban("serial", "list", "--output=json").out.startswith("[")
    enban("serial", "list", "-q")
