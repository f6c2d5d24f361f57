"""Changing what an image was created with: compatibility level, refcount width, flags.

Each is done so that a crash leaves the image as it was or as it shall be: whatever differs is written to
where nothing points yet, made durable, and then one write of the header's first sector leads over to it.
Going down to version 2, clusters that only say "zeros" are first made ones that need no such flag; the
guest sees no difference between before and after.
"""

from __future__ import annotations

from array import array

from ...block import mover
from ...errors import HostError, NoSpaceError, UnsupportedOperationError
from ...wire.qcow2 import (
    AUTOCLEAR_BITMAPS,
    EXT_BITMAPS,
    EXT_FEATURE_NAMES,
    LAZY_REFCOUNTS,
    MAX_REFCOUNT_TABLE_BYTES,
    feature_table,
)
from ...wire.qcow2_entries import ALL_ZERO, COMPRESSED, OFFSET_MASK, REFTABLE_MASK
from ..common.tables import to_big_endian
from .barrier import barrier
from .leaving import release_quarantine
from .refcounts import Refcounts, new_counts
from .switch import read_l1
from .upkeep import write_first_sector
from .vm_state import drop

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .node import Qcow2Node

    Report = Callable[[int, int], None] | None

_HEADER_LENGTH = 112  # with the compression type, as QEMU writes it


async def _rewrite_header(node: Qcow2Node) -> None:
    """The fields in memory to the disk, at once; the mutex is held."""
    try:
        await write_first_sector(node)
    except UnsupportedOperationError:
        raise  # nothing was written
    except BaseException:
        node.halt(HostError)  # which of the two the disk has is not known
        raise


async def set_flags(node: Qcow2Node, flag: int, on: bool, *, autoclear: bool = False) -> None:
    """Set or clear a compatible (or autoclear) feature bit."""
    await node.flush()
    async with node.mutex:
        await node.prepare_change()
        kind = "autoclear" if autoclear else "compatible"
        before = getattr(node.header, kind)
        setattr(node.header, kind, before | flag if on else before & ~flag)
        try:
            await _rewrite_header(node)
        except BaseException:
            setattr(node.header, kind, before)
            raise


async def set_extension(node: Qcow2Node, kind: int, content: bytes) -> None:
    """Other content for a header extension."""
    await node.flush()
    async with node.mutex:
        await node.prepare_change()
        before = list(node.header.extensions)
        node.header.set_extension(kind, content)
        try:
            await _rewrite_header(node)
        except BaseException:
            node.header.extensions = before
            raise


# -- the version -----------------------------------------------------------------------------


async def upgrade(node: Qcow2Node) -> None:
    """Version 2 to version 3."""
    header = node.header
    await node.flush()
    async with node.mutex:
        await node.prepare_change()
        before = list(header.extensions)
        header.version, header.header_length = 3, _HEADER_LENGTH
        header.incompatible = header.compatible = header.autoclear = 0
        header.set_extension(EXT_FEATURE_NAMES, feature_table())
        try:
            await _rewrite_header(node)
        except BaseException:
            header.version, header.header_length, header.extensions = 2, 72, before
            raise


async def downgrade(node: Qcow2Node, progress: Report) -> None:
    """Version 3 to version 2. Raises UnsupportedOperationError for what version 2 has not."""
    await _refuse_in_version_2(node)
    await drop(node)
    await _expand_zeroes(node, progress)
    await node.flush()
    header = node.header
    async with node.mutex:
        before = list(header.extensions), header.compatible, header.autoclear, header.header_length
        header.version, header.header_length = 2, 72
        header.compatible = header.autoclear = 0
        header.set_extension(EXT_FEATURE_NAMES, None)
        try:
            await _rewrite_header(node)
        except BaseException:
            header.version = 3
            header.extensions, header.compatible, header.autoclear, header.header_length = before
            raise


async def _refuse_in_version_2(node: Qcow2Node) -> None:
    header = node.header
    bitmaps = header.extension(EXT_BITMAPS) is not None and header.autoclear & AUTOCLEAR_BITMAPS
    for found, what, hint in (
        (header.incompatible, "features that version 2 has not", "convert it with -o compat=0.10"),
        (header.refcount_order != 4, f"{header.refcount_bits}-bit refcounts", "add refcount_bits=16"),
        (bitmaps, "dirty bitmaps", "remove them first: enban bitmap --remove"),
        (
            any(s.disk_size != node.size or s.vm_state_size for s in node.snapshots),
            "snapshots of another size or with VM state",
            "delete them first",
        ),
    ):
        if found:
            raise UnsupportedOperationError(
                f"the image has {what} and cannot get compat level 0.10", path=node.name, hint=hint
            )
    for snapshot in node.snapshots:
        for l1_entry in filter(OFFSET_MASK.__and__, await read_l1(node, snapshot)):
            if any(_only_flagged(entry) for entry in await node.read_l2(l1_entry & OFFSET_MASK)):
                raise UnsupportedOperationError(
                    f"snapshot '{snapshot.name}' has zero clusters, which compat level 0.10 does not know",
                    path=node.name,
                    hint="delete it first",
                )


def _only_flagged(entry: int) -> bool:
    return bool(entry & ALL_ZERO) and not entry & COMPRESSED


