"""A Linux guest of 18 MB for trying things out: Debian's cloud kernel and busybox on the serial console.

    .venv/bin/python scripts/tiny_guest.py FOLDER      # makes FOLDER/kernel and FOLDER/initrd

The packages are fetched with `apt-get download` (nothing is installed) and kept in `.cache/guest`. The guest
knows virtio and IDE disks, CD-ROMs, ext4 and iso9660, and powers off when asked to. Its shell is at the first
serial port; start it with the kernel command line `console=ttyS0 quiet`.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "guest"
# Each after those it needs.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_blk",
    "scsi_common",
    "scsi_mod",
    "cdrom",
    "sr_mod",
    "sd_mod",
    "libata",
    "ata_piix",
    "isofs",
    "evdev",
    "button",
)
KERNEL = "linux-image-cloud-amd64"
_DIRECTORY, _FILE, _PROGRAM = 0o040755, 0o100644, 0o100755
_INIT = r"""#!/bin/busybox sh
export PATH=/bin HOME=/ PS1='guest# '
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for module in @modules@; do insmod /modules/$module.ko || echo "no module $module"; done
echo 0 > /proc/sys/kernel/printk
acpid -c /etc/acpi -l /dev/null -p /tmp/acpid.pid
echo 'The guest is ready.'
while true; do setsid cttyhack sh; done
"""
_POWER = "#!/bin/sh\nsync; umount -a -r 2>/dev/null; poweroff -f\n"


class CannotBuild(Exception):
    """What is missing, in one line."""


def fetch() -> Path:
    """The folder with `kernel`, `busybox` and the modules. Raises CannotBuild."""
    done = CACHE / "complete-2"
    if done.exists():
        return CACHE
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise CannotBuild("a guest needs Debian's apt-get and dpkg-deb")
    depends = subprocess.run(["apt-cache", "depends", KERNEL], capture_output=True, text=True, check=False)
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64\S*)", depends.stdout)
    if found is None:
        raise CannotBuild(f"apt knows no kernel for a guest (package {KERNEL}); run: apt-get update")
    work = CACHE / f"making-{os.getpid()}"
    work.mkdir(parents=True)
    try:
        root = work / "root"
        for package in download(work, found[1], "busybox-static"):
            subprocess.run(["dpkg-deb", "-x", package, root], check=True, timeout=120)
        (kernel,) = (root / "boot").glob("vmlinuz-*")
        kernel.rename(CACHE / "kernel")
        (root / "bin" / "busybox").rename(CACHE / "busybox")
        for module in MODULES:
            (path,) = root.rglob(f"{module}.ko")
            path.rename(CACHE / f"{module}.ko")
        done.touch()
    finally:
        shutil.rmtree(work)
    return CACHE


def download(folder: Path, *packages: str) -> list[Path]:
    """Debian packages as files in a folder. Raises CannotBuild."""
    done = subprocess.run(
        ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *packages],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    found = sorted(folder.glob("*.deb"))
    if done.returncode or len(found) < len(packages):
        raise CannotBuild(f"packages for a guest cannot be fetched: {done.stderr.strip()[-200:]}")
    return found


def newc(files: dict[str, tuple[int, bytes]]) -> bytes:
    """An initramfs: a cpio archive in the "newc" form (kernel document initramfs-buffer-format).

    files: name -> mode with file type, content.
    """
    out = bytearray()
    entries = [*files.items(), ("TRAILER!!!", (0, b""))]
    for number, (name, (mode, content)) in enumerate(entries, 1):
        raw = name.encode() + b"\0"
        fields = (number, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(raw), 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + raw
        out += bytes(-len(out) % 4) + content
        out += bytes(-len(out) % 4)
    return bytes(out)


def initramfs(guest: Path, init: str = _INIT, more: dict[str, tuple[int, bytes]] | None = None) -> bytes:
    """The guest's root file system. init: its first program; `@modules@` in it becomes their names."""
    files = dict.fromkeys(("bin", "modules", "dev", "proc", "sys", "tmp", "mnt"), (_DIRECTORY, b""))
    files |= dict.fromkeys(("etc", "etc/acpi", "etc/acpi/PWRF"), (_DIRECTORY, b""))
    files["etc/acpi/PWRF/00000080"] = (_PROGRAM, _POWER.encode())
    files["init"] = (_PROGRAM, init.replace("@modules@", " ".join(MODULES)).encode())
    files["bin/busybox"] = (_PROGRAM, (guest / "busybox").read_bytes())
    for module in MODULES:
        files[f"modules/{module}.ko"] = (_FILE, (guest / f"{module}.ko").read_bytes())
    return newc(files | (more or {}))


def build(folder: Path) -> None:
    """Make `kernel` and `initrd` in a folder. Raises CannotBuild."""
    guest = fetch()
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(guest / "kernel", folder / "kernel")
    (folder / "initrd").write_bytes(initramfs(guest))


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__)
        return 1
    try:
        build(Path(arguments[0]))
    except CannotBuild as error:
        print(f"tiny_guest: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
