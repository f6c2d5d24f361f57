"""A guest that is one boot sector: it polls the keyboard controller and prints each scancode over COM1, in
hex.

Assembled by hand below (16-bit real mode). It prints "R" when it is ready, then two digits and a blank for
each byte read from port 0x60. A slow one idles after each byte, so that the 16 bytes of the PS/2 queue
matter.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

from qemu.qmp import QMPClient
from qemu.qmp.error import QMPError

from enban.guest.keyboard.keys import Key, by_name

PROGRAM = bytes.fromhex(
    "31c0"  #   00         xor ax, ax
    "8ed0"  #   02         mov ss, ax
    "bc007c"  # 04         mov sp, 0x7c00
    "fa"  #     07         cli                  ; nobody else reads the keyboard
    "b052"  #   08         mov al, 'R'
    "e82700"  # 0a         call putc
    "e464"  #   0d next:   in al, 0x64
    "a801"  #   0f         test al, 1           ; a byte waits
    "74fa"  #   11         jz next
    "e460"  #   13         in al, 0x60
    "88c4"  #   15         mov ah, al
    "c0e804"  # 17         shr al, 4
    "e80f00"  # 1a         call digit
    "88e0"  #   1d         mov al, ah
    "240f"  #   1f         and al, 15
    "e80800"  # 21         call digit
    "b020"  #   24         mov al, ' '
    "e80b00"  # 26         call putc
    "e91700"  # 29         jmp idle
    "3c0a"  #   2c digit:  cmp al, 10
    "7202"  #   2e         jb low
    "0427"  #   30         add al, 'a' - 10 - '0'
    "0430"  #   32 low:    add al, '0'
    "50"  #     34 putc:   push ax
    "bafd03"  # 35         mov dx, 0x3fd
    "ec"  #     38 full:   in al, dx
    "a820"  #   39         test al, 0x20        ; the transmitter is empty
    "74fb"  #   3b         jz full
    "58"  #     3d         pop ax
    "baf803"  # 3e         mov dx, 0x3f8
    "ee"  #     41         out dx, al
    "c3"  #     42         ret
)  #            43 idle:
IDLE = bytes.fromhex("b90000 e2fe")  # mov cx, 0; loop $: 65536 turns


def boot_sector(idle: int = 0) -> bytes:
    """The sector. idle: how many times 65536 turns the guest idles after each byte."""
    code = PROGRAM + IDLE * idle
    code += b"\xe9" + struct.pack("<h", 0x0D - (len(code) + 3))  # jmp next
    return code + bytes(510 - len(code)) + b"\x55\xaa"


def scancodes(key: Key, down: bool) -> bytes:
    """What a guest with a PC keyboard in set 1 must read for a press or a release (IBM's keyboard
    references)."""
    name = key.qcode
    if name == "print":  # alone, no modifier held
        return bytes.fromhex("e02ae037" if down else "e0b7e0aa")
    if name == "pause":  # a press only
        return bytes.fromhex("e11d45e19dc5") if down else b""
    if name in ("lang1", "lang2"):  # a press only, and not of the usual form
        return {"lang1": b"\xf2", "lang2": b"\xf1"}[name] if down else b""
    set1 = by_name(name).set1
    prefix = b"\xe0" if set1 > 0xFF else b""
    return prefix + bytes([set1 & 0xFF | (0 if down else 0x80)])


class BootGuest:
    """The running guest: `qmp`, the VNC socket `vnc`, and what it printed."""

    def __init__(self, process: asyncio.subprocess.Process, qmp: QMPClient, vnc: Path) -> None:
        self.process = process
        self.qmp = qmp
        self.vnc = vnc
        assert process.stdout is not None
        self._out = process.stdout

    async def read(self, count: int, timeout_s: float = 10.0) -> bytes:
        """The next `count` bytes the guest has read from its keyboard; fewer if they do not come in time."""
        text = bytearray()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(text) < 3 * count:
                    piece = await self._out.read(3 * count - len(text))
                    assert piece, "the guest is gone"
                    text += piece
        return bytes.fromhex(text.decode())

    async def expect(self, wanted: bytes) -> None:
        """The guest read exactly this, and nothing after it (a final key proves the latter)."""
        got = await self.read(len(wanted))
        assert got == wanted, f"{got.hex(' ')} instead of {wanted.hex(' ')}"

    async def until(self, last: bytes) -> bytes:
        """What the guest read before it read `last`."""
        got = b""
        while not got.endswith(last):
            piece = await self.read(1)
            assert piece, f"{last.hex(' ')} did not come after {got.hex(' ')}"
            got += piece
        return got[: -len(last)]

    async def mark(self) -> None:
        """Nothing is on its way: F12 comes next."""
        for down in (True, False):
            event = {"type": "key", "data": {"down": down, "key": {"type": "qcode", "data": "f12"}}}
            await self.qmp.execute("input-send-event", {"events": [event]})
        await self.expect(b"\x58\xd8")


@contextlib.asynccontextmanager
async def boot_guest(folder: Path, *, idle: int = 0, options: Sequence[str] = ()) -> AsyncIterator[BootGuest]:
    """Start the guest in a folder, and end it. idle: as of `boot_sector`; options: more words for QEMU."""
    (folder / "boot.img").write_bytes(boot_sector(idle))
    monitor, vnc = folder / "qmp.sock", folder / "vnc.sock"
    words = ["-accel", "tcg", "-m", "16", "-nodefaults", "-vga", "std", "-serial", "stdio"]
    words += ["-drive", f"file={folder / 'boot.img'},format=raw,if=floppy,readonly=on"]
    words += ["-qmp", f"unix:{monitor},server=on,wait=off", "-display", f"vnc=unix:{vnc}", *options]
    process = await asyncio.create_subprocess_exec(
        "qemu-system-x86_64",
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    qmp = QMPClient("keyboard")
    try:
        assert process.stdout is not None
        async with asyncio.timeout(30):
            first = await process.stdout.read(1)
        if first != b"R":
            assert process.stderr is not None
            raise AssertionError(f"the guest did not start: {(await process.stderr.read()).decode()}")
        await qmp.connect(str(monitor))
        yield BootGuest(process, qmp, vnc)
    finally:
        with contextlib.suppress(QMPError, asyncio.CancelledError):
            await qmp.disconnect()
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
