"""A Linux guest whose text console has a keyboard map of Debian's: what is typed on it comes back over the
serial line.

Debian's cloud kernel with a busybox initramfs, as of the NBD guest test; the maps are of the packages
console-data and kbd, fetched once with `apt-get download` into `.cache/guest` and turned into the kernel's
form by kbd's loadkeys. Commands on the serial line: `map NAME` loads a map, `load` starts two busy loops.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from tests.interop.test_nbd_guest import CACHE, fetch, newc

# A map of the console -> our layout, and the file in console-data, or the layout that console-setup makes
# from XKB (which is what a Debian console has today).
MAPS = {
    "jp106": ("ja", "qwerty/jp106"),
    "us": ("en-us", "qwerty/us"),
    "de-latin1-nodeadkeys": ("de-nodeadkeys", "qwertz/de-latin1-nodeadkeys"),
    "fr-pc": ("fr", "azerty/fr-pc"),
    "xkb-de": ("de", "xkb:de"),
    "xkb-fr": ("fr", "xkb:fr"),
}
PACKAGES = ("console-data", "console-setup", "kbd")
INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t devtmpfs dev /dev
echo 0 > /proc/sys/kernel/printk
exec < /dev/ttyS0 > /dev/ttyS0
stty raw -echo
(stty raw -echo; exec cat) < /dev/tty1 &
echo GUEST READY
while read command name; do
    case $command in
    map) loadkmap < /maps/$name || echo FAILED ;;
    load) while :; do :; done & while :; do :; done & ;;
    esac
    echo READY $command $name
done
"""


def keymaps() -> dict[str, bytes]:
    """The maps in the kernel's form; skips the test if they cannot be had."""
    folder = CACHE / "keymaps-2"
    if not (folder / "complete").exists():
        work = CACHE / f"keymaps-{os.getpid()}"
        work.mkdir(parents=True)
        try:
            download = subprocess.run(
                ["apt-get", "-q", "-o", "APT::Sandbox::User=root", "download", *PACKAGES],
                cwd=work,
                capture_output=True,
                text=True,
                timeout=300,
                check=False,
            )
            packages = sorted(work.glob("*.deb"))
            if download.returncode or len(packages) != len(PACKAGES):
                pytest.skip(
                    f"the packages {', '.join(PACKAGES)} cannot be fetched: {download.stderr.strip()[-200:]}"
                )
            for package in packages:
                subprocess.run(["dpkg-deb", "-x", package, work / "root"], check=True, timeout=120)
            made = work / "made"
            made.mkdir()
            for name, (_, source) in MAPS.items():
                (made / name).write_bytes(_compile(work / "root", source))
            (made / "complete").touch()
            with contextlib.suppress(OSError):  # another worker was quicker
                made.rename(folder)
        finally:
            shutil.rmtree(work)
    return {name: (folder / name).read_bytes() for name in MAPS}


def _compile(root: Path, source: str) -> bytes:
    """A map in the kernel's form (busybox' loadkmap): with console-setup's ckbcomp for "xkb:", then
    loadkeys."""
    path = root / "usr" / "share" / "keymaps" / "i386" / f"{source}.kmap.gz"
    options = ["-b"]
    if source.startswith("xkb:"):
        made = subprocess.run(
            ["perl", root / "usr" / "bin" / "ckbcomp", "-model", "pc105", source[4:]],
            capture_output=True,
            check=True,
        )
        path = root / "made.kmap"
        path.write_bytes(made.stdout)
        options = ["-b", "-u"]
    done = subprocess.run([root / "bin" / "loadkeys", *options, path], capture_output=True, check=False)
    assert done.stdout.startswith(b"bkeymap"), done.stderr
    return done.stdout


class ConsoleGuest:
    """The running guest: `qmp`, the VNC socket `vnc`; `command` and `typed` speak with its serial line."""

    def __init__(self, process: asyncio.subprocess.Process, qmp: QMPClient, vnc: Path) -> None:
        self.qmp = qmp
        self.vnc = vnc
        assert process.stdout is not None and process.stdin is not None
        self._out, self._in = process.stdout, process.stdin

    async def command(self, line: str) -> None:
        self._in.write(line.encode() + b"\n")
        await self._in.drain()
        async with asyncio.timeout(60):
            while (answer := await self._out.readline()).strip() != f"READY {line}".strip().encode():
                assert answer and b"FAILED" not in answer, answer

    async def typed(self, count: int, timeout_s: float = 60) -> bytes:
        """The next `count` bytes that the console's reader got; fewer if no more come in time."""
        got = bytearray()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(got) < count:
                    got += await self._out.read(count - len(got))
        return bytes(got)


@contextlib.asynccontextmanager
async def console_guest(folder: Path) -> AsyncIterator[ConsoleGuest]:
    """Boot it (some seconds under TCG), and end it."""
    guest, maps = fetch(), keymaps()
    files = {
        "bin": (0o040755, b""),
        "dev": (0o040755, b""),
        "maps": (0o040755, b""),
        "init": (0o100755, INIT.encode()),
        "bin/busybox": (0o100755, (guest / "busybox").read_bytes()),
        **{f"maps/{name}": (0o100644, content) for name, content in maps.items()},
    }
    (folder / "initramfs").write_bytes(newc(files))
    monitor, vnc = folder / "qmp.sock", folder / "vnc.sock"
    words = ["-accel", "tcg", "-m", "256", "-nodefaults", "-vga", "std", "-serial", "stdio", "-no-reboot"]
    words += ["-kernel", str(guest / "kernel"), "-initrd", str(folder / "initramfs")]
    words += ["-append", "console=ttyS0 quiet panic=-1"]
    words += ["-qmp", f"unix:{monitor},server=on,wait=off", "-display", f"vnc=unix:{vnc}"]
    process = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64",
        *words,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    qmp = QMPClient("keyboard")
    try:
        assert process.stdout is not None
        running = ConsoleGuest(process, qmp, vnc)
        async with asyncio.timeout(120):
            while b"GUEST READY" not in await process.stdout.readline():
                assert process.returncode is None
        await qmp.connect(str(monitor))
        yield running
    finally:
        with contextlib.suppress(QMPError, asyncio.CancelledError):
            await qmp.disconnect()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
