"""Reads sent from memory that the image's file is mapped to, for all clients of an export by one thread.

Clients that only read, and small pieces that are in the page cache, need no more than a look into tables and
one call a batch: the host takes the data from the page cache into the socket. What is left is the cost of
going from one thread to another, so such clients share one (leader and followers):

    take_part   a connection's thread comes here when its client has been so quick for a while. The first
                to come leads: it receives, answers and waits for all who take part; the others sleep.
    leave       a connection leaves as soon as it has anything for which a thread of its own is due: another
                request, a place that is not known, its end. What was received is left where it is.
                If the leader leaves, the next one leads.

The leader never waits for a client: what does not fit into a socket is sent when there is room again. It does
wait for the medium where data are not in the page cache after all (a major page fault); if those are many,
all leave.

Only where a place in the file keeps its meaning (`ServedExport.stable`). Only the host touches mapped memory,
never this process: so memory that is not there (a file that was cut short, a failing medium) is an error of
the call (EFAULT), not a signal; all leave, and none comes back.

A batch is in the ledger while places are looked up and while its replies go out as far as the client has room
for them; never while the client is waited for.
"""

from __future__ import annotations

import _thread
import errno
import os
import select
from time import perf_counter_ns

from ...busy_poll import BusyPoll
from ...storage import host
from .places import Places

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .export import ServedExport
    from .incoming import Threads
    from .reader import Reader, Replies

# Larger files are not mapped to memory: the tables for it take up to one byte for 512 of the file.
MOST_MAPPED = 64 << 30
# What was used of a mapped file counts as memory of this process, and who has most is ended first when a
# machine has none left: from this size on we have it not count any more.
MOST_RESIDENT = 2 << 30

_LOOK_EVERY = 256  # reads between two looks at the page faults
_MEASURE_EVERY = 16 << 20  # bytes between two looks at the memory; up to 16 times as much is mapped for them
_FEW = 64  # one read in so many may have to wait for the medium