async def _expand_zeroes(node: Qcow2Node, progress: Report) -> None:
    """Make zero clusters plain: unallocated where nothing shows through, otherwise zeros that are stored."""
    bits = node.cluster_bits
    for index in range(len(node.l1)):
        if not node.l1[index] & OFFSET_MASK:
            continue
        await node.make_room()
        async with node.mutex:
            await node.prepare_change()
            entries = (await node.load_table(index)).entries
            places = [place for place, entry in enumerate(entries) if _only_flagged(entry)]
            if places and not node.may_show_backing:
                table = await node.own_table(index)
                for place in places:
                    if not node.present(table.entries[place]):
                        table.entries[place] = 0
                        node.cache.touch(index, place, 1)
                places = [place for place in places if table.entries[place]]
        for place in places:
            offset = (index << node.l2_shift) + (place << bits)
            length = min(node.cluster_size, node.size - offset)
            if length > 0:
                with memoryview(bytes(length)) as zeroes:
                    await mover.write(node, zeroes, offset)
        if progress is not None:
            progress(min(node.size, index + 1 << node.l2_shift), node.size)


# -- the width of refcounts --------------------------------------------------------------------


async def set_refcount_bits(node: Qcow2Node, width: int, progress: Report) -> None:
    """Write all refcounts anew, in another width, behind the end of the file. Nothing is in flight."""
    if width == node.header.refcount_bits:
        return
    for _ in range(3):  # what was unlinked is free, and its counts are written
        await barrier(node)
    async with node.mutex:
        await node.prepare_change()
        await release_quarantine(node)
    await barrier(node)
    async with node.mutex:
        await _Widths(node, width, progress).run()


class _Widths:
    def __init__(self, node: Qcow2Node, width: int, progress: Report) -> None:
        self.node = node
        self.order = width.bit_length() - 1
        self.progress = progress
        self.old = node.refcounts
        bits = node.cluster_bits
        self.per_block = node.cluster_size * 8 >> self.order
        self.end = max(self.old.end, -(-node.file.size() >> bits))  # the new tables begin here
        self.blocks = self.table = 0
        while True:
            total = self.end + self.blocks + self.table
            blocks = -(-total // self.per_block)
            table = -(-blocks * 8 >> bits)
            if (blocks, table) == (self.blocks, self.table):
                break
            self.blocks, self.table = blocks, table
        self.total = total
        old = node.header.refcount_table_offset >> bits
        self.freed = set(range(old, old + node.header.refcount_table_clusters))
        self.freed.update((entry & REFTABLE_MASK) >> bits for entry in self.old.table if entry)

    async def run(self) -> None:
        node, bits, file = self.node, self.node.cluster_bits, self.node.file
        if self.table << bits > MAX_REFCOUNT_TABLE_BYTES:
            raise UnsupportedOperationError(
                "the refcount table would be too large", path=node.name, hint="use a smaller refcount width"
            )
        if file.fixed_size and self.total << bits > file.size():
            raise NoSpaceError("there is no room behind the image's end", path=node.name, errno=28)
        entries = array("Q", bytes(self.table << bits))
        for number in range(self.blocks):
            counts = new_counts(bytes(node.cluster_size), self.order)
            counts.store(await self._values(number * self.per_block))
            place = self.end + number << bits
            await file.write(counts.big_endian(0, node.cluster_size), place)
            entries[number] = place
            if self.progress is not None:
                self.progress(number, self.blocks)
        place = self.end + self.blocks << bits
        await file.write(to_big_endian(entries), place)
        await file.flush()
        await self._lead_over(place, entries)

    async def _values(self, first: int) -> list[int]:
        """The new counts of the clusters of one block."""
        values: list[int] = []
        most = min(first + self.per_block, self.total)
        cluster = first
        while cluster < min(most, self.end):
            inside = cluster % self.old.per_block
            span = min(self.old.per_block - inside, min(most, self.end) - cluster)
            block = await self.old.block(cluster // self.old.per_block)
            values += block.counts.values(inside, span) if block is not None else [0] * span
            cluster += span
        for gone in self.freed:
            if first <= gone < first + len(values):
                values[gone - first] = 0
        values += [1] * (most - first - len(values))
        largest = (1 << (1 << self.order)) - 1
        if max(values, default=0) > largest:
            raise UnsupportedOperationError(
                f"a cluster has more references than {1 << self.order} bits can count",
                path=self.node.name,
                hint="delete snapshots first",
            )
        return values

    async def _lead_over(self, place: int, entries: array[int]) -> None:
        node, header, bits = self.node, self.node.header, self.node.cluster_bits
        before = header.refcount_order, header.refcount_table_offset, header.refcount_table_clusters
        header.refcount_order = self.order
        header.refcount_table_offset, header.refcount_table_clusters = place, self.table
        try:
            await _rewrite_header(node)
        except BaseException:
            header.refcount_order, header.refcount_table_offset, header.refcount_table_clusters = before
            raise
        fresh = Refcounts(node.file, header, entries, node.name)
        fresh.metadata = self.old.metadata - {cluster << bits for cluster in self.freed}
        fresh.metadata.update(range(self.end << bits, self.total << bits, 1 << bits))
        node.refcounts = fresh


async def set_lazy(node: Qcow2Node, on: bool) -> None:
    await set_flags(node, LAZY_REFCOUNTS, on)
