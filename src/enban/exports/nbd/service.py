"""A server as a process runs it: open the disks, listen, serve until told to stop, leave in order.

Everything that is undone at the end is undone in the reverse order, whatever fails in between:
connections end, the disks are flushed and closed, the socket, the pid file and the trace are
finished. A disk that cannot be flushed makes `serve` raise, after all the rest is done.
"""

from __future__ import annotations

import contextlib
import os
import tempfile

from ...errors import UsageError
from ...wire.nbd.constants import DEFAULT_PORT, EXTENDED, MAX_STRING, SIMPLE
from .. import process, sockets
from ..process import Wanted, catch_signals, keep_signal_handlers, open_wanted, remove_file, write_pid
from .export import ServedExport
from .incoming import SPIN_US
from .media import MediaWatch
from .server import GRACE_S, HANDSHAKE_S, Server
from .trace import Trace
from .uri import uri_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence


class Settings(process.Settings):
    """What `enban serve` can be told; the defaults are its defaults.

    socket_path: the unix socket; "" makes a private one unless tcp or sockets of systemd are used.
    tcp: listen on TCP; bind: which address, "" this machine alone, "*" all; port: 0 picks one.
    shared: clients at once, 0 for any number. tls_dir: certificates (see storage.tls); "" is plain.
    tls_verify: turn away clients without a certificate of our CA. idle_s: end after so long without a
    client, 0 never. keep_awake: keep the host's processors from sleeping while clients are quick.
    structured_replies: offer them, and extended headers; without, replies are simple ones, and clients
    cannot ask where data are.
    """

    def __init__(self) -> None:
        super().__init__(SPIN_US)
        self.socket_path = ""
        self.tcp = False
        self.bind = ""
        self.port = DEFAULT_PORT
        self.shared = 64
        self.tls_dir = ""
        self.tls_verify = True
        self.idle_s = 0.0
        self.handshake_s = float(HANDSHAKE_S)
        self.grace_s = float(GRACE_S)
        self.keep_awake = False
        self.structured_replies = True
        self.trace = ""


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
        awake = None
        if settings.keep_awake:
            from ...storage.awake import KeepAwake

            awake = KeepAwake()
            stack.callback(awake.close)
        tls = None
        if settings.tls_dir:
            from ...storage.tls import server_context

            tls = server_context(settings.tls_dir, verify_peer=settings.tls_verify)
        exports = [_export(one, settings, stack, trace) for one in wanted]
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
            style=EXTENDED if settings.structured_replies else SIMPLE,
            awake=awake,
            trace=trace,
            log=log,
        )
        catch_signals(server, handlers)
        if settings.pid_file:
            write_pid(settings.pid_file, stack)
        for listener in listeners:
            for export in exports:
                announce(uri_of(listener, export.name, tls=tls is not None))
        media = MediaWatch(server, log)
        media.start()
        try:
            server.run()
        finally:
            media.stop()


def _export(
    one: Wanted, settings: Settings, stack: contextlib.ExitStack, trace: Trace | None
) -> ServedExport:
    door = open_wanted(one, settings, stack)
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
