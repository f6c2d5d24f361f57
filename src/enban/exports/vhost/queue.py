"""One virtqueue: a thread that takes requests, answers them, and tells the driver.

    wait     look at the ring for a moment (`spin_us`), then sleep until the driver kicks
    batch    every request that is there; hot ones by the node's short cuts: map, one preadv or pwritev
             between the image and the guest's memory; the others as `requests` has it
    call     tell the driver once, if it wants to be told

Reads whose pages are not in the page cache are announced to the host while the rest of a batch is answered,
and read at its end, so that a disk works on all of them at a time.

Rules kept: a batch is in the ledger from before its first short cut to after its last. Every request that
was taken is given back exactly once, and `position` counts those taken: when the thread has ended, what it
took is answered, and another thread or process can go on from `position`. A thread begins with its ring and
settings and never sees them change: whoever changes them ends the thread first (`pause`) and starts another.
"""

from __future__ import annotations

import _thread
import errno
import os
import select
import threading
from time import perf_counter_ns

from ...block import mover
from ...storage import host
from ...wire.virtio_blk import IN, IOERR, OK, OUT, REQUEST, SECTOR, SECTOR_BITS
from ...wire.virtqueue import WRITE, BrokenRing
from .requests import NoRoom
from .spin import Spin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ...wire.virtqueue import Chain, Ring
    from .memory import Log
    from .requests import Device

_LOOKS = 16  # looks at the ring between two moments at which other threads may run
_MOST_PIECES = 512  # of data, for one call to the system
_TOLD = (1).to_bytes(8, "little")
# Whether others see this processor's stores, and it sees theirs, in the order in which they were made.
_ORDERED = os.name != "posix" or os.uname().machine in ("x86_64", "i686")
_NOWAIT = getattr(os, "RWF_NOWAIT", 0)
_U16 = 0xFFFF


