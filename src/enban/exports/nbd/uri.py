"""What clients call an export: its NBD URI."""

from __future__ import annotations

import os
import socket
from urllib.parse import quote

from ...wire.nbd.constants import DEFAULT_PORT


def uri_of(sock: socket.socket, export: str, *, tls: bool) -> str:
    """The URI under which clients find an export on a listening socket."""
    scheme = "nbds" if tls else "nbd"
    name = quote(export, safe="")
    if sock.family == socket.AF_UNIX:
        path = sock.getsockname()
        if isinstance(path, bytes):
            path = os.fsdecode(path)
        return f"{scheme}+unix:///{name}?socket={quote(os.path.abspath(path))}"
    host, port = sock.getsockname()[:2]
    host = f"[{host}]" if ":" in host else host
    where = host if port == DEFAULT_PORT else f"{host}:{port}"
    return f"{scheme}://{where}/{name}"
