"""The copying at the heart of a convert: pieces, threads, and who may allocate when.

The guest range is cut into pieces of a few MiB. Several threads each take the next piece,
read it, and find what in it is not zero. Space in the target is handed out in the order of
the pieces (unless `out_of_order`), so the same input gives the same image every time (but for
compressed clusters: isal's packing may vary by a byte); the bytes themselves move in parallel.

Memory: a few buffers of one piece a thread, whatever the size of the images.
"""

from __future__ import annotations

from ..block.codec import deflater
from ..block.disk import Disk
from ..block.mover import fill_zeroes
from ..block.runtime import drive
from ..extent import DATA
from ..storage.host import new_buffer
from ..units import align_down, align_up
from .advice import Advice
from .in_order import InOrder, Stopped
from .packing import ZEROS, Packer, runs
from .sources import READ, SKIP
from .threads import Condition, Worker
from .zeroes import find_data

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from ..block.mover import PlannedWrite
    from ..block.requests import Request
    from .packing import Unit
    from .progress import Report
    from .sources import Sources

    Plan = tuple[PlannedWrite, Request]

PIECE = 2 << 20
# What is only copied goes in larger pieces: half as often do the threads need Python's lock and their turn.
_COPY_PIECE = 4 << 20


class ConvertResult:
    """What a convert did. bytes_read, bytes_written: guest bytes; `verified`: the target was read
    back; `resumed_at`: the guest offset an interrupted run was continued from, or 0."""

    __slots__ = ("bytes_read", "bytes_written", "resumed_at", "size", "verified")

    def __init__(self, size: int) -> None:
        self.size = size
        self.bytes_read = 0
        self.bytes_written = 0
        self.verified = False
        self.resumed_at = 0


_NOTHING = memoryview(b"")
# Packed pieces that may wait for an earlier one: random data is packed 20 times as fast as text.
_MOST_PACKED = 8


class _Piece:
    """buffer and units: what was read, and packed, until it is stored."""

    __slots__ = ("buffer", "length", "number", "start", "units", "zero")

    def __init__(self, number: int, start: int, length: int, zero: bool) -> None:
        self.number = number
        self.start = start
        self.length = length
        self.zero = zero  # all of it reads as zeros
        self.buffer = _NOTHING
        self.units: list[Unit] = []


