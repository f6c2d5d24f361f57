"""The structures inside KD packets, as tables of named fields (all little-endian).

A row is: name, offset in bytes, code of the `struct` module (B, H, I, Q: 1, 2, 4, 8 bytes). Gaps are padding,
or the rest of a union. `read` takes what is there: a payload that ends early yields the fields it has.
"""

from __future__ import annotations

from struct import Struct, calcsize

TYPE_CHECKING = False
if TYPE_CHECKING:
    Row = tuple[str, int, str]
    Buffer = bytes | bytearray | memoryview


class Layout:
    """A structure. size: its bytes on the wire, which may be more than its fields fill."""

    __slots__ = ("_rows", "name", "rows", "size")

    def __init__(self, name: str, size: int, *rows: Row) -> None:
        self.name = name
        self.size = size
        self.rows = rows
        self._rows = [
            (field, offset, offset + calcsize(f"<{code}"), Struct(f"<{code}")) for field, offset, code in rows
        ]

    def read(self, data: Buffer) -> dict[str, int]:
        """The fields that `data` holds in full."""
        length = len(data)
        return {
            field: form.unpack_from(data, offset)[0]
            for field, offset, end, form in self._rows
            if end <= length
        }

    def build(self, **values: int) -> bytearray:
        """The structure with these fields, zeros elsewhere. Raises KeyError for a field it has not."""
        out = bytearray(self.size)
        self.put(out, **values)
        return out

    def put(self, out: bytearray, **values: int) -> None:
        """Set fields in a structure that exists."""
        places = {field: (offset, form) for field, offset, _, form in self._rows}
        for field, value in values.items():
            offset, form = places[field]
            form.pack_into(out, offset, value)


HEADER = Layout(
    "packet header",
    16,
    ("leader", 0, "I"),
    ("type", 4, "H"),
    ("count", 6, "H"),
    ("id", 8, "I"),
    ("checksum", 12, "I"),
)

# -- state changes -----------------------------------------------------------------------------

_STATE64: tuple[Row, ...] = (
    ("state", 0, "I"),
    ("processor_level", 4, "H"),
    ("processor", 6, "H"),
    ("processors", 8, "I"),
    ("thread", 16, "Q"),
    ("pc", 24, "Q"),
)
# What stands behind the union, from 192 on, on x64.
_REPORT64: tuple[Row, ...] = (
    ("dr6", 192, "Q"),
    ("dr7", 200, "Q"),
    ("eflags", 208, "I"),
    ("instruction_count", 212, "H"),
    ("report_flags", 214, "H"),
    ("cs", 232, "H"),
    ("ds", 234, "H"),
    ("es", 236, "H"),
    ("fs", 238, "H"),
)
INSTRUCTIONS64 = (216, 16)  # the instruction bytes at the program counter: offset, at most

EXCEPTION64 = Layout(
    "exception, 64 bits",
    240,
    *_STATE64,
    ("code", 32, "I"),
    ("flags", 36, "I"),
    ("nested", 40, "Q"),
    ("address", 48, "Q"),
    ("parameters", 56, "I"),
    ("parameter0", 64, "Q"),
    ("parameter1", 72, "Q"),
    ("first_chance", 184, "I"),
    *_REPORT64,
)
LOAD_SYMBOLS64 = Layout(
    "load symbols, 64 bits",
    240,
    *_STATE64,
    ("path_length", 32, "I"),
    ("base", 40, "Q"),
    ("process", 48, "Q"),
    ("image_checksum", 56, "I"),
    ("image_size", 60, "I"),
    ("unload", 64, "B"),
    *_REPORT64,
)
COMMAND_STRING64 = Layout("command string, 64 bits", 240, *_STATE64, ("flags", 32, "I"), *_REPORT64)

_STATE32: tuple[Row, ...] = (
    ("state", 0, "I"),
    ("processor_level", 4, "H"),
    ("processor", 6, "H"),
    ("processors", 8, "I"),
    ("thread", 12, "I"),
    ("pc", 16, "I"),
)
EXCEPTION32 = Layout(
    "exception, 32 bits",
    104,
    *_STATE32,
    ("code", 20, "I"),
    ("flags", 24, "I"),
    ("nested", 28, "I"),
    ("address", 32, "I"),
    ("parameters", 36, "I"),
    ("parameter0", 40, "I"),
    ("parameter1", 44, "I"),
    ("first_chance", 100, "I"),
)
LOAD_SYMBOLS32 = Layout(
    "load symbols, 32 bits",
    104,
    *_STATE32,
    ("path_length", 20, "I"),
    ("base", 24, "I"),
    ("process", 28, "I"),
    ("image_checksum", 32, "I"),
    ("image_size", 36, "I"),
    ("unload", 40, "B"),
)
COMMAND_STRING32 = Layout("command string, 32 bits", 104, *_STATE32, ("flags", 20, "I"))

