"""What stands at the other end of vhost-user in tests: a driver's rings in shared memory, and a front-end.

`Driver` fills a split virtqueue by the rules of VIRTIO 1.2, 2.7; it shares no code with the device's side.
`FrontEnd` speaks to a server as QEMU does: memory, rings and events by descriptors on a unix socket.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
from collections.abc import Sequence

from enban.wire import vhost_user as vu
from enban.wire import virtio_blk as blk

MEMORY = 4 << 20
GUEST = 0x10_0000  # the guest's address of the memory's first byte
USER = 0x7F00_0000_0000
DESCRIPTORS, AVAILABLE, USED, HEAP = 0, 0x8000, 0x10000, 0x20000
NEXT, WRITE, INDIRECT = 1, 2, 4
HEADER = struct.Struct("<IIQ")


class Driver:
    """One ring of `size` descriptors in `memory`, which begins at GUEST."""

    def __init__(self, memory: memoryview, size: int = 16, *, event_idx: bool = True, base: int = 0) -> None:
        self.memory = memory
        self.size = size
        self.event_idx = event_idx
        self.base = base
        self.available = 0
        self.seen = 0
        self.heap = base + HEAP
        memory[base : base + HEAP] = bytes(HEAP)

    def u16(self, place: int) -> int:
        return int.from_bytes(self.memory[place : place + 2], "little")

    def put_u16(self, place: int, value: int) -> None:
        self.memory[place : place + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def room(self, length: int) -> int:
        """A place in the memory, 16-byte aligned."""
        place = self.heap
        self.heap += -(-max(1, length) // 16) * 16
        return place

    def store(self, data: bytes) -> int:
        place = self.room(len(data))
        self.memory[place : place + len(data)] = data
        return place

    def describe(self, place: int, address: int, length: int, flags: int, following: int) -> None:
        self.memory[place : place + 16] = struct.pack("<QIHH", address, length, flags, following)

    def chain(self, pieces: Sequence[tuple[int, int, int]], first: int = 0, *, indirect: bool = False) -> int:
        """Describe (place, length, flags); the number of the first descriptor."""
        table = self.room(16 * len(pieces)) if indirect else self.base + DESCRIPTORS
        start = 0 if indirect else first
        for number, (place, length, flags) in enumerate(pieces):
            more = NEXT if number + 1 < len(pieces) else 0
            index = start + number
            self.describe(table + 16 * index, GUEST + place, length, flags | more, index + 1 if more else 0)
        if indirect:
            at = self.base + DESCRIPTORS + 16 * first
            self.describe(at, GUEST + table, 16 * len(pieces), INDIRECT, 0)
        return first

    def offer(self, head: int) -> None:
        place = self.base + AVAILABLE + 4 + 2 * (self.available % self.size)
        self.put_u16(place, head)
        self.available += 1
        self.put_u16(self.base + AVAILABLE + 2, self.available)

    def ask_for_call(self) -> bool:
        """Want to be told of the next chain that is given back; whether it is there already."""
        if self.event_idx:
            self.put_u16(self.base + AVAILABLE + 4 + 2 * self.size, self.seen)
        return self.used != self.seen & 0xFFFF

    @property
    def used(self) -> int:
        return self.u16(self.base + USED + 2)

    def take(self) -> tuple[int, int] | None:
        """The next chain that was given back: (its head, bytes written into it)."""
        if self.used == self.seen & 0xFFFF:
            return None
        place = self.base + USED + 4 + 8 * (self.seen % self.size)
        self.seen += 1
        head, written = struct.unpack("<II", self.memory[place : place + 8])
        return head, written


def request(
    driver: Driver,
    kind: int,
    sector: int,
    data: bytes | int = b"",
    *,
    first: int = 0,
    indirect: bool = False,
    pieces: int = 1,
) -> tuple[int, int, int]:
    """Describe a request with data to write or so many bytes to read, in pieces; (head, data, status)."""
    header = driver.store(HEADER.pack(kind, 0, sector))
    length = data if isinstance(data, int) else len(data)
    place = driver.room(length) if isinstance(data, int) else driver.store(data)
    status = driver.store(b"\xff")
    flags = WRITE if isinstance(data, int) else 0
    parts = [(header, 16, 0)]
    step = max(1, length // pieces)
    for start in range(0, length, step):
        parts.append((place + start, min(step, length - start), flags))
    parts.append((status, 1, WRITE))
    return driver.chain(parts, first, indirect=indirect), place, status


class FrontEnd:
    """A connection to a server, as a machine monitor has it. queues: rings, each with 1 MiB of the memory."""

    def __init__(
        self,
        path: str,
        *,
        queues: int = 1,
        size: int = 16,
        features: int = 0,
        event_idx: bool = True,
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(10)
        self.sock.connect(path)
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, MEMORY)
        self.memory = memoryview(mmap.mmap(self.fd, MEMORY))
        self.size = size
        self.wanted = features | blk.F_VERSION_1 | blk.F_FLUSH | blk.F_INDIRECT | vu.F_PROTOCOL_FEATURES
        self.wanted |= blk.F_EVENT_IDX if event_idx else 0
        self.drivers = [
            Driver(self.memory, size, event_idx=event_idx, base=number << 20) for number in range(queues)
        ]
        self.kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(queues)]
        self.calls = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(queues)]
        self.backend, self._far = socket.socketpair()

    def close(self) -> None:
        for fd in (*self.kicks, *self.calls, self.fd):
            os.close(fd)
        for sock in (self.sock, self.backend, self._far):
            sock.close()

    def send(self, message: bytes, fds: Sequence[int] = ()) -> None:
        socket.send_fds(self.sock, [message], fds)

    def receive(self) -> tuple[int, bytes]:
        head = self.sock.recv(12, socket.MSG_WAITALL)
        if len(head) < 12:
            raise ConnectionError("the server hung up")
        request_, _, size = vu.HEADER.unpack(head)
        return request_, self.sock.recv(size, socket.MSG_WAITALL) if size else b""

    def ask(self, message: bytes, fds: Sequence[int] = ()) -> bytes:
        self.send(message, fds)
        return self.receive()[1]

    def number(self, what: int) -> int:
        return vu.parse_u64(self.ask(vu.pack(what)))

    def told(self, message: bytes, fds: Sequence[int] = ()) -> None:
        """Send what is to be acknowledged."""
        flags = vu.HEADER.unpack(message[:12])[1] | vu.NEED_REPLY
        message = message[:4] + flags.to_bytes(4, "little") + message[8:]
        assert vu.parse_u64(self.ask(message, fds)) == 0

    def negotiate(self) -> None:
        assert self.number(vu.GET_FEATURES) & self.wanted == self.wanted
        protocol = self.number(vu.GET_PROTOCOL_FEATURES)
        self.send(vu.pack_u64(vu.SET_PROTOCOL_FEATURES, protocol))
        self.send(vu.pack(vu.SET_OWNER))
        self.told(vu.pack_u64(vu.SET_FEATURES, self.wanted))
        self.told(vu.pack_u64(vu.SET_BACKEND_REQ_FD, 0), [self._far.fileno()])

    def share(self) -> None:
        self.told(vu.pack_regions([vu.Region(GUEST, MEMORY, USER, 0)]), [self.fd])

    def start(self, *, base: int = 0, log: int = -1) -> None:
        for index, driver in enumerate(self.drivers):
            at = USER + driver.base
            flags = vu.VRING_LOG if log >= 0 else 0
            place = vu.RingAddress(
                index, flags, at + DESCRIPTORS, at + USED, at + AVAILABLE, GUEST + driver.base + USED
            )
            self.told(vu.pack_state(vu.SET_VRING_NUM, index, self.size))
            self.told(vu.pack_state(vu.SET_VRING_BASE, index, base))
            self.told(vu.pack_address(place))
            self.told(vu.pack_u64(vu.SET_VRING_CALL, index), [self.calls[index]])
            self.told(vu.pack_u64(vu.SET_VRING_KICK, index), [self.kicks[index]])
            self.told(vu.pack_state(vu.SET_VRING_ENABLE, index, 1))

    def begin(self) -> FrontEnd:
        self.negotiate()
        self.share()
        self.start()
        return self

    def stop(self, index: int = 0) -> int:
        """Stop a ring; where it was."""
        return vu.parse_state(self.ask(vu.pack_state(vu.GET_VRING_BASE, index, 0)))[1]

    def kick(self, index: int = 0) -> None:
        os.eventfd_write(self.kicks[index], 1)

    def wait_call(self, index: int = 0, timeout_s: float = 10) -> None:
        """Sleep until something was given back; a call may be late, of what was seen without it."""
        while not self.drivers[index].ask_for_call():
            ready, _, _ = select.select([self.calls[index]], [], [], timeout_s)
            assert ready, "the device has not called"
            os.eventfd_read(self.calls[index])

    def run(
        self, kind: int, sector: int, data: bytes | int = b"", *, index: int = 0, indirect: bool = False,
        pieces: int = 1,
    ) -> tuple[int, bytes]:  # fmt: skip
        """One request from begin to end: (status, what was read)."""
        driver = self.drivers[index]
        driver.heap = driver.base + HEAP
        head, place, status = request(driver, kind, sector, data, indirect=indirect, pieces=pieces)
        driver.offer(head)
        self.kick(index)
        while driver.used == driver.seen & 0xFFFF:
            self.wait_call(index)
        assert driver.take() is not None
        length = data if isinstance(data, int) else 0
        return driver.memory[status], bytes(driver.memory[place : place + length])
