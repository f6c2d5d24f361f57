"""A front-end's messages: what it says of its memory, rings and features, and what it is told.

Everything that a queue's thread uses is changed only while that thread does not run: `_change` ends the
threads it concerns, lets the change happen, and starts those again that have all they need. A message that
cannot be right ends the session, with one line; queues end in order, whatever ends it.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from struct import error as StructError

from ...errors import EnbanError, PeerError
from ...wire import vhost_user as vu
from ...wire import virtio_blk as blk
from ...wire.virtqueue import Ring, check_size, part_sizes
from .memory import GuestMemory, Log
from .queue import Queue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from .requests import Device

SEGMENTS = 126  # pieces of data in a request: what fits a ring of 128 with header and status
MESSAGE_S = 10.0  # within so long a message that has begun is here
PROTOCOL = (
    vu.PROTOCOL_MQ
    | vu.PROTOCOL_LOG_SHMFD
    | vu.PROTOCOL_REPLY_ACK
    | vu.PROTOCOL_BACKEND_REQ
    | vu.PROTOCOL_CONFIG
)


class _Ring:
    """What was said of one ring."""

    __slots__ = ("address", "size")

    def __init__(self) -> None:
        self.size = 0
        self.address: vu.RingAddress | None = None


class Session:
    """One connection of a front-end. Its methods but `notify_size` are for one thread."""

    def __init__(self, sock: socket.socket, device: Device, *, queues: int, spin_us: int) -> None:
        if sys.byteorder != "little":
            raise PeerError("vhost-user is for little-endian hosts")
        self._sock = sock
        self._device = device
        self._queues = [Queue(index, device, spin_us) for index in range(queues)]
        self._rings = [_Ring() for _ in range(queues)]
        self._memory: GuestMemory | None = None
        self._log: Log | None = None
        self._features = 0
        self._told_size = -1  # that the front-end knows
        self._backend: socket.socket | None = None
        self._guard = threading.Lock()  # of _backend and _told_size
        self._fds: list[int] = []  # that came with the present message and are nobody's yet
        sock.settimeout(MESSAGE_S)

    # -- what the front-end is told ----------------------------------------------------------

    @property
    def _offered(self) -> int:
        features = blk.F_SEG_MAX | blk.F_BLK_SIZE | blk.F_TOPOLOGY | blk.F_FLUSH | blk.F_MQ
        features |= blk.F_VERSION_1 | blk.F_EVENT_IDX | blk.F_INDIRECT
        if self._device.door.writable:
            features |= blk.F_CONFIG_WCE | blk.F_DISCARD | blk.F_WRITE_ZEROES
        else:
            features |= blk.F_RO
        return features | vu.F_LOG_ALL | vu.F_PROTOCOL_FEATURES

    def _config(self) -> bytes:
        node = self._device.door.node
        return blk.pack_config(
            node.size,
            segments=SEGMENTS,
            queues=len(self._queues),
            grain=node.grain,
            writeback=self._device.writeback,
            read_only=not self._device.door.writable,
        ).ljust(vu.MOST_CONFIG, b"\0")

    def notify_size(self) -> bool:
        """Tell the guest that the disk has another size; whether it can be told. From any thread."""
        with self._guard:
            if self._backend is None:
                return False
            try:
                self._backend.send(
                    vu.pack(vu.BACKEND_CONFIG_CHANGE), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL
                )
            except OSError:
                return False
            return True

    @property
    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def answered(self) -> int:
        return sum(queue.answered for queue in self._queues)

    # -- life --------------------------------------------------------------------------------

    def serve_one(self) -> bool:
        """Take one message; False if the front-end has hung up. Raises PeerError, OSError."""
        head = self._receive(vu.HEADER.size, begins=True)
        if not head:
            return False
        try:
            request, flags, size = vu.parse_header(head)
            payload = self._receive(size) if size else b""
            self._carry_out(request, flags, payload)
        finally:
            _close_all(self._fds)
            self._fds = []
        return True

    def _receive(self, size: int, *, begins: bool = False) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part, fds, flags, _ = socket.recv_fds(
                    self._sock, size - len(data), vu.MOST_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except TimeoutError:
                raise PeerError("the front-end has stopped in the middle of a message") from None
            self._fds += fds
            if flags & socket.MSG_CTRUNC or len(self._fds) > vu.MOST_FDS:
                raise PeerError(f"more than {vu.MOST_FDS} descriptors with a message")
            if not part:
                if begins and not data:
                    return b""
                raise PeerError("the front-end hung up in the middle of a message")
            data += part
        return data

    def close(self) -> None:
        """End the queues, what they have taken is answered, and let go of the guest's memory."""
        for queue in self._queues:
            queue.close()
        with self._guard:
            if self._backend is not None:
                self._backend.close()
                self._backend = None
        _close_all(self._fds)
        self._fds = []
        self._memory = self._log = None
        self._sock.close()

    # -- messages ----------------------------------------------------------------------------

    def _carry_out(self, request: int, flags: int, payload: bytes) -> None:
        handler = _HANDLERS.get(request)
        wanted = bool(flags & vu.NEED_REPLY)
        if handler is None:
            # It was not offered what else there is. Who waits for an answer gets one.
            if wanted:
                self._reply(vu.pack_u64(request, 1, vu.REPLY))
            self._device.log(f"vhost-user message {request} is not known here")
            return
        try:
            reply = handler(self, payload)
        except (OSError, StructError, EnbanError) as error:
            name = vu.NAMES.get(request, str(request))
            what = error.what if isinstance(error, EnbanError) else str(error)
            raise PeerError(f"{name}: {what}") from error
        if reply is not None:
            self._reply(vu.pack(request, reply, vu.REPLY))
        elif wanted:
            self._reply(vu.pack_u64(request, 0, vu.REPLY))

    def _reply(self, message: bytes) -> None:
        self._sock.sendall(message)

    def _take_fd(self) -> int:
        """The one descriptor of this message, which is the caller's from now on."""
        if len(self._fds) != 1:
            raise PeerError(f"{len(self._fds)} descriptors, one was expected")
        return self._fds.pop()

    def _queue(self, index: int) -> Queue:
        if index >= len(self._queues):
            raise PeerError(f"ring {index} of {len(self._queues)}")
        return self._queues[index]

    def _change(self, queues: Iterable[Queue], change: Callable[[], None]) -> None:
        """Change what queues go by; those that can run afterwards do."""
        queues = list(queues)
        for queue in queues:
            queue.pause()
        change()
        for queue in queues:
            if queue.started and queue.enabled and not queue.broken:
                self._start(queue)

    def _start(self, queue: Queue) -> None:
        said = self._rings[queue.index]
        if said.address is None or not said.size or self._memory is None:
            raise PeerError(f"ring {queue.index} is to start without addresses, size or memory")
        address = said.address
        places = (address.descriptors, address.available, address.used)
        parts = []
        for place, size, aligned in zip(places, part_sizes(said.size), (16, 2, 4), strict=True):
            part = self._memory.at_user(place, size)
            if part is None or place % aligned:
                raise PeerError(f"ring {queue.index} is not in the guest's memory, or not aligned")
            parts.append(part)
        descriptors, available, used = parts
        ring = Ring(
            said.size,
            self._memory.memory,
            descriptors,
            available,
            used,
            event_idx=bool(self._features & blk.F_EVENT_IDX),
            indirect=bool(self._features & blk.F_INDIRECT),
        )
        log = self._log if self._features & vu.F_LOG_ALL else None
        queue.resume(ring, log, address.log if address.flags & vu.VRING_LOG else -1)
        with self._guard:
            late = self._told_size not in (-1, self._device.door.node.size)
        if late:
            self.notify_size()  # while the rings stood still nobody would have listened

    def _get_features(self, payload: bytes) -> bytes:
        return vu.U64.pack(self._offered)

    def _set_features(self, payload: bytes) -> None:
        features = vu.parse_u64(payload)
        if features & ~self._offered:
            raise PeerError(f"features {features & ~self._offered:#x} were not offered")

        def change() -> None:
            self._features = self._device.features = features
            if not features & vu.F_PROTOCOL_FEATURES:
                for queue in self._queues:
                    queue.enabled = True

        self._change(self._queues, change)

    def _get_protocol_features(self, payload: bytes) -> bytes:
        return vu.U64.pack(PROTOCOL)

    def _set_protocol_features(self, payload: bytes) -> None:
        wanted = vu.parse_u64(payload)
        if wanted & ~PROTOCOL:
            raise PeerError(f"protocol features {wanted & ~PROTOCOL:#x} were not offered")

    def _get_queue_num(self, payload: bytes) -> bytes:
        return vu.U64.pack(len(self._queues))

    def _set_owner(self, payload: bytes) -> None:
        pass

    def _reset_owner(self, payload: bytes) -> None:
        for queue in self._queues:
            queue.pause()
            queue.started = queue.enabled = False

    def _set_mem_table(self, payload: bytes) -> None:
        memory = GuestMemory(vu.parse_regions(payload), self._fds)

        def change() -> None:
            self._memory = memory

        self._change(self._queues, change)

    def _set_log_base(self, payload: bytes) -> bytes:
        size, offset = vu.parse_log(payload)
        if len(self._fds) != 1:
            raise PeerError("a log without its memory")
        log = Log(self._fds[0], offset, size)

        def change() -> None:
            self._log = log

        self._change(self._queues, change)
        return vu.U64.pack(0)

    def _set_log_fd(self, payload: bytes) -> None:
        pass  # an event for changes of the log, which front-ends may give and we need not use

    def _set_vring_num(self, payload: bytes) -> None:
        index, size = vu.parse_state(payload)
        queue = self._queue(index)
        check_size(size)

        def change() -> None:
            self._rings[index].size = size

        self._change([queue], change)

    def _set_vring_addr(self, payload: bytes) -> None:
        address = vu.parse_address(payload)
        queue = self._queue(address.index)

        def change() -> None:
            self._rings[address.index].address = address

        self._change([queue], change)

    def _set_vring_base(self, payload: bytes) -> None:
        index, position = vu.parse_state(payload)
        queue = self._queue(index)

        def change() -> None:
            queue.position = position & 0xFFFF

        self._change([queue], change)

    def _get_vring_base(self, payload: bytes) -> bytes:
        index, _ = vu.parse_state(payload)
        queue = self._queue(index)
        queue.pause()
        queue.started = False
        queue.broken = ""
        for name in ("kick", "call", "error"):
            self._put_fd(queue, name, -1)
        return vu.pack_state(vu.GET_VRING_BASE, index, queue.position)[vu.HEADER.size :]

    def _vring_fd(self, payload: bytes, name: str) -> None:
        wanted = vu.parse_u64(payload)
        queue = self._queue(wanted & vu.INDEX_MASK)
        fd = -1 if wanted & vu.NO_FD else self._take_fd()

        def change() -> None:
            self._put_fd(queue, name, fd)
            if name == "kick":
                queue.started = True
            elif name == "call":
                queue.tell()

        self._change([queue], change)

    def _put_fd(self, queue: Queue, name: str, fd: int) -> None:
        before: int = getattr(queue, name)
        setattr(queue, name, fd)
        if before >= 0:
            os.close(before)

    def _set_vring_kick(self, payload: bytes) -> None:
        self._vring_fd(payload, "kick")

    def _set_vring_call(self, payload: bytes) -> None:
        self._vring_fd(payload, "call")

    def _set_vring_err(self, payload: bytes) -> None:
        self._vring_fd(payload, "error")

    def _set_vring_enable(self, payload: bytes) -> None:
        index, enabled = vu.parse_state(payload)
        queue = self._queue(index)

        def change() -> None:
            queue.enabled = bool(enabled)

        self._change([queue], change)

    def _set_backend_req_fd(self, payload: bytes) -> None:
        fd = self._take_fd()
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            os.close(fd)
            raise
        with self._guard:
            before, self._backend = self._backend, sock
        if before is not None:
            before.close()

    def _get_config(self, payload: bytes) -> bytes:
        offset, wanted = vu.parse_config(payload)
        with self._guard:
            self._told_size = self._device.door.node.size
        content = self._config()[offset : offset + len(wanted)]
        return vu.pack_config(vu.GET_CONFIG, offset, content)[vu.HEADER.size :]

    def _set_config(self, payload: bytes) -> None:
        """Only the cache mode can be set; what else is written changes nothing."""
        offset, content = vu.parse_config(payload)
        if offset <= blk.WRITEBACK_AT < offset + len(content):
            writeback = bool(content[blk.WRITEBACK_AT - offset])

            def change() -> None:
                self._device.writeback = writeback

            self._change(self._queues, change)


def _close_all(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


_HANDLERS: dict[int, Callable[[Session, bytes], bytes | None]] = {
    number: getattr(Session, f"_{name.lower()}") for number, name in vu.NAMES.items()
}
