"""Verdicts: what the facts of a session mean, in words, with the evidence.

One function a cause, each a plain reading of the facts that `doctor` and `tracking` keep; `judge` asks them
in the order of their gravity, and leaves out what another verdict explains. A verdict states what was seen
and where in which direction's stream; what cannot be seen from the line (the guest's configuration, a cable)
it only offers as something to look at.

Times are measured in the kernel's timeout (about a second), so that a test may run faster than a kernel does.
"""

from __future__ import annotations

from ..wire.kd import constants as k
from ..wire.kd.messages import decode
from .tracking import DEBUGGER, MS, SECOND, SIDES, TARGET, middle

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .doctor import Doctor
    from .tracking import Flight, Sender

    Rule = Callable[[Doctor], "Verdict | None"]

FAULT, SLOW, NOTE, HEALTHY = "fault", "slow", "note", "healthy"
BAUDS = (300, 600, 1200, 2400, 4800, 9600, 14400, 19200, 38400, 57600, 115200, 230400)


class Verdict:
    """name: one of a fixed set, for programs. grade: FAULT, SLOW, NOTE or HEALTHY. summary: what is the
    matter. evidence: what was seen. advice: what to look at. places: (side, offset in its stream) of the
    evidence."""

    __slots__ = ("advice", "evidence", "grade", "name", "places", "summary")

    def __init__(
        self,
        name: str,
        grade: str,
        summary: str,
        evidence: list[str],
        advice: str = "",
        places: list[tuple[int, int]] | None = None,
    ) -> None:
        self.name = name
        self.grade = grade
        self.summary = summary
        self.evidence = evidence
        self.advice = advice
        self.places = places or []

    def words(self) -> str:
        """The verdict for people, on a few lines."""
        lines = [f"{self.grade}: {self.summary} [{self.name}]"]
        lines += [f"  - {line}" for line in self.evidence]
        if self.places:
            lines.append("  at " + ", ".join(f"{SIDES[side]} {offset:#x}" for side, offset in self.places))
        if self.advice:
            lines.append(f"  {self.advice}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "grade": self.grade,
            "summary": self.summary,
            "evidence": self.evidence,
            "advice": self.advice,
            "places": [{"side": SIDES[side], "offset": offset} for side, offset in self.places],
        }

    def __repr__(self) -> str:
        return f"<Verdict {self.name}: {self.summary}>"


def judge(doctor: Doctor) -> list[Verdict]:
    """All that can be said, the gravest first."""
    found: dict[str, Verdict] = {}
    for rule in _RULES:
        verdict = rule(doctor)
        if verdict is not None:
            found[verdict.name] = verdict
    for name, hidden in _EXPLAINS.items():
        if name in found:
            for other in hidden:
                found.pop(other, None)
    grades = (FAULT, SLOW, NOTE)
    verdicts = sorted(found.values(), key=lambda verdict: grades.index(verdict.grade))
    if not any(verdict.grade in (FAULT, SLOW) for verdict in verdicts):
        calm = _healthy(doctor)
        if calm is not None:
            verdicts.insert(0, calm)
    return verdicts


# -- the line itself ---------------------------------------------------------------------------


def _no_bytes(doctor: Doctor) -> Verdict | None:
    target, debugger = doctor.target, doctor.debugger
    waited = doctor.now_ns - max(doctor.began_ns, target.opened_ns)
    if target.bytes or waited < 5 * doctor.timeout_ns:
        return None
    evidence = [f"the guest's side sent no byte in {_s(waited)}"]
    if target.present is False:
        evidence.append("nobody is connected on the guest's side")
    if debugger.bytes:
        evidence.append(
            f"the debugger sent {debugger.bytes} bytes: {debugger.break_ins} break-ins, {debugger.resets} "
            "RESETs"
        )
    return Verdict(
        "no-bytes",
        FAULT,
        "no bytes from the guest",
        evidence,
        "Is kernel debugging on in the guest (bcdedit /debug on, then a restart), and on this COM port? A "
        "guest "
        "sends nothing before it starts Windows, nor while it runs undisturbed.",
    )


