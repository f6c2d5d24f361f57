"""The text of a transport: `KIND:WHERE[,option[=value]...]`. A comma in a path is written twice.

unix:PATH            connect to a unix socket          unix:PATH,listen
tcp:HOST:PORT        connect (tcp:PORT: this machine)  tcp:PORT,listen   tcp:*:PORT,listen
fifo:PATH            PATH.in and PATH.out as QEMU has them; options swap, keep
pty:LINK             a new pty, LINK points to it (pty alone: no link)
tty:DEVICE,baud=N    a serial port; option rtscts
stdio                this process's own
file:PATH            records what the guest says; option append

pace=BAUD            model a line of that speed        watch   may only look on
"""

from __future__ import annotations

from ...errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .base import Transport

_EVERY = frozenset({"pace", "watch"})
_FLAGS = frozenset({"listen", "swap", "keep", "rtscts", "append", "watch"})
_OPTIONS = {
    "unix": {"listen"},
    "tcp": {"listen"},
    "fifo": {"swap", "keep"},
    "pty": set[str](),
    "tty": {"baud", "rtscts"},
    "stdio": set[str](),
    "file": {"append"},
}
_MOST_BAUD = 1_000_000_000


def parse_transport(text: str) -> Transport:
    """The transport that a text names; nothing is opened yet. Raises UsageError."""
    head, *items = [item.replace("\0", ",") for item in text.replace(",,", "\0").split(",")]
    kind, colon, where = head.partition(":")
    if kind not in _OPTIONS:
        raise UsageError(f"'{text}' names no transport", hint=f"begin with {', '.join(_OPTIONS)}")
    options = _options(text, kind, items)
    if kind != "stdio" and kind != "pty" and not where:
        raise UsageError(f"'{text}' says not where", hint=f"write {kind}:{_PLACES[kind]}")
    if kind == "stdio" and colon:
        raise UsageError("stdio takes no place", hint="write stdio")
    if "\0" in where:
        raise UsageError(f"'{text}' has a zero byte in its path")
    made = _MAKERS[kind](text, where, options)
    made.watch = made.watch or "watch" in options
    if "pace" in options:
        made.pace_baud = _number(text, "pace", options["pace"], 50, _MOST_BAUD)
    return made


def _options(text: str, kind: str, items: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for item in items:
        name, equals, value = item.partition("=")
        if name not in _OPTIONS[kind] | _EVERY:
            known = ", ".join(sorted(_OPTIONS[kind] | _EVERY))
            raise UsageError(f"'{text}': {kind} has no option '{name}'", hint=f"it has {known}")
        if name in found:
            raise UsageError(f"'{text}' gives {name} twice")
        if (name in _FLAGS) == bool(equals):
            raise UsageError(
                f"'{text}': {name} {'takes no' if name in _FLAGS else 'needs a'} value",
                hint=f"write {name if name in _FLAGS else name + '=NUMBER'}",
            )
        found[name] = value
    return found


def _number(text: str, name: str, value: str, least: int, most: int) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 12) or not least <= int(value) <= most:
        raise UsageError(f"'{text}': '{value}' is no {name}", hint=f"use {least} to {most}")
    return int(value)


def _unix(text: str, where: str, options: dict[str, str]) -> Transport:
    from .sockets import UnixListener, unix_connector

    return UnixListener(text, where) if "listen" in options else unix_connector(text, where)


def _tcp(text: str, where: str, options: dict[str, str]) -> Transport:
    from .sockets import TcpListener, tcp_connector

    host, _, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise UsageError(f"'{text}': which part is the port?", hint="write an IPv6 address in brackets")
    if "listen" in options:
        return TcpListener(text, host, _number(text, "port", port, 0, 65535))
    return tcp_connector(text, host or "127.0.0.1", _number(text, "port", port, 1, 65535))


def _fifo(text: str, where: str, options: dict[str, str]) -> Transport:
    from .fifo import FifoPair

    return FifoPair(text, where, swap="swap" in options, keep="keep" in options)


def _pty(text: str, where: str, options: dict[str, str]) -> Transport:
    from .tty import Pty

    return Pty(text, where)


def _tty(text: str, where: str, options: dict[str, str]) -> Transport:
    from .tty import SerialPort

    baud = _number(text, "baud", options.get("baud", "115200"), 50, 4_000_000)
    return SerialPort(text, where, baud=baud, rtscts="rtscts" in options)


def _stdio(text: str, where: str, options: dict[str, str]) -> Transport:
    from .plain import Stdio

    return Stdio(text)


def _file(text: str, where: str, options: dict[str, str]) -> Transport:
    from .plain import RecordFile

    return RecordFile(text, where, append="append" in options)


_PLACES = {"unix": "PATH", "tcp": "HOST:PORT", "fifo": "PATH", "tty": "DEVICE", "file": "PATH"}
_MAKERS: dict[str, Callable[[str, str, dict[str, str]], Transport]] = {
    "unix": _unix,
    "tcp": _tcp,
    "fifo": _fifo,
    "pty": _pty,
    "tty": _tty,
    "stdio": _stdio,
    "file": _file,
}
