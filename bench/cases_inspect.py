"""Looking at images: compare, check, map and info."""

from __future__ import annotations

from bench.case import Case

CASES = [
    Case(
        name="compare raw and qcow2, 2 GiB",
        peer="qemu-img compare -f raw -F qcow2 {raw-2G} {qcow2-2G}",
        ours="compare -f raw -F qcow2 {raw-2G} {qcow2-2G}",
        goal=1.3,
    ),
    Case(
        name="check 1 TiB, tables in order",
        peer="qemu-img check -f qcow2 {meta-1T}",
        ours="check -f qcow2 {meta-1T}",
        goal=3,
    ),
    Case(
        name="check 1 TiB, shuffled",
        peer="qemu-img check -f qcow2 {shuffled-1T}",
        ours="check -f qcow2 {shuffled-1T}",
        # qemu-img needs more than ten minutes.
        goal=50,
        peer_bound_s=120,
    ),
    Case(
        name="map 1 TiB, tables in order",
        peer="qemu-img map --output=json -f qcow2 {meta-1T}",
        ours="map --output=json -f qcow2 {meta-1T}",
        goal=1,
        same_json=True,
    ),
    Case(
        # A million extents; for 1 TiB qemu-img alone would print for 40 s a sample.
        name="map 64 GiB, shuffled",
        peer="qemu-img map --output=json -f qcow2 {shuffled-64G}",
        ours="map --output=json -f qcow2 {shuffled-64G}",
        goal=1,
        same_json=True,
    ),
    Case(
        name="info, at most 3x an empty Python",
        peer="{python} -c pass",
        ours="info {meta-4G}",
        goal=1 / 3,
        more=3,
    ),
    Case(
        name="info, against qemu-img",
        peer="qemu-img info {meta-4G}",
        ours="info {meta-4G}",
        more=3,
    ),
]
