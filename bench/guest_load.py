"""A guest that reads its disk at random places; prints what a read took in seconds.

    python -m bench.guest_load IMAGE FOLDER qemu                 QEMU opens it, the better of its aio modes
    python -m bench.guest_load IMAGE FOLDER BUS ENBAN-COMMAND... enban run --bus BUS

The guest is the tiny one of `scripts/tiny_guest.py` on TCG, with a program of its own in place of a shell: it
reads 4 KiB with O_DIRECT, one after the other, and says on the serial line when it begins and ends. The first
round brings the image into the page cache and is not counted.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import enban
from scripts.tiny_guest import CannotBuild, fetch, initramfs

READS = 20_000
BLOCK = 4096
_BASE, _HEAD, _BUFFER = 0x400000, 64 + 56, 0x402000
_MULTIPLIER = 6364136223846793005  # Knuth's MMIX generator, its upper bits are used
_INIT = r"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
for module in @modules@; do insmod /modules/$module.ko; done
reader; echo GUEST BEGIN; reader && echo GUEST END
poweroff -f
"""


def reader(blocks: int, reads: int = READS) -> bytes:
    """A static x86-64 program: `reads` times pread(2) of a random one of `blocks` blocks of /dev/vda."""
    path = b"/dev/vda\0"
    start = _BASE + _HEAD + len(path)
    code = bytearray()

    def put(text: str, *values: tuple[str, int]) -> None:
        code.extend(bytes.fromhex(text))
        for form, value in values:
            code.extend(struct.pack("<" + form, value))

    put("BF", ("I", _BASE + _HEAD))  # mov edi, path
    put("BE 00400000 31D2 B8 02000000 0F05")  # esi = O_DIRECT, edx = 0, open
    put("4189C4 41BD", ("I", reads))  # r12 = fd, r13 = reads
    put("41BE", ("I", 1))  # r14 = the generator
    loop = len(code)
    put("48B8", ("Q", _MULTIPLIER))  # mov rax, multiplier
    put("4C0FAFF0 49FFC6 4C89F0 48C1E821")  # imul r14, rax; inc r14; rax = r14 >> 33
    put("31D2 B9", ("I", blocks))  # edx = 0, ecx = blocks
    put("F7F1 4189D2 49C1E20C")  # div ecx; r10 = remainder << 12
    put("4489E7 BE", ("I", _BUFFER))  # edi = fd, esi = buffer
    put("BA", ("I", BLOCK))
    put("B8 11000000 0F05 3D", ("I", BLOCK))  # pread64; was it all?
    put("7509 41FFCD 75", ("b", loop - (len(code) + 6)))  # jne fail; dec r13; jnz loop
    put("31FF EB05")  # status 0
    put("BF 01000000 B8 3C000000 0F05")  # fail: status 1; exit
    body = path + code
    # ELF64 header and one program header (System V ABI): all of it readable, writable, executable.
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, start, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    size = _HEAD + len(body)
    head += struct.pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, _BUFFER + BLOCK - _BASE, 0x1000)
    return head + body


def main(arguments: list[str]) -> int:
    image, folder, *command = arguments
    with enban.open(image) as disk:
        blocks = disk.size // BLOCK
    with tempfile.TemporaryDirectory(dir=folder) as name:
        room = Path(name)
        try:
            guest = fetch()
        except CannotBuild as error:
            print(error, file=sys.stderr)
            return 1
        more = {"bin/reader": (0o100755, reader(blocks))}
        (room / "initrd").write_bytes(initramfs(guest, _INIT, more))
        kernel = ["--kernel", str(guest / "kernel"), "--initrd", str(room / "initrd")]
        kernel += ["--append", "console=ttyS0 quiet panic=-1"]
        if command == ["qemu"]:
            common = ["qemu-system-x86_64", "-accel", "tcg", "-cpu", "max", "-m", "512M", "-no-reboot"]
            common += ["-nodefaults", "-display", "none", "-vga", "std", "-serial", "stdio"]
            common += [word.replace("--", "-", 1) for word in kernel]
            drive = f"file={image},format=qcow2,if=virtio,readonly=on,discard=unmap"
            commands = [[*common, "-drive", f"{drive},aio={aio}"] for aio in ("threads", "io_uring")]
        else:
            os.environ["XDG_RUNTIME_DIR"] = name
            bus, *command = command
            commands = [[*command, "run", "-q", "-r", "--bus", bus, "--accel", "tcg", *kernel, image]]
        print(min(measure(words) for words in commands))
    return 0


def measure(words: list[str]) -> float:
    """Seconds a read."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert process.stdout is not None
    begun = 0.0
    try:
        for line in process.stdout:
            if b"GUEST BEGIN" in line:
                begun = time.monotonic()
            elif b"GUEST END" in line:
                return (time.monotonic() - begun) / READS
        raise SystemExit(f"{words[0]}: the guest has not read its disk")
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
