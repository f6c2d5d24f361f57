"""The machine inside the KD target simulator: memory, registers, breakpoints, and answers to requests.

It is an x64 machine as far as a debugger can see through KD: nothing executes. Addresses, sizes and offsets
are those of docs/formats/kd.md.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import ClassVar

from enban.wire.kd import constants as k
from enban.wire.kd import layouts
from enban.wire.kd import messages as m
from enban.wire.kd.parser import Packet

KERNEL_BASE = 0xFFFFF80000000000
CONTEXT_BYTES = 1232
KSPECIAL = 2  # the control space with CR3
MOST_READ = k.MAX_PAYLOAD - layouts.MANIPULATE_BYTES
NOT_IMPLEMENTED = 0xC0000002
INT3 = 0xCC
EFER = 0xC0000080

# Offsets in CONTEXT of what tests look at.
REGISTERS = {
    "eflags": (0x44, "<I"),
    **{
        name: (0x78 + 8 * place, "<Q")
        for place, name in enumerate(
            ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)), "rip")
        )
    },
}
SEGMENTS = {
    "cs": (0x38, 0x10),
    "ds": (0x3A, 0x2B),
    "es": (0x3C, 0x2B),
    "fs": (0x3E, 0x53),
    "gs": (0x40, 0x2B),
    "ss": (0x42, 0x18),
}


class Machine:
    """memory: regions by their base. break_at: where the int3 of a break-in stands."""

    def __init__(
        self, *, kernel_base: int = KERNEL_BASE, module_list: int = 0, debugger_data: int = 0
    ) -> None:
        self.kernel_base = kernel_base
        self.module_list = module_list or kernel_base + 0x3000
        self.debugger_data = debugger_data or kernel_base + 0x3800
        self.memory: dict[int, bytearray] = {}
        self.break_at = kernel_base + 0x1000
        self.context = bytearray(CONTEXT_BYTES)
        self.special = bytearray(0xF0)
        self.msrs = {EFER: 0xD01}
        self.breakpoints: dict[int, tuple[int, int]] = {}  # handle: (address, the byte that was there)
        self._staged = bytearray()
        for name in REGISTERS:
            self.set(name, hash_of(name) & (0xFFFFFFFF if name == "eflags" else 2**64 - 1))
        struct.pack_into("<I", self.context, 0x30, 0x10001F)
        self.set("eflags", 0x246)
        self.set("rsp", kernel_base + 0x7F00)
        self.set("rip", self.break_at)
        for offset, value in SEGMENTS.values():
            struct.pack_into("<H", self.context, offset, value)
        struct.pack_into("<QQQQ", self.special, 0, 0x80050033, 0, 0x1AB000, 0x350EF8)

    def map(self, base: int, content: bytes) -> None:
        self.memory[base] = bytearray(content)

    def small_kernel(self) -> None:
        """Enough for a debugger that wants no symbols: an int3 to break at, and a page of numbers."""
        self.map(self.kernel_base, bytes(range(256)) * 64)
        self.write(self.break_at, b"\xcc\xc3")

    # -- state ---------------------------------------------------------------------------------

    def get(self, register: str) -> int:
        offset, code = REGISTERS[register]
        return int(struct.unpack_from(code, self.context, offset)[0])

    def set(self, register: str, value: int) -> None:
        offset, code = REGISTERS[register]
        struct.pack_into(code, self.context, offset, value)

    def read(self, address: int, length: int) -> bytes:
        """What is mapped there, from `address` on without a hole; b"" if nothing is."""
        out = bytearray()
        while len(out) < length:
            here = address + len(out)
            for base, content in self.memory.items():
                if base <= here < base + len(content):
                    out += content[here - base : here - base + length - len(out)]
                    break
            else:
                break
        return bytes(out)

    def write(self, address: int, data: bytes) -> int:
        for base, content in self.memory.items():
            if base <= address < base + len(content):
                data = data[: base + len(content) - address]
                content[address - base : address - base + len(data)] = data
                return len(data)
        return 0

    def on_int3(self) -> bool:
        return self.read(self.get("rip"), 1) == bytes((INT3,))

    # -- answers -------------------------------------------------------------------------------

    def state_change(self, code: int) -> bytes:
        pc = self.get("rip")
        return m.exception64(
            code=code,
            pc=pc,
            address=pc,
            thread=self.kernel_base + 0x5000,
            first_chance=1,
            eflags=self.get("eflags"),
            cs=0x10,
            ds=0x2B,
            es=0x2B,
            fs=0x53,
            report_flags=3,
            instructions=self.read(pc, 16),
        )

    def answer(self, payload: bytes) -> bytes:
        """The answer to a Manipulate request that does not set the machine going."""
        request = m.decode(_manipulate(payload))
        reply = bytearray(payload[: layouts.MANIPULATE_BYTES].ljust(layouts.MANIPULATE_BYTES, b"\0"))
        act = self._ACTS.get(request.code)
        status, data = act(self, request, reply) if act else (NOT_IMPLEMENTED, b"")
        layouts.MANIPULATE_PLAIN.put(reply, status=status)
        return bytes(reply) + data

    def _read_virtual(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        data = self.read(request["address"], min(request["length"], MOST_READ))
        layouts.MEMORY.put(reply, done=len(data))
        return (k.STATUS_SUCCESS if data else k.STATUS_UNSUCCESSFUL), data

    def _write_virtual(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        done = self.write(request["address"], request.data[: request["length"]])
        layouts.MEMORY.put(reply, done=done)
        return (k.STATUS_SUCCESS if done else k.STATUS_UNSUCCESSFUL), b""

    def _version(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        layouts.VERSION.put(
            reply,
            major=0xF,
            minor=19041,
            protocol=6,
            secondary=2,
            version_flags=0x47,
            machine=0x8664,
            max_packet_type=12,
            max_state=3,
            max_api=0x31,
            kernel_base=self.kernel_base,
            module_list=self.module_list,
            debugger_data=self.debugger_data,
        )
        return k.STATUS_SUCCESS, b""

    def _control_space(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        if request["address"] != KSPECIAL:
            return k.STATUS_UNSUCCESSFUL, b""
        data = bytes(self.special[: request["length"]])
        layouts.MEMORY.put(reply, done=len(data))
        return k.STATUS_SUCCESS, data

    def _get_context(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        return k.STATUS_SUCCESS, bytes(self.context)

    def _set_context(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        self.context[: len(request.data)] = request.data[:CONTEXT_BYTES]
        return k.STATUS_SUCCESS, b""

    def _get_context_ex(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        data = bytes(self.context[request["offset"] :][: request["length"]])
        layouts.CONTEXT_EX.put(reply, done=len(data))
        return k.STATUS_SUCCESS, data

    def _set_context_ex(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        """Parts are staged; the last one makes them count. `done` of the request is the whole size."""
        if not request["offset"]:
            self._staged.clear()
        self._staged += request.data
        layouts.CONTEXT_EX.put(reply, done=len(request.data))
        if len(self._staged) == request["done"]:
            self.context[: len(self._staged)] = self._staged[:CONTEXT_BYTES]
        return k.STATUS_SUCCESS, b""

    def _write_breakpoint(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        before = self.read(request["address"], 1)
        free = [handle for handle in range(1, 33) if handle not in self.breakpoints]
        if not before or not free:
            return k.STATUS_UNSUCCESSFUL, b""
        self.breakpoints[free[0]] = (request["address"], before[0])
        self.write(request["address"], bytes((INT3,)))
        layouts.WRITE_BP.put(reply, handle=free[0])
        return k.STATUS_SUCCESS, b""

    def _restore_breakpoint(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        if request["handle"] not in self.breakpoints:
            return k.STATUS_UNSUCCESSFUL, b""
        address, before = self.breakpoints.pop(request["handle"])
        self.write(address, bytes((before,)))
        return k.STATUS_SUCCESS, b""

    def _read_msr(self, request: m.Message, reply: bytearray) -> tuple[int, bytes]:
        value = self.msrs.get(request["msr"])
        if value is None:
            return k.STATUS_UNSUCCESSFUL, b""
        layouts.MSR.put(reply, low=value & 0xFFFFFFFF, high=value >> 32)
        return k.STATUS_SUCCESS, b""

    _ACTS: ClassVar[dict[int, Callable[[Machine, m.Message, bytearray], tuple[int, bytes]]]] = {
        k.READ_VIRTUAL: _read_virtual,
        k.WRITE_VIRTUAL: _write_virtual,
        k.GET_VERSION: _version,
        k.READ_CONTROL_SPACE: _control_space,
        k.GET_CONTEXT: _get_context,
        k.SET_CONTEXT: _set_context,
        k.GET_CONTEXT_EX: _get_context_ex,
        k.SET_CONTEXT_EX: _set_context_ex,
        k.WRITE_BREAKPOINT: _write_breakpoint,
        k.RESTORE_BREAKPOINT: _restore_breakpoint,
        k.READ_MSR: _read_msr,
    }


def hash_of(name: str) -> int:
    """A value for a register that is its own and always the same."""
    return int.from_bytes(name.encode().ljust(8, b"\x11"), "big") & 0x7FFFFFFFFFFFFFFF


def _manipulate(payload: bytes) -> Packet:
    return Packet(0, 0, k.MANIPULATE, 0, payload)