class Queue:
    """Ring number `index` of a device.

    position: requests taken, modulo 2**16; where the next thread begins. enabled, started, kick, call, error:
    as the front-end has set them; descriptors of ours, -1 for none. answered: how many requests were, ever.
    broken: why the ring was given up, until it is stopped.
    """

    def __init__(self, index: int, device: Device, spin_us: int) -> None:
        self.index = index
        self.device = device
        self.position = 0
        self.enabled = False
        self.started = False
        self.kick = self.call = self.error = -1
        self.answered = 0
        self.broken = ""
        self._spin = Spin(spin_us)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._nowait = _NOWAIT if host.HAVE_PREADV else 0
        self._barrier = _thread.allocate_lock()
        self._barrier.acquire()
        self._ring: Ring
        self._log: Log | None = None
        self._used_log = -1
        self._used = self._told = 0  # requests given back, and those of which the driver was told
        self._slow = 0  # requests of the present batch that were not answered by a short cut
        self._poller: select.poll

    # -- for the session's thread ------------------------------------------------------------

    def resume(self, ring: Ring, log: Log | None, used_log: int) -> None:
        """Start to answer. log: where what is written is marked; used_log: the guest address of the used
        ring in it, -1 if that is not wanted."""
        assert self._thread is None
        self._ring, self._log, self._used_log = ring, log, used_log
        self._used = self._told = ring.used_index
        self._stopping = False
        self._poller = select.poll()
        self._poller.register(self._wake, select.POLLIN)
        if self.kick >= 0:
            self._poller.register(self.kick, select.POLLIN)
        thread = threading.Thread(target=self._live, name=f"vhost-{self.index}", daemon=True)
        thread.start()
        self._thread = thread

    def pause(self) -> None:
        """End the thread, when what it has taken is answered."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping = True
            os.eventfd_write(self._wake, 1)
            thread.join()
            os.eventfd_read(self._wake)

    def tell(self) -> None:
        """Call the driver, whatever it wants: what it was told another way may have been lost."""
        _signal(self.call)

    def close(self) -> None:
        self.pause()
        for fd in (self.kick, self.call, self.error, self._wake):
            if fd >= 0:
                os.close(fd)
        self.kick = self.call = self.error = self._wake = -1

    # -- the thread --------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            while not self._stopping:
                count = self._ring.waiting(self.position)
                if count:
                    self._batch(count)
                else:
                    self._wait()
        except BrokenRing as error:
            self.broken = str(error)
            self.device.log(f"queue {self.index} is stopped: {error}")
            _signal(self.error)
        except NoRoom as error:
            assert self.device.on_full is not None
            self.device.on_full(str(error))
        except Exception as error:  # a bug of ours must not look like a slow disk
            self.broken = f"{type(error).__name__}: {error}"
            self.device.log(
                f"queue {self.index} is stopped by an error of enban; please report: {self.broken}"
            )
            _signal(self.error)

    def _fence(self) -> None:
        """A full memory barrier: what was stored before is seen before anything is loaded after it."""
        self._barrier.release()
        self._barrier.acquire()

    def _wait(self) -> None:
        """Return when there may be something to do."""
        ring, position = self._ring, self.position & _U16
        spin = self._spin
        if spin.begin():
            found = False
            try:
                ring.quiet()
                found = self._look(ring, position)
            finally:
                spin.end(found)
            if found:
                return
        ring.listen(position)
        self._fence()
        if ring.available_index != position:
            return
        before = perf_counter_ns()
        # Without a descriptor for kicks the driver does not kick: the ring is looked at each millisecond.
        self._poll(None if self.kick >= 0 else 1)
        spin.waited(perf_counter_ns() - before)

    def _look(self, ring: Ring, position: int) -> bool:
        """Look at the ring again and again; whether there is something to do."""
        go_on, until = self._spin.look, perf_counter_ns() + self._spin.length_ns
        while True:
            for _ in range(_LOOKS):
                if ring.available_index != position:
                    return True
            if self._stopping:
                return True
            if not go_on(until):
                return False
            self._poll(0)  # others of our threads get their turn

    def _poll(self, timeout_ms: int | None) -> None:
        for fd, _ in self._poller.poll(timeout_ms):
            if fd == self.kick:
                try:
                    os.read(fd, 8)
                except OSError:
                    pass  # somebody else has read it, or it is none of our business what it is

    # -- a batch -----------------------------------------------------------------------------

    def _batch(self, count: int) -> None:
        ledger = self.device.door.ledger
        entry = ledger.begin_batch()
        before, self._slow = self.answered, 0
        if not _ORDERED:
            self._fence()  # the index was seen, now what it speaks of is
        try:
            nowait = self._nowait if count > 1 else 0
            count -= self._take_plain(count, nowait)
            if count:
                for head, chain in self._take(count, nowait):
                    self._answer(head, chain)
        finally:
            ledger.end_batch(entry, self.answered - before - self._slow)
        self._call()
        if self._slow:
            self._spin.was_slow()

    def _take_plain(self, count: int, nowait: int) -> int:
        """Answer those at the front that are of the most frequent form: a read of one piece, in the largest
        part of the memory, of data that is in one place. How many they were."""
        ring, door = self._ring, self.device.door
        node = door.node
        fd = node.data.plain_fd() if host.HAVE_PREADV and not door.closed else -1
        if fd < 0 or self._log is not None:
            return 0
        plain, locate, size = ring.plain, node.locate, node.size
        start, end, view = ring.memory.parts[0]
        for done in range(count):
            head = ring.head(self.position)
            found = plain(head)
            if found is None:
                return done
            header, data, length, flags, status = found
            if (
                not flags & WRITE
                or not start <= header <= end - 16
                or not start <= data < data + length <= end
                or not start <= status < end
            ):
                return done
            kind, _, sector = REQUEST.unpack_from(view, header - start)
            offset = sector << SECTOR_BITS
            if kind != IN or length % SECTOR or offset + length > size:
                return done
            place = locate(offset, length)
            if place < 0:
                return done
            try:
                if os.preadv(fd, (view[data - start : data - start + length],), place, nowait) != length:
                    return done
            except OSError:
                return done  # it is met again, and translated
            view[status - start] = OK
            ring.put(self._used, head, length + 1)
            if not _ORDERED:
                self._fence()
            self._used = used = (self._used + 1) & _U16
            ring.publish(used)
            self.answered += 1
            self.position = (self.position + 1) & _U16
        return count

    def _take(self, count: int, nowait: int) -> list[tuple[int, Chain]]:
        """Take requests and answer them, but for the reads that would have to wait for the medium."""
        ring, device = self._ring, self.device
        door = device.door
        node = door.node
        fd = node.data.plain_fd() if host.HAVE_PREADV and not door.closed else -1
        may_write = door.writable and not door.writethrough and not device.writethrough
        at, unpack = ring.memory.at, REQUEST.unpack
        late: list[tuple[int, Chain]] = []
        for _ in range(count):
            head = ring.head(self.position)
            chain = ring.chain(head)
            first, last = chain[0], chain[-1]
            done = -1
            # The form that drivers use: a header, data, a status byte. Others are as good, but slower.
            if fd >= 0 and 2 < len(chain) <= _MOST_PIECES and first[1] == 16 and last[1] == 1:
                header, status = at(first[0], 16), at(last[0], 1)
                if header is not None and status is not None and not first[2] & WRITE and last[2] & WRITE:
                    kind, _, sector = unpack(header)
                    if kind == IN or (kind == OUT and may_write):
                        total = 0
                        views = []
                        direction = 0 if kind else WRITE
                        for address, length, flags in chain[1:-1]:
                            view = at(address, length)
                            if view is None or not length or flags & WRITE != direction:
                                total = -1
                                break
                            views.append(view)
                            total += length
                        offset = sector << SECTOR_BITS
                        if total > 0 and not total % SECTOR and offset + total <= node.size:
                            if kind == IN:
                                done = self._read(fd, views, offset, total, nowait)
                                if nowait and 0 <= done < total:
                                    late.append((head, chain))
                                    self.position = (self.position + 1) & _U16
                                    continue
                            else:
                                done = self._write(fd, views, offset, total)
                            if done == total:
                                status[0] = OK
                                self._give_back(head, chain, 1 if kind else total + 1)
                                self.position = (self.position + 1) & _U16
                                continue
            for one in late:
                self._answer(*one)
            late = []
            self._call()  # this one may take its time
            self._answer(head, chain)
            self.position = (self.position + 1) & _U16
        return late

    def _read(self, fd: int, views: list[memoryview], offset: int, total: int, nowait: int) -> int:
        """By the short cut: bytes that were read, 0 if the medium had to be waited for (the host is
        reading ahead), -1 if this is no way."""
        node = self.device.door.node
        place = node.locate(offset, total)
        if place < 0:
            return -1
        try:
            done = os.preadv(fd, views, place, nowait)
        except OSError as error:
            if error.errno == errno.EOPNOTSUPP:
                self._nowait = 0
            if error.errno != errno.EAGAIN:
                return -1  # the door will meet it again, and translate it
            done = 0
        if done < total and nowait:
            host.will_need(fd, place, total)
        return done

    def _write(self, fd: int, views: list[memoryview], offset: int, total: int) -> int:
        """By the short cuts: `total`, or -1 if there is none."""
        node = self.device.door.node
        switches = node.switches
        place = node.locate_write(offset, total)
        if place >= 0 and place + total <= node.data.size():
            try:
                done = os.pwritev(fd, views, place)
            except OSError:
                return -1
            # A snapshot that was made meanwhile has the place too: write again, by the door.
            return done if done == total and switches == node.switches else -1
        if place < 0 and len(views) == 1 and mover.write_now(node, views[0], offset):
            return total
        return -1

    def _answer(self, head: int, chain: Chain) -> None:
        """One request by all the rules. Raises BrokenRing, NoRoom."""
        memory = self._ring.memory
        address, length, flags = chain[-1]
        status = memory.at(address + length - 1, 1) if length and flags & WRITE else None
        if status is None:
            raise BrokenRing("a request without a place for its status")
        self._slow += 1
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        sound = True
        for address, length, flags in chain:
            pieces = memory.pieces(address, length)
            # Each is of some length and in memory, and what the device reads comes first.
            if not pieces or (not flags & WRITE and writable):
                sound = False
                break
            (writable if flags & WRITE else readable).extend(pieces)
        result, written = IOERR, 0
        if sound:
            writable[-1] = writable[-1][:-1]
            result, written = self.device.answer(readable, [view for view in writable if len(view)])
        else:
            self.device.log("a request whose data is not in the guest's memory, or out of order")
        status[0] = result
        self._give_back(head, chain, written + 1)

    def _give_back(self, head: int, chain: Chain, written: int) -> None:
        ring = self._ring
        if self._log is not None:
            for address, length, flags in chain:
                if flags & WRITE:
                    self._log.mark(address, length)
        ring.put(self._used, head, written)
        place = self._used_log + 4 + 8 * (self._used & ring.mask)
        self._used = (self._used + 1) & _U16
        if not _ORDERED:
            self._fence()
        ring.publish(self._used)
        if self._used_log >= 0 and self._log is not None:
            self._log.mark(place, 8)
            self._log.mark(self._used_log, 4)
        self.answered += 1

    def _call(self) -> None:
        """Tell the driver of what was given back, if it wants to know."""
        if self._told == self._used:
            return
        self._fence()
        before, self._told = self._told, self._used
        if self._ring.wants_call(before, self._used):
            _signal(self.call)


def _signal(fd: int) -> None:
    if fd >= 0:
        try:
            os.write(fd, _TOLD)
        except OSError:
            pass  # it is signalled already, or nobody listens any more
