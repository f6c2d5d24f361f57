"""`enban serve` against qemu-nbd, the better of its modes in each sample: seconds a request, by fio."""

from __future__ import annotations

from bench.case import Case

# Work of bench.nbd_load, what it is, the ratio to reach.
_ROWS = (
    ("randread-32", "4k random read, depth 32", 2.0),
    ("randwrite-32", "4k random write, allocated, depth 32", 2.0),
    ("allocate-32", "4k random write that allocates, depth 32", 1.5),
    ("randread-1", "4k random read, depth 1", 2.0),
    ("randwrite-1", "4k random write, depth 1", 2.0),
    ("randread-1-awake", "4k random read, depth 1, --keep-awake (for root)", 2.0),
    ("randwrite-1-awake", "4k random write, depth 1, --keep-awake (for root)", 2.0),
    ("randread-32-simple", "4k random read, depth 32, --no-sr", 2.0),
    ("randread-1-simple", "4k random read, depth 1, --no-sr", 2.0),
    ("randread-4x32-simple", "4k random read, 4 connections, depth 32, --no-sr", 2.5),
    ("read-256k", "256k sequential read, depth 8", 4.0),
    ("write-256k", "256k sequential write, depth 8", 2.0),
    ("randread-4x32", "4k random read, 4 connections, depth 32", 2.5),
    ("cold-32", "4k random read, depth 32, not in page cache", 1.0),
    ("nbdcopy", "nbdcopy of a compressed qcow2", 1.5),
)

CASES = [
    Case(
        name=f"nbd: {text}",
        peer=f"{{python}} -m bench.nbd_load {work} {{{image}}} {{folder}} qemu-nbd",
        ours=f"{{python}} -m bench.nbd_load {work} {{{image}}} {{folder}}",
        goal=goal,
        self_timed=True,
        needs=("qemu-nbd", "qemu-img", "nbdcopy" if work == "nbdcopy" else "fio"),
    )
    for work, text, goal in _ROWS
    for image in ("zlib-1G" if work == "nbdcopy" else "full-1G",)
]
