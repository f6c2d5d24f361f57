"""How time and peak memory grow with the image: `python -m bench --growth`.

Each operation runs at growing sizes, ours and, where it is installed and can keep up, the peer's. The last
line of a table says the power of the size that the cost follows: 1 is linear, 0 is constant. Memory should
say about 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench import inputs
from bench.case import Case
from bench.harness import MIB, Bench, Row
from bench.report import align, as_json, seconds
from bench.stats import Spread, growth_exponent

DATA = ("512M", "1G", "2G", "4G", "8G")  # half of it data: 256 MiB to 4 GiB
METADATA = ("64G", "256G", "1T", "4T")


@dataclass(frozen=True, slots=True)
class Operation:
    """A case whose commands have SIZE in their input names."""

    name: str
    peer: str
    ours: str
    sizes: tuple[str, ...]
    out: str = ""
    peer_bound_s: float | None = None

    def at(self, size: str) -> Case:
        return Case(
            name=f"{self.name}, {size}",
            peer=self.peer.replace("SIZE", size),
            ours=self.ours.replace("SIZE", size),
            out=self.out,
            peer_bound_s=self.peer_bound_s,
        )


OPERATIONS = [
    Operation(
        "convert raw -> qcow2",
        "qemu-img convert -f raw -O qcow2 {raw-SIZE} {out}",
        "convert -t unsafe -f raw -O qcow2 {raw-SIZE} {out}",
        DATA,
        out="qcow2",
    ),
    Operation(
        "convert qcow2 -> raw",
        "qemu-img convert -f qcow2 -O raw {qcow2-SIZE} {out}",
        "convert -t unsafe -f qcow2 -O raw {qcow2-SIZE} {out}",
        DATA,
        out="raw",
    ),
    Operation(
        "check, tables in order",
        "qemu-img check -f qcow2 {meta-SIZE}",
        "check -f qcow2 {meta-SIZE}",
        METADATA,
    ),
    Operation(
        "check, shuffled",
        "qemu-img check -f qcow2 {shuffled-SIZE}",
        "check -f qcow2 {shuffled-SIZE}",
        METADATA,
        peer_bound_s=60,
    ),
    Operation(
        "map, tables in order",
        "qemu-img map --output=json -f qcow2 {meta-SIZE}",
        "map --output=json -f qcow2 {meta-SIZE}",
        METADATA,
    ),
    Operation(
        "info",
        "qemu-img info -f qcow2 {meta-SIZE}",
        "info -f qcow2 {meta-SIZE}",
        METADATA,
    ),
]


@dataclass(slots=True)
class Curve:
    operation: Operation
    rows: dict[str, Row] = field(default_factory=dict)


def sizes_of(operations: list[Operation]) -> list[str]:
    return list(dict.fromkeys(size for operation in operations for size in operation.sizes))


def inputs_at(operations: list[Operation], size: str) -> set[str]:
    return {name for operation in operations if size in operation.sizes for name in operation.at(size).inputs}


def measure(bench: Bench, operations: list[Operation], *, keep: bool) -> list[Curve]:
    """All operations, size by size: unless they are to be kept, only one size's inputs exist at a time."""
    curves = [Curve(operation) for operation in operations]
    for size in sizes_of(operations):
        for curve in curves:
            if size in curve.operation.sizes:
                curve.rows[size] = bench.measure(curve.operation.at(size))
        if not keep:
            bench.forget(inputs_at(operations, size))
    return curves


def curve_table(curve: Curve) -> str:
    lines = [(curve.operation.name, "peer", "MiB", "ours", "MiB", "")]
    sizes: list[float] = []
    times: list[float] = []
    peaks: list[float] = []
    for size, row in curve.rows.items():
        peer = ours = peer_mib = ours_mib = "-"
        if row.peer.seconds:
            peer = ("> " if row.peer.unfinished else "") + seconds(Spread.of(row.peer.seconds).median)
            peer_mib = f"{row.peer.peak_bytes / MIB:.0f}"
        if row.ours.seconds:
            median = Spread.of(row.ours.seconds).median
            ours, ours_mib = seconds(median), f"{row.ours.peak_bytes / MIB:.0f}"
            sizes.append(inputs.parse(f"raw-{size}")[1])
            times.append(median)
            peaks.append(row.ours.peak_bytes)
        lines.append((f"  {size}", peer, peer_mib, ours, ours_mib, row.why))
    if len(sizes) > 1:
        time_power, memory_power = growth_exponent(sizes, times), growth_exponent(sizes, peaks)
        lines.append(
            ("  grows as size to the power of", "", "", f"{time_power:.2f}", f"{memory_power:.2f}", "")
        )
    return align(lines)


def curve_json(curve: Curve) -> dict[str, Any]:
    return {
        "operation": curve.operation.name,
        "rows": {size: as_json(row) for size, row in curve.rows.items()},
    }
