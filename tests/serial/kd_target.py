"""A simulated Windows kernel at the end of a serial line, able to misbehave on demand.

    with Target(listen_unix(path), machine) as target:
        ... a debugger connects to path ...
        target.print("hello\n")
        target.hit(address)

It keeps the rules of docs/formats/kd.md: packets are sent again each `timeout_s` (about a second on a real
kernel) until they are acknowledged; load-symbols, print and Manipulate packets give up after 20 tries and
begin both streams anew; exceptions and prompts go on for ever, and nothing else happens meanwhile. A running
target looks at one byte each tick and throws away what is no break-in. What it does wrong is in `Faults`.

One thread, blocking calls, any stream of `kd_streams` (or with the same three methods).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from enban.wire.kd import constants as k
from enban.wire.kd import messages as m
from enban.wire.kd.parser import (
    BreakIn,
    Broken,
    Event,
    Noise,
    Packet,
    Parser,
    ack_id,
    control_packet,
    data_packet,
    next_id,
)
from tests.serial.kd_machine import Machine
from tests.serial.kd_streams import Stream


@dataclass
class Faults:
    """How often to do what. Each count goes down as it happens; `done` says what happened.

    Of what the target sends: lose_byte, corrupt, truncate, drop, duplicate a data packet, `skip` of them
    first. Of what it hears: drop_acks, drop_break_ins, drop_requests (not even acknowledged), ignore_requests
    (acknowledged, not answered). close_in: close the line in the middle of the so-manieth packet from now;
    those that are sent again do not count.
    bytes_per_s: a slow line. pieces: header, payload and trailer as writes of their own.
    """

    skip: int = 0
    lose_byte: int = 0
    corrupt: int = 0
    truncate: int = 0
    drop: int = 0
    duplicate: int = 0
    drop_acks: int = 0
    drop_break_ins: int = 0
    drop_requests: int = 0
    ignore_requests: int = 0
    close_in: int = 0
    bytes_per_s: float = 0
    pieces: bool = False
    done: list[str] = field(default_factory=list)

    def take(self, name: str) -> bool:
        left: int = getattr(self, name)
        if left:
            setattr(self, name, left - 1)
            self.done.append(name)
        return bool(left)


class Stopped(Exception):
    """The target was told to end, or its line closed."""


class Target:
    def __init__(
        self,
        stream: Stream,
        machine: Machine,
        *,
        faults: Faults | None = None,
        timeout_s: float = 1.0,
        tick_s: float = 0.005,
        retries: int = 20,
        images: tuple[str, ...] = (),
    ) -> None:
        self.stream = stream
        self.machine = machine
        self.faults = faults if faults is not None else Faults()
        self.timeout_s = timeout_s
        self.tick_s = tick_s
        self.retries = retries
        self.images = images
        self.state = "booting"  # then running, stopped, ended
        self.id_out = k.INITIAL_ID | k.SYNC
        self.id_in = k.INITIAL_ID
        self.sent: dict[str, int] = {}  # packets by type, repetitions too
        self.given_up = 0
        self.requests: list[int] = []
        self.stops = 0
        self.continues = 0
        self.answers: list[bytes] = []  # to prompts
        self.error: BaseException | None = None
        self._parser = Parser()
        self._events: deque[Event] = deque()
        self._raw: deque[int] = deque()  # bytes that a running target has not looked at
        self._break_in_pending = False  # seen while it waited for an ACK
        self._todo: deque[tuple[str, str, int]] = deque()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._main, name="kd-target", daemon=True)

    # -- for tests -----------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending.set()
        self._thread.join(10)
        self.stream.close()
        assert not self._thread.is_alive()
        if self.error is not None and error is None:
            raise self.error

    def print(self, text: str) -> None:
        self._todo.append(("print", text, 0))

    def prompt(self, text: str) -> None:
        self._todo.append(("prompt", text, 0))

    def load(self, image: str, base: int = 0) -> None:
        self._todo.append(("load", image, base))

    def hit(self, address: int) -> None:
        """Run into the int3 at an address."""
        self._todo.append(("hit", "", address))

    def wait(self, state: str, timeout_s: float = 10) -> None:
        """Until the target is in a state. Raises TimeoutError."""
        end = time.monotonic() + timeout_s
        while self.state != state:
            if time.monotonic() > end:
                raise TimeoutError(f"the target is {self.state}, not {state}")
            time.sleep(0.002)

    # -- the kernel ----------------------------------------------------------------------------

    def _main(self) -> None:
        try:
            for number, image in enumerate(self.images):
                self._load(image, self.machine.kernel_base + number * 0x100000)
            self.state = "running"
            while True:
                self._run_a_tick()
        except (Stopped, EOFError):
            pass
        except BaseException as error:
            self.error = error
        finally:
            self.state = "ended"

    def _run_a_tick(self) -> None:
        if not self._raw:
            self._raw += self._hear(0 if self._todo else self.tick_s)
        else:
            self._ending.wait(self.tick_s)
        pending, self._break_in_pending = self._break_in_pending, False
        seen = bool(self._raw) and self._raw.popleft() == k.BREAK_IN
        if pending or (seen and not self.faults.take("drop_break_ins")):
            self.machine.set("rip", self.machine.break_at)
            self._stop(k.STATUS_BREAKPOINT)
        elif self._todo:
            what, text, number = self._todo.popleft()
            if what == "print":
                self._send(k.DEBUG_IO, m.print_string(text.encode("latin-1")))
            elif what == "prompt":
                self._ask(text)
            elif what == "load":
                self._load(text, number)
            else:
                self.machine.set("rip", number)
                self._stop(k.STATUS_BREAKPOINT)

    def _load(self, image: str, base: int) -> None:
        payload = m.load_symbols64(image, pc=base, base=base, image_size=0x100000)
        self._report(payload, forever=False)

    def _stop(self, code: int) -> None:
        """An exception: everything stands still until the debugger says go. Standing on an int3 stops
        again."""
        while True:
            self.stops += 1
            self.state = "stopped"
            self._report(self.machine.state_change(code), forever=True)
            if not self.machine.on_int3():
                break
            self._ending.wait(self.tick_s)
        self.state = "running"

    def _report(self, payload: bytes, *, forever: bool) -> None:
        """A state change, then requests until the one that sets the machine going. A RESET tells it again."""
        while True:
            if not self._send(k.STATE_CHANGE64, payload, forever=forever):
                return  # nobody is there, and this is not worth waiting for
            while (request := self._request()) is not None:
                api = int.from_bytes(request[:4], "little")
                self.requests.append(api)
                if self.faults.take("ignore_requests"):
                    continue
                if api in k.RESUMING:
                    self.continues += 1
                    return
                if api in k.ANSWERED_BY_STATE:
                    break
                self._send(k.MANIPULATE, self.machine.answer(request))

    def _ask(self, text: str) -> None:
        self.state = "stopped"
        payload = m.prompt_string(text.encode("latin-1"), 16)
        while True:
            self._send(k.DEBUG_IO, payload, forever=True)
            packet = self._data(k.DEBUG_IO)
            if packet is not None:
                break
        message = m.decode(packet)
        self.answers.append(message.data[: message["answer_length"]])
        self.state = "running"

    # -- packets out ---------------------------------------------------------------------------

    def _send(self, kind: int, payload: bytes, *, forever: bool = False) -> bool:
        """Send until acknowledged. False: gave up, and both streams begin anew."""
        tries, heard = 0, ""
        while True:
            packet = data_packet(kind, self.id_out, payload)
            self.sent[k.TYPE_NAMES[kind]] = self.sent.get(k.TYPE_NAMES[kind], 0) + 1
            self._write_packet(packet, again=bool(heard))
            heard = self._wait_for_ack()
            if heard == "ack":
                self.id_out = next_id(self.id_out)
                return True
            if heard == "timeout":
                tries += 1
                if tries > self.retries and not forever:
                    self.given_up += 1
                    self.id_out, self.id_in = k.INITIAL_ID | k.SYNC, k.INITIAL_ID
                    return False

    def _write_packet(self, packet: bytes, *, again: bool) -> None:
        faults = self.faults
        if faults.close_in and not again:
            faults.close_in -= 1
            if not faults.close_in:
                faults.done.append("close_in")
                self._write(packet[: len(packet) // 2])
                self.stream.close()
                raise Stopped
        if faults.skip:
            faults.skip -= 1
        elif faults.take("drop"):
            return
        elif faults.take("lose_byte"):
            packet = packet[:20] + packet[21:]
        elif faults.take("corrupt"):
            packet = packet[:20] + bytes((packet[20] ^ 0x40,)) + packet[21:]
        elif faults.take("truncate"):
            packet = packet[: len(packet) // 2]
        elif faults.take("duplicate"):
            packet += packet
        self._write(packet)

    def _write(self, data: bytes) -> None:
        if self.faults.pieces:
            for piece in (data[:16], data[16:-1], data[-1:]):
                if piece:
                    self.stream.write(piece)
        elif self.faults.bytes_per_s:
            for start in range(0, len(data), 16):
                if self._ending.wait(len(data[start : start + 16]) / self.faults.bytes_per_s):
                    raise Stopped
                self.stream.write(data[start : start + 16])
        else:
            self.stream.write(data)

    # -- packets in ----------------------------------------------------------------------------

    def _hear(self, timeout_s: float) -> bytes:
        if self._ending.is_set():
            raise Stopped
        return self.stream.read(timeout_s)

    def _next(self, timeout_s: float) -> Event | None:
        """The next event; None after so long without one, and what was half received is forgotten."""
        end = time.monotonic() + timeout_s
        while not self._events:
            if self._raw:
                data = bytes(self._raw)
                self._raw.clear()
            else:
                left = end - time.monotonic()
                if left <= 0:
                    self._events += self._parser.idle()
                    return self._events.popleft() if self._events else None
                data = self._hear(min(left, 0.05))
            self._events += self._parser.receive(data)
        return self._events.popleft()

    def _wait_for_ack(self) -> str:
        end = time.monotonic() + self.timeout_s
        while (event := self._next(end - time.monotonic())) is not None:
            if isinstance(event, Broken):
                self._write(control_packet(k.RESEND))
            elif isinstance(event, BreakIn) and self.state == "running":
                self._break_in_pending = not self.faults.take("drop_break_ins")
            if not isinstance(event, Packet):
                continue
            if event.type == k.ACK:
                if self.faults.take("drop_acks"):
                    continue
                if event.id == ack_id(self.id_out):
                    return "ack"
            elif event.type == k.RESEND:
                return "resend"
            elif event.type == k.RESET:
                self._reset()
                return "resend"
            else:
                # Data counts as the ACK; the sender is asked to send it again, for nobody reads it now.
                self._write(control_packet(k.RESEND))
                return "ack"
        return "timeout"

    def _request(self) -> bytes | None:
        """The next Manipulate request, however long it takes; None: report the state again."""
        packet = self._data(k.MANIPULATE)
        return packet.payload if packet is not None else None

    def _data(self, kind: int) -> Packet | None:
        while True:
            event = self._next(self.timeout_s)
            if isinstance(event, Broken):
                self._write(control_packet(k.RESEND))
            if event is None or isinstance(event, (BreakIn, Noise, Broken)) or not isinstance(event, Packet):
                continue
            if event.type == k.RESET:
                self._reset()
                return None
            if event.type == k.RESEND:
                return None
            if event.is_control or self.faults.take("drop_requests"):
                continue
            self._write(control_packet(k.ACK, ack_id(event.id)))
            if event.id != self.id_in or event.type != kind:
                continue  # acknowledged and dropped
            self.id_in = next_id(self.id_in)
            return event

    def _reset(self) -> None:
        self.id_out = self.id_in = k.INITIAL_ID
        self._write(control_packet(k.RESET))
