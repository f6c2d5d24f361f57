"""enban: virtual disks for Python.

    with enban.open("disk.qcow2", writable=True) as disk:
        disk.pwrite(b"hello", 4096)

The public API is this page (blocking) and `enban.aio` (asyncio, the same names). Below it,
each layer imports only what stands lower:

    cli                                   the command
    guest, serial, lab                    machines; their serial lines; the integrity lab
    aio                                   the same for asyncio
    jobs, exports                         work on whole disks; how others reach a disk
    catalog                               the table of drivers, the opener
    temporary                             overlays that vanish
    storage, formats, filters             where bytes rest; how they are arranged; what happens between
    block                                 the engine: contracts, door, requests, locks, mover
    wire                                  pure bytes
    extent                                where bytes live
    units, busy_poll                      sizes and offsets; whether looking before sleeping pays
    errors                                what can go wrong
"""

from __future__ import annotations

from .block.disk import Disk
from .block.gate import CLOSED, SIBLINGS, TRUSTED, Gate
from .errors import EnbanError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from typing import Any

    from .block.cipher import Passphrase
    from .jobs.amend import amend
    from .jobs.backup import backup
    from .jobs.check import check
    from .jobs.commit import commit
    from .jobs.compare import compare
    from .jobs.convert import convert
    from .jobs.create import create
    from .jobs.dd import dd
    from .jobs.info import image_info
    from .jobs.measure import measure
    from .jobs.rebase import rebase
    from .jobs.stream import stream

__version__ = "0.1.0"

__all__ = [
    "CLOSED",
    "SIBLINGS",
    "TRUSTED",
    "Disk",
    "EnbanError",
    "Gate",
    "__version__",
    "amend",
    "backup",
    "check",
    "commit",
    "compare",
    "convert",
    "create",
    "dd",
    "image_info",
    "measure",
    "open",
    "rebase",
    "stream",
]

# Work on whole disks; each is imported when it is first asked for.
_JOBS = {
    "backup": "backup",
    "amend": "amend",
    "check": "check",
    "commit": "commit",
    "compare": "compare",
    "convert": "convert",
    "create": "create",
    "dd": "dd",
    "image_info": "info",
    "measure": "measure",
    "rebase": "rebase",
    "stream": "stream",
}


def __getattr__(name: str) -> Any:
    module = _JOBS.get(name)
    if module is None:
        raise AttributeError(f"module 'enban' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"enban.jobs.{module}"), name)


def open(
    path: str | os.PathLike[str] | dict[str, Any],
    *,
    writable: bool = False,
    format: str = "",
    backing: bool = True,
    cache: str = "writeback",
    gate: Gate = SIBLINGS,
    force_share: bool = False,
    snapshot: bool = False,
    snapshot_dir: str | os.PathLike[str] | None = None,
    snapshot_name: str = "",
    passphrase: Passphrase = None,
) -> Disk:
    """Open a disk image and everything below it.

    path: a file, a URI, a `json:{...}` string, or a dictionary of image options.
    writable: for reading and writing; otherwise nothing is ever written.
    format: the driver's name; "" finds it out from the content.
    backing: False opens the image alone, without what its unallocated clusters show.
    cache: "writeback", "none" (O_DIRECT), "writethrough", "directsync" or "unsafe".
    gate: which files named inside images may be opened: `SIBLINGS` (plain relative names at or
        below the image's directory), `TRUSTED` (all) or `CLOSED` (none).
    force_share: read an image although another process has it open for writing.
    snapshot: the disk can be written to, but all of that goes to a temporary overlay and is gone when the
        disk is closed; the image is only read. `Disk.commit` writes it down into the image after all.
    snapshot_dir: where the overlay's file goes; it has no name. None: $TMPDIR, else /var/tmp.
    snapshot_name: show this internal snapshot (id or name), not the present state; read-only.
    passphrase: of encrypted images in the chain: text or bytes, or a function that is asked with an
        image's name. A wrong one cannot be told from the right one: the data then reads as noise.

    Raises HostError (LockedError, ...), ImageError, UsageError (GateError, ...).
    """
    from os import fspath

    from .block.runtime import BLOCKING, drive
    from .catalog import open_door
    from .errors import UsageError

    if force_share and writable and not snapshot:
        raise UsageError("force_share is for reading only")
    reference = path if isinstance(path, dict) else fspath(path)
    return Disk(
        drive(
            open_door(
                reference,
                BLOCKING,
                format=format,
                writable=writable,
                backing=backing,
                cache=cache,
                gate=gate,
                lock=not force_share,
                snapshot=snapshot,
                snapshot_dir=None if snapshot_dir is None else fspath(snapshot_dir),
                snapshot_name=snapshot_name,
                passphrase=passphrase,
            )
        )
    )
