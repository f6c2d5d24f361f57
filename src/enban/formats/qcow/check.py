"""Checking a qcow image, for which QEMU has no check.

The format counts nothing, so a check asks of every place that a table names: does it lie in
the file, is it used once only, and does packed data unpack? And of the file: which space does
nothing name?

All places in use are collected as runs [start, end) of the file and joined where they touch;
of a sound image a few long runs are left, whatever its size. If the image is so fragmented
that more than MOST_RUNS are left, the check looks at one part of the file after the other.
"""

from __future__ import annotations

from ...block import codec
from ...errors import CorruptDataError, CorruptImageError
from ...units import SECTOR, align_up
from ...wire.qcow import COMPRESSED, HEADER, PLACE_UNIT, unpack_compressed
from ..common.findings import CORRUPTION, ERROR, LEAK, CheckResult, Findings

TYPE_CHECKING = False
if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

    from ...units import GuestOffset, HostOffset
    from .node import QcowNode

MOST_RUNS = 1 << 19
_PENDING = 1 << 16

# Who uses a place: a guest offset, or one of these.
_METADATA = -1
_TABLE = -2  # - index of the L1 entry


class Usage:
    """The runs of the file in use between `low` and `high`, and who uses a place that another uses.

    `high` comes down when there are more runs than `most`.
    """

    def __init__(
        self,
        low: HostOffset,
        high: HostOffset,
        clash: Callable[[HostOffset, HostOffset, int], None],
        *,
        most: int = MOST_RUNS,
        pending: int = _PENDING,
    ) -> None:
        self.low = low
        self.high = high
        self.runs: list[tuple[HostOffset, HostOffset]] = []
        self._clash = clash
        self._most = most
        self._at_once = pending
        self._pending: list[tuple[HostOffset, HostOffset, int]] = []

    def add(self, start: HostOffset, end: HostOffset, user: int) -> None:
        if start < self.high and end > max(start, self.low):
            self._pending.append((start, end, user))
            if len(self._pending) >= self._at_once:
                self.settle()

    def settle(self) -> None:
        """Join what was added to the runs."""
        # What was there before has no user any more: the newcomer is the one to name.
        everything: list[tuple[HostOffset, HostOffset, int | None]] = [(a, b, None) for a, b in self.runs]
        everything.extend(self._pending)
        everything.sort(key=lambda run: run[0])
        self._pending = []
        runs: list[tuple[HostOffset, HostOffset]] = []
        start = end = -1
        last_user: int | None = None  # of what reaches to `end`
        for first, last, user in everything:
            if first < end:
                named = last_user if user is None else user
                if named is not None and max(first, self.low) < self.high:
                    self._clash(first, min(last, end), named)
            elif first > end:
                if end >= 0:
                    runs.append((start, end))
                start = first
            if last > end:
                end, last_user = last, user
        if end >= 0:
            runs.append((start, end))
        self.runs = runs
        if len(runs) > self._most:
            self.high = max(runs[self._most // 2][0], self.low + 1)
            self.runs = [run for run in runs if run[0] < self.high]


class Checker:
    """One check of an open image; `run` once. most, pending: for tests, how much is kept in memory."""

    def __init__(
        self,
        node: QcowNode,
        report: Callable[[int, int], None] | None = None,
        *,
        most: int = MOST_RUNS,
        pending: int = _PENDING,
    ) -> None:
        self.node = node
        self.findings = Findings()
        self.result = CheckResult(node.name, "qcow")
        self._report = report
        self._most = most
        self._at_once = pending
        self._file_size = node.file.size()
        self._first = True  # the first walk looks at every entry, later ones only at places
        self._next: HostOffset = 0  # where a cluster would follow its neighbour
        self._usage = self._new_usage(0)

    def _new_usage(self, low: HostOffset) -> Usage:
        return Usage(low, 1 << 64, self._clash, most=self._most, pending=self._at_once)

    async def run(self) -> CheckResult:
        """Raises HostError; what is wrong with the image is in the result."""
        node, result, findings = self.node, self.result, self.findings
        result.total_clusters = -(-node.size >> node.cluster_bits)
        while True:
            await self._walk()
            self._usage.settle()
            self._count_leaks()
            if self._usage.high >= 1 << 64:
                break
            self._usage = self._new_usage(self._usage.high)
            self._first = False
        if self._report is not None:
            self._report(len(node.l1) or 1, len(node.l1) or 1)
        result.check_errors = findings.total(ERROR)
        result.corruptions = findings.total(CORRUPTION)
        result.leaks = findings.total(LEAK)
        result.findings, result.kinds = findings.kept, findings.kinds
        return result

    async def _walk(self) -> None:
        node, header = self.node, self.node.header
        self._use(0, HEADER.size, _METADATA)
        if header.backing_name:  # without an offset its length says nothing
            self._use(header.backing_offset, header.backing_offset + len(header.backing_name), _METADATA)
        self._use(header.l1_offset, header.l1_offset + len(node.l1) * 8, _METADATA)
        for index, place in enumerate(node.l1):
            if self._report is not None and self._first and not index % 64:
                self._report(index, len(node.l1))
            if not place:
                continue
            try:
                entries = await node.read_table(index)
            except CorruptImageError as error:
                if self._first:
                    self.findings.add("l1-past-end", header.l1_offset + index * 8, error.what)
                continue
            self._use(place, place + node.table_bytes, _TABLE - index)
            await self._check_table(index, entries)

    def _use(self, start: HostOffset, end: HostOffset, user: int) -> None:
        self._usage.add(start, end, user)
        self.result.image_end_offset = max(self.result.image_end_offset, end)

    async def _check_table(self, index: int, entries: array[int]) -> None:
        """Runs of clusters that follow each other are one use."""
        node, result, first = self.node, self.result, self._first
        bits, size = node.cluster_bits, node.cluster_size
        guest = index << node.l2_shift
        run_start = run_end = run_guest = 0
        for position, entry in enumerate(entries):
            if not entry:
                continue
            offset = guest + (position << bits)
            if entry & COMPRESSED:
                host, length = unpack_compressed(entry, bits)
                if first and offset < node.size:
                    result.allocated_clusters += 1
                    result.compressed_clusters += 1
                    result.fragmented_clusters += 1  # as QEMU counts them in qcow2
                if not host or not length or host + length > self._file_size:
                    self._wrong("packed-past-end", index, position, offset, host)
                    continue
                self._use(host, host + length, offset)
                if first:
                    await self._unpack(offset, host, length)
                continue
            if first and offset < node.size:  # a smaller size left the others behind
                result.allocated_clusters += 1
                if self._next and entry != self._next:
                    result.fragmented_clusters += 1
                self._next = entry + size
            if entry % PLACE_UNIT:
                self._wrong("l2-unaligned", index, position, offset, entry)
            elif entry > node.last_place:
                self._wrong("l2-past-end", index, position, offset, entry)
            elif entry == run_end:
                run_end += size
            else:
                if run_end:
                    self._use(run_start, run_end, run_guest)
                run_start, run_end, run_guest = entry, entry + size, offset
        if run_end:
            self._use(run_start, run_end, run_guest)

    def _wrong(self, kind: str, index: int, position: int, offset: GuestOffset, host: HostOffset) -> None:
        if self._first:
            what = "is no multiple of 512" if kind == "l2-unaligned" else "is not inside the file"
            self.findings.add(
                kind,
                self.node.l1[index] + position * 8,
                f"L2 entry of guest offset {offset:#x}: {host:#x} {what}",
            )

    async def _unpack(self, offset: GuestOffset, host: HostOffset, length: int) -> None:
        node = self.node
        packed = await node.file.read(host, length)
        try:
            await node.runtime.offload(self._inflate, packed, host)
        except CorruptDataError as error:
            self.findings.add("packed-unreadable", host, f"guest offset {offset:#x}: {error.what}")

    def _inflate(self, packed: bytearray, host: HostOffset) -> bytes:
        return codec.inflate(
            self.node.codec, packed, self.node.cluster_size, path=self.node.name, offset=host
        )

    def _clash(self, start: HostOffset, end: HostOffset, user: int) -> None:
        if user >= 0:
            who = f"the cluster of guest offset {user:#x} or one of those that follow it"
        elif user == _METADATA:
            who = "the header, the L1 table or the backing file's name"
        else:
            who = f"L2 table {_TABLE - user}"
        count = -(-(end - start) >> self.node.cluster_bits)
        self.findings.add("overlap", start, f"{who} shares {start:#x}-{end:#x} with something else", count)

    def _count_leaks(self) -> None:
        """Gaps between the runs, but not what aligning the next place leaves free."""
        usage, cluster = self._usage, self.node.cluster_size
        position = usage.low
        limit = min(usage.high, self._file_size)
        # New images have their L1 table filled up to whole sectors, wherever it begins.
        l1_offset, l1_bytes = self.node.header.l1_offset, len(self.node.l1) * 8
        for start, end in [*usage.runs, (limit, limit)]:
            gap_end = min(start, limit)
            if position == l1_offset + l1_bytes:
                position = min(gap_end, l1_offset + align_up(l1_bytes, SECTOR))
            length = gap_end - position
            padding = length < SECTOR or (length < cluster and not gap_end % cluster)
            if length > 0 and not padding:
                self.findings.add(
                    "unused",
                    position,
                    f"{length} bytes at {position:#x} are named by no table",
                    -(-length // cluster),
                )
            position = max(position, end)


async def check_image(node: QcowNode, report: Callable[[int, int], None] | None = None) -> CheckResult:
    """What is wrong with an image. report: called with (done, all), in L1 entries."""
    return await Checker(node, report).run()
