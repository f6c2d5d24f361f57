"""The contract of a node: where do these guest bytes live?

A node is a format over storages. It maps guest ranges to extents (read side) and
allocates space for them (write side); it never moves guest bytes itself, the mover does.
A new format is a class with `lookup` and, if it can be written, `reserve` and `publish`.

Rules for implementers:

- `locate`, `locate_write` and `lookup` are plain calls that never wait: they use tables in
  memory and answer "not here" (-1 or None) when one is missing; `load` brings it in.
- The write side runs under the node's range lock for the unit-aligned range, so no two
  reservations of the same unit are alive at once; tables change under the node's own mutex.
- `reserve` must not make anything visible. `publish` makes it visible in memory; after a
  `flush` it is durable. `abandon` undoes a reservation. Each reservation ends in exactly
  one of the two.
- A guest byte that was never written reads from `backing` if there is one and it is long
  enough, else as zero: say UNALLOCATED and leave the rest to the mover.
"""

from __future__ import annotations

from ..errors import UnsupportedOperationError
from ..extent import COMPRESSED, Extent

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..units import GuestOffset, HostOffset
    from ..wire.qcow2_snapshots import SnapshotEntry
    from .bitmaps import Bitmaps
    from .cipher import Cipher
    from .locks import RangeLocks
    from .requests import Ledger
    from .runtime import Runtime
    from .storage import Storage


class Piece:
    """Space promised to a write: guest [start, start+length) at `host` in `storage`.

    fill: bytes of the range that the caller does not write must be filled with what the
        guest reads there now, because the space is new. False: the space already holds them.
    clean: new space that is known to read as zeros, so zeros need not be written to it.
    token: whatever the node needs to publish or abandon the piece.
    """

    __slots__ = ("clean", "fill", "host", "length", "start", "storage", "token")

    def __init__(
        self,
        start: GuestOffset,
        length: int,
        storage: Storage,
        host: HostOffset,
        *,
        fill: bool,
        clean: bool = False,
        token: object = None,
    ) -> None:
        self.start = start
        self.length = length
        self.storage = storage
        self.host = host
        self.fill = fill
        self.clean = clean
        self.token = token


