"""The doctor of a kernel-debugging session: it watches both directions of a line and says why nothing moves.

    doctor = Doctor()
    doctor.saw(TARGET, data, when_ns)        # side 0, the guest
    doctor.saw(DEBUGGER, data, when_ns)      # side 1
    for verdict in doctor.verdicts():
        print(verdict.words())

It only looks: it answers for nobody and changes nothing. All it knows comes from bytes and the times they
came at, so a recording of these gives the same verdicts again. Times are nanoseconds of one clock that does
not go back; only differences count. Memory is bounded, whatever the session's length.

`tracking` keeps the facts of each side, `verdicts` reads them; this module takes the bytes in and follows
what concerns both sides: is the guest running, which request is out, who began the streams anew.
"""

from __future__ import annotations

from collections import deque

from ..wire.kd import constants as k
from ..wire.kd.messages import Message, decode
from ..wire.kd.parser import BreakIn, Broken, Event, Noise, Packet
from .judge import judge
from .tracking import DEBUGGER, SECOND, SIDES, TARGET, WINDOW, Sender
from .verdicts import Verdict

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

RUNNING, STOPPED, UNKNOWN = "running", "stopped", "unknown"
__all__ = ["DEBUGGER", "RUNNING", "SIDES", "STOPPED", "TARGET", "UNKNOWN", "Doctor", "Request", "Verdict"]


class Request:
    """A request of the debugger (a Manipulate packet) and what became of it."""

    __slots__ = ("acked_ns", "answered_ns", "api", "packet", "sent_ns")

    def __init__(self, packet: Packet, api: int, when_ns: int) -> None:
        self.packet = packet
        self.api = api
        self.sent_ns = when_ns
        self.acked_ns = self.answered_ns = 0

    @property
    def is_open(self) -> bool:
        return not self.answered_ns

    @property
    def words(self) -> str:
        return decode(self.packet).words()


