"""Internal snapshots: create, apply, delete. Each is one `switch`, so a crash leaves the state
before or the state after, and the image checks clean in both."""

from __future__ import annotations

from array import array

from ...errors import CorruptImageError, UnsupportedOperationError, UsageError
from ...wire.qcow2_snapshots import SnapshotEntry
from .switch import Change, read_l1, switch
from .vm_state import drop, first_index

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .node import Qcow2Node


def find(
    snapshots: list[SnapshotEntry], wanted: str, path: str, *, fields: tuple[str, ...] = ("id", "name")
) -> SnapshotEntry:
    """The snapshot that a text means. A name may look like another snapshot's id: then the first of
    `fields` decides. `snapshot.id=TEXT` and `snapshot.name=TEXT` leave no doubt. Raises UsageError."""
    text = wanted
    for field in ("id", "name"):
        if wanted.startswith(f"snapshot.{field}="):
            fields, text = (field,), wanted.partition("=")[2]
    for field in fields:
        for snapshot in snapshots:
            if getattr(snapshot, field) == text:
                return snapshot
    raise UsageError(f"there is no snapshot '{wanted}'", path=path, hint="see: enban snapshot -l")


async def create(node: Qcow2Node, snapshot: SnapshotEntry) -> None:
    """Add a snapshot of the active state. `snapshot` carries name, dates and VM clock; its id
    (unless given), L1 table, disk size and VM state size are filled in here."""
    if node.external:
        raise UnsupportedOperationError(
            "an image with an external data file has no internal snapshots", path=node.name
        )
    if any(snapshot.name == other.name for other in node.snapshots):
        raise UsageError(f"there is a snapshot '{snapshot.name}' already", path=node.name)
    if not snapshot.id:
        numbers = [int(other.id) for other in node.snapshots if other.id.isdigit()]
        snapshot.id = str(max(numbers, default=0) + 1)
    if not node.vm_state_new:
        await drop(node)
    snapshot.vm_state_size = node.vm_state_size
    first = first_index(node)
    active = node.l1[:first]
    active.extend([0] * (len(node.l1) - first))
    snapshot.l1_offset, snapshot.l1_entries = node.header.l1_offset, node.header.l1_entries
    snapshot.disk_size = node.size
    await switch(
        node,
        Change(
            l1=active,
            size=node.size,
            snapshots=[*node.snapshots, snapshot],
            counted=[(active, +1)],  # the VM state goes over to the snapshot, so its counts stay
            freed=[],
        ),
    )
    node.vm_state_size, node.vm_state_new = 0, False


async def delete(node: Qcow2Node, name: str) -> SnapshotEntry:
    """Remove a snapshot; exactly the clusters that only it held become free."""
    # Names first: qemu-img deletes by name alone, and what is gone is gone.
    snapshot = find(node.snapshots, name, node.name, fields=("name", "id"))
    l1 = await read_l1(node, snapshot)
    await switch(
        node,
        Change(
            l1=array("Q", node.l1),
            size=node.size,
            snapshots=[other for other in node.snapshots if other is not snapshot],
            counted=[(l1, -1)],
            freed=[(snapshot.l1_offset, snapshot.l1_entries)],
        ),
    )
    return snapshot


async def apply(node: Qcow2Node, name: str) -> SnapshotEntry:
    """Make the active state that of a snapshot: its bytes, its size; what was active is given up."""
    snapshot = find(node.snapshots, name, node.name)
    l1 = await read_l1(node, snapshot)
    if len(l1) << node.l2_shift < snapshot.disk_size:
        raise CorruptImageError(
            f"L1 table of snapshot '{snapshot.name}' is too small for its {snapshot.disk_size} bytes",
            path=node.name,
            offset=snapshot.l1_offset,
        )
    async with node.mutex:
        await node.prepare_change()
    bitmaps = node.dirty_bitmaps
    if bitmaps is not None and snapshot.disk_size != node.size:
        await bitmaps.prepare_resize(snapshot.disk_size)
    node.mark(0, node.size)  # before and after: all of it may be other bytes
    await switch(
        node,
        Change(
            l1=l1,
            size=snapshot.disk_size,
            snapshots=list(node.snapshots),
            counted=[(l1, +1), (node.l1, -1)],
            freed=[],
        ),
    )
    if bitmaps is not None:
        bitmaps.resized(node.size)
        node.mark(0, node.size)
    node.vm_state_size, node.vm_state_new = snapshot.vm_state_size, False
    return snapshot
