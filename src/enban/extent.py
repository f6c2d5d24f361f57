"""The one answer to "where do these bytes live?"."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .block.node import Node
    from .block.storage import Storage
    from .units import GuestOffset, HostOffset

# Kinds of extent.
DATA = 1  # plain bytes at `host` in `storage`
ZERO = 2  # reads as zeros; `host` is set where a cluster is kept reserved for it
COMPRESSED = 3  # `packed` bytes at `host` in `storage`; the node's codec inflates them
UNALLOCATED = 4  # nothing here: the backing node below answers, or zeros

KIND_NAMES = {DATA: "data", ZERO: "zero", COMPRESSED: "compressed", UNALLOCATED: "unallocated"}


class Extent:
    """A run of guest bytes that live in one place.

    start, length: guest bytes.
    kind: DATA, ZERO, COMPRESSED or UNALLOCATED.
    storage, host: for DATA the place of the first byte (storage is None where the bytes there are
        encrypted: only the mover, with the node's cipher, can use them); for ZERO the place of a reserved
        (preallocated) cluster or None, -1; for COMPRESSED the place of the packed bytes.
    packed: for COMPRESSED, the number of bytes at `host` that hold the packed unit
        (an upper bound where the format only stores whole sectors).
    unit: for COMPRESSED, guest offset of the start of the packed unit.
    node: the node that answered; across a backing chain this is the layer that holds the bytes.
    depth: 0 for the node asked, 1 for its backing node, and so on.
    """

    __slots__ = ("depth", "host", "kind", "length", "node", "packed", "start", "storage", "unit")

    def __init__(
        self,
        start: GuestOffset,
        length: int,
        kind: int,
        node: Node,
        storage: Storage | None = None,
        host: HostOffset = -1,
        packed: int = 0,
        unit: GuestOffset = -1,
        depth: int = 0,
    ) -> None:
        self.start = start
        self.length = length
        self.kind = kind
        self.node = node
        self.storage = storage
        self.host = host
        self.packed = packed
        self.unit = unit
        self.depth = depth

    def __repr__(self) -> str:
        where = f" @{self.host:#x}" if self.host >= 0 else ""
        return f"<{KIND_NAMES[self.kind]} {self.start:#x}+{self.length:#x}{where} depth {self.depth}>"
