"""A server as a process runs it: open the disks, listen, serve until told to stop, leave in order.

Everything that is undone at the end is undone in the reverse order, whatever fails in between:
connections end, the disks are flushed and closed, the socket, the pid file and the trace are
finished. A disk that cannot be flushed makes `serve` raise, after all the rest is done.
"""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading

from ...block.gate import SIBLINGS
from ...block.runtime import BLOCKING, drive
from ...catalog import open_door
from ...errors import UsageError, from_oserror
from ...wire.nbd.constants import DEFAULT_PORT, MAX_STRING
from . import sockets
from .export import ServedExport
from .incoming import SPIN_US
from .media import MediaWatch
from .server import GRACE_S, HANDSHAKE_S, Server
from .trace import Trace

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from ...block.cipher import Passphrase
    from ...block.door import Door
    from ...block.gate import Gate

    class Stoppable(Protocol):
        """A server whose `stop` and `request_status` may be called from a signal handler."""

        def stop(self) -> None: ...

        def request_status(self) -> None: ...


class Wanted:
    """One disk to serve. reference: as for `enban.open`. name: the export's, "" for the default one.

    offset, size: the slice of the disk in bytes; size None is to its end. bitmaps: dirty bitmaps to show.
    """

    __slots__ = ("bitmaps", "description", "format", "name", "offset", "reference", "size")

    def __init__(
        self,
        reference: str | dict[str, Any],
        name: str = "",
        *,
        format: str = "",
        offset: int = 0,
        size: int | None = None,
        description: str = "",
        bitmaps: Sequence[str] = (),
    ) -> None:
        self.bitmaps = bitmaps
        self.reference = reference
        self.name = name
        self.format = format
        self.offset = offset
        self.size = size
        self.description = description


class Settings:
    """What `enban serve` can be told; the defaults are its defaults.

    socket_path: the unix socket; "" makes a private one unless tcp or sockets of systemd are used.
    tcp: listen on TCP; bind: which address, "" this machine alone, "*" all; port: 0 picks one.
    shared: clients at once, 0 for any number. tls_dir: certificates (see storage.tls); "" is plain.
    tls_verify: turn away clients without a certificate of our CA. passphrase: of encrypted images.
    snapshot: writes go to temporary overlays, in files without a name in snapshot_dir, and vanish.
    idle_s: end after so long without a client, 0 never. spin_us: see `incoming`.
    """

    def __init__(self) -> None:
        self.read_only = False
        self.socket_path = ""
        self.tcp = False
        self.bind = ""
        self.port = DEFAULT_PORT
        self.shared = 64
        self.tls_dir = ""
        self.tls_verify = True
        self.pid_file = ""
        self.idle_s = 0.0
        self.handshake_s = float(HANDSHAKE_S)
        self.grace_s = float(GRACE_S)
        self.spin_us = SPIN_US
        self.trace = ""
        self.cache = "writeback"
        self.snapshot = False
        self.snapshot_dir = ""
        self.passphrase: Passphrase = None
        self.gate: Gate = SIBLINGS


