"""The blocking face of a disk: plain calls, safe from many threads."""

from __future__ import annotations

from ..errors import UsageError
from .runtime import drive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import TracebackType

    from ..extent import Extent
    from ..wire.qcow2_snapshots import SnapshotEntry
    from .bitmaps import BitmapInfo
    from .door import Door
    from .node import Node
    from .storage import ReadBuffer, WriteBuffer
    from .stream import DiskStream


class Disk:
    """A virtual disk. Offsets and lengths are in bytes and need no alignment.

    Made by `enban.open`. Use it in a `with` statement, or call `close`: it writes out what
    is still in memory and raises if that fails.
    """

    __slots__ = ("door",)

    def __init__(self, door: Door) -> None:
        self.door = door

    @property
    def node(self) -> Node:
        return self.door.node

    @property
    def size(self) -> int:
        """Virtual size in bytes."""
        return self.door.node.size

    @property
    def format(self) -> str:
        """Name of the format driver."""
        return self.door.node.format

    @property
    def name(self) -> str:
        """The path or URI it was opened by."""
        return self.door.node.name

    @property
    def writable(self) -> bool:
        return self.door.writable

    def pread(self, length: int, offset: int) -> bytes:
        """`length` bytes from `offset`. Raises OutOfRangeError past the end, HostError, ImageError."""
        self.door.check(offset, length)
        buffer = bytearray(length)
        drive(self.door.read_into(buffer, offset))
        return bytes(buffer)

    def readinto(self, buffer: WriteBuffer, offset: int) -> int:
        """Fill `buffer` from `offset`; its length in bytes is returned."""
        drive(self.door.read_into(buffer, offset))
        return memoryview(buffer).nbytes

    def pwrite(self, data: ReadBuffer, offset: int, *, fua: bool = False) -> int:
        """Write all of `data` at `offset`; with `fua` it is durable on return. Returns its length."""
        drive(self.door.write(data, offset, fua=fua))
        return memoryview(data).nbytes

    def write_packed(self, packed: bytes, offset: int) -> None:
        """Store one whole cluster that `enban.block.codec.deflater` of the node's codec has packed."""
        drive(self.door.write_packed(packed, offset))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeros; with `unmap` its space may be given back."""
        drive(self.door.write_zeroes(offset, length, unmap=unmap))

    def discard(self, offset: int, length: int) -> None:
        """The range is not needed: whole units in it may be given back and then read as zeros."""
        drive(self.door.discard(offset, length))

    def flush(self) -> None:
        """Return once everything written so far is durable."""
        drive(self.door.flush())

    def map(self, offset: int = 0, length: int | None = None) -> Iterator[Extent]:
        """The extents of a range, in order and without gaps, each answered by the layer that has it."""
        end = self.size if length is None else offset + length
        self.door.check(offset, end - offset)
        while offset < end:
            extent = drive(self.door.extent(offset, end - offset))
            yield extent
            offset += extent.length

    def resize(self, size: int, *, preallocation: str = "off") -> None:
        """Set the virtual size in bytes. Bytes beyond a smaller size are lost; new ones read as zeros."""
        drive(self.door.resize(size, preallocation=preallocation))

    def stream(self, *, offset: int = 0, length: int | None = None) -> DiskStream:
        """A raw I/O object over (a part of) the disk, for libraries that want a file."""
        from .stream import DiskStream

        if length is None:
            length = self.size - offset
        if offset < 0 or length < 0 or offset + length > self.size:
            raise UsageError(
                f"range {offset}+{length} is outside the disk of {self.size} bytes", path=self.name
            )
        return DiskStream(self, offset, length)

    @property
    def snapshots(self) -> list[SnapshotEntry]:
        """The internal snapshots, oldest first: id, name, date_s, disk_size, vm_state_size, ..."""
        return self.door.node.snapshots_here()

    def create_snapshot(self, name: str, *, vm_clock_ns: int = 0) -> SnapshotEntry:
        """Keep the present state inside the image, with the VM state written since the last snapshot.
        vm_clock_ns: the guest's time. Raises UsageError if the name is taken."""
        return drive(self.door.create_snapshot(name, vm_clock_ns=vm_clock_ns))

    def apply_snapshot(self, name: str) -> None:
        """Go back to a snapshot (id or name): its bytes and its virtual size."""
        drive(self.door.apply_snapshot(name))

    def delete_snapshot(self, name: str) -> None:
        """Remove a snapshot (name or id)."""
        drive(self.door.delete_snapshot(name))

    @property
    def vm_state_size(self) -> int:
        """Bytes of VM state that can be read: as written, or as an applied snapshot had it."""
        return self.door.node.vm_state_size

    def write_vm_state(self, data: ReadBuffer, offset: int) -> int:
        """Write a part of a guest's memory and devices beside the disk, for the next snapshot to take with
        it. The first write after a snapshot was made or applied begins a new state. Returns its length."""
        drive(self.door.write_vm_state(data, offset))
        return memoryview(data).nbytes

    def read_vm_state(self, length: int, offset: int) -> bytes:
        """`length` bytes of the VM state from `offset`."""
        buffer = bytearray(max(0, min(length, self.vm_state_size - offset + 1)))  # one too many is refused
        drive(self.door.read_vm_state(buffer, offset))
        return bytes(buffer)

    def pull(self, base: str = "", *, progress: Callable[[int, int], None] | None = None) -> int:
        """Copy into the image what it shows of the images below, and let go of them; other requests go on
        meanwhile. base: how far down the chain to let go, a name as stored there or a path; "": all.
        Interrupted, it can be begun again. Returns the number of bytes copied.

        Raises UsageError, HostError, ImageError."""
        return drive(self.door.pull(base, progress))

    def commit(self) -> int:
        """Of a disk opened with `snapshot=True`: write its changes down into the image, and go on with an
        empty overlay. Other requests go on meanwhile. Returns the number of bytes written.

        Raises LockedError if others use the image, ReadOnlyError, HostError, UsageError; the disk then
        reads as before, but the image may have got a part of the changes."""
        return drive(self.door.commit())

    def bitmaps(self) -> list[BitmapInfo]:
        """The persistent dirty bitmaps: name, granularity, enabled, inconsistent. Raises
        UnsupportedOperationError if the format has none, CorruptImageError."""
        return drive(self.door.bitmaps()).infos()

    def add_bitmap(self, name: str, *, granularity: int = 65536, enabled: bool = True) -> None:
        """Make an empty bitmap, a bit for each `granularity` bytes (a power of two from 512 to 2 GiB).
        While it is enabled, everything that is written from now on is recorded in it."""
        drive(self.door.change_bitmaps(lambda found: found.add(name, granularity, enabled=enabled)))

    def remove_bitmap(self, name: str) -> None:
        """Remove a bitmap, also one that is inconsistent."""
        drive(self.door.change_bitmaps(lambda found: found.remove(name)))

    def clear_bitmap(self, name: str) -> None:
        """From now on nothing counts as changed. Raises ImageError if the bitmap is inconsistent, as do
        all below."""
        drive(self.door.change_bitmaps(lambda found: found.clear(name)))

    def enable_bitmap(self, name: str) -> None:
        """Record what is written."""
        drive(self.door.change_bitmaps(lambda found: found.enable(name, True)))

    def disable_bitmap(self, name: str) -> None:
        """Keep the bitmap as it is now."""
        drive(self.door.change_bitmaps(lambda found: found.enable(name, False)))

    def merge_bitmap(self, target: str, source: str, *, of: Disk | None = None) -> None:
        """Add what bitmap `source` (of this disk, or of another one of the same size) says to `target`."""
        found = drive((of or self).door.bitmaps())
        bits = drive(found.bits(source))
        drive(self.door.change_bitmaps(lambda found: found.merge(target, bits)))

    def dirty(self, name: str, offset: int = 0, length: int | None = None) -> Iterator[tuple[int, int]]:
        """What of a range changed, by a bitmap: (offset, length) in bytes, in order."""
        end = self.size if length is None else offset + length
        self.door.check(offset, end - offset)
        bits = drive(drive(self.door.bitmaps()).bits(name))
        yield from bits.extents(offset, end - offset)

    def close(self) -> None:
        drive(self.door.close())

    def __enter__(self) -> Disk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self.door.closed else ("rw" if self.writable else "ro")
        return f"<Disk {self.name!r} {self.format} {self.size} bytes {state}>"