class MappedReads:
    """The readers of one export, and what its file is mapped to. Thread-safe."""

    def __init__(self, export: ServedExport) -> None:
        self._export = export
        self._guard = _thread.allocate_lock()
        self._pages = memoryview(b"")
        self._places: Places  # from `pages` on
        self._may_map = export.stable and host.HAVE_FAULTS
        # Not epoll: that is told of every single request that comes, which the sender's processor pays for.
        self._poll = select.poll()
        self._bell = -1
        self._readers: dict[int, Reader] = {}  # by descriptor
        self._leader: Reader | None = None
        self._faults = 0
        self._unlooked = 0  # reads since the last look at the page faults
        self._unmeasured = 0  # bytes since the last look at the memory

    def pages(self) -> memoryview:
        """The image's file, for reading, once for all clients. Empty where there is none, or it is no
        regular file, or larger than MOST_MAPPED, or was found not to be there."""
        with self._guard:
            if self._may_map:
                self._may_map = False
                self._places = Places(self._export.door)
                fd = self._export.door.node.data.plain_fd()
                if fd >= 0:
                    self._pages = host.map_file(fd, MOST_MAPPED)
            return self._pages

    def release(self) -> None:
        """Let go of the file, when the last client is gone; a mapping would keep it open, and locked."""
        with self._guard:
            self._may_map = False
            self._pages = memoryview(b"")
            if self._bell >= 0:
                self._poll.unregister(self._bell)
                os.close(self._bell)
                self._bell = -1

    # -- in the connection's own thread ------------------------------------------------------

    def take_part(self, reader: Reader) -> None:
        """Have reads answered, until something else is due. What was received and is not answered is in
        `incoming` then. Raises OSError if the client is gone, and EnbanError."""
        if not reader.come():
            return
        os.set_blocking(reader.fd, False)
        reader.replies = self._replies(reader)
        try:
            if not self._enter(reader):
                reader.turn.acquire()
            if self._leader is reader:
                try:
                    self._lead(reader)
                finally:
                    self._resign(reader)
        finally:
            os.set_blocking(reader.fd, True)
            reader.leave()
        if reader.error is not None:
            raise reader.error
        if reader.parts:
            reader.send_rest(self._export)

    def _enter(self, reader: Reader) -> bool:
        """Whether it leads."""
        with self._guard:
            if self._bell < 0:
                self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
                self._poll.register(self._bell, select.POLLIN)
            self._poll.register(reader.fd, select.POLLIN)
            self._readers[reader.fd] = reader
            reader.taking_part = True
            if self._leader is not None:
                os.eventfd_write(self._bell, 1)  # if it sleeps, it does not know of us yet
                return False
            self._leader = reader
            return True

    def _resign(self, leader: Reader) -> None:
        self._leave(leader)  # has been done, unless this thread has met something unforeseen
        with self._guard:
            self._leader = next(iter(self._readers.values()), None)
            if self._leader is not None:
                self._leader.turn.release()

    # -- as the leader -----------------------------------------------------------------------

    def _leave(self, reader: Reader) -> None:
        """From here on its own thread has it."""
        with self._guard:
            if not reader.taking_part:
                return
            del self._readers[reader.fd]
            self._poll.unregister(reader.fd)
            reader.taking_part = False
        if reader is not self._leader:
            reader.turn.release()

    def _lead(self, leader: Reader) -> None:
        threads, looks = leader.threads, BusyPoll(leader.spin_us, short_wait=4)
        self._faults, self._unlooked = host.page_faults(), 0
        while leader.taking_part:
            if self._look(leader):
                continue
            if looks.pays() and self._may_spin(threads) and self._spin(leader, looks):
                continue
            before = perf_counter_ns()
            ready = self._poll.poll()
            looks.waited(perf_counter_ns() - before)
            self._serve(ready)

    def _may_spin(self, threads: Threads) -> bool:
        """Not where clients may be waiting for this very processor."""
        return len(self._readers) <= threads.most and threads.may_spin()

    def _spin(self, leader: Reader, looks: BusyPoll) -> bool:
        threads, busy, found = leader.threads, leader.threads.busy, False
        until = perf_counter_ns() + looks.length_ns
        threads.spinning.add(leader)
        try:
            while not found and not busy and perf_counter_ns() < until:
                found = self._look(leader)
        finally:
            threads.spinning.discard(leader)
        looks.looked(found)
        if found and threads.awake is not None:
            threads.awake.use()
        return found

    def _look(self, leader: Reader) -> bool:
        """Serve who has something now; False if nobody has."""
        if len(self._readers) == 1 and not leader.parts:
            return self._receive(leader)  # ask the only one directly: that saves a call
        ready = self._poll.poll(0)
        self._serve(ready)
        return bool(ready)

    def _serve(self, ready: list[tuple[int, int]]) -> None:
        for fd, _ in ready:
            reader = self._readers.get(fd)
            if reader is None:  # it has left, or this is the bell
                if fd == self._bell:
                    os.eventfd_read(fd)
            elif reader.parts:
                self._send_on(reader)
            else:
                self._receive(reader)

    def _receive(self, reader: Reader) -> bool:
        """Receive and answer; False if there is nothing yet."""
        try:
            n = reader.read_into(reader.room)
            if n is None:
                return False
            reader.incoming.end += n
            if n and self._may_gather(reader):
                reader.gather()
            stays = n > 0 and self._answer(reader)
        except Exception as error:  # raised in the reader's own thread; this one has others to serve
            reader.error = error
            stays = False
        if not stays:
            self._leave(reader)
        if self._unlooked >= _LOOK_EVERY or not self._pages:
            self._look_at_pages()
        return True

    def _may_gather(self, reader: Reader) -> bool:
        """Not where clients may be waiting for this very processor, or others for this thread."""
        threads = reader.threads
        return reader.spin_us > 0 and len(self._readers) == 1 <= threads.most and not threads.busy

    def _send_on(self, reader: Reader) -> None:
        """There is room again for what is left to send."""
        try:
            stays = self._sent(reader, os.writev(reader.fd, reader.parts))
        except BlockingIOError:
            return
        except OSError as error:
            stays = False
            if error.errno == errno.EFAULT:
                self._pages = memoryview(b"")  # the rest is sent by the reader's own thread
            else:
                reader.error = error
        if not stays:
            self._leave(reader)
        if not self._pages:
            self._look_at_pages()

    def _look_at_pages(self) -> None:
        """Whether it goes on like this."""
        before, self._faults = self._faults, host.page_faults()
        cold = (self._faults - before) * _FEW > self._unlooked
        self._unlooked = 0
        if cold or not self._pages:
            for reader in list(self._readers.values()):
                reader.cold = cold
                self._leave(reader)
        elif self._unmeasured >= _MEASURE_EVERY:
            self._unmeasured = 0
            if host.resident_pages() > MOST_RESIDENT:
                host.leave_mapped(self._pages)

    def _answer(self, reader: Reader) -> bool:
        """Answer the requests that a reader has, up to the first that is not for us. False if there is
        such a one. Raises OSError if the client is gone."""
        door, incoming, busy = self._export.door, reader.incoming, reader.threads.busy
        done = sent = 0
        reader.first, reader.past = incoming.start, incoming.end
        reader.transmission.since_ns = perf_counter_ns()
        busy.add(reader)
        entry = reader.entry = door.ledger.begin_batch(reader.entry)
        try:
            if door.closed:
                return False
            parts, reader.past, total = reader.replies(reader.first, reader.past)
            if parts:
                try:
                    sent = os.writev(reader.fd, parts)
                except BlockingIOError:
                    pass
                except OSError as error:
                    if error.errno != errno.EFAULT:
                        raise
                    self._pages = memoryview(b"")
                    return False
                done = len(parts) >> 1
        finally:
            door.ledger.end_batch(entry, done)
            busy.discard(reader)
        incoming.start = reader.past
        self._unlooked += done
        self._unmeasured += total
        reader.transmission.answered += done
        if sent < total:
            reader.parts = parts
            reader.transmission.sending = True
            self._poll.register(reader.fd, select.POLLOUT)
            return self._sent(reader, sent)
        reader.past = reader.first
        return reader.make_room()

    def _replies(self, reader: Reader) -> Replies:
        """The function that `reader.replies` is."""
        export, pages, places = self._export, self._pages, self._places
        base, most = export.base, reader.most
        known, find, shift, unit = places.known, places.find, places.shift, places.unit
        codec, buffer, mask, room = reader.codec, reader.incoming.buffer, unit - 1, len(pages)
        unpack, pack, plain = codec.unpack_glance, codec.pack_read_header, codec.plain_read
        width, header = codec.request_size, codec.read_header_size

        def replies(start: int, end: int) -> tuple[list[bytes | memoryview], int, int]:
            parts: list[bytes | memoryview] = []
            add, size, last, total = parts.append, export.size, end - width, 0
            while start <= last:
                kind, cookie, offset, length = unpack(buffer, start)
                if kind != plain or not 0 < length <= most or offset + length > size:
                    break
                at = base + offset
                place, inside = known[at >> shift], at & mask
                if place >= 0 and inside + length <= unit:
                    place += inside
                else:
                    place = find(at, length)
                if not 0 <= place <= room - length:
                    break
                add(pack(cookie, offset, length))
                add(pages[place : place + length])
                total += length + header
                start += width
            return parts, start, total

        return replies

    def _sent(self, reader: Reader, sent: int) -> bool:
        """So much of the parts is gone. False if a request is next that is not for us."""
        reader.drop(sent)
        if reader.parts:
            return True
        reader.transmission.sending = False
        reader.past = reader.first
        self._poll.register(reader.fd, select.POLLIN)
        return reader.make_room()
