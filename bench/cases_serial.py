"""`enban serial bridge` against two programs without anything in between, and against a cable.

A round trip is one of kernel debugging: a request, its ACK, the answer, its ACK. Both programs read and
build packets as a debugger does. The cable is a line of 115200 baud, as `pace=` models it: 11.5 kB/s.
"""

from __future__ import annotations

from bench.case import Case

# Transport, goal of round trips against direct.
_KINDS = (("unix", 0.5), ("tcp", None), ("fifo", None), ("pty", None))

CASES = [
    Case(
        name=f"serial: {what}, {kind}, against direct",
        peer=f"{{python}} -m bench.serial_load {work} {kind} {{folder}} direct",
        ours=f"{{python}} -m bench.serial_load {work} {kind} {{folder}} bridge",
        goal=goal if work == "trips" else None,
        self_timed=True,
    )
    for work, what in (("trips", "round trips"), ("bytes", "bytes"))
    for kind, goal in _KINDS
] + [
    Case(
        name=f"serial: {what}, unix, against a 115200 line",
        peer=f"{{python}} -m bench.serial_load {work} unix {{folder}} cable {{python}} -m enban",
        ours=f"{{python}} -m bench.serial_load {work} unix {{folder}} bridge",
        goal=100,
        self_timed=True,
    )
    for work, what in (("trips", "round trips"), ("bytes", "bytes"))
]
