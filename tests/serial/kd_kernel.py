"""A tiny "ntoskrnl.exe" with a PDB, so that a debugger that insists on symbols is content.

Built with clang and lld-link (Debian packages clang and lld) when a test needs it; see `build`. The image is
loaded into a `Machine` as Windows' loader would, and its PDB goes where ntoseye keeps downloaded ones.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.serial.kd_machine import KERNEL_BASE, Machine

SOURCE = r"""
typedef unsigned long long u64; typedef unsigned int u32; typedef unsigned short u16; typedef unsigned char
u8; typedef struct _LIST_ENTRY { struct _LIST_ENTRY *Flink, *Blink; } LIST_ENTRY;
typedef struct _UNICODE_STRING { u16 Length, MaximumLength; u16 *Buffer; } UNICODE_STRING;
typedef struct _KPROCESS { LIST_ENTRY Header; u64 DirectoryTableBase; } KPROCESS;
typedef struct _EPROCESS { KPROCESS Pcb; void *UniqueProcessId; LIST_ENTRY ActiveProcessLinks; u8
ImageFileName[15];
    void *Peb; } EPROCESS;
typedef struct _KTHREAD { void *Process; } KTHREAD;
typedef struct _ETHREAD { KTHREAD Tcb; void *Cid; } ETHREAD;
typedef struct _KLDR_DATA_TABLE_ENTRY { LIST_ENTRY InLoadOrderLinks; void *Spare[4]; void *DllBase,
*EntryPoint;
    u32 SizeOfImage; UNICODE_STRING FullDllName, BaseDllName; } KLDR_DATA_TABLE_ENTRY;

LIST_ENTRY PsLoadedModuleList = { &PsLoadedModuleList, &PsLoadedModuleList };
LIST_ENTRY PsActiveProcessHead = { &PsActiveProcessHead, &PsActiveProcessHead };
u16 ExeName[] = { 'n','t','o','s','k','r','n','l','.','e','x','e' };
KLDR_DATA_TABLE_ENTRY KernelEntry = { { &PsLoadedModuleList, &PsLoadedModuleList } };
EPROCESS SystemProcess; EPROCESS *PsInitialSystemProcess = &SystemProcess;
ETHREAD SystemThread;
u64 Numbers[64]; u64 KdDebuggerDataBlock[0x80];
u32 NtBuildNumber = 0xF0004A61, CmNtCSDVersion = 0;
u8 PoolCode[] = "POOLCODE";