def _no_packets(doctor: Doctor) -> Verdict | None:
    target = doctor.target
    noise = target.noise + target.parser.noise
    if target.packets or noise < 64:
        return None
    sample = target.noise_sample
    text = sum(32 <= byte < 127 or byte in b"\t\r\n\x1b" for byte in sample) >= 0.9 * len(sample)
    evidence = [f"{target.bytes} bytes came from the guest, and no packet"]
    if sample:
        evidence.append(f"they begin with {sample.hex(' ')}" + (f" ({sample!r})" if text else ""))
    advice = (
        "It reads as text: a console, or the firmware, speaks here. Windows debugs on another port, or not "
        "at all."
        if text
        else "It is not text either: most likely the two ends have different baud rates, or this is another "
        "port."
    )
    return Verdict(
        "no-packets",
        FAULT,
        "bytes come from the guest, but no packets: wrong baud rate or wrong port",
        evidence,
        advice,
        [(TARGET, max(0, target.noise_at))],
    )


def _echo(doctor: Doctor) -> Verdict | None:
    if not doctor.echoed:
        return None
    places = [(DEBUGGER, offset) for offset, _ in doctor.echoed]
    if any(same for _, same in doctor.echoed):
        return Verdict(
            "echo",
            FAULT,
            "what the guest sends comes back from the debugger's side",
            [f"{len(places)} state changes came from the debugger's side that the guest had just sent"],
            "A terminal in the way echoes (stty raw -echo), or a plug connects a line with itself.",
            places,
        )
    return Verdict(
        "sides-swapped",
        FAULT,
        "the debugger's side speaks as a guest does",
        [f"{len(places)} state changes came from the debugger's side"],
        "Swap the two ends, or the files of a recording.",
        places,
    )


def _damage(doctor: Doctor) -> Verdict | None:
    """Broken packets and bytes between packets. A few that were sent again are how the protocol works."""
    evidence, places, grave = [], [], False
    for side, sender in enumerate(doctor.sides):
        if not sender.broken:
            continue
        unhealed = sender.unhealed_ns and doctor.now_ns - sender.unhealed_ns > 3 * doctor.timeout_ns
        if sender.present is False and sender.unhealed_ns >= sender.closed_ns:
            unhealed = False  # it went away in the middle of a packet
        grave |= bool(unhealed) or (sender.broken >= 3 and sender.broken * 20 >= sender.packets)
        reasons = sorted({reason for _, reason in sender.broken_at})
        evidence.append(
            f"{sender.broken} broken packets from the {SIDES[side]} ({', '.join(reasons)}), "
            f"{sender.packets} whole ones, {sender.noise} bytes between packets"
        )
        if unhealed:
            evidence.append(
                f"nothing whole followed the last one for {_s(doctor.now_ns - sender.unhealed_ns)}"
            )
        places += [(side, offset) for offset, _ in sender.broken_at]
    if not evidence:
        return None
    return Verdict(
        "damaged",
        FAULT if grave else NOTE,
        "bytes are lost or changed on the way" if grave else "a few packets were damaged and sent again",
        evidence,
        "On a cable: flow control, speed, the cable. Between programs: somebody drops bytes when a buffer is "
        "full, "
        "or two readers share one line."
        if grave
        else "",
        places,
    )


# -- packets and their ACKs --------------------------------------------------------------------


def _unacknowledged(doctor: Doctor) -> Verdict | None:
    flight = _stuck(doctor, doctor.target)
    if flight is None or _freezes(flight):
        return None
    return Verdict(
        "unacknowledged",
        FAULT,
        "the guest sends a packet again and again, and nobody acknowledges it",
        [_flight_words(doctor, flight), _debugger_words(doctor)],
        "The guest gives up after about 20 tries for each packet and starts slowly. Start the debugger, or "
        "turn kernel "
        "debugging off.",
        [(TARGET, flight.packet.offset)],
    )


