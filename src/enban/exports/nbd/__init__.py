"""Disks served over NBD.

    export          one disk (or a slice of it) under a name: what it offers, block status
    transmission    the loop that answers requests; all the speed is there
    connection      one client from the first byte to the last: handshake, TLS, loop, good-bye
    server          listening, clients, draining, what is in flight
    trace           each request's life as a file for a trace viewer
    uri             what clients call an export
    service         all of it as one process: disks, sockets, signals, pid file

One thread a connection, blocking calls, buffers that are used again. Nothing here knows a
format: requests go through the disk's door, or by its node's short cuts while the ledger
holds an entry for the batch.
"""

from __future__ import annotations

from .export import ServedExport
from .server import Server

__all__ = ["ServedExport", "Server"]
