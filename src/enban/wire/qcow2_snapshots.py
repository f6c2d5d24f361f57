"""The qcow2 snapshot table, bytes to entries and back.

Rule kept: extra data of an entry that we do not know is carried along; nothing is read outside the table,
and no table is built that others would refuse.

Source: specification, "Snapshots".
"""

from __future__ import annotations

from struct import Struct

from ..errors import CorruptImageError, UnsupportedOperationError
from .qcow2 import MAX_L1_BYTES, MAX_SNAPSHOTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .qcow2 import Header

MAX_SNAPSHOT_TABLE_BYTES = 64 << 20

_SNAPSHOT = Struct(">QIHHIIQII")


class SnapshotEntry:
    """One entry of the snapshot table.

    disk_size: virtual size in bytes when it was taken; vm_state_size: bytes of VM state.
    date_s, date_ns: when it was taken; vm_clock_ns: guest time; icount: None if not stored.
    """

    __slots__ = (
        "date_ns",
        "date_s",
        "disk_size",
        "extra",
        "icount",
        "id",
        "l1_entries",
        "l1_offset",
        "name",
        "vm_clock_ns",
        "vm_state_size",
    )

    def __init__(self) -> None:
        self.l1_offset = 0
        self.l1_entries = 0
        self.id = ""
        self.name = ""
        self.date_s = 0
        self.date_ns = 0
        self.vm_clock_ns = 0
        self.vm_state_size = 0
        self.disk_size = 0
        self.icount: int | None = None
        self.extra = b""

    def __repr__(self) -> str:
        state = f", {self.vm_state_size} bytes of VM state" if self.vm_state_size else ""
        return f"<SnapshotEntry {self.id} {self.name!r} {self.disk_size} bytes{state}>"


def parse_snapshots(
    data: bytes | bytearray, header: Header, *, path: str = ""
) -> tuple[list[SnapshotEntry], int]:
    """(the snapshot table's entries, the table's length in bytes). `data` may run on after it.

    Raises CorruptImageError.
    """
    entries = []
    position = 0
    for number in range(header.snapshot_count):
        if position + _SNAPSHOT.size > len(data):
            raise CorruptImageError(
                f"snapshot table ends inside entry {number}", path=path, offset=header.snapshots_offset
            )
        entry = SnapshotEntry()
        (
            entry.l1_offset,
            entry.l1_entries,
            id_length,
            name_length,
            entry.date_s,
            entry.date_ns,
            entry.vm_clock_ns,
            small_vm_state,
            extra_length,
        ) = _SNAPSHOT.unpack_from(data, position)
        position += _SNAPSHOT.size
        end = position + extra_length + id_length + name_length
        if end > len(data):
            raise CorruptImageError(
                f"snapshot table ends inside entry {number}", path=path, offset=header.snapshots_offset
            )
        extra = bytes(data[position : position + extra_length])
        position += extra_length
        entry.vm_state_size = int.from_bytes(extra[0:8], "big") if len(extra) >= 8 else small_vm_state
        entry.disk_size = int.from_bytes(extra[8:16], "big") if len(extra) >= 16 else header.size
        if len(extra) >= 24 and extra[16:24] != b"\xff" * 8:
            entry.icount = int.from_bytes(extra[16:24], "big")
        entry.extra = extra[24:]
        entry.id = data[position : position + id_length].decode("utf-8", "replace")
        position += id_length
        entry.name = data[position : position + name_length].decode("utf-8", "replace")
        position = -(-end // 8) * 8
        if entry.l1_entries * 8 > MAX_L1_BYTES or entry.l1_offset % header.cluster_size:
            raise CorruptImageError(
                f"snapshot '{entry.name}' has {entry.l1_entries} L1 entries at {entry.l1_offset:#x}",
                path=path,
                offset=header.snapshots_offset,
            )
        entries.append(entry)
    return entries, position


def build_snapshots(entries: list[SnapshotEntry]) -> bytes:
    """The snapshot table of these entries. Raises UnsupportedOperationError if it would be too large."""
    out = bytearray()
    for entry in entries:
        icount = 0xFFFF_FFFF_FFFF_FFFF if entry.icount is None else entry.icount
        numbers = (entry.vm_state_size, entry.disk_size, icount)
        extra = b"".join(number.to_bytes(8, "big") for number in numbers) + entry.extra
        ident, name = entry.id.encode(), entry.name.encode()
        if len(ident) > 0xFFFF or len(name) > 0xFFFF:
            raise UnsupportedOperationError("a snapshot's name is longer than 65535 bytes")
        out += _SNAPSHOT.pack(
            entry.l1_offset,
            entry.l1_entries,
            len(ident),
            len(name),
            entry.date_s,
            entry.date_ns,
            entry.vm_clock_ns,
            min(entry.vm_state_size, 0xFFFF_FFFF),
            len(extra),
        )
        out += extra + ident + name
        out += bytes(-len(out) % 8)
    if len(out) > MAX_SNAPSHOT_TABLE_BYTES or len(entries) > MAX_SNAPSHOTS:
        raise UnsupportedOperationError("the image cannot hold more snapshots")
    return bytes(out)