def _frozen(doctor: Doctor) -> Verdict | None:
    stop, unit = doctor.stop, doctor.timeout_ns
    if doctor.state != "stopped" or stop is None:
        return None
    what = decode(stop)
    debugger, flight = doctor.debugger, _stuck(doctor, doctor.target)
    if flight is not None and _freezes(flight):
        evidence = [_flight_words(doctor, flight), _debugger_words(doctor)]
        summary = (
            "the debugger is silent after an exception: the guest is frozen, by design, until one answers"
        )
    elif what.is_exception and doctor.stop_acked_ns:
        idle = doctor.now_ns - doctor.progress_ns
        left = debugger.closed_ns > doctor.stop_acked_ns or debugger.opened_ns > doctor.stop_acked_ns
        if left and idle > 3 * unit:
            summary = (
                "the debugger that took an exception is gone: the guest stays frozen until another goes on"
            )
        elif not doctor.requests_since_stop and idle > 10 * unit:
            summary = "the debugger took an exception and asks nothing: the guest is frozen until it does"
        else:
            return None
        evidence = [f"{what.words()}, acknowledged, and no progress for {_s(idle)}", _debugger_words(doctor)]
    else:
        return None
    return Verdict(
        "frozen-exception",
        FAULT,
        summary,
        evidence,
        "All processors of the guest stand still; it answers no ping and no key. Connect a debugger and let "
        "it go on "
        "(g). If one is connected and waits, a RESET makes the guest report the exception again.",
        [(TARGET, stop.offset)],
    )


def _wrong_id(doctor: Doctor) -> Verdict | None:
    evidence: list[str] = []
    places: list[tuple[int, int]] = []
    for side, sender in enumerate(doctor.sides):
        other = 1 - side
        if sender.sync_kept_run >= 2:
            evidence.append(
                f"{sender.sync_kept_run} ACKs from the {SIDES[other]} still carry SYNC; the {SIDES[side]} "
                "waits for the "
                "id without it"
            )
        if sender.wrong_ack_run >= 3 and sender.flight is not None:
            evidence.append(f"{sender.wrong_ack_run} ACKs from the {SIDES[other]} are for another packet")
        if sender.sync_kept_run >= 2 or sender.wrong_ack_run >= 3:
            _, id, wanted = sender.wrong_acks[-1]
            evidence.append(f"ACK of {id:#x} while {wanted:#x} is in flight")
            places += [(other, offset) for offset, _, _ in sender.wrong_acks]
        request = doctor.request
        stalled = (
            request is not None
            and request.is_open
            and doctor.now_ns - request.sent_ns > 2 * doctor.timeout_ns
        )
        if sender.wrong_id_run >= 2 or (sender.wrong_id_run and stalled and side == DEBUGGER):
            _, id, wanted = sender.wrong_ids[-1]
            evidence.append(
                f"the {SIDES[side]} sends id {id:#x} where {wanted:#x} is due; such a packet is acknowledged "
                "and dropped"
            )
            places += [(side, offset) for offset, _, _ in sender.wrong_ids]
    if not evidence:
        return None
    return Verdict(
        "wrong-id",
        FAULT,
        "the two ends do not agree about packet ids",
        evidence,
        "One of them restarted its stream and the other did not notice. A RESET from the debugger sets both "
        "to the "
        "beginning (WinDbg: Ctrl+Alt+R).",
        places,
    )


def _acks_lost(doctor: Doctor) -> Verdict | None:
    for side, sender in enumerate(doctor.sides):
        if sender.lost_ack_run >= 3:
            return Verdict(
                "acks-lost",
                FAULT,
                f"the {SIDES[1 - side]} acknowledges, but the {SIDES[side]} sends the same again: ACKs get "
                "lost",
                [
                    f"{sender.lost_acks} times a packet came again more than half a timeout after its ACK "
                    "had passed here",
                    f"{sender.acked} packets were acknowledged in all",
                ],
                f"Bytes towards the {SIDES[side]} are lost behind this point: look at its receiving end.",
                [(side, offset) for offset in sender.lost_ack_at],
            )
    return None


def _storm(doctor: Doctor) -> Verdict | None:
    for side, sender in enumerate(doctor.sides):
        late = sender.late_acks + sender.retransmissions - sender.lost_acks
        if sender.late_acks < 3 or sender.late_acks * 4 < sender.acked:
            continue
        if sender.retransmitted_bytes * 4 < sender.bytes or middle(sender.ack_ns) < doctor.timeout_ns // 2:
            continue
        return Verdict(
            "retransmission-storm",
            FAULT,
            f"ACKs come later than the {SIDES[side]} waits, so it sends everything again",
            [
                f"{sender.late_acks} of {sender.acked} packets were acknowledged only after they had been "
                "sent again; "
                f"{late} needless sendings",
                f"{sender.retransmitted_bytes} of {sender.bytes} bytes are repetitions",
                f"an ACK takes {_ms(middle(sender.ack_ns))} in the middle, {_ms(sender.ack_most_ns)} at most",
            ],
            "Something between the two holds bytes back (a relay that buffers and then paces). Pace where "
            "bytes are taken "
            "in, with a small buffer, so that the sender feels it.",
            [(side, sender.flight.packet.offset)] if sender.flight else [],
        )
    return None


