"""Texts of transports, and what each of them promises besides carrying bytes."""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import termios
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.errors import EnbanError, HostError, UsageError
from enban.serial.transports import parse_transport
from enban.serial.transports.fifo import FifoPair
from enban.serial.transports.plain import RecordFile, Stdio
from enban.serial.transports.sockets import Connector, TcpListener, UnixListener
from enban.serial.transports.tty import Pty, SerialPort
from tests.serial.lines import Client, bridge, free_port, until


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("unix:/a", Connector),
        ("unix:/a,listen", UnixListener),
        ("unix:a,,b,listen,watch", UnixListener),
        ("tcp:5000", Connector),
        ("tcp:127.0.0.1:5000", Connector),
        ("tcp:[::1]:5000", Connector),
        ("tcp:5000,listen", TcpListener),
        ("tcp:0,listen", TcpListener),
        ("tcp:*:5000,listen,pace=115200", TcpListener),
        ("fifo:/a", FifoPair),
        ("fifo:/a,swap,keep", FifoPair),
        ("pty", Pty),
        ("pty:/a", Pty),
        ("tty:/dev/ttyS0", SerialPort),
        ("tty:/dev/ttyS0,baud=9600,rtscts", SerialPort),
        ("stdio", Stdio),
        ("file:/a,append", RecordFile),
    ],
)
def test_texts(text: str, kind: type) -> None:
    made = parse_transport(text)
    assert type(made) is kind
    assert made.name == text
    assert made.watch == ("watch" in text or kind is RecordFile)
    assert made.pace_baud == (115200 if "pace" in text else 0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "names no transport; begin with unix, tcp"),
        ("serial:/x", "names no transport"),
        ("unix:", "says not where; write unix:PATH"),
        ("unix:" + "x" * 200, "too long for a unix socket"),
        ("unix:/a,lisen", "unix has no option 'lisen'; it has listen, pace, watch"),
        ("unix:/a,listen=1", "listen takes no value"),
        ("unix:/a,listen,listen", "gives listen twice"),
        ("tcp:x", "'x' is no port; use 1 to 65535"),
        ("tcp:65536,listen", "is no port"),
        ("tcp:::1:5000", "write an IPv6 address in brackets"),
        ("tty:/dev/ttyS0,baud=fast", "'fast' is no baud"),
        ("tty:/dev/ttyS0,baud=12345", "12345 baud is no rate of a serial port here; use 9600, "),
        ("fifo:/a,pace", "pace needs a value"),
        ("fifo:/a,pace=0", "'0' is no pace"),
        ("stdio:x", "stdio takes no place"),
        ("tcp:no.such.host.invalid:5000", "cannot look up 'no.such.host.invalid'"),
    ],
)
def test_texts_that_are_refused(text: str, says: str) -> None:
    with pytest.raises(EnbanError) as caught:
        parse_transport(text)
    assert says in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@given(st.text(max_size=40) | st.text("unixtcpfop:,=listenwach0123456789*[]", max_size=40))
def test_any_text_is_a_transport_or_refused(text: str) -> None:
    if text.startswith("tcp") and "listen" not in text:
        text += ",listen"  # the others may ask a name server
    try:
        parse_transport(text)
    except UsageError:
        pass


# -- sockets -------------------------------------------------------------------------------------


def test_a_unix_listener_is_private_and_cleans_up(tmp_path: Path) -> None:
    path = tmp_path / "s"
    one = parse_transport(f"unix:{path},listen")
    one.open()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(HostError, match="is another server using it"):
        parse_transport(f"unix:{path},listen").open()
    assert path.exists()
    one.close()
    assert not path.exists()
    # What a bridge that was killed left behind is replaced; what is no socket is not.
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    one.open()
    one.close()
    path.write_text("mine")
    with pytest.raises(HostError):
        one.open()
    assert path.read_text() == "mine"


def test_tcp_listens_on_this_machine_alone_unless_told(tmp_path: Path) -> None:
    for text, host in (("tcp:0,listen", "127.0.0.1"), ("tcp:127.0.0.1:0,listen", "127.0.0.1")):
        one = parse_transport(text)
        assert isinstance(one, TcpListener)
        one.open()
        assert one.sockets[0].getsockname()[0] == host
        assert one.address().startswith(f"tcp:{host}:") and not one.address().endswith(":0")
        one.close()
    everywhere = parse_transport("tcp:*:0,listen")
    assert isinstance(everywhere, TcpListener)
    everywhere.open()
    assert everywhere.sockets[0].getsockname()[0] in ("::", "0.0.0.0")
    everywhere.close()
    with pytest.raises(UsageError, match="no address of this machine"):
        parse_transport("tcp:no.such.host.invalid:0,listen").open()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(HostError, match=f"cannot listen on port {port}"):
            parse_transport(f"tcp:{port},listen").open()


@pytest.mark.parametrize("text", ["tcp:{},listen", "tcp:{}"])
def test_nodelay_always(text: str) -> None:
    port = free_port()
    listener = Client(f"tcp:{port},listen")
    caller = Client(f"tcp:{port}").connect()
    listener.connect()
    for one in (listener, caller):
        sock = socket.socket(fileno=os.dup(one.up.read_fd))
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sock.close()
        one.close()


