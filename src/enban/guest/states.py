"""Whole-machine states: memory, devices and every disk, kept together under one tag.

A state is an internal snapshot of that name on every writable disk. The first of them, the *keeper*, also
holds what QEMU writes when it migrates a machine away (memory and devices) as the snapshot's VM state, where
QEMU's own `savevm` puts it, and in the same form.

    save    pause . stream -> VM state area of the keeper . snapshots of the others . snapshot of the keeper
                                                               from here on it exists ^       . resume
    delete  snapshot of the keeper . snapshots of the others
            ^ from here on it is gone

So a tag without VM state on the keeper is what was left by a crash; it is shown as incomplete and can be
deleted.

Loading gives up the present. So that a crash in the middle, or a state that QEMU will not take, costs
nothing, the present is saved first as the state UNDO:

    load    save UNDO . QEMU ends . each disk goes to TAG . a new QEMU takes TAG's memory . delete UNDO
                                                                     from here on it is loaded ^

`recover`, at the start of a machine, finds UNDO on the keeper after a crash and takes the disks back to it;
where the keeper has none, what others have of it is left over from deleting it, and is deleted.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..block.disk import Disk
from ..errors import CorruptImageError, EnbanError, PeerError, UnsupportedOperationError, UsageError
from ..wire.qcow2_snapshots import SnapshotEntry
from .disks import GuestDisk
from .qmp import Monitor

UNDO = "enban-undo"
MOST_TAG = 128  # letters; it stands in tables and messages
_STEP = 1 << 20


@dataclass(frozen=True, slots=True)
class State:
    """A whole-machine state.

    date_s: unix time. vm_clock_ns: how long the guest had run. vm_state_size: bytes of memory and devices.
    complete: false if a disk lacks it or it has no memory.
    """

    tag: str
    date_s: int
    vm_clock_ns: int
    vm_state_size: int
    complete: bool


def snapshot_of(disk: Disk, tag: str) -> SnapshotEntry | None:
    """The snapshot with this name; ids are not looked at, so a tag may be a number."""
    for entry in disk.snapshots:
        if entry.name == tag:
            return entry
    return None


def writable(disks: Sequence[GuestDisk]) -> list[GuestDisk]:
    """The disks that belong to a state, the keeper first. Raises UsageError if one cannot take part."""
    found = [one for one in disks if one.writable]
    if not found:
        raise UsageError("the machine has no disk that can be written to, so nothing can keep its state")
    for one in found:
        if not one.keeps_snapshots:
            raise UnsupportedOperationError(
                f"a {one.disk.format} image has no snapshots, so the machine's state cannot be kept",
                path=one.name,
                hint="convert it to qcow2, or run the machine with --snapshot",
            )
    return found


def list_states(disks: Sequence[GuestDisk]) -> list[State]:
    """All states, oldest first, incomplete ones too."""
    found: dict[str, State] = {}
    members = [one for one in disks if one.writable]
    for one in members:
        for entry in one.disk.snapshots:
            if entry.name in found or entry.name == UNDO:
                continue
            kept = [snapshot_of(other.disk, entry.name) for other in members]
            keeper = kept[0]
            size = keeper.vm_state_size if keeper is not None else 0
            found[entry.name] = State(
                entry.name, entry.date_s, entry.vm_clock_ns, size, size > 0 and None not in kept
            )
    return sorted(found.values(), key=lambda state: state.date_s)


def check_free(disks: Sequence[GuestDisk], tag: str) -> list[GuestDisk]:
    """The disks to save on. Raises UsageError if the tag is taken on one of them."""
    if not tag or tag == UNDO or len(tag) > MOST_TAG or not tag.isprintable():
        raise UsageError(
            f"{tag[:MOST_TAG]!r} cannot be the tag of a state",
            hint=f"give it another name, of up to {MOST_TAG} printable characters",
        )
    members = writable(disks)
    for one in members:
        if snapshot_of(one.disk, tag) is not None:
            raise UsageError(
                f"there is a snapshot '{tag}' already",
                path=one.name,
                hint="delete it first (snapshot delete), or use another tag",
            )
    return members


def check_whole(disks: Sequence[GuestDisk], tag: str) -> list[GuestDisk]:
    """The disks to load. Raises UsageError if the state is not whole."""
    members = writable(disks)
    for one in members:
        if snapshot_of(one.disk, tag) is None:
            raise UsageError(f"there is no state '{tag}'", path=one.name, hint="see: snapshot list")
    keeper = members[0]
    entry = snapshot_of(keeper.disk, tag)
    assert entry is not None
    if not entry.vm_state_size:
        raise UsageError(
            f"snapshot '{tag}' is of the disk alone, without the machine's memory",
            path=keeper.name,
            hint="use enban snapshot -a on the image while no machine runs",
        )
    return members


# -- the pieces: blocking calls on disks, to be run in a thread ---------------------------------


def keep(members: Sequence[GuestDisk], tag: str, vm_clock_ns: int) -> None:
    """Snapshots on all disks, the keeper's last: it is what makes the state exist."""
    keeper, *others = members
    made: list[GuestDisk] = []
    try:
        for one in others:
            one.disk.create_snapshot(tag, vm_clock_ns=vm_clock_ns)
            made.append(one)
        keeper.disk.create_snapshot(tag, vm_clock_ns=vm_clock_ns)
    except BaseException:
        for one in made:
            _forget_quietly(one, tag)
        raise


