"""`enban run` against QEMU that opens the same image itself: seconds a read, as a guest on TCG sees it."""

from __future__ import annotations

from bench.case import Case

NEEDS = ("qemu-system-x86_64", "qemu-img", "apt-get", "dpkg-deb")
CASES = [
    Case(
        name="guest: 4k random read, depth 1, bus vhost",
        peer="{python} -m bench.guest_load {full-1G} {folder} qemu",
        ours="{python} -m bench.guest_load {full-1G} {folder} vhost",
        goal=0.8,
        self_timed=True,
        needs=NEEDS,
    ),
    Case(
        name="guest: 4k random read, depth 1, bus virtio (NBD)",
        peer="{python} -m bench.guest_load {full-1G} {folder} qemu",
        ours="{python} -m bench.guest_load {full-1G} {folder} virtio",
        self_timed=True,
        needs=NEEDS,
    ),
]