class Node:
    """Base class of formats.

    name: path or URI of the image, for messages.
    format: name of the driver ("raw", "qcow2", ...).
    size: virtual size in bytes; need not be a multiple of anything.
    unit: allocation unit in bytes: reservations and range locks are aligned to it.
    grain: the smallest range the tables can zero or discard; divides `unit`.
    file: the storage that holds the image; `data`: the storage that `locate` speaks of.
    codec: how COMPRESSED extents are packed ("zlib", "zstd"), "" if there are none.
    cipher: what the bytes of DATA extents are encrypted with, None if they are the guest's as they are.
        With a cipher `locate` and `locate_write` answer -1, DATA extents say `storage` None, and the
        pieces of `reserve` are `fill`, not `clean`, and begin and end at multiples of 512 (or at `size`).
    encrypted: whether the image says that its data is encrypted.
    backing: the node below, or None.
    vm_state_size: bytes of a guest's memory and devices kept beside the disk.
    backing_name, backing_format: what the image says of it ("" if nothing), kept as found.
    ledger: the requests of the disk this node is the top of; set by the door, None below it.
    """

    format: str = ""
    codec: str = ""
    cipher: Cipher | None = None
    encrypted: bool = False
    vm_state_size: int = 0
    # Formats with a fixed cluster size pack exactly `cluster_size` guest bytes per COMPRESSED unit.
    cluster_size: int = 0

    def __init__(self, name: str, runtime: Runtime, file: Storage, *, writable: bool) -> None:
        from .locks import RangeLocks

        self.name = name
        self.runtime = runtime
        self.file = file
        self.data: Storage = file
        self.writable = writable
        self.size = 0
        self.unit = 1
        self.grain = 1
        self.backing: Node | None = None
        self.backing_name = ""
        self.backing_format = ""
        self.ranges: RangeLocks = RangeLocks(runtime)
        self.ledger: Ledger | None = None
        self.switches = 0  # raised whenever all tables change at once: what was ours alone may be shared
        self.generation = 0  # raised whenever space that held packed data may be used anew
        self.unpacked: dict[tuple[int, int], bytes] = {}  # the mover's few last inflated units

    # -- read side -------------------------------------------------------------------------

    def locate(self, offset: GuestOffset, length: int) -> HostOffset:
        """Hot path: the place in `data` of a range that is one plain DATA run, else -1."""
        return -1

    def lookup(self, offset: GuestOffset, length: int) -> Extent | None:
        """The extent at `offset`, at most `length` bytes long, or None if a table is not in memory.

        Called with 0 <= offset < offset + length <= size. The extent starts at `offset`, has
        length >= 1 and may end early (at a table's end, say); callers go on from there. A
        COMPRESSED extent ends at the end of its unit at the latest.
        """
        raise NotImplementedError

    async def load(self, offset: GuestOffset) -> None:
        """Bring in what `lookup(offset, ...)` needs. Raises CorruptImageError, HostError, PeerError."""

    # -- write side ------------------------------------------------------------------------

    def locate_write(self, offset: GuestOffset, length: int) -> HostOffset:
        """Hot path: the place in `data` where the range may be overwritten in place, else -1."""
        return -1

    def claim(self, offset: GuestOffset, length: int) -> Piece | None:
        """Hot path of `reserve`, for a write inside one unit that reads as zeros: its piece, or None
        if anything had to be waited for or is out of the ordinary. The unit's range is locked."""
        return None

    async def vet(self, buffer: bytes | bytearray | memoryview, offset: GuestOffset) -> None:
        """Refuse content that must not be written here. Called before every write off the hot path,
        with the units of the range locked."""

    async def reserve(self, offset: GuestOffset, length: int) -> list[Piece]:
        """Space for a write. The pieces are in guest order, cover the range, and may reach past
        it to unit boundaries; what they reach past `size` is filled with zeros. Raises NoSpaceError,
        HostError, CorruptImageError."""
        raise UnsupportedOperationError(f"format {self.format} cannot be written", path=self.name)

    async def reserve_packed(self, offset: GuestOffset, length: int) -> Piece:
        """Space for `length` packed bytes of the unit at `offset` (a multiple of `cluster_size`)."""
        raise UnsupportedOperationError(f"format {self.format} has no compressed clusters", path=self.name)

    async def publish(self, pieces: list[Piece]) -> None:
        """Let the guest see reserved space; its bytes are in place."""

    async def abandon(self, pieces: list[Piece]) -> None:
        """Give reserved space back; nothing was shown."""

    async def zero(self, offset: GuestOffset, length: int, *, unmap: bool) -> bool:
        """Make a grain-aligned range (or one up to `size`) read as zeros by the tables alone.
        False: this node cannot, nothing was changed, write zeros instead."""
        return False

    def zeroes_fast(self, *, unmap: bool) -> bool:
        """Whether `zero` is sure to do it, without writing the zeros one by one."""
        return False

    async def discard(self, offset: GuestOffset, length: int) -> None:
        """Give back the space of a grain-aligned range where that is safe. Afterwards each
        grain reads as zeros or as before, never as something older."""

    async def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Set the virtual size; grown space reads as zeros even over a longer backing file."""
        raise UnsupportedOperationError(f"format {self.format} cannot be resized", path=self.name)

    async def show_snapshot(self, name: str) -> None:
        """Turn a node that was just opened read-only into the view of an internal snapshot."""
        raise UnsupportedOperationError(f"format {self.format} has no internal snapshots", path=self.name)

    def snapshots_here(self) -> list[SnapshotEntry]:
        """The internal snapshots, oldest first."""
        return []

    async def write_vm_state(self, buffer: memoryview, offset: int) -> bool:
        """Write a part of the VM state. False: nothing was written, `prepare_vm_state` has to come first."""
        raise UnsupportedOperationError(f"format {self.format} has no place for VM state", path=self.name)

    async def prepare_vm_state(self, end: int) -> None:
        """Make room for a VM state of `end` bytes, a new one if the present one was not written since the
        last snapshot was made or applied. No request is in flight."""
        raise UnsupportedOperationError(f"format {self.format} has no place for VM state", path=self.name)

    async def read_vm_state(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` from the VM state; the range lies inside `vm_state_size`."""
        raise UnsupportedOperationError(f"format {self.format} has no place for VM state", path=self.name)

    async def create_snapshot(self, snapshot: SnapshotEntry) -> None:
        """Keep the present state as an internal snapshot, the VM state with it if it is new. For this and
        the next two the range lock of the whole disk is held. They happen as a whole or not at all, whatever
        fails."""
        raise UnsupportedOperationError(f"format {self.format} has no internal snapshots", path=self.name)

    async def apply_snapshot(self, name: str) -> None:
        """Go back to a snapshot, named by id or name: its bytes and its virtual size."""
        raise UnsupportedOperationError(f"format {self.format} has no internal snapshots", path=self.name)

    async def delete_snapshot(self, name: str) -> None:
        """Remove a snapshot."""
        raise UnsupportedOperationError(f"format {self.format} has no internal snapshots", path=self.name)

    async def flush(self) -> None:
        """Make everything published durable."""
        await self.file.flush()

    async def corrupted(self) -> None:
        """The node's tables proved wrong: make sure nobody writes on top of the damage."""

    async def close(self) -> None:
        """Flush what is still in memory if writable, release the storages. Closes only itself,
        not `backing`. The storages are released even if flushing fails; then the error is raised."""
        try:
            if self.writable:
                await self.flush()
        finally:
            await self.file.close()

    async def bitmaps(self) -> Bitmaps:
        """The image's persistent dirty bitmaps."""
        raise UnsupportedOperationError(f"format {self.format} has no dirty bitmaps", path=self.name)

    # -- facts and upkeep --------------------------------------------------------------------

    def runs(self, offset: GuestOffset, length: int) -> list[tuple[GuestOffset, int, int, HostOffset]] | None:
        """`lookup` for those who list a whole disk: many extents from `offset` on, as plain
        (start, length, kind, host). COMPRESSED units that follow each other may be one run, with
        host -1; an UNALLOCATED run has the host offset of space kept for it, else -1."""
        extent = self.lookup(offset, length)
        if extent is None:
            return None
        host = -1 if extent.kind == COMPRESSED else extent.host
        return [(offset, extent.length, extent.kind, host)]

    async def holes(self) -> bool:
        """Whether DATA is likely to lie over holes of the storage, so that asking it pays."""
        return False

    async def describe(self) -> dict[str, Any]:
        """What the image says of itself, under qemu-img info's names, as far as the format has them:
        `encrypted`, `cluster-size`, `snapshots`, `dirty-flag` and `format-specific`."""
        return {}

    async def set_backing(self, name: str, format: str = "") -> None:
        """Name another backing file, or none (""), durably and at once: after a crash the image has
        the old name or the new. Guest data and `backing` stay as they are."""
        raise UnsupportedOperationError(f"format {self.format} has no backing files", path=self.name)

    def state_zeroes(self) -> bool:
        """From now on `zero` marks a range also where it reads as zeros already, because the layer below
        is about to be replaced. False: this node cannot mark zeros, they must be written."""
        return False

    async def make_empty(self) -> None:
        """Forget all guest data, so that the backing file shows everywhere. Nothing else is in flight."""
        raise UnsupportedOperationError(f"format {self.format} cannot be emptied", path=self.name)
