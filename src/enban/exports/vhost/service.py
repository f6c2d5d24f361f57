"""`enban serve --vhost-user` as a process runs it: open the disk, listen, serve until told to stop.

What is undone at the end is undone in the reverse order, whatever fails: see `process`.
"""

from __future__ import annotations

import contextlib

from ...errors import UsageError
from .. import sockets
from ..process import catch_signals, keep_signal_handlers, open_wanted, remove_file, write_pid
from .server import Server

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..process import Settings, Wanted


def serve(
    wanted: Wanted,
    settings: Settings,
    path: str,
    *,
    announce: Callable[[str], None],
    log: Callable[[str], None],
) -> None:
    """Serve a disk at the unix socket `path` until SIGTERM or SIGINT. `announce` gets the path once a
    front-end may come. Call it in the main thread.

    Raises UsageError, HostError, ImageError before anything is served, and what closing raises.
    """
    import os

    if not hasattr(os, "eventfd"):
        raise UsageError("vhost-user needs Linux")
    with contextlib.ExitStack() as stack:
        handlers = keep_signal_handlers(stack)
        door = open_wanted(wanted, settings, stack)
        listener = sockets.listen_unix(path)
        stack.callback(remove_file, path)
        server = Server(door, listener, spin_us=settings.spin_us, log=log)
        catch_signals(server, handlers)
        if settings.pid_file:
            write_pid(settings.pid_file, stack)
        announce(path)
        server.run()