def _ping_pong(doctor: Doctor) -> Verdict | None:
    first, last = doctor.reset_run_ns
    if min(doctor.reset_run) < 3 or doctor.now_ns - last > 10 * doctor.timeout_ns:
        return None
    if last - first > sum(doctor.reset_run) * doctor.timeout_ns:
        return None  # seconds apart: a debugger knocking
    return Verdict(
        "reset-ping-pong",
        FAULT,
        "both ends answer each other's RESET, for ever",
        [
            f"{doctor.reset_run[DEBUGGER]} RESETs from the debugger and {doctor.reset_run[TARGET]} from the "
            "guest within "
            f"{_s(last - first)}, with no request between"
        ],
        "Restart the debugger: it must not answer the reply to its own RESET. Two debuggers on one line do "
        "this too.",
        list(doctor.reset_offsets),
    )


# -- requests, break-ins, peers ----------------------------------------------------------------


def _break_in_ignored(doctor: Doctor) -> Verdict | None:
    waited = doctor.now_ns - doctor.break_in_ns
    if not doctor.break_ins_waiting or not doctor.target.bytes or waited < 3 * doctor.timeout_ns:
        return None
    evidence = [f"{doctor.break_ins_waiting} break-ins in {_s(waited)}, and the guest did not stop"]
    last = doctor.target.last_ns
    evidence.append(
        f"the guest's last byte came {_s(doctor.now_ns - last)} ago"
        + (", before the break-in" if last < doctor.break_in_ns else "")
    )
    return Verdict(
        "break-in-ignored",
        FAULT,
        "the guest does not react to a break-in",
        evidence,
        "A running guest looks for one byte a clock tick, if kernel debugging is on and it is not hung with "
        "interrupts "
        "off. The byte may also be lost: try again.",
    )


def _no_answer(doctor: Doctor) -> Verdict | None:
    request, unit = doctor.request, doctor.timeout_ns
    flight = _stuck(doctor, doctor.debugger)
    if flight is not None:
        summary = "the guest does not acknowledge the debugger's packets"
        evidence = [_flight_words(doctor, flight)]
        offset = flight.packet.offset
    elif (
        request is not None
        and request.is_open
        and request.acked_ns
        and doctor.now_ns - request.acked_ns > 5 * unit
    ):
        summary = "the guest acknowledged a request and does not answer it"
        evidence = [f"{request.words}, acknowledged {_s(doctor.now_ns - request.acked_ns)} ago"]
        offset = request.packet.offset
    else:
        return None
    evidence.append(_target_words(doctor))
    return Verdict(
        "no-answer",
        FAULT,
        summary,
        evidence,
        "Either the guest runs and the debugger believes it stopped (break in again), or bytes towards the "
        "guest are lost.",
        [(DEBUGGER, offset)],
    )


def _peer_gone(doctor: Doctor) -> Verdict | None:
    target, debugger = doctor.target, doctor.debugger
    if target.present is False and target.sessions:
        request = doctor.request
        open_request = request is not None and request.is_open
        grave = doctor.state == "stopped" or open_request or (debugger.flight is not None)
        evidence = [f"the guest's end closed {_s(doctor.now_ns - target.closed_ns)} ago"]
        if request is not None and request.is_open:
            evidence.append(f"unanswered: {request.words}")
        if target.parser.pending or target.unhealed_ns:
            evidence.append("it closed in the middle of a packet")
            grave = True
        return Verdict(
            "peer-gone",
            FAULT if grave else NOTE,
            "the guest's end of the line closed" + (" in the middle of a session" if grave else ""),
            evidence,
            "The virtual machine ended, or was restarted with another socket." if grave else "",
            [(TARGET, target.bytes)],
        )
    if debugger.present is False and debugger.sessions:
        grave = doctor.state == "stopped"
        return Verdict(
            "peer-gone",
            FAULT if grave else NOTE,
            "the debugger went away"
            + (" while the guest was stopped: it stays stopped" if grave else ", the guest runs"),
            [f"the debugger's end closed {_s(doctor.now_ns - debugger.closed_ns)} ago"],
            "Connect a debugger and let the guest go on (g)." if grave else "",
            [(DEBUGGER, debugger.bytes)],
        )
    return None


