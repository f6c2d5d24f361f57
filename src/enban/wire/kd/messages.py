"""What KD packets say: payloads to named fields, and payloads from them.

`decode` never refuses: of a payload that is shorter than its structure it gives the fields that are there,
of one that is unknown the bytes. `Message.words()` is one line for people.
"""

from __future__ import annotations

from . import constants as k
from . import layouts
from .layouts import Layout
from .parser import Packet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .layouts import Buffer

# Which structure a Manipulate packet of an api has.
MANIPULATE_LAYOUTS = {
    k.READ_VIRTUAL: layouts.MEMORY,
    k.WRITE_VIRTUAL: layouts.MEMORY,
    k.READ_PHYSICAL: layouts.MEMORY,
    k.WRITE_PHYSICAL: layouts.MEMORY,
    k.READ_CONTROL_SPACE: layouts.MEMORY,
    k.WRITE_CONTROL_SPACE: layouts.MEMORY,
    k.GET_CONTEXT: layouts.CONTEXT,
    k.SET_CONTEXT: layouts.CONTEXT,
    k.GET_CONTEXT_EX: layouts.CONTEXT_EX,
    k.SET_CONTEXT_EX: layouts.CONTEXT_EX,
    k.WRITE_BREAKPOINT: layouts.WRITE_BP,
    k.RESTORE_BREAKPOINT: layouts.RESTORE_BP,
    k.CONTINUE: layouts.GO,
    k.CONTINUE2: layouts.GO2,
    k.READ_IO: layouts.IO_SPACE,
    k.WRITE_IO: layouts.IO_SPACE,
    k.READ_MSR: layouts.MSR,
    k.WRITE_MSR: layouts.MSR,
    k.SEARCH_MEMORY: layouts.SEARCH,
    k.GET_BUS_DATA: layouts.BUS_DATA,
    k.SET_BUS_DATA: layouts.BUS_DATA,
    k.FILL_MEMORY: layouts.FILL,
    k.QUERY_MEMORY: layouts.QUERY,
    k.GET_VERSION: layouts.VERSION,
}
STATE64_LAYOUTS = {
    k.EXCEPTION: layouts.EXCEPTION64,
    k.LOAD_SYMBOLS: layouts.LOAD_SYMBOLS64,
    k.COMMAND_STRING: layouts.COMMAND_STRING64,
}
STATE32_LAYOUTS = {
    k.EXCEPTION: layouts.EXCEPTION32,
    k.LOAD_SYMBOLS: layouts.LOAD_SYMBOLS32,
    k.COMMAND_STRING: layouts.COMMAND_STRING32,
}
IO_LAYOUTS = {
    k.PRINT_STRING: layouts.PRINT,
    k.GET_STRING: layouts.PROMPT,
    k.PRINT_TRACE: layouts.TRACE,
    k.REQUEST_HARDWARE_BP: layouts.HARDWARE_BP,
    k.RELEASE_HARDWARE_BP: layouts.HARDWARE_BP,
    k.CREATE_FILE: layouts.FILE_OPEN,
    k.READ_FILE: layouts.FILE_MOVE,
    k.WRITE_FILE: layouts.FILE_MOVE,
    k.CLOSE_FILE: layouts.FILE_CLOSE,
}
_IO_FALLBACK = {
    k.DEBUG_IO: layouts.PRINT,
    k.TRACE_IO: layouts.TRACE,
    k.CONTROL_REQUEST: layouts.HARDWARE_BP,
    k.FILE_IO: layouts.FILE_CLOSE,
}


class Message:
    """A payload, understood.

    kind: the packet's type. code: what it is about (an api, a state, an I/O call), -1 if the payload is too
    short to say. fields: by name. data: the bytes behind the structure.
    """

    __slots__ = ("code", "data", "fields", "kind", "name")

    def __init__(self, kind: int, code: int, name: str, fields: dict[str, int], data: bytes) -> None:
        self.kind = kind
        self.code = code
        self.name = name
        self.fields = fields
        self.data = data

    def __getitem__(self, field: str) -> int:
        return self.fields[field]

    def get(self, field: str, default: int = 0) -> int:
        return self.fields.get(field, default)

    @property
    def is_state(self) -> bool:
        return self.kind in (k.STATE_CHANGE32, k.STATE_CHANGE64)

    @property
    def is_exception(self) -> bool:
        return self.is_state and self.code == k.EXCEPTION

    @property
    def text(self) -> str:
        """The string behind a print, a prompt or a load-symbols structure, up to its end."""
        data = self.data
        if self.kind == k.FILE_IO:
            return data.decode("utf-16-le", "replace").split("\0")[0]
        length = self.get("path_length" if self.is_state else "length", len(data))
        return data[:length].split(b"\0")[0].decode("latin-1")

    def words(self) -> str:
        """One line for people."""
        if self.is_exception:
            code, pc, processor = self.get("code"), self.get("pc"), self.get("processor")
            return f"exception {code:#010x} at {pc:#x}, processor {processor}"
        if self.code == k.LOAD_SYMBOLS and self.is_state:
            verb = "unload" if self.get("unload") else "load"
            return f"{verb} symbols of {_plain(self.text)} at {self.get('base'):#x}"
        if self.kind == k.DEBUG_IO:
            verb = "print" if self.code == k.PRINT_STRING else "prompt"
            return f"{verb} {_plain(self.text)!r}"
        more = ""
        if "address" in self.fields:
            more = f" at {self['address']:#x}"
            if "length" in self.fields:
                more += f", {self['length']} bytes"
        return self.name + more