def serve(
    wanted: Sequence[Wanted],
    settings: Settings,
    *,
    announce: Callable[[str], None],
    log: Callable[[str], None],
) -> None:
    """Serve until SIGTERM, SIGINT or idle. `announce` gets the URI of every export once clients
    may come; `log` gets lines about clients and failures. SIGUSR1 has the log told what is in
    flight. Call it in the main thread.

    Raises UsageError, HostError, ImageError before anything is served, and what closing raises.
    """
    names = [one.name for one in wanted]
    for name in names:
        if len(name.encode("utf-8", "surrogateescape")) > MAX_STRING:
            raise UsageError(f"an export's name may have {MAX_STRING} bytes", hint="give a shorter one")
        if names.count(name) > 1:
            raise UsageError(f"two exports have the name '{name}'", hint="name them with -x, in order")
    with contextlib.ExitStack() as stack:
        # Until the last disk is closed a signal must not end the process: that would lose what was answered.
        handlers = keep_signal_handlers(stack)
        trace = None
        if settings.trace:
            trace = Trace(settings.trace)
            stack.callback(trace.close)
        tls = None
        if settings.tls_dir:
            from ...storage.tls import server_context

            tls = server_context(settings.tls_dir, verify_peer=settings.tls_verify)
        exports = [open_export(one, settings, stack, trace) for one in wanted]
        listeners = _listen(settings, stack)
        server = Server(
            exports,
            listeners,
            shared=settings.shared,
            tls=tls,
            handshake_s=settings.handshake_s,
            idle_s=settings.idle_s,
            grace_s=settings.grace_s,
            spin_us=settings.spin_us,
            trace=trace,
            log=log,
        )
        catch_signals(server, handlers)
        if settings.pid_file:
            write_pid(settings.pid_file, stack)
        for listener in listeners:
            for export in exports:
                announce(sockets.uri_of(listener, export.name, tls=tls is not None))
        media = MediaWatch(server, log)
        media.start()
        try:
            server.run()
        finally:
            media.stop()


def open_export(
    one: Wanted, settings: Settings, stack: contextlib.ExitStack, trace: Trace | None
) -> ServedExport:
    door: Door = drive(
        open_door(
            one.reference,
            BLOCKING,
            format=one.format,
            writable=not (settings.read_only or settings.snapshot),
            cache=settings.cache,
            gate=settings.gate,
            snapshot=settings.snapshot,
            snapshot_dir=settings.snapshot_dir or None,
            passphrase=settings.passphrase,
            empty_drive=True,
        )
    )
    stack.callback(lambda: drive(door.close()))
    if trace is not None:
        trace.watch(door.node)
    return ServedExport(
        door,
        one.name,
        offset=one.offset,
        size=one.size,
        description=one.description,
        multi_conn=settings.shared != 1,
        bitmaps=one.bitmaps,
    )


def _listen(settings: Settings, stack: contextlib.ExitStack) -> list[socket.socket]:
    passed = sockets.passed_sockets()
    if passed:
        if settings.tcp or settings.socket_path:
            raise UsageError("systemd passed sockets to listen on", hint="leave out the socket and the port")
        return passed
    listeners: list[socket.socket] = []
    if settings.tcp:
        listeners += sockets.listen_tcp(settings.bind, settings.port)
        for listener in listeners:
            stack.callback(listener.close)
    if settings.socket_path or not settings.tcp:
        path = settings.socket_path
        if not path:
            runtime = os.environ.get("XDG_RUNTIME_DIR", "")
            directory = tempfile.mkdtemp(prefix="enban-", dir=runtime if os.path.isdir(runtime) else None)
            stack.callback(os.rmdir, directory)
            path = os.path.join(directory, "nbd")
        listeners.append(sockets.listen_unix(path))
        stack.callback(remove_file, path)
        stack.callback(listeners[-1].close)
    return listeners


def remove_file(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def write_pid(path: str, stack: contextlib.ExitStack) -> None:
    """Only a server that can be reached has a pid file; it appears whole."""
    partial = f"{path}.{os.getpid()}"
    try:
        with open(partial, "w", encoding="ascii") as file:
            file.write(f"{os.getpid()}\n")
        os.rename(partial, path)
    except OSError as error:
        remove_file(partial)
        raise from_oserror(error, "write the pid file", path) from error
    stack.callback(remove_file, path)


def keep_signal_handlers(stack: contextlib.ExitStack) -> dict[int, Any]:
    """The signal handlers that are put back at the very end, after everything else on the stack."""
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    stack.callback(restore)
    return before


def catch_signals(server: Stoppable, before: dict[int, Any]) -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        before[number] = signal.signal(number, lambda *_: server.stop())
    before[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, lambda *_: server.request_status())