# -- slow --------------------------------------------------------------------------------------


def _nagle(doctor: Doctor) -> Verdict | None:
    """Bytes that were due at once came after the delay of a TCP ACK (40 ms on Linux, up to 200 elsewhere),
    however many they were: the sender's TCP collects small writes."""
    for side, sender in enumerate(doctor.sides):
        pauses = [(gap, length) for gap, length in sender.gaps if gap > 20 * MS]
        marked = [
            (gap, length)
            for gap, length in pauses
            if 35 * MS <= gap <= 60 * MS or 190 * MS <= gap <= 230 * MS
        ]
        if len(marked) < 8 or len(marked) * 10 < len(pauses) * 7 or len(pauses) * 4 < len(sender.gaps):
            continue
        lengths = [length for _, length in marked]
        if max(lengths) < 4 * min(lengths):
            continue  # the same number of bytes each time: a paced line does that
        evidence = [
            f"{len(marked)} of the last {len(sender.gaps)} times the {SIDES[side]} owed bytes, they came "
            f"{_ms(sorted(gap for gap, _ in marked)[len(marked) // 2])} late, {min(lengths)} to "
            f"{max(lengths)} bytes alike"
        ]
        if doctor.round_trip_ns:
            evidence.append(f"a round trip takes {_ms(middle(doctor.round_trip_ns))}")
        return Verdict(
            "nagle",
            SLOW,
            "small writes wait for TCP's delayed ACK (Nagle's algorithm)",
            evidence,
            f"Set TCP_NODELAY where the {SIDES[side]}'s bytes enter TCP (QEMU: nodelay=on), or use a unix "
            "socket.",
            [(side, sender.bytes)],
        )
    return None


def _line_rate(doctor: Doctor) -> Verdict | None:
    for side, sender in enumerate(doctor.sides):
        rates = sender.rates
        rate = middle(rates)
        near = sum(0.7 * rate <= found <= 1.4 * rate for found in rates)
        if len(rates) < 4 or rate > 30_000 or near * 10 < len(rates) * 7:
            continue
        baud = min(BAUDS, key=lambda known: abs(known - rate * 10))
        evidence = [f"inside of packets {rate:.0f} bytes/s come from the {SIDES[side]}, steadily"]
        if abs(baud - rate * 10) < 0.25 * baud:
            evidence.append(f"that is a line of {baud} baud")
        if doctor.round_trip_ns:
            evidence.append(f"a round trip takes {_ms(middle(doctor.round_trip_ns))}")
        return Verdict(
            "line-rate",
            SLOW,
            "the line's speed is the limit",
            evidence,
            "Nothing is wrong; raise the baud rate on both ends, or use a socket or pipe instead of a cable.",
            [(side, sender.bytes)],
        )
    return None


# -- notes -------------------------------------------------------------------------------------


def _held(doctor: Doctor) -> Verdict | None:
    if doctor.state != "stopped" or doctor.stop is None or not doctor.stop_acked_ns:
        return None
    request = doctor.request
    evidence = [decode(doctor.stop).words()]
    if request is not None:
        evidence.append(f"last request: {request.words}, {_s(doctor.now_ns - request.sent_ns)} ago")
    return Verdict(
        "guest-stopped",
        NOTE,
        "the debugger holds the guest stopped",
        evidence,
        places=[(TARGET, doctor.stop.offset)],
    )


def _healed(doctor: Doctor) -> Verdict | None:
    evidence = list(doctor.healed)
    for side, sender in enumerate(doctor.sides):
        if sender.retransmissions:
            evidence.append(
                f"the {SIDES[side]} sent {sender.retransmissions} packets again "
                f"({sender.retransmitted_bytes} bytes)"
            )
        if sender.given_up:
            evidence.append(f"the {SIDES[side]} gave up on {sender.given_up} packets and went on")
        if sender.resends:
            evidence.append(f"the {SIDES[side]} asked {sender.resends} times to have a packet again")
        if sender.noise and sender.packets:
            evidence.append(
                f"{sender.noise} bytes from the {SIDES[side]} belong to no packet, first at "
                f"{sender.noise_at:#x}"
            )
    if doctor.injections:
        evidence += [f"injected: {what}" for _, what in doctor.injections]
    if not evidence:
        return None
    return Verdict("healed", NOTE, "what went wrong and came right, or may explain the rest", evidence)


