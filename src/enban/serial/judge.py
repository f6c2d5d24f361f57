"""Asks for every cause, and says the gravest first; what another verdict explains is left out."""

from __future__ import annotations

from ..wire.kd.messages import decode
from . import line_causes as line
from . import packet_causes as packets
from .tracking import SIDES, TARGET, middle
from .verdicts import FAULT, HEALTHY, NOTE, SLOW, Verdict, flight_words, milliseconds, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .doctor import Doctor

    Rule = Callable[[Doctor], "Verdict | None"]


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
    if "no-bytes" not in found and not any(verdict.grade in (FAULT, SLOW) for verdict in verdicts):
        verdicts.insert(0, healthy(doctor))
    return verdicts


# -- notes -------------------------------------------------------------------------------------


def held(doctor: Doctor) -> Verdict | None:
    if doctor.state != "stopped" or doctor.stop is None or not doctor.stop_acked_ns:
        return None
    request = doctor.request
    evidence = [decode(doctor.stop).words()]
    if request is not None:
        evidence.append(f"last request: {request.words}, {seconds(doctor.now_ns - request.sent_ns)} ago")
    return Verdict(
        "guest-stopped",
        NOTE,
        "the debugger holds the guest stopped",
        evidence,
        places=[(TARGET, doctor.stop.offset)],
    )


def healed(doctor: Doctor) -> Verdict | None:
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


def healthy(doctor: Doctor) -> Verdict:
    target, debugger = doctor.target, doctor.debugger
    if not target.packets:
        return Verdict(
            "waiting",
            NOTE,
            "nothing to say yet: no packet from the guest",
            [f"watched for {seconds(doctor.now_ns - max(0, doctor.began_ns))}"],
        )
    for sender in doctor.sides:
        flight = sender.flight
        if flight is not None and flight.sends > 1 and not flight.implicit:
            return Verdict(
                "waiting",
                NOTE,
                "too early to say: a packet was sent again and waits for its ACK",
                [flight_words(doctor, flight)],
                places=[(sender.side, flight.packet.offset)],
            )
    evidence = [
        f"{target.packets} packets from the guest, {debugger.packets} from the debugger, {doctor.requests} "
        "requests",
        f"the guest is {'in an unknown state' if doctor.state == 'unknown' else doctor.state}",
    ]
    if doctor.round_trip_ns:
        evidence.append(f"a round trip takes {milliseconds(middle(doctor.round_trip_ns))}")
    if target.ack_ns:
        evidence.append(f"the guest's packets are acknowledged within {milliseconds(target.ack_most_ns)}")
    return Verdict("healthy", HEALTHY, "the session is in order", evidence)


# The gravest first. What a verdict explains is not said again.
_RULES: tuple[Rule, ...] = (
    line.no_bytes,
    line.no_packets,
    line.echo,
    packets.ping_pong,
    packets.wrong_id,
    packets.peer_gone,
    packets.frozen,
    packets.unacknowledged,
    line.damage,
    packets.acks_lost,
    packets.storm,
    packets.break_in_ignored,
    packets.no_answer,
    line.nagle,
    line.line_rate,
    held,
    healed,
)
_EXPLAINS = {
    "no-bytes": ("break-in-ignored", "no-answer", "peer-gone"),
    "no-packets": ("damaged", "break-in-ignored", "no-answer", "healed"),
    "echo": ("wrong-id", "unacknowledged", "frozen-exception", "acks-lost", "no-answer", "healed"),
    "sides-swapped": ("wrong-id", "unacknowledged", "frozen-exception", "acks-lost", "no-answer"),
    "reset-ping-pong": ("wrong-id", "unacknowledged", "frozen-exception", "acks-lost"),
    "wrong-id": ("unacknowledged", "frozen-exception", "acks-lost", "no-answer", "retransmission-storm"),
    "frozen-exception": ("guest-stopped",),
    "peer-gone": ("guest-stopped", "break-in-ignored"),
    "nagle": ("line-rate",),
}