# -- requests and answers ----------------------------------------------------------------------

_MANIPULATE: tuple[Row, ...] = (
    ("api", 0, "I"),
    ("processor_level", 4, "H"),
    ("processor", 6, "H"),
    ("status", 8, "I"),
)
MANIPULATE_BYTES = 56


def _manipulate(name: str, *rows: Row) -> Layout:
    """A row's offset counts from the union, which begins at 16."""
    return Layout(name, MANIPULATE_BYTES, *_MANIPULATE, *((field, 16 + at, code) for field, at, code in rows))


MANIPULATE_PLAIN = _manipulate("manipulate")
MEMORY = _manipulate("memory", ("address", 0, "Q"), ("length", 8, "I"), ("done", 12, "I"))
CONTEXT = _manipulate("context", ("context_flags", 0, "I"))
CONTEXT_EX = _manipulate("context part", ("offset", 0, "I"), ("length", 4, "I"), ("done", 8, "I"))
WRITE_BP = _manipulate("write breakpoint", ("address", 0, "Q"), ("handle", 8, "I"))
RESTORE_BP = _manipulate("restore breakpoint", ("handle", 0, "I"))
GO = _manipulate("continue", ("go_status", 0, "I"))
GO2 = _manipulate(
    "continue, with control set",
    ("go_status", 0, "I"),
    ("trace", 4, "I"),
    ("dr7", 8, "Q"),
    ("symbol_start", 16, "Q"),
    ("symbol_end", 24, "Q"),
)
IO_SPACE = _manipulate("I/O space", ("address", 0, "Q"), ("length", 8, "I"), ("value", 12, "I"))
MSR = _manipulate("model-specific register", ("msr", 0, "I"), ("low", 4, "I"), ("high", 8, "I"))
SEARCH = _manipulate("search", ("address", 0, "Q"), ("length", 8, "Q"), ("pattern", 16, "I"))
BUS_DATA = _manipulate(
    "bus data",
    ("bus_type", 0, "I"),
    ("bus", 4, "I"),
    ("slot", 8, "I"),
    ("offset", 12, "I"),
    ("length", 16, "I"),
)
FILL = _manipulate(
    "fill", ("address", 0, "Q"), ("length", 8, "I"), ("fill_flags", 12, "H"), ("pattern", 14, "H")
)
QUERY = _manipulate("query", ("address", 0, "Q"), ("space", 16, "I"), ("query_flags", 20, "I"))
VERSION = _manipulate(
    "version",
    ("major", 0, "H"),
    ("minor", 2, "H"),
    ("protocol", 4, "B"),
    ("secondary", 5, "B"),
    ("version_flags", 6, "H"),
    ("machine", 8, "H"),
    ("max_packet_type", 10, "B"),
    ("max_state", 11, "B"),
    ("max_api", 12, "B"),
    ("simulation", 13, "B"),
    ("kernel_base", 16, "Q"),
    ("module_list", 24, "Q"),
    ("debugger_data", 32, "Q"),
)

# -- the guest's own calls ---------------------------------------------------------------------

PRINT = Layout(
    "print", 16, ("api", 0, "I"), ("processor_level", 4, "H"), ("processor", 6, "H"), ("length", 8, "I")
)
PROMPT = Layout(
    "prompt",
    16,
    ("api", 0, "I"),
    ("processor_level", 4, "H"),
    ("processor", 6, "H"),
    ("length", 8, "I"),
    ("answer_length", 12, "I"),
)
TRACE = Layout(
    "trace", 64, ("api", 0, "I"), ("processor_level", 4, "H"), ("processor", 6, "H"), ("length", 8, "I")
)
HARDWARE_BP = Layout("hardware breakpoint", 12, ("api", 0, "I"), ("number", 4, "I"), ("granted", 8, "I"))
FILE_OPEN = Layout(
    "create file",
    64,
    ("api", 0, "I"),
    ("status", 4, "I"),
    ("access", 8, "I"),
    ("attributes", 12, "I"),
    ("share", 16, "I"),
    ("disposition", 20, "I"),
    ("options", 24, "I"),
    ("handle", 32, "Q"),
    ("length", 40, "Q"),
)
FILE_MOVE = Layout(
    "read or write file",
    64,
    ("api", 0, "I"),
    ("status", 4, "I"),
    ("handle", 8, "Q"),
    ("offset", 16, "Q"),
    ("length", 24, "I"),
)
FILE_CLOSE = Layout("close file", 64, ("api", 0, "I"), ("status", 4, "I"), ("handle", 8, "Q"))
