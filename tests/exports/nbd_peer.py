"""A client made of wire.nbd's machines over a plain socket, and a server in a thread to talk to."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from enban.block.door import Door
from enban.block.runtime import BLOCKING, drive
from enban.catalog import open_door
from enban.exports import sockets
from enban.exports.nbd import ServedExport, Server
from enban.exports.nbd.incoming import SPIN_US
from enban.wire.nbd import ClientHandshake, ClientTransmission, Negotiator
from enban.wire.nbd import constants as c
from enban.wire.nbd.negotiator import READY
from enban.wire.nbd.replies import Data, Done, Hole, Status, Transaction

KIB = 1 << 10
MIB = 1 << 20
BOTH_CONTEXTS = (c.BASE_ALLOCATION, "qemu:allocation-depth")


class Answer:
    """What came for one request. status: extents by context name."""

    def __init__(self, length: int) -> None:
        self.data = bytearray(length)
        self.status: dict[str, list[tuple[int, int]]] = {}
        self.error = 0
        self.message = ""


class Peer:
    """A client connection. `ask` waits for its answer; `send` and `collect` are for many at a time."""

    def __init__(
        self,
        where: str | Path | tuple[str, int],
        export: str = "",
        *,
        style: int = c.EXTENDED,
        contexts: tuple[str, ...] = BOTH_CONTEXTS,
    ) -> None:
        if isinstance(where, tuple):
            self.socket = socket.create_connection(where)
        else:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.connect(str(where))
        self.socket.settimeout(30)
        handshake = ClientHandshake()
        negotiator = Negotiator(handshake, export, style=style, contexts=contexts if style else ())
        while negotiator.advance() != READY:
            self.socket.sendall(handshake.to_send())
            data = self.socket.recv(65536)
            if not data:
                handshake.end_of_stream()
            handshake.receive(data)
        assert handshake.session is not None
        self.session = handshake.session
        self.machine = ClientTransmission(self.session, handshake.leftover())
        self._answers: dict[Transaction, Answer] = {}

    def send(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Transaction:
        transaction = self._prepare(kind, offset, length or len(payload), flags)
        self.socket.sendall(transaction.header + payload)
        return transaction

    def send_reads(self, ranges: list[tuple[int, int]]) -> list[Transaction]:
        """Reads of (offset, length) that the server receives in one piece."""
        transactions = [self._prepare(c.CMD_READ, offset, length, 0) for offset, length in ranges]
        self.socket.sendall(b"".join(transaction.header for transaction in transactions))
        return transactions

    def _prepare(self, kind: int, offset: int, length: int, flags: int) -> Transaction:
        transaction = self.machine.request(kind, offset, length, flags)
        self._answers[transaction] = Answer(transaction.length if kind == c.CMD_READ else 0)
        return transaction

    def collect(self, transaction: Transaction) -> Answer:
        while not transaction.done:
            data = self.socket.recv(1 << 20)
            assert data, "the server hung up"
            self.machine.receive(data)
            while event := self.machine.next_event():
                answer = self._answers[event.transaction]
                if isinstance(event, Data):
                    at = event.offset - event.transaction.offset
                    answer.data[at : at + len(event.data)] = event.data
                elif isinstance(event, Hole):
                    pass  # the buffer is zero there already
                elif isinstance(event, Status):
                    answer.status[self.session.contexts[event.context]] = event.extents
                elif isinstance(event, Done):
                    answer.error, answer.message = event.transaction.error, event.transaction.message
        return self._answers.pop(transaction)

    def try_ask(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Answer:
        return self.collect(self.send(kind, offset, length, flags, payload))

    def ask(
        self, kind: int, offset: int = 0, length: int = 0, flags: int = 0, payload: bytes = b""
    ) -> Answer:
        answer = self.try_ask(kind, offset, length, flags, payload)
        assert answer.error == 0, answer.message
        return answer

    def read_together(self, ranges: list[tuple[int, int]]) -> list[bytes]:
        return [bytes(self.collect(transaction).data) for transaction in self.send_reads(ranges)]

    def read(self, offset: int, length: int) -> bytes:
        return bytes(self.ask(c.CMD_READ, offset, length).data)

    def write(self, offset: int, data: bytes, flags: int = 0) -> None:
        self.ask(c.CMD_WRITE, offset, 0, flags, data)

    def send_raw(self, flags: int, kind: int, offset: int, length: int, payload: bytes = b"") -> Transaction:
        """A request that this side's rules would refuse to make."""
        transaction = self.machine.request(c.CMD_FLUSH)
        header = bytearray(self.session.codec.request_size)
        self.session.codec.pack_request_into(header, 0, flags, kind, transaction.cookie, offset, length)
        self._answers[transaction] = Answer(0)
        # So that replies are taken for what was really asked.
        transaction.kind, transaction.offset, transaction.length = kind, offset, length
        self.socket.sendall(bytes(header) + payload)
        return transaction

    def close(self) -> None:
        self.socket.sendall(self.machine.disconnect())
        assert self.socket.recv(1) == b""
        self.machine.end_of_stream()
        self.socket.close()

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class Running:
    """A server in a thread. log: what it said. path: its unix socket."""

    def __init__(self, exports: list[ServedExport], folder: Path, **options: Any) -> None:
        self.path = folder / "nbd.sock"
        self.log: list[str] = []
        options.setdefault("spin_us", SPIN_US)
        self.server = Server(exports, [sockets.listen_unix(str(self.path))], log=self.log.append, **options)
        self.thread = threading.Thread(target=self.server.run)
        self.thread.start()

    def peer(self, export: str = "", **options: Any) -> Peer:
        return Peer(self.path, export, **options)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive(), "the server did not stop"


def open_disk(path: Path, *, writable: bool = True, **options: Any) -> Door:
    return drive(open_door(str(path), BLOCKING, writable=writable, **options))


@contextlib.contextmanager
def serving(
    *doors: Door, folder: Path, names: tuple[str, ...] = ("",), bitmaps: Sequence[str] = (), **options: Any
) -> Iterator[Running]:
    """Serve disks until the block ends; afterwards the books of every one must balance."""
    exports = [ServedExport(door, name, bitmaps=bitmaps) for door, name in zip(doors, names, strict=True)]
    running = Running(exports, folder, **options)
    try:
        yield running
    finally:
        running.stop()
        for door in doors:
            ledger = door.ledger
            assert not ledger.in_flight
            assert ledger.started == ledger.done + ledger.failed + ledger.cancelled
            drive(door.close())
