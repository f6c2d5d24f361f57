"""Snapshots, commit and rebase: seconds of one command on images prepared for it."""

from __future__ import annotations

from bench.case import Case

_ROWS = (
    ("create", "meta-64G", "snapshot -c, 64 GiB allocated in order", 2.0),
    ("delete", "meta-64G", "snapshot -d, 64 GiB allocated in order", 2.0),
    ("create", "shuffled-64G", "snapshot -c, 64 GiB allocated, shuffled", 2.0),
    ("delete", "shuffled-64G", "snapshot -d, 64 GiB allocated, shuffled", 2.0),
    ("commit", "qcow2-1G", "commit, 512 MiB of data", 1.2),
    ("rebase", "qcow2-1G", "rebase, 512 MiB of data", 1.2),
)

CASES = [
    Case(
        name=name,
        peer=f"{{python}} -m bench.snapshot_load {work} {{{image}}} {{folder}} qemu-img",
        ours=f"{{python}} -m bench.snapshot_load {work} {{{image}}} {{folder}}",
        goal=goal,
        self_timed=True,
        needs=("qemu-img",),
    )
    for work, image, name, goal in _ROWS
] + [
    Case(
        name=f"open {image} with snapshot=True, at most 5 ms",
        peer="{python} -c print(0.005)",
        ours=f"{{python}} -m bench.snapshot_load open {{{image}}} {{folder}}",
        goal=1.0,
        self_timed=True,
    )
    for image in ("meta-4G", "meta-1T")
]