def forget(members: Sequence[GuestDisk], tag: str) -> bool:
    """Delete a state wherever it is, the keeper's snapshot first; whether there was any."""
    found = False
    for one in members:
        entry = snapshot_of(one.disk, tag)
        if entry is not None:
            one.disk.delete_snapshot(f"snapshot.id={entry.id}")
            found = True
    return found


def _forget_quietly(one: GuestDisk, tag: str) -> None:
    try:
        forget([one], tag)
    except EnbanError:
        pass  # the error that led here is the one to report


def go_to(members: Sequence[GuestDisk], tag: str) -> None:
    """Every disk goes back to its snapshot."""
    for one in members:
        entry = snapshot_of(one.disk, tag)
        if entry is None:
            raise CorruptImageError(f"snapshot '{tag}' is gone", path=one.name)
        one.disk.apply_snapshot(f"snapshot.id={entry.id}")
        one.resized()


def recover(disks: Sequence[GuestDisk]) -> bool:
    """Undo a load that a crash cut short; whether there was one to undo."""
    members = [one for one in disks if one.writable and one.keeps_snapshots]
    if not members or all(snapshot_of(one.disk, UNDO) is None for one in members):
        return False
    undo = snapshot_of(members[0].disk, UNDO) is not None
    if undo:
        go_to([one for one in members if snapshot_of(one.disk, UNDO) is not None], UNDO)
    forget(members, UNDO)
    return undo


# -- memory: between QEMU and the keeper's VM state area -----------------------------------------


async def save_memory(monitor: Monitor, keeper: Disk, socket: str) -> int:
    """Have a stopped QEMU migrate into the keeper's VM state area; the number of bytes."""
    loop = asyncio.get_running_loop()
    written = 0
    result: asyncio.Future[int] = loop.create_future()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal written
        pending = bytearray()
        try:
            while True:
                data = await reader.read(_STEP)
                pending += data
                if len(pending) >= _STEP or (pending and not data):
                    piece = bytes(pending)
                    pending.clear()
                    await asyncio.to_thread(keeper.write_vm_state, piece, written)
                    written += len(piece)
                if not data:
                    break
            if not result.done():
                result.set_result(written)
        except BaseException as error:
            if not result.done():
                result.set_exception(error)
        finally:
            writer.close()

    server = await asyncio.start_unix_server(take, socket, limit=_STEP)
    try:
        await monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40, "downtime-limit": 2000})
        await monitor.execute("migrate", {"uri": f"unix:{socket}"})
        status = await _migrated(monitor, result)
        if status != "completed":
            if result.done() and not result.cancelled() and result.exception() is not None:
                result.result()  # the disk's own error says more
            raise PeerError(f"QEMU could not write the machine's state ({status})")
        return await asyncio.wait_for(result, 60)
    finally:
        server.close()
        if not result.done():
            result.cancel()
        try:
            os.unlink(socket)
        except FileNotFoundError:
            pass


async def _migrated(monitor: Monitor, stream: asyncio.Future[int] | None) -> str:
    """How a migration ended. (QEMU tells by events too, but only the question is sure to be answered.)"""
    wait_s = 0.01
    while True:
        answer = await monitor.execute("query-migrate")
        status = str(answer.get("status", ""))
        if status in ("completed", "failed", "cancelled"):
            reason = answer.get("error-desc", "")
            return f"{status}: {reason}" if reason else status
        if stream is not None and stream.done() and stream.exception() is not None:
            await monitor.execute("migrate_cancel")
        await asyncio.sleep(wait_s)
        wait_s = min(0.1, wait_s * 1.5)


async def load_memory(
    monitor: Monitor, keeper: Disk, socket: str, ended: Callable[[], Awaitable[int]]
) -> None:
    """Give a QEMU that waits for it the memory in the keeper's active VM state area.

    ended: waits for QEMU to end, which it does when it cannot take the state.
    """
    await monitor.execute("migrate-incoming", {"uri": f"unix:{socket}"})  # QEMU listens there now
    _, writer = await asyncio.open_unix_connection(socket)
    given = asyncio.ensure_future(_give(keeper, writer))
    done = asyncio.ensure_future(_migrated(monitor, None))
    gone = asyncio.ensure_future(ended())
    try:
        await asyncio.wait([done, gone], return_when=asyncio.FIRST_COMPLETED)
        if given.done() and given.exception() is not None:
            given.result()  # the disk's own error says more
        if not done.done() or done.exception() is not None:
            raise PeerError("QEMU ended instead of taking the state")
        if done.result() != "completed":
            raise PeerError(f"QEMU does not take the state ({done.result()})")
    finally:
        for task in (given, done, gone):
            task.cancel()
        await asyncio.wait([given, done, gone])
        writer.close()
        try:
            os.unlink(socket)
        except FileNotFoundError:
            pass


async def _give(keeper: Disk, writer: asyncio.StreamWriter) -> None:
    try:
        offset, size = 0, keeper.vm_state_size
        while offset < size:
            piece = await asyncio.to_thread(keeper.read_vm_state, min(_STEP, size - offset), offset)
            writer.write(piece)
            await writer.drain()
            offset += len(piece)
    except ConnectionError:
        pass  # QEMU has read all it wants, or given up: its status tells
    finally:
        writer.close()