def test_a_connector_tells_what_it_waits_for(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with bridge(f"unix:{path}", f"unix:{tmp_path / 'd'},listen") as running:
        running.expect(f"waiting for unix:{path}: no such file")
        Client(f"unix:{path},listen").connect().close()
        running.expect_guest()
        running.expect("is gone")
    assert running.logged("waiting for") == 1


# -- FIFOs ---------------------------------------------------------------------------------------


def test_bytes_of_an_old_session_are_thrown_away(tmp_path: Path) -> None:
    path = tmp_path / "f"
    for suffix in (".in", ".out"):
        os.mkfifo(f"{path}{suffix}")
    # A guest that still runs, as QEMU has them open, and what is left of the debugger before us.
    guest = {s: os.open(f"{path}{s}", os.O_RDWR | os.O_NONBLOCK) for s in (".in", ".out")}
    os.write(guest[".out"], b"old answer")
    os.write(guest[".in"], b"old request")
    ours = FifoPair("fifo", str(path))
    ours.open()
    assert ours.dropped == len(b"old answer" + b"old request")
    link = ours.advance()
    assert link is not None
    assert link.read() == b""
    os.write(guest[".out"], b"new")
    assert link.read() == b"new"
    assert link.write(b"request") == 7
    assert os.read(guest[".in"], 100) == b"request"
    link.close()
    ours.close()
    os.write(guest[".out"], b"kept")
    ours = FifoPair("fifo", str(path), keep=True)
    ours.open()
    link = ours.advance()
    assert link is not None
    assert link.read() == b"kept"
    link.close()
    ours.close()
    for fd in guest.values():
        os.close(fd)
    # They were here before us and stay.
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f.in", "f.out"]


def test_a_file_in_the_place_of_a_fifo(tmp_path: Path) -> None:
    (tmp_path / "f.in").write_text("mine")
    with pytest.raises(UsageError, match="is not a FIFO"):
        parse_transport(f"fifo:{tmp_path / 'f'}").open()
    with pytest.raises(HostError, match="cannot make the FIFO: no such file or directory"):
        parse_transport(f"fifo:{tmp_path / 'no' / 'f'}").open()


# -- terminals -----------------------------------------------------------------------------------


def test_a_pty_has_a_link_and_is_empty_for_who_comes_next(tmp_path: Path) -> None:
    link = tmp_path / "pty"
    link.symlink_to("/dev/pts/999999")  # of a bridge that was killed
    pty = Pty("pty", str(link))
    pty.open()
    assert os.readlink(link) == pty.slave
    assert pty.advance() is None and pty.reason == "nobody has it open"
    fd = os.open(link, os.O_RDWR | os.O_NOCTTY)
    assert not termios.tcgetattr(fd)[3] & (termios.ICANON | termios.ECHO)
    up = pty.advance()
    assert up is not None
    while up.write(b"never read" * 100):
        pass
    os.close(fd)
    pty.lost()
    fd = os.open(link, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    up = pty.advance()
    assert up is not None
    with pytest.raises(BlockingIOError):
        os.read(fd, 100)
    # Nothing is translated: neither line ends nor control characters, both ways.
    everything = bytes(range(256))
    os.write(fd, everything)
    assert up.read() == everything
    up.write(everything)
    until(lambda: select_ready(fd), "the bytes are there")
    assert os.read(fd, 1000) == everything
    os.close(fd)
    pty.close()
    assert not link.is_symlink()


def select_ready(fd: int) -> bool:
    count = bytearray(4)
    fcntl.ioctl(fd, termios.FIONREAD, count)
    return int.from_bytes(count, "little") == 256


def test_a_name_that_is_taken_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "pty").write_text("mine")
    pty = Pty("pty", str(tmp_path / "pty"))
    with pytest.raises(HostError, match="file exists already; give another name"):
        pty.open()
    pty.close()
    assert (tmp_path / "pty").read_text() == "mine"


def test_a_port_is_set_up_locked_and_given_back(tmp_path: Path) -> None:
    pty = Pty("pty", str(tmp_path / "tty"))
    pty.open()
    fd = os.open(tmp_path / "tty", os.O_RDWR | os.O_NOCTTY)
    before = termios.tcgetattr(fd)
    port = SerialPort("tty", str(tmp_path / "tty"), baud=9600)
    port.open()
    link = port.advance()
    assert link is not None
    _, _, cflag, _, ispeed, ospeed, _ = termios.tcgetattr(fd)
    assert ispeed == ospeed == termios.B9600
    assert cflag & termios.CSIZE == termios.CS8
    assert not cflag & (termios.PARENB | termios.CSTOPB | termios.CRTSCTS)
    assert cflag & termios.CLOCAL
    with pytest.raises(HostError, match="another program has this line"):
        SerialPort("tty", str(tmp_path / "tty")).open()
    link.close()
    assert termios.tcgetattr(fd) == before
    os.close(fd)
    port.close()
    pty.close()


def test_modem_lines_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A pty has none, so the kernel's answer is played."""
    pty = Pty("pty", str(tmp_path / "tty"))
    pty.open()
    port = SerialPort("tty:x", str(tmp_path / "tty"))
    port.open()
    assert port.notice() == ""
    bits = termios.TIOCM_DTR | termios.TIOCM_RTS | termios.TIOCM_CTS
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, data: bits.to_bytes(4, "little"))
    assert port.notice() == "tty:x: modem lines, off in brackets: DTR RTS CTS (DSR) (DCD) (RI)"
    assert port.notice() == ""
    monkeypatch.undo()
    port.close()
    pty.close()


@pytest.mark.parametrize(
    ("path", "says"),
    [("/dev/null", "is not a serial line; see: enban serial list"), ("/dev/no", "no such file")],
)
def test_what_is_no_port(path: str, says: str) -> None:
    with pytest.raises(EnbanError, match=says):
        parse_transport(f"tty:{path}").open()
