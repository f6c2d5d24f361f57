"""What can be wrong with a line and with those at its ends: nothing comes, the wrong thing, damage, slowness.

One function a cause: the verdict if the facts show it, else None. Times are measured in the kernel's timeout
(about a second), so that a test may run faster than a kernel does; only what TCP and UARTs do has its own.
"""

from __future__ import annotations

from .tracking import DEBUGGER, MS, SIDES, TARGET, middle
from .verdicts import FAULT, NOTE, SLOW, Verdict, milliseconds, seconds

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .doctor import Doctor

BAUDS = (300, 600, 1200, 2400, 4800, 9600, 14400, 19200, 38400, 57600, 115200, 230400)


def no_bytes(doctor: Doctor) -> Verdict | None:
    target, debugger = doctor.target, doctor.debugger
    waited = doctor.now_ns - max(doctor.began_ns, target.opened_ns)
    if target.bytes or waited < 5 * doctor.timeout_ns:
        return None
    evidence = [f"the guest's side sent no byte in {seconds(waited)}"]
    if target.present is False:
        evidence.append("nobody is connected on the guest's side")
    if debugger.bytes:
        evidence.append(
            f"the debugger sent {debugger.bytes} bytes: {debugger.break_ins} break-ins, {debugger.resets} "
            "RESETs"
        )
    # A guest that runs and is left alone has nothing to say.
    asked = debugger.bytes > 0
    return Verdict(
        "no-bytes",
        FAULT if asked else NOTE,
        "the guest does not answer: no byte came from it" if asked else "no byte from the guest yet",
        evidence,
        "Is kernel debugging on in the guest (bcdedit /debug on, then a restart), and on this COM port? A "
        "guest sends nothing before it starts Windows, nor while it runs undisturbed.",
    )


def no_packets(doctor: Doctor) -> Verdict | None:
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


def echo(doctor: Doctor) -> Verdict | None:
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


def damage(doctor: Doctor) -> Verdict | None:
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
            f"{sender.broken} broken packets from the {SIDES[side]} ({', '.join(reasons)}), {sender.packets} "
            f"whole ones, {sender.noise} bytes between packets"
        )
        if unhealed:
            evidence.append(
                f"nothing whole followed the last one for {seconds(doctor.now_ns - sender.unhealed_ns)}"
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
        "full, or two readers share one line."
        if grave
        else "",
        places,
    )


# -- slow --------------------------------------------------------------------------------------


def nagle(doctor: Doctor) -> Verdict | None:
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
            f"{milliseconds(sorted(gap for gap, _ in marked)[len(marked) // 2])} late, {min(lengths)} to "
            f"{max(lengths)} bytes alike"
        ]
        if doctor.round_trip_ns:
            evidence.append(f"a round trip takes {milliseconds(middle(doctor.round_trip_ns))}")
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


def line_rate(doctor: Doctor) -> Verdict | None:
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
            evidence.append(f"a round trip takes {milliseconds(middle(doctor.round_trip_ns))}")
        return Verdict(
            "line-rate",
            SLOW,
            "the line's speed is the limit",
            evidence,
            "Nothing is wrong; raise the baud rate on both ends, or use a socket or pipe instead of a cable.",
            [(side, sender.bytes)],
        )
    return None
