"""Conversions against qemu-img.

Like is compared with like: enban flushes what it wrote before it gives it its name, qemu-img by default
never does (its `-t unsafe`). So rows against plain `qemu-img convert` say `-t unsafe` to enban too, and the
"flushed" rows say `-t writeback` to both.
"""

from __future__ import annotations

from bench.case import Case

PEAK_MIB = 96

CASES = [
    Case(
        name="raw -> qcow2",
        peer="qemu-img convert -f raw -O qcow2 {raw-2G} {out}",
        ours="convert -t unsafe -f raw -O qcow2 {raw-2G} {out}",
        goal=1.5,
        out="qcow2",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="qcow2 -> raw",
        peer="qemu-img convert -f qcow2 -O raw {qcow2-2G} {out}",
        ours="convert -t unsafe -f qcow2 -O raw {qcow2-2G} {out}",
        goal=1.5,
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="raw -> qcow2, peer with -m 16 -W",
        peer="qemu-img convert -m 16 -W -f raw -O qcow2 {raw-2G} {out}",
        ours="convert -t unsafe -f raw -O qcow2 {raw-2G} {out}",
        out="qcow2",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="qcow2 -> raw, peer with -m 16 -W",
        peer="qemu-img convert -m 16 -W -f qcow2 -O raw {qcow2-2G} {out}",
        ours="convert -t unsafe -f qcow2 -O raw {qcow2-2G} {out}",
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="raw -> qcow2, flushed",
        peer="qemu-img convert -t writeback -f raw -O qcow2 {raw-2G} {out}",
        ours="convert -t writeback -f raw -O qcow2 {raw-2G} {out}",
        out="qcow2",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="qcow2 -> raw, flushed",
        peer="qemu-img convert -t writeback -f qcow2 -O raw {qcow2-2G} {out}",
        ours="convert -t writeback -f qcow2 -O raw {qcow2-2G} {out}",
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="raw -> qcow2 -c (zlib)",
        peer="qemu-img convert -c -f raw -O qcow2 {raw-2G} {out}",
        ours="convert -t unsafe -c -f raw -O qcow2 {raw-2G} {out}",
        goal=12,
        out="qcow2",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="raw -> qcow2 -c zstd",
        peer="qemu-img convert -c -o compression_type=zstd -f raw -O qcow2 {raw-2G} {out}",
        ours="convert -t unsafe -c -o compression_type=zstd -f raw -O qcow2 {raw-2G} {out}",
        goal=3,
        out="qcow2",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="compressed qcow2 (zlib) -> raw",
        peer="qemu-img convert -f qcow2 -O raw {zlib-2G} {out}",
        ours="convert -t unsafe -f qcow2 -O raw {zlib-2G} {out}",
        goal=2,
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="compressed qcow2 (zstd) -> raw",
        peer="qemu-img convert -f qcow2 -O raw {zstd-2G} {out}",
        ours="convert -t unsafe -f qcow2 -O raw {zstd-2G} {out}",
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="raw -> qcow",
        peer="qemu-img convert -f raw -O qcow {raw-2G} {out}",
        ours="convert -t unsafe -f raw -O qcow {raw-2G} {out}",
        goal=1.3,
        out="qcow",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="qcow -> raw",
        peer="qemu-img convert -f qcow -O raw {qcow-2G} {out}",
        ours="convert -t unsafe -f qcow -O raw {qcow-2G} {out}",
        goal=1.3,
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="qcow -> qcow2",
        peer="qemu-img convert -f qcow -O qcow2 {qcow-2G} {out}",
        ours="convert -t unsafe -f qcow -O qcow2 {qcow-2G} {out}",
        goal=1.3,
        out="qcow2",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
    Case(
        name="raw -> qcow -c",
        peer="qemu-img convert -c -f raw -O qcow {raw-2G} {out}",
        ours="convert -t unsafe -c -f raw -O qcow {raw-2G} {out}",
        goal=1.3,
        out="qcow",
        no_larger=True,
        peak_mib=PEAK_MIB,
        peer_code=1,  # complete all the same: qemu-img (7.2) trips over the end of its own job
    ),
    Case(
        name="compressed qcow -> raw",
        peer="qemu-img convert -f qcow -O raw {packed-2G} {out}",
        ours="convert -t unsafe -f qcow -O raw {packed-2G} {out}",
        goal=1.3,
        out="raw",
        no_larger=True,
        peak_mib=PEAK_MIB,
    ),
]
