"""Guests for tests.

`counting_sector`: a boot sector, so a guest that is up in a second. Again and again it counts up a number in
memory, writes it to sector 1 of the disk it was started from, reads that sector back and prints both:
`memory 5 disk 5`.

`Linux`: the guest of `scripts/tiny_guest.py`, whose shell on the serial line is spoken to.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

from enban.guest import Machine

SECTOR = 512
_ORIGIN = 0x7C00


class _Code:
    """8086 machine code with labels."""

    def __init__(self) -> None:
        self.bytes = bytearray()
        self.labels: dict[str, int] = {}
        self.holes: list[tuple[int, str, str]] = []

    def label(self, name: str) -> None:
        self.labels[name] = len(self.bytes)

    def put(self, text: str, *targets: str) -> None:
        """Hex; `rr` is a relative byte, `ww` a relative word, `aaaa` an address, to `targets`."""
        wanted = iter(targets)
        for word in text.split():
            if word in ("rr", "ww", "aaaa"):
                self.holes.append((len(self.bytes), word, next(wanted)))
                self.bytes += bytes(1 if word == "rr" else 2)
            else:
                self.bytes += bytes.fromhex(word)

    def finish(self) -> bytes:
        for place, kind, name in self.holes:
            target = self.labels[name]
            if kind == "rr":
                self.bytes[place] = (target - place - 1) & 0xFF
            elif kind == "ww":
                self.bytes[place : place + 2] = ((target - place - 2) & 0xFFFF).to_bytes(2, "little")
            else:
                self.bytes[place : place + 2] = (_ORIGIN + target).to_bytes(2, "little")
        assert len(self.bytes) <= SECTOR - 2
        return bytes(self.bytes).ljust(SECTOR - 2, b"\0") + b"\x55\xaa"


def counting_sector() -> bytes:
    code = _Code()
    code.put("31C0 8ED8 8ED0 BC007C FB")  # ds = ss = 0, sp below the code, interrupts on
    code.put("8816 aaaa", "drive")
    code.label("again")
    code.put("FF06 aaaa", "count")  # inc count
    code.put("B80008 8EC0")  # es = 0x800, the buffer of one sector
    code.put("A1 aaaa 26A30000", "count")  # es:[0] = count
    code.put("B80103 E8 ww", "disk")  # write one sector
    code.put("26C70600000000")  # es:[0] = 0
    code.put("B80102 E8 ww", "disk")  # read it
    code.put("BE aaaa E8 ww A1 aaaa E8 ww", "memory", "print", "count", "number")
    code.put("BE aaaa E8 ww 26A10000 E8 ww", "disk_is", "print", "number")
    code.put("BE aaaa E8 ww", "newline", "print")
    code.put("B486 B90300 BA0000 CD15")  # BIOS: wait 0x30000 microseconds
    code.put("EB rr", "again")
    code.label("disk")  # ax: what; cylinder 0, head 0, sector 2
    code.put("31DB B90200 30F6 8A16 aaaa CD13 7201 C3", "drive")
    code.put("BE aaaa E8 ww C3", "failed", "print")
    code.label("number")  # ax in decimal
    code.put("B90000 BB0A00")
    code.label("digit")
    code.put("31D2 F7F3 52 41 85C0 75 rr", "digit")
    code.label("out")
    code.put("58 0430 E8 ww E2 rr C3", "put", "out")
    code.label("print")
    code.put("AC 84C0 7501 C3 E8 ww EB rr", "put", "print")
    code.label("put")  # al to the first serial port
    code.put("50 BAFD03")
    code.label("busy")
    code.put("EC A820 74 rr 58 BAF803 EE C3", "busy")
    for name, text in (
        ("memory", "memory "),
        ("disk_is", " disk "),
        ("newline", "\r\n"),
        ("failed", "disk error\r\n"),
    ):
        code.label(name)
        code.bytes += text.encode() + b"\0"
    code.label("drive")
    code.bytes += b"\0"
    code.label("count")
    code.bytes += b"\0\0"
    return code.finish()


async def count(machine: Machine, timeout_s: float = 30) -> int:
    """The number a counting guest has now; memory and disk must agree."""
    console = machine.console
    console.skip()
    found = await console.wait_for(rb"\nmemory (\d+) disk (\d+)\r", timeout_s)
    assert found[1] == found[2], found[0]
    return int(found[1])


# -- Linux -----------------------------------------------------------------------------------

LINUX = "console=ttyS0 quiet panic=-1"


async def ready(machine: Machine) -> None:
    """The guest's shell is there, without echo."""
    await machine.console.wait_for(rb"guest# ", 120)
    await machine.console.write(b"stty -echo; PS1=\n")
    await shell(machine, "true")


_asked = 0


async def shell(machine: Machine, command: str, timeout_s: float = 120, *, ok: bool = True) -> str:
    """Run a command in the guest's shell; what it printed. A failure in the guest is one of the test."""
    global _asked
    _asked += 1
    mark = f"END-{_asked}-"
    # The mark is put together by the shell, so that an echo of the command cannot be taken for it.
    await machine.console.write(f"{command}\necho E'ND-{_asked}-'$?.\n".encode())
    found = await machine.console.wait_for(rb"(?s)(.*?)" + mark.encode() + rb"(\d+)\.", timeout_s)
    text = found[1].decode(errors="replace").replace("\r\n", "\n")
    assert not ok or found[2] == b"0", f"{command}: exit code {found[2].decode()}\n{text}"
    return re.sub(r"^\s*guest# ", "", text, flags=re.MULTILINE).strip()


def run(work: Any, timeout_s: float = 300) -> Any:
    """Finish a scenario, which may take so long at most."""

    async def limited() -> Any:
        async with asyncio.timeout(timeout_s):
            return await work

    return asyncio.run(limited())


def boot_disk(path: Path, format: str, size: int = 1 << 20) -> Path:
    """A disk of a format that a counting guest starts from."""
    import enban

    enban.create(path, format, size=size)
    with enban.open(path, format=format, writable=True) as disk:
        disk.pwrite(counting_sector(), 0)
    return path