def _healthy(doctor: Doctor) -> Verdict | None:
    target, debugger = doctor.target, doctor.debugger
    if not target.packets:
        return Verdict(
            "waiting",
            NOTE,
            "nothing to say yet: no packet from the guest",
            [f"watched for {_s(doctor.now_ns - max(0, doctor.began_ns))}"],
        )
    evidence = [
        f"{target.packets} packets from the guest, {debugger.packets} from the debugger, {doctor.requests} "
        "requests",
        f"the guest is {'in an unknown state' if doctor.state == 'unknown' else doctor.state}",
    ]
    if doctor.round_trip_ns:
        evidence.append(f"a round trip takes {_ms(middle(doctor.round_trip_ns))}")
    if target.ack_ns:
        evidence.append(f"the guest's packets are acknowledged within {_ms(target.ack_most_ns)}")
    return Verdict("healthy", HEALTHY, "the session is in order", evidence)


# The gravest first. What a verdict explains is not said again.
_RULES: tuple[Rule, ...] = (
    _no_bytes,
    _no_packets,
    _echo,
    _ping_pong,
    _wrong_id,
    _peer_gone,
    _frozen,
    _unacknowledged,
    _damage,
    _acks_lost,
    _storm,
    _break_in_ignored,
    _no_answer,
    _nagle,
    _line_rate,
    _held,
    _healed,
)
_EXPLAINS = {
    "no-bytes": ("break-in-ignored", "no-answer", "peer-gone"),
    "no-packets": ("damaged", "break-in-ignored", "no-answer", "healed"),
    "echo": ("wrong-id", "unacknowledged", "frozen-exception", "acks-lost", "no-answer", "healed"),
    "sides-swapped": ("wrong-id", "unacknowledged", "frozen-exception", "acks-lost", "no-answer"),
    "reset-ping-pong": ("wrong-id", "unacknowledged", "frozen-exception", "acks-lost"),
    "wrong-id": ("unacknowledged", "frozen-exception", "acks-lost", "no-answer", "retransmission-storm"),
    "frozen-exception": ("guest-stopped",),
    "peer-gone": ("no-answer", "guest-stopped", "break-in-ignored"),
    "nagle": ("line-rate",),
}


# -- words -------------------------------------------------------------------------------------


def _stuck(doctor: Doctor, sender: Sender) -> Flight | None:
    """The packet of a side that should have been acknowledged long ago."""
    flight = sender.flight
    if flight is None or flight.implicit:
        return None
    age = doctor.now_ns - flight.first_ns
    return flight if flight.sends >= 4 or age > 3 * doctor.timeout_ns else None


def _freezes(flight: Flight) -> bool:
    """Whether the guest waits for this ACK for ever: an exception or a prompt. For others it gives up."""
    message = decode(flight.packet)
    return message.is_exception or message.code == k.GET_STRING


def _flight_words(doctor: Doctor, flight: Flight) -> str:
    return (
        f"{flight.words}, id {flight.packet.id:#x}, sent {flight.sends} times in "
        f"{_s(doctor.now_ns - flight.first_ns)}, no ACK"
    )


def _debugger_words(doctor: Doctor) -> str:
    debugger = doctor.debugger
    if debugger.present is False:
        return "no debugger is connected"
    if not debugger.bytes:
        return "the debugger's side never sent a byte"
    return f"the debugger's last byte came {_s(doctor.now_ns - debugger.last_ns)} ago"


def _target_words(doctor: Doctor) -> str:
    target = doctor.target
    if not target.bytes:
        return "the guest never sent a byte"
    return f"the guest is {doctor.state}; its last byte came {_s(doctor.now_ns - target.last_ns)} ago"


def _s(nanoseconds: float) -> str:
    return f"{max(0, nanoseconds) / SECOND:.1f} s"


def _ms(nanoseconds: float) -> str:
    return f"{nanoseconds / MS:.1f} ms"
