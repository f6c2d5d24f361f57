"""Verdicts: what the facts of a session mean, in words, with the evidence.

A verdict states what was seen, and where in which direction's stream; what cannot be seen from the line (the
guest's configuration, a cable) it only offers as something to look at. `line_causes` and `packet_causes` have
one function a cause, each a plain reading of the facts that `doctor` and `tracking` keep; `judge` asks them.
"""

from __future__ import annotations

from ..wire.kd import constants as k
from ..wire.kd.messages import decode
from .tracking import MS, SECOND, SIDES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .doctor import Doctor
    from .tracking import Flight, Sender

FAULT, SLOW, NOTE, HEALTHY = "fault", "slow", "note", "healthy"


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


# -- what several causes ask and say -------------------------------------------------------------


def stuck(doctor: Doctor, sender: Sender) -> Flight | None:
    """The packet of a side that should have been acknowledged long ago."""
    flight = sender.flight
    if flight is None or flight.implicit:
        return None
    age = doctor.now_ns - flight.first_ns
    return flight if flight.sends >= 4 or age > 3 * doctor.timeout_ns else None


def freezes(flight: Flight) -> bool:
    """Whether the guest waits for this ACK for ever: an exception or a prompt. For others it gives up."""
    message = decode(flight.packet)
    return message.is_exception or message.code == k.GET_STRING


def flight_words(doctor: Doctor, flight: Flight) -> str:
    waited = seconds(doctor.now_ns - flight.first_ns)
    return f"{flight.words}, id {flight.packet.id:#x}, sent {flight.sends} times in {waited}, no ACK"


def debugger_words(doctor: Doctor) -> str:
    debugger = doctor.debugger
    if debugger.present is False:
        return "no debugger is connected"
    if not debugger.bytes:
        return "the debugger's side never sent a byte"
    return f"the debugger's last byte came {seconds(doctor.now_ns - debugger.last_ns)} ago"


def target_words(doctor: Doctor) -> str:
    target = doctor.target
    if not target.bytes:
        return "the guest never sent a byte"
    return f"the guest is {doctor.state}; its last byte came {seconds(doctor.now_ns - target.last_ns)} ago"


def seconds(nanoseconds: float) -> str:
    return f"{max(0, nanoseconds) / SECOND:.1f} s"


def milliseconds(nanoseconds: float) -> str:
    return f"{nanoseconds / MS:.1f} ms" if nanoseconds >= MS else f"{nanoseconds / 1000:.0f} us"
