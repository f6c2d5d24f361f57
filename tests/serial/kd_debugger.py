"""A small debugger for tests: keeps the protocol as WinDbg would, or breaks it where a test says so."""

from __future__ import annotations

import socket
import time
from collections import deque
from types import TracebackType
from typing import Self

from enban.wire.kd import constants as k
from enban.wire.kd import messages as m
from enban.wire.kd.parser import (
    Broken,
    Event,
    Packet,
    Parser,
    ack_id,
    control_packet,
    data_packet,
    next_id,
)
from tests.serial.kd_streams import SocketStream, Stream


class GaveUp(Exception):
    """Nothing came in time."""


class Debugger:
    """acks: "right", "none" or "sync" (SYNC is kept, which is wrong). answers_reset: sends a RESET back for
    each one it gets, its own answer too, which is wrong as well."""

    def __init__(
        self, stream: Stream, *, timeout_s: float = 0.5, acks: str = "right", answers_reset: bool = False
    ) -> None:
        self.stream = stream
        self.timeout_s = timeout_s
        self.acks = acks
        self.answers_reset = answers_reset
        self.id_out = self.id_in = k.INITIAL_ID
        self.printed: list[str] = []
        self.loaded: list[str] = []
        self.retries = 0
        self._parser = Parser()
        self._events: deque[Event] = deque()
        self._kept: deque[m.Message] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stream.close()

    # -- what a debugger does ------------------------------------------------------------------

    def break_in(self) -> None:
        self.stream.write(bytes((k.BREAK_IN,)))

    def reset(self) -> None:
        self.id_out = self.id_in = k.INITIAL_ID
        self.stream.write(control_packet(k.RESET))

    def state(self, timeout_s: float = 5) -> m.Message:
        """The next state change. Load-symbols reports are answered with "go on"."""
        end = time.monotonic() + timeout_s
        while True:
            message = self._message(end)
            if message.is_state and message.code == k.LOAD_SYMBOLS:
                self.loaded.append(message.text)
                self.go()
            elif message.is_state or message.code == k.GET_STRING:
                return message

    def listen(self, seconds: float) -> None:
        """Take and acknowledge what comes, and do nothing else."""
        end = time.monotonic() + seconds
        while (packet := self._packet(end)) is not None:
            if not packet.is_control:
                self._keep(packet)

    def ask(self, api: int, data: bytes = b"", timeout_s: float = 5, **fields: int) -> m.Message:
        """A request and its answer."""
        self.send(k.MANIPULATE, m.manipulate(api, data, **fields))
        end = time.monotonic() + timeout_s
        while True:
            message = self._message(end)
            if message.kind == k.MANIPULATE and message.code == api:
                return message

    def read(self, address: int, length: int) -> bytes:
        return self.ask(k.READ_VIRTUAL, address=address, length=length).data

    def go(self) -> None:
        self.send(k.MANIPULATE, m.manipulate(k.CONTINUE2, go_status=k.DBG_CONTINUE))

    def leave(self) -> None:
        """Step over the int3 and go on."""
        context = bytearray(self.ask(k.GET_CONTEXT).data)
        pc = int.from_bytes(context[0xF8:0x100], "little")
        context[0xF8:0x100] = (pc + 1).to_bytes(8, "little")
        self.ask(k.SET_CONTEXT, bytes(context))
        self.go()

    def answer(self, prompt: m.Message, text: bytes) -> None:
        self.send(k.DEBUG_IO, m.prompt_answer(prompt, text))

    # -- packets -------------------------------------------------------------------------------

    def send(self, kind: int, payload: bytes) -> None:
        """Send until acknowledged. Raises GaveUp."""
        for _ in range(20):
            self.stream.write(data_packet(kind, self.id_out, payload))
            end = time.monotonic() + self.timeout_s
            while (packet := self._packet(end)) is not None:
                if packet.type == k.ACK and packet.id == ack_id(self.id_out):
                    self.id_out = next_id(self.id_out)
                    return
                if packet.type == k.RESEND:
                    break
                if not packet.is_control:
                    self._keep(packet)
            self.retries += 1
        raise GaveUp("no ACK")

    def _message(self, end: float) -> m.Message:
        while not self._kept:
            packet = self._packet(end)
            if packet is None:
                raise GaveUp("no packet")
            if not packet.is_control:
                self._keep(packet)
        return self._kept.popleft()

    def _keep(self, packet: Packet) -> None:
        """Acknowledge a data packet; if it is new, keep what it says."""
        if self.acks != "none":
            id = packet.id if self.acks == "sync" else ack_id(packet.id)
            self.stream.write(control_packet(k.ACK, id))
        if packet.sync:
            self.id_out = k.INITIAL_ID
        elif packet.id != self.id_in:
            return
        self.id_in = next_id(packet.id)
        message = m.decode(packet)
        if packet.type == k.DEBUG_IO and message.code == k.PRINT_STRING:
            self.printed.append(message.text)
        else:
            self._kept.append(message)

    def _packet(self, end: float) -> Packet | None:
        while True:
            while self._events:
                event = self._events.popleft()
                if isinstance(event, Broken):
                    self.stream.write(control_packet(k.RESEND))
                if isinstance(event, Packet):
                    if event.type == k.RESET:
                        self.id_out = self.id_in = k.INITIAL_ID
                        if self.answers_reset:
                            self.stream.write(control_packet(k.RESET))
                    return event
            left = end - time.monotonic()
            if left <= 0:
                return None
            data = self.stream.read(min(left, self.timeout_s))
            self._events += self._parser.receive(data) if data else self._parser.idle()


def connect(
    path: str, *, timeout_s: float = 0.5, acks: str = "right", answers_reset: bool = False
) -> Debugger:
    """A debugger at a unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(path)
    return Debugger(SocketStream(sock), timeout_s=timeout_s, acks=acks, answers_reset=answers_reset)