def _plain(text: str) -> str:
    """Text from the wire on one line, and not too much of it."""
    shown = "".join(c if c.isprintable() else " " for c in text).strip()
    return shown if len(shown) <= 60 else shown[:57] + "..."


def decode(packet: Packet) -> Message:
    """What a packet says. A control packet has its id and nothing else."""
    kind, payload = packet.type, packet.payload
    if kind in k.CONTROL_TYPES:
        return Message(kind, -1, k.TYPE_NAMES[kind], {"id": packet.id}, b"")
    code = int.from_bytes(payload[:4], "little") if len(payload) >= 4 else -1
    if kind in (k.STATE_CHANGE32, k.STATE_CHANGE64):
        code = code & ~k.ALTERNATE if code >= 0 else code
        states = STATE64_LAYOUTS if kind == k.STATE_CHANGE64 else STATE32_LAYOUTS
        layout = states.get(code, states[k.COMMAND_STRING])
        name = k.STATE_NAMES.get(code, f"state {code:#x}")
    elif kind == k.MANIPULATE:
        layout = MANIPULATE_LAYOUTS.get(code, layouts.MANIPULATE_PLAIN)
        name = k.API_NAMES.get(code, f"api {code:#x}")
    else:
        layout = IO_LAYOUTS.get(code, _IO_FALLBACK[kind])
        name = k.IO_NAMES.get(code, f"{k.TYPE_NAMES[kind]} {code:#x}")
    return Message(kind, code, name, layout.read(payload), payload[layout.size :])


# -- payloads ----------------------------------------------------------------------------------


def exception64(*, instructions: Buffer = b"", **fields: int) -> bytes:
    """The payload of a StateChange64 that reports an exception; fields of layouts.EXCEPTION64."""
    out = layouts.EXCEPTION64.build(**{"state": k.EXCEPTION, "processors": 1, **fields})
    offset, most = layouts.INSTRUCTIONS64
    found = bytes(instructions[:most])
    out[offset : offset + len(found)] = found
    if "instruction_count" not in fields:
        layouts.EXCEPTION64.put(out, instruction_count=len(found))
    return bytes(out)


def exception32(**fields: int) -> bytes:
    """The payload of a StateChange32 that reports an exception; fields of layouts.EXCEPTION32."""
    return bytes(layouts.EXCEPTION32.build(**{"state": k.EXCEPTION, "processors": 1, **fields}))


def load_symbols64(path: str, **fields: int) -> bytes:
    """The payload of a StateChange64 that reports a loaded or unloaded image."""
    return _load_symbols(layouts.LOAD_SYMBOLS64, path, fields)


def load_symbols32(path: str, **fields: int) -> bytes:
    """The same of a StateChange32."""
    return _load_symbols(layouts.LOAD_SYMBOLS32, path, fields)


def _load_symbols(layout: Layout, path: str, fields: dict[str, int]) -> bytes:
    name = path.encode("latin-1") + b"\0"
    values = {"state": k.LOAD_SYMBOLS, "processors": 1, "path_length": len(name), **fields}
    return bytes(layout.build(**values)) + name


def manipulate(api: int, data: Buffer = b"", **fields: int) -> bytes:
    """The payload of a Manipulate packet, request or answer; fields of the api's structure."""
    layout = MANIPULATE_LAYOUTS.get(api, layouts.MANIPULATE_PLAIN)
    return bytes(layout.build(api=api, **fields)) + bytes(data)


def print_string(text: bytes, **fields: int) -> bytes:
    """The payload of a DebugIO packet: the guest prints."""
    return bytes(layouts.PRINT.build(**{"api": k.PRINT_STRING, "length": len(text), **fields})) + text


def prompt_string(text: bytes, answer_length: int, **fields: int) -> bytes:
    """The payload of a DebugIO packet: the guest asks, for an answer of at most so many bytes."""
    values = {"api": k.GET_STRING, "length": len(text), "answer_length": answer_length, **fields}
    return bytes(layouts.PROMPT.build(**values)) + text


def prompt_answer(prompt: Message, answer: bytes) -> bytes:
    """The payload that answers a prompt."""
    fields = {**prompt.fields, "length": 0, "answer_length": len(answer)}
    return bytes(layouts.PROMPT.build(**fields)) + answer


def print_trace(data: bytes, **fields: int) -> bytes:
    """The payload of a TraceIO packet."""
    return bytes(layouts.TRACE.build(**{"api": k.PRINT_TRACE, "length": len(data), **fields})) + data


def control_request(api: int, **fields: int) -> bytes:
    """The payload of a ControlRequest packet: the guest wants, or gives back, a hardware breakpoint."""
    return bytes(layouts.HARDWARE_BP.build(api=api, **fields))


def file_io(api: int, path: str = "", data: Buffer = b"", **fields: int) -> bytes:
    """The payload of a FileIO packet, request or answer; a path stands behind the structure."""
    name = path.encode("utf-16-le") + b"\0\0" if path else b""
    return bytes(IO_LAYOUTS[api].build(api=api, **fields)) + name + bytes(data)