class Doctor:
    """Watches one line.

    timeout_ns: how long the guest's kernel waits for an ACK before it sends again; about a second on real
    ones.
        What counts as late or silent is measured by it.
    on_event: called with (side, event, when_ns) for each packet, break-in, noise and broken packet.
    """

    def __init__(
        self, *, timeout_ns: int = SECOND, on_event: Callable[[int, Event, int], None] | None = None
    ) -> None:
        self.timeout_ns = timeout_ns
        self.on_event = on_event
        self.sides = (Sender(TARGET, timeout_ns), Sender(DEBUGGER, timeout_ns))
        self.began_ns = -1  # when watching began
        self.now_ns = 0
        self.state = UNKNOWN
        self.stop: Packet | None = None  # what stopped the guest
        self.stop_ns = 0
        self.stop_acked_ns = 0
        self.requests_since_stop = 0
        self.requests = 0
        self.request: Request | None = None  # the last one
        self.unanswered_run = 0  # acknowledged requests that were given up, without an answered one between
        self.progress_ns = 0  # when something new last happened: not a retransmission, not a RESET
        self.round_trip_ns: deque[int] = deque(maxlen=WINDOW)
        self.break_in_ns = 0  # the first break-in that no stop followed yet
        self.break_ins_waiting = 0
        self.reset_run = [0, 0]  # RESETs of each side since a request
        self.reset_run_ns = [0, 0]  # of the first and of the last of them
        self.reset_offsets: deque[tuple[int, int]] = deque(maxlen=8)  # (side, offset)
        self.echoed: list[tuple[int, bool]] = []  # (offset, is it the target's own packet?)
        self.healed: deque[str] = deque(maxlen=8)  # what went wrong and came right again
        self.injections: deque[tuple[int, str]] = deque(maxlen=8)  # (when, what and why)

    @property
    def target(self) -> Sender:
        return self.sides[TARGET]

    @property
    def debugger(self) -> Sender:
        return self.sides[DEBUGGER]

    # -- what the line tells -------------------------------------------------------------------

    def opened(self, side: int, when_ns: int) -> None:
        """Somebody is there."""
        self.tick(when_ns)
        sender = self.sides[side]
        sender.present = True
        sender.opened_ns = when_ns
        sender.sessions += 1

    def closed(self, side: int, when_ns: int) -> None:
        """The peer of a side went away by itself (not: we hung up)."""
        self.tick(when_ns)
        sender = self.sides[side]
        self._took(side, sender.parser.idle(), when_ns)
        if side == DEBUGGER:
            self._abandoned(when_ns)
        sender.present = False
        sender.closed_ns = when_ns

    def saw(self, side: int, data: bytes | bytearray | memoryview, when_ns: int) -> None:
        """Bytes that a side sent."""
        if not data:
            return
        self.tick(when_ns)
        sender = self.sides[side]
        sender.took(len(data), when_ns, bool(sender.parser.pending) or self._owes(side))
        self._took(side, sender.parser.receive(data), when_ns)

    def injected(self, side: int, data: bytes, why: str, when_ns: int) -> None:
        """We sent bytes ourselves, towards a side. They count as the other side's doing, and are
        remembered."""
        self.tick(when_ns)
        name = "break-in" if data[:1] == bytes((k.BREAK_IN,)) else "RESET"
        self.injections.append((when_ns, f"{name} to the {SIDES[side]}: {why}"))
        if name == "RESET":
            for sender in self.sides:
                sender.restarted()

    def tick(self, when_ns: int) -> None:
        """Time passes. Call it now and then while the line is silent, before asking for verdicts."""
        if self.began_ns < 0:
            self.began_ns = self.now_ns = self.progress_ns = when_ns
        self.now_ns = max(self.now_ns, when_ns)
        for side, sender in enumerate(self.sides):
            # No sender pauses inside a packet for longer than its peer waits for an ACK. The time of it is
            # when that was certain, not when somebody happened to ask: a replay must come to the same.
            silent_ns = sender.last_ns + 2 * self.timeout_ns
            if (sender.parser.pending or sender.parser.noise) and self.now_ns > silent_ns:
                self._took(side, sender.parser.idle(), silent_ns)

    def verdicts(self, when_ns: int | None = None) -> list[Verdict]:
        """What is the matter, the gravest first; one verdict "healthy" if nothing is."""
        if when_ns is not None:
            self.tick(when_ns)
        return judge(self)

    # -- inside --------------------------------------------------------------------------------

    def _owes(self, side: int) -> bool:
        """Whether this side has acknowledged something that it answers without thinking."""
        request = self.request
        return side == TARGET and request is not None and request.is_open and request.acked_ns > 0

    def _took(self, side: int, events: list[Event], when_ns: int) -> None:
        sender = self.sides[side]
        for event in events:
            if isinstance(event, Packet):
                sender.packets += 1
                if event.is_control:
                    self._control(side, event, when_ns)
                else:
                    self._data(side, event, when_ns)
            elif isinstance(event, BreakIn):
                sender.break_ins += 1
                self.progress_ns = when_ns
                if self.state != STOPPED:
                    self.break_in_ns = self.break_in_ns or when_ns
                    self.break_ins_waiting += 1
            elif isinstance(event, Noise):
                sender.made_noise(event)
            elif isinstance(event, Broken):
                sender.broke(event, when_ns)
            if self.on_event is not None:
                self.on_event(side, event, when_ns)

    def _control(self, side: int, packet: Packet, when_ns: int) -> None:
        sender, other = self.sides[side], self.sides[1 - side]
        if packet.type == k.ACK:
            sender.acks += 1
            flight = other.flight
            if other.got_ack(packet, when_ns) and flight is not None:
                self.progress_ns = when_ns
                self._acknowledged(1 - side, flight.packet, when_ns)
                if flight.sends > 2:
                    waited = (when_ns - flight.first_ns) / SECOND
                    self.healed.append(
                        f"{flight.words} at offset {flight.packet.offset:#x} of the {SIDES[1 - side]} waited "
                        f"{waited:.1f} s for its ACK and was sent {flight.sends} times"
                    )
        elif packet.type == k.RESEND:
            sender.resends += 1
        else:
            sender.resets += 1
            self.reset_run[side] += 1
            self.reset_run_ns[1] = when_ns
            if sum(self.reset_run) == 1:
                self.reset_run_ns[0] = when_ns
            self.reset_offsets.append((side, packet.offset))
            sender.restarted()
            other.restarted()
            if side == DEBUGGER:  # it forgets what it had asked
                sender.flight = sender.last_acked = None
                self._abandoned(when_ns)

    def _acknowledged(self, side: int, packet: Packet, when_ns: int) -> None:
        request = self.request
        if side == TARGET:
            if packet.type in (k.STATE_CHANGE32, k.STATE_CHANGE64):
                self.stop_acked_ns = when_ns
        elif request is not None and request.packet.offset == packet.offset:
            request.acked_ns = when_ns
            if request.api in k.RESUMING:
                self._resumed(when_ns)

    def _resumed(self, when_ns: int) -> None:
        if self.request is not None:
            self.request.answered_ns = when_ns
        self.unanswered_run = 0
        self.state, self.stop = RUNNING, None
        self.break_in_ns = self.break_ins_waiting = 0

    def _data(self, side: int, packet: Packet, when_ns: int) -> None:
        sender, other = self.sides[side], self.sides[1 - side]
        if packet.sync and side == TARGET:
            other.restarted()
        damaged = sender.unhealed_ns
        is_new = sender.sent_data(packet, when_ns)
        if damaged:
            self.healed.append(
                f"damage in what the {SIDES[side]} sent was followed by a whole packet at offset "
                f"{packet.offset:#x}"
            )
        if not is_new:
            return
        other.got_data()
        self.progress_ns = when_ns
        message = decode(packet)
        if side == DEBUGGER:
            if message.is_state:
                if len(self.echoed) < 8:
                    before = self.target.flight or self.target.last_acked
                    self.echoed.append((packet.offset, before is not None and before.is_same(packet)))
            elif packet.type == k.MANIPULATE:
                self._requested(packet, message, when_ns)
            elif self.stop is not None and self.stop.type == packet.type == k.DEBUG_IO:
                self.state, self.stop = RUNNING, None  # the answer to a prompt
        elif message.is_state or (packet.type == k.DEBUG_IO and message.code == k.GET_STRING):
            self._stopped(packet, message, when_ns)
        elif packet.type == k.MANIPULATE:
            self._answered(message.code, when_ns)
        elif packet.type == k.DEBUG_IO and self.state == UNKNOWN:
            self.state = RUNNING

    def _abandoned(self, when_ns: int) -> None:
        """The debugger does not wait any longer for the answer to its last request."""
        request = self.request
        if request is not None and request.is_open:
            self.unanswered_run += request.acked_ns > 0
            request.answered_ns = when_ns

    def _requested(self, packet: Packet, message: Message, when_ns: int) -> None:
        self._abandoned(when_ns)
        self.requests += 1
        self.requests_since_stop += 1
        self.request = Request(packet, message.code, when_ns)
        self.reset_run = [0, 0]

    def _answered(self, api: int, when_ns: int) -> None:
        request = self.request
        if request is not None and request.is_open and request.api == api:
            request.answered_ns = when_ns
            self.unanswered_run = 0
            self.round_trip_ns.append(when_ns - request.sent_ns)

    def _stopped(self, packet: Packet, message: Message, when_ns: int) -> None:
        request = self.request
        if request is not None and request.is_open:
            request.answered_ns = when_ns  # another processor's state answers a SwitchProcessor
        self.state, self.stop, self.stop_ns = STOPPED, packet, when_ns
        self.stop_acked_ns = self.requests_since_stop = 0
        if message.code != k.LOAD_SYMBOLS:
            self.break_in_ns = self.break_ins_waiting = 0