class Copier:
    """The state that the threads of one convert share."""

    def __init__(
        self,
        sources: Sources,
        target: Disk,
        *,
        size: int,
        fresh: bool,
        grain: int,
        compress: bool,
        out_of_order: bool,
        offload: bool,
        start: int,
        progress: Report | None,
        result: ConvertResult,
    ) -> None:
        self.sources = sources
        self.target = target
        self.size = size
        # Whether what is not written reads as zeros. Over a backing file it does not.
        self.reads_zero = fresh and not sources.top_only
        self.grain = grain
        self.out_of_order = out_of_order
        self.offload = offload
        self.progress = progress
        self.result = result
        self.cluster = target.node.cluster_size
        self.stride = max(PIECE if compress else _COPY_PIECE, self.cluster)
        self._packer: Packer | None = None
        if compress:
            deflate = deflater(target.node.codec)
            self._packer = Packer(sources, deflate, self.cluster, reads_zero=self.reads_zero)
        self._guard = Condition()  # over what follows, and for turns
        self._position = start
        self._number = 0
        self._next_turn = 0
        self._running: dict[int, int] = {}  # piece number -> start
        self._packed = InOrder(self._store_packed, _MOST_PACKED)
        self._spare: list[memoryview] = []
        self._advice = Advice()
        self.stopped: BaseException | None = None

    # -- handing out pieces ----------------------------------------------------------------

    def next_piece(self) -> _Piece | None:
        with self._guard:
            if self.stopped is not None or self._position >= self.size:
                return None
            start = self._position
            end = min(self.size, align_down(start, self.stride) + self.stride)
            length, kind = self.sources.extent(start, end - start)
            zero = kind != READ and start + length >= end
            if zero and end < self.size:  # skip all of a hole at once
                length, kind = self.sources.extent(start, self.size - start)
                if kind != READ:
                    end = start + length
                    if end < self.size:
                        end = align_down(end, self.stride)
            piece = _Piece(self._number, start, end - start, zero)
            self._number += 1
            self._position = end
            self._running[piece.number] = start
            return piece

    def done(self, piece: _Piece) -> None:
        with self._guard:
            del self._running[piece.number]
            completed = self._completed()
        if self.progress is not None:
            self.progress(completed, self.size)

    def completed(self) -> int:
        """Everything before this guest offset is in the target."""
        with self._guard:
            return self._completed()

    def _completed(self) -> int:
        return min(self._running.values(), default=self._position)

    def stop(self, error: BaseException) -> None:
        with self._guard:
            if self.stopped is None:
                self.stopped = error
            self._guard.notify_all()
        self._packed.stop()

    def _wait_turn(self, piece: _Piece) -> None:
        """Wait until every earlier piece has its space. Raises Stopped if the job is over."""
        with self._guard:
            while self._next_turn != piece.number and self.stopped is None and not self.out_of_order:
                self._guard.wait()
            if self.stopped is not None:
                raise Stopped

    def _end_turn(self, piece: _Piece) -> None:
        if self.out_of_order:
            return
        with self._guard:
            self._next_turn = max(self._next_turn, piece.number + 1)
            self._guard.notify_all()

    # -- one piece -------------------------------------------------------------------------

    def work(self) -> None:
        """Copy pieces until there are none; errors go to `stopped`."""
        try:
            while (piece := self.next_piece()) is not None:
                try:
                    buffer = self._spare.pop()
                except IndexError:
                    buffer = new_buffer(min(self.stride, self.size))
                piece.buffer = buffer
                if self._packer is not None:
                    self._pack(piece)
                else:
                    self._copy(piece, buffer)
                    self._finish(piece)
        except Stopped:
            pass
        except BaseException as error:
            self.stop(error)

    def _finish(self, piece: _Piece) -> None:
        self._spare.append(piece.buffer)
        self.done(piece)

    def _copy(self, piece: _Piece, buffer: memoryview) -> None:
        if piece.zero:
            self._wait_turn(piece)
            self._zero(piece.start, piece.length)
            self._end_turn(piece)
            return
        view = buffer[: piece.length]
        if self.offload:
            self._wait_turn(piece)
            self._copy_in_host(piece, view)
            self._end_turn(piece)
        else:
            self._copy_plain(piece, view)

    def _read(self, piece: _Piece, view: memoryview) -> list[tuple[int, int]]:
        """Read a piece; the parts of it that hold data, as offsets into `view`."""
        parts: list[tuple[int, int]] = []
        position, end = piece.start, piece.start + piece.length
        while position < end:
            length, kind = self.sources.extent(position, end - position)
            if kind == READ:
                first = position - piece.start
                if parts and parts[-1][1] == first:
                    parts[-1] = (parts[-1][0], first + length)
                else:
                    parts.append((first, first + length))
            position += length
        for first, last in parts:
            self.sources.read(view[first:last], piece.start + first)
            self.result.bytes_read += last - first
        return parts

    def _read_data(self, piece: _Piece, view: memoryview) -> list[tuple[int, int]]:
        """Read a piece; the parts of it that are to be written, as offsets into `view`."""
        parts = self._read(piece, view)
        if not self.grain:
            return parts
        writes: list[tuple[int, int]] = []
        for first, last in parts:
            lead = -(piece.start + first) % self.grain  # zeros count only in aligned units
            if lead and first + lead < last:
                writes.extend((first + a, first + b) for a, b in find_data(view[first : first + lead], lead))
                first += lead
            writes.extend((first + a, first + b) for a, b in find_data(view[first:last], self.grain))
        return writes

    def _copy_plain(self, piece: _Piece, view: memoryview) -> None:
        writes = self._read_data(piece, view)
        self._wait_turn(piece)
        plans: list[Plan] = []
        try:
            self._zero_between(piece, writes)
            self._plan(piece, view, writes, plans)
        finally:
            self._end_turn(piece)
            self._carry_out(plans)
        self.result.bytes_written += sum(last - first for first, last in writes)

    def _plan(
        self, piece: _Piece, view: memoryview, writes: list[tuple[int, int]], plans: list[Plan]
    ) -> None:
        """Find room in the target for parts of a piece; what is in `plans` has to be carried out."""
        door = self.target.door
        unit, planned_to = self.target.node.unit, -1
        for first, last in _joined(writes):
            if piece.start + first < planned_to:  # in a unit that the plan before holds
                drive(door.run_plan(plans.pop()))
            plan = drive(door.plan_write(view[first:last], piece.start + first))
            plans.append(plan)
            planned_to = align_up(piece.start + last, unit)
            for part in plan[0].pieces:
                self._advice.will_write(part.storage, part.host, part.length)

    def _carry_out(self, plans: list[Plan]) -> None:
        for plan in plans:
            drive(self.target.door.run_plan(plan))
        for plan in plans:
            for part in plan[0].pieces:
                self._advice.has_written(part.storage, part.host, part.length)

    def _zero_between(self, piece: _Piece, writes: list[tuple[int, int]]) -> None:
        if self.reads_zero:
            return
        position = 0
        for first, last in [*writes, (piece.length, piece.length)]:
            if first > position:
                self._zero(piece.start + position, first - position)
            position = last

    def _zero(self, start: int, length: int) -> None:
        """Zero a range of the target that nothing was written to, where it does not read so by itself."""
        end = start + length
        while start < end and not self.reads_zero:
            n, kind = self.sources.extent(start, end - start)
            if kind != SKIP:
                self.target.write_zeroes(start, n)
            start += n

    def _pack(self, piece: _Piece) -> None:
        """Read and pack a piece, and leave it to be stored after those before it."""
        assert self._packer is not None
        if not piece.zero:
            view = piece.buffer[: piece.length]
            fill_zeroes(view)
            self._read(piece, view)
            piece.units = self._packer.units(view, piece.start)
        if self.out_of_order:
            self._store_packed(piece)
        else:
            self._packed.bring(piece.number, piece)

    def _store_packed(self, piece: _Piece) -> None:
        door, file, start = self.target.door, self.target.node.file, piece.start
        if piece.zero:
            self._zero(start, piece.length)
        end = file.size()
        self._advice.will_write(file, end, self.stride)
        for first, run in runs(piece.units, self.cluster):
            last = min(first + len(run) * self.cluster, piece.length)
            packed = [unit for unit in run if unit]
            if packed:
                drive(door.write_packed_run(packed, start + first))
            elif run[0] is ZEROS:
                self.target.write_zeroes(start + first, last - first)
            else:
                drive(door.write(piece.buffer[first:last], start + first))
        self._advice.has_written(file, end, file.size() - end)
        self.result.bytes_written += len(piece.units) * self.cluster
        self._finish(piece)

    def _copy_in_host(self, piece: _Piece, view: memoryview) -> None:
        """Copy without moving bytes through this process where source and target are plain files."""
        position, end = piece.start, piece.start + piece.length
        target = self.target.node
        while position < end:
            length, kind = self.sources.extent(position, end - position)
            if kind == READ:
                disk, start = self.sources.find(position)
                extent = self.sources.where(disk, position - start, length)
                host = target.locate_write(position, length)
                copied = 0
                if extent.kind == DATA and extent.storage is not None and host >= 0:
                    copied = drive(target.data.copy_from(extent.storage, extent.host, host, length))
                if copied:
                    length = copied
                else:
                    first = position - piece.start
                    part = view[first : first + length]
                    self.sources.read(part, position)
                    self.target.pwrite(part, position)
                self.result.bytes_written += length
            else:
                self._zero(position, length)
            position += length


def _joined(writes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Adjacent ranges as one."""
    found: list[tuple[int, int]] = []
    for first, last in writes:
        if found and found[-1][1] == first:
            found[-1] = (found[-1][0], last)
        else:
            found.append((first, last))
    return found


def run_workers(copier: Copier, workers: int, checkpoint: Callable[[], None] | None = None) -> None:
    """Copy everything with `workers` threads; raises what stopped them."""
    threads: list[Worker] = []
    try:
        for _ in range(workers):
            threads.append(Worker(copier.work))
        running = threads
        while running:
            running = [thread for thread in running if not thread.join(0.2)]  # so that Ctrl-C is noticed
            if checkpoint is not None and copier.stopped is None:
                checkpoint()
    except BaseException as error:
        copier.stop(error)
        for thread in threads:
            thread.join()
    if copier.stopped is not None:
        raise copier.stopped
