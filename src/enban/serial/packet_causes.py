"""What can be wrong between two ends that do exchange packets: ACKs, ids, RESETs, requests, break-ins, and a
peer that leaves.

One function a cause: the verdict if the facts show it, else None. Times are measured in the kernel's timeout.
"""

from __future__ import annotations

from ..wire.kd.messages import decode
from .tracking import DEBUGGER, SIDES, TARGET, middle
from .verdicts import (
    FAULT,
    NOTE,
    Verdict,
    debugger_words,
    flight_words,
    freezes,
    milliseconds,
    seconds,
    stuck,
    target_words,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .doctor import Doctor


def unacknowledged(doctor: Doctor) -> Verdict | None:
    flight = stuck(doctor, doctor.target)
    if flight is None or freezes(flight):
        return None
    return Verdict(
        "unacknowledged",
        FAULT,
        "the guest sends a packet again and again, and nobody acknowledges it",
        [flight_words(doctor, flight), debugger_words(doctor)],
        "The guest gives up after about 20 tries for each packet and starts slowly. Start the debugger, or "
        "turn kernel debugging off.",
        [(TARGET, flight.packet.offset)],
    )


def frozen(doctor: Doctor) -> Verdict | None:
    stop, unit = doctor.stop, doctor.timeout_ns
    if doctor.state != "stopped" or stop is None:
        return None
    what = decode(stop)
    debugger, flight = doctor.debugger, stuck(doctor, doctor.target)
    if flight is not None and freezes(flight):
        evidence = [flight_words(doctor, flight), debugger_words(doctor)]
        at = "an exception" if what.is_exception else "a prompt"
        summary = f"the debugger is silent after {at}: the guest is frozen, by design, until one answers"
    elif what.is_exception and doctor.stop_acked_ns:
        idle = doctor.now_ns - doctor.progress_ns
        # Gone, or another has come that has not asked anything yet.
        asked_ns = doctor.request.sent_ns if doctor.request is not None else 0
        left = debugger.present is False or max(doctor.stop_acked_ns, asked_ns) < debugger.opened_ns
        if left and idle > 3 * unit:
            summary = (
                "the debugger that took an exception is gone: the guest stays frozen until another goes on"
            )
        elif not doctor.requests_since_stop and idle > 10 * unit:
            summary = "the debugger took an exception and asks nothing: the guest is frozen until it does"
        else:
            return None
        evidence = [
            f"{what.words()}, acknowledged, and no progress for {seconds(idle)}",
            debugger_words(doctor),
        ]
    else:
        return None
    return Verdict(
        "frozen-exception",
        FAULT,
        summary,
        evidence,
        "All processors of the guest stand still; it answers no ping and no key. Connect a debugger and let "
        "it go on (g). If one is connected and waits, a RESET makes the guest report the exception again.",
        [(TARGET, stop.offset)],
    )


def wrong_id(doctor: Doctor) -> Verdict | None:
    evidence: list[str] = []
    places: list[tuple[int, int]] = []
    for side, sender in enumerate(doctor.sides):
        other = 1 - side
        if sender.sync_kept_run >= 2:
            evidence.append(
                f"{sender.sync_kept_run} ACKs from the {SIDES[other]} still carry SYNC; the {SIDES[side]} "
                "waits for the id without it"
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
        "to the beginning (WinDbg: Ctrl+Alt+R).",
        places,
    )


def acks_lost(doctor: Doctor) -> Verdict | None:
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


def storm(doctor: Doctor) -> Verdict | None:
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
                f"sent again; {late} needless sendings",
                f"{sender.retransmitted_bytes} of {sender.bytes} bytes are repetitions",
                f"an ACK takes {milliseconds(middle(sender.ack_ns))} in the middle, "
                f"{milliseconds(sender.ack_most_ns)} at most",
            ],
            "Something between the two holds bytes back (a relay that buffers and then paces). Pace where "
            "bytes are taken in, with a small buffer, so that the sender feels it.",
            [(side, sender.flight.packet.offset)] if sender.flight else [],
        )
    return None


def ping_pong(doctor: Doctor) -> Verdict | None:
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
            f"guest within {seconds(last - first)}, with no request between"
        ],
        "Restart the debugger: it must not answer the reply to its own RESET. Two debuggers on one line do "
        "this too.",
        list(doctor.reset_offsets),
    )


# -- requests, break-ins, peers ----------------------------------------------------------------


def break_in_ignored(doctor: Doctor) -> Verdict | None:
    waited = doctor.now_ns - doctor.break_in_ns
    if not doctor.break_ins_waiting or not doctor.target.bytes or waited < 3 * doctor.timeout_ns:
        return None
    evidence = [f"{doctor.break_ins_waiting} break-ins in {seconds(waited)}, and the guest did not stop"]
    last = doctor.target.last_ns
    evidence.append(
        f"the guest's last byte came {seconds(doctor.now_ns - last)} ago"
        + (", before the break-in" if last < doctor.break_in_ns else "")
    )
    return Verdict(
        "break-in-ignored",
        FAULT,
        "the guest does not react to a break-in",
        evidence,
        "A running guest looks for one byte a clock tick, if kernel debugging is on and it is not hung with "
        "interrupts off. The byte may also be lost: try again.",
    )


def no_answer(doctor: Doctor) -> Verdict | None:
    request, unit = doctor.request, doctor.timeout_ns
    flight = stuck(doctor, doctor.debugger)
    if doctor.target.present is False:
        return None
    if flight is not None:
        summary = "the guest does not acknowledge the debugger's packets"
        evidence = [flight_words(doctor, flight)]
        offset = flight.packet.offset
    elif (
        request is not None
        and request.is_open
        and request.acked_ns
        and doctor.now_ns - request.acked_ns > 5 * unit
    ):
        summary = "the guest acknowledged a request and does not answer it"
        evidence = [f"{request.words}, acknowledged {seconds(doctor.now_ns - request.acked_ns)} ago"]
        offset = request.packet.offset
    elif request is not None and doctor.unanswered_run >= 2:
        summary = "the guest acknowledges requests and does not answer them"
        evidence = [f"{doctor.unanswered_run} requests in a row, the last of them {request.words}"]
        offset = request.packet.offset
    else:
        return None
    evidence.append(target_words(doctor))
    return Verdict(
        "no-answer",
        FAULT,
        summary,
        evidence,
        "Either the guest runs and the debugger believes it stopped (break in again), or bytes towards the "
        "guest are lost.",
        [(DEBUGGER, offset)],
    )


def peer_gone(doctor: Doctor) -> Verdict | None:
    target, debugger = doctor.target, doctor.debugger
    if target.present is False and target.sessions:
        request = doctor.request
        open_request = request is not None and request.is_open
        grave = doctor.state == "stopped" or open_request or (debugger.flight is not None)
        evidence = [f"the guest's end closed {seconds(doctor.now_ns - target.closed_ns)} ago"]
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
            [f"the debugger's end closed {seconds(doctor.now_ns - debugger.closed_ns)} ago"],
            "Connect a debugger and let the guest go on (g)." if grave else "",
            [(DEBUGGER, debugger.bytes)],
        )
    return None
