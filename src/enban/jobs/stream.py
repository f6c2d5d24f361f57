"""Making an image need its backing files no more, or fewer of them.

The work is `block.pull`, the same that an open disk does; here is the part around it.
"""

from __future__ import annotations

from enban.block.disk import Disk
from enban.block.door import Door
from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enban.block.cipher import Passphrase
    from enban.block.gate import Gate
    from enban.jobs.progress import Report


def stream(
    reference: str | dict[str, Any],
    base: str = "",
    *,
    format: str = "",
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    passphrase: Passphrase = None,
    progress: Report | None = None,
) -> int:
    """Copy into an image what it shows of its backing files, and let go of them.

    base: down to which image of the chain, which then is the backing file; a name as stored there or a
        path. "": all of the chain, so that the image stands alone.
    passphrase: of encrypted images, as for `enban.open`.
    The disk reads the same at every moment, and an interrupted run can be begun again.
    Returns the number of guest bytes copied.
    Raises UsageError, HostError (LockedError if an image is in use), ImageError.
    """
    opener = Opener(BLOCKING, gate=gate, cache=cache, passphrase=passphrase)
    node = drive(opener.open_chain(reference, format=format, writable=True))
    writethrough = cache in ("writethrough", "directsync")
    with Disk(Door(node, writable=True, writethrough=writethrough)) as disk:
        return disk.pull(base, progress=progress)