void DbgBreakPointWithStatus(u64 status) { __asm__ volatile("int3"); }
int KeBugCheckEx(int code) { return code; }
int NtCreateFile(int a) { return a + (int)(u64)PsInitialSystemProcess + (int)SystemThread.Tcb.Process; }
int KiSystemStartup(void) {
    DbgBreakPointWithStatus(1); return NtCreateFile(KeBugCheckEx(1)) + (int)KernelEntry.SizeOfImage;
}
"""
SYMBOLS = (
    "PsLoadedModuleList",
    "PsActiveProcessHead",
    "KdDebuggerDataBlock",
    "DbgBreakPointWithStatus",
    "Numbers",
    "NtCreateFile",
)
NUMBERS = b"".join(struct.pack("<Q", (n * 0x9E3779B97F4A7C15) & (2**64 - 1)) for n in range(64))


def missing() -> list[str]:
    """What it takes and is not there, with the Debian package that has it."""
    needed = (("clang", "clang"), ("lld-link", "lld"))
    return [
        f"{program} (Debian package {package})" for program, package in needed if not shutil.which(program)
    ]


@dataclass
class Kernel:
    """image: as loaded in memory. symbols: name -> offset in it. pdb: its symbols, and the name a symbol
    store knows them by."""

    image: bytes
    symbols: dict[str, int]
    pdb: Path
    guid_age: str


def build(folder: Path) -> Kernel:
    """Compile, link and lay out the kernel."""
    source, exe, pdb, listing = (folder / name for name in ("nt.c", "ntoskrnl.exe", "ntkrnlmp.pdb", "nt.map"))
    source.write_text(SOURCE)
    target = ["clang", "--target=x86_64-pc-windows-msvc", "-g", "-gcodeview", "-O0", "-ffreestanding", "-c"]
    subprocess.run([*target, source, "-o", folder / "nt.obj"], check=True, capture_output=True, timeout=120)
    words = ["lld-link", "/subsystem:native", "/entry:KiSystemStartup", "/nodefaultlib", "/driver", "/debug"]
    words += [
        f"/pdb:{pdb}",
        "/pdbaltpath:ntkrnlmp.pdb",
        f"/out:{exe}",
        f"/map:{listing}",
        str(folder / "nt.obj"),
    ]
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    raw = exe.read_bytes()
    image, preferred = loaded(raw)
    symbols = {}
    for line in listing.read_text().splitlines():
        columns = line.split()
        if len(columns) >= 3 and columns[1] in SYMBOLS:
            symbols[columns[1]] = int(columns[2], 16) - preferred
    return Kernel(image, symbols, pdb, guid_age(raw))


def loaded(raw: bytes) -> tuple[bytes, int]:
    """A PE file as it lies in memory, moved to KERNEL_BASE; and the base it was linked for."""
    header = struct.unpack_from("<I", raw, 0x3C)[0]
    sections, optional_size = (
        struct.unpack_from("<H", raw, header + 6)[0],
        struct.unpack_from("<H", raw, header + 20)[0],
    )
    optional = header + 24
    preferred = struct.unpack_from("<Q", raw, optional + 24)[0]
    size, headers = struct.unpack_from("<II", raw, optional + 56)
    image = bytearray(size)
    image[:headers] = raw[:headers]
    for number in range(sections):
        virtual_size, at, raw_size, raw_at = struct.unpack_from(
            "<IIII", raw, optional + optional_size + 40 * number + 8
        )
        length = min(virtual_size, raw_size)
        image[at : at + length] = raw[raw_at : raw_at + length]
    relocations, length = struct.unpack_from("<II", raw, optional + 112 + 5 * 8)
    place = relocations
    while place < relocations + length:
        page, block = struct.unpack_from("<II", image, place)
        for entry in struct.unpack_from(f"<{(block - 8) // 2}H", image, place + 8):
            if entry >> 12 == 10:  # a 64-bit address
                at = page + (entry & 0xFFF)
                value = struct.unpack_from("<Q", image, at)[0] - preferred + KERNEL_BASE
                struct.pack_into("<Q", image, at, value)
        place += block
    struct.pack_into("<Q", image, optional + 24, KERNEL_BASE)
    return bytes(image), preferred


def guid_age(raw: bytes) -> str:
    """The name of the PDB in a symbol store: the GUID and the age of the image's CodeView record."""
    at = raw.index(b"RSDS")
    first, second, third = struct.unpack_from("<IHH", raw, at + 4)
    rest, age = raw[at + 12 : at + 20].hex().upper(), struct.unpack_from("<I", raw, at + 20)[0]
    return f"{first:08X}{second:04X}{third:04X}{rest}{age:X}"


def machine(kernel: Kernel) -> Machine:
    """A machine that runs this kernel."""
    base = KERNEL_BASE
    made = Machine(
        kernel_base=base,
        module_list=base + kernel.symbols["PsLoadedModuleList"],
        debugger_data=base + kernel.symbols["KdDebuggerDataBlock"],
    )
    made.map(base, kernel.image)
    made.break_at = base + kernel.image.index(b"\xcc", kernel.symbols["DbgBreakPointWithStatus"])
    made.set("rip", made.break_at)
    made.write(base + kernel.symbols["Numbers"], NUMBERS)
    block = bytearray(0x360)
    list_head = made.debugger_data
    struct.pack_into("<QQ4sIQ", block, 0, list_head, list_head, b"KDBG", len(block), base)
    struct.pack_into("<Q", block, 0x48, made.module_list)
    struct.pack_into("<Q", block, 0x50, base + kernel.symbols["PsActiveProcessHead"])
    made.write(made.debugger_data, bytes(block))
    return made


def install_symbols(kernel: Kernel, home: Path) -> None:
    """Put the PDB where ntoseye, with this HOME, looks for it."""
    place = home / ".ntoseye" / "symbols" / "ntkrnlmp.pdb" / kernel.guid_age
    place.mkdir(parents=True)
    shutil.copy(kernel.pdb, place / "ntkrnlmp.pdb")
