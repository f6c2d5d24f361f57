"""How bytes of a serial line reach this process: sockets, FIFOs, terminals, ports, files.

One interface (`base`), a text for each (`spec`), nothing that runs by itself.
"""

from __future__ import annotations

from .base import Link, LinkEnded, Transport
from .spec import parse_transport

__all__ = ["Link", "LinkEnded", "Transport", "parse_transport"]
