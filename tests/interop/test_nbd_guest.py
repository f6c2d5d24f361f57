"""A Linux guest on QEMU whose disk is our export: it mounts ext4, writes, trims; fsck finds it clean.

The guest is that of `scripts/tiny_guest.py` with a program of its own.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

import enban
from scripts import tiny_guest
from scripts.tiny_guest import CACHE, newc
from tests.interop.test_nbd_server import serve
from tests.support import needs, needs_qemu_system, qemu_check, qemu_img

__all__ = ["CACHE", "fetch", "newc"]  # the console guest of the keyboard tests is made of them too

INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in @modules@; do insmod /modules/$module.ko || echo GUEST FAILED insmod $module; done
mount -t ext4 -o discard /dev/vda /mnt || echo GUEST FAILED mount
mkdir /mnt/many
for n in $(seq 1 200); do head -c $((n * 97)) /dev/urandom > /mnt/many/$n; done
dd if=/dev/urandom of=/mnt/large bs=64k count=200 2>/dev/null
sync
echo 3 > /proc/sys/vm/drop_caches
for n in $(seq 1 2 200); do rm /mnt/many/$n; done
dd if=/mnt/large of=/mnt/copy bs=1M 2>/dev/null && rm /mnt/large
sync; fstrim /mnt; echo 3 > /proc/sys/vm/drop_caches
(cd /mnt; find . -type f | sort | xargs md5sum > /tmp.sums; mv /tmp.sums sums) || echo GUEST FAILED sums
(cd /mnt; md5sum -c -s sums) || echo GUEST FAILED check
echo GUEST SUM $(md5sum < /mnt/copy)
umount /mnt || echo GUEST FAILED umount
echo GUEST DONE
poweroff -f
"""


def fetch() -> Path:
    """The folder with `kernel`, `busybox` and the modules; skips the test if it cannot be had."""
    try:
        return tiny_guest.fetch()
    except tiny_guest.CannotBuild as error:
        pytest.skip(str(error))


@needs_qemu_system
@needs("mkfs.ext4", "e2fsprogs")
@needs("qemu-img", "qemu-utils")
def test_a_guest_lives_on_our_export(tmp_path: Path) -> None:
    guest = fetch()
    raw, disk = tmp_path / "fs.raw", tmp_path / "disk.qcow2"
    with raw.open("wb") as file:
        file.truncate(192 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", raw], check=True, timeout=60)
    qemu_img("convert", "-f", "raw", "-O", "qcow2", raw, disk)
    (tmp_path / "initramfs").write_bytes(tiny_guest.initramfs(guest, INIT))
    with serve(tmp_path, disk) as service:
        words = [
            "qemu-system-x86_64",
            "-accel",
            "tcg",
            "-m",
            "512",
            "-nographic",
            "-no-reboot",
            "-nodefaults",
        ]
        words += [
            "-serial",
            "stdio",
            "-kernel",
            str(guest / "kernel"),
            "-initrd",
            str(tmp_path / "initramfs"),
        ]
        words += ["-append", "console=ttyS0 quiet panic=-1"]
        words += ["-drive", f"file={service.uri},format=raw,if=virtio,discard=unmap"]
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=240, check=False, stdin=subprocess.DEVNULL
        )
        assert "GUEST DONE" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]
        assert "GUEST FAILED" not in done.stdout, done.stdout[-3000:]
        assert " failed: " not in service.log, service.log
    qemu_check(disk)
    after = tmp_path / "after.raw"
    with enban.open(disk) as image, after.open("wb") as file:
        for offset in range(0, image.size, 1 << 20):
            file.write(image.pread(1 << 20, offset))
    fsck = subprocess.run(["e2fsck", "-fn", after], capture_output=True, text=True, timeout=60, check=False)
    assert fsck.returncode == 0, fsck.stdout
    told = re.search(r"GUEST SUM (\w+)", done.stdout)
    assert told is not None
    dumped = tmp_path / "copy"
    subprocess.run(
        ["debugfs", "-R", f"dump /copy {dumped}", after], check=True, capture_output=True, timeout=60
    )
    import hashlib

    assert hashlib.md5(dumped.read_bytes()).hexdigest() == told[1]
    listed = subprocess.run(
        ["debugfs", "-R", "ls -p /many", after], check=True, capture_output=True, text=True
    )
    assert listed.stdout.count("/100644/") == 100
