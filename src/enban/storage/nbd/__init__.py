"""An NBD export as a storage.

    address     which server and export: URIs and image options
    link        one connection, shared by any number of threads
    client      the storage: several links, reconnecting, block status

The work is done by blocking calls, in line on the blocking runtime and in the runtime's
threads on asyncio.
"""

from __future__ import annotations

from .address import OPTIONS, Address
from .client import NbdStorage, open_nbd

__all__ = ["OPTIONS", "Address", "NbdStorage", "open_nbd"]
