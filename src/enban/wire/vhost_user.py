"""The messages of vhost-user: how a machine monitor hands its guest's memory and virtqueues to a device.

    0   4 request     4   4 flags (1: version, 4: reply, 8: a reply is wanted)     8   4 size
    12    payload of `size` bytes; descriptors travel beside it (SCM_RIGHTS)

All numbers are little-endian, as on every host this is used on. Parsers check a payload's size and every
count in it before anything is done with them, and raise PeerError.

Source: "Vhost-user Protocol" of QEMU's documentation (interop/vhost-user).
"""

from __future__ import annotations

from struct import Struct

from ..errors import PeerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    Buffer = bytes | bytearray | memoryview

HEADER = Struct("<III")
U64 = Struct("<Q")
_STATE = Struct("<II")
_ADDRESS = Struct("<IIQQQQ")
_REGION = Struct("<QQQQ")
_TABLE_HEAD = Struct("<II")
_LOG = Struct("<QQ")
_CONFIG = Struct("<III")

VERSION = 1
VERSION_MASK = 3
REPLY = 4
NEED_REPLY = 8

# Requests of the front-end.
GET_FEATURES = 1
SET_FEATURES = 2
SET_OWNER = 3
RESET_OWNER = 4
SET_MEM_TABLE = 5
SET_LOG_BASE = 6
SET_LOG_FD = 7
SET_VRING_NUM = 8
SET_VRING_ADDR = 9
SET_VRING_BASE = 10
GET_VRING_BASE = 11
SET_VRING_KICK = 12
SET_VRING_CALL = 13
SET_VRING_ERR = 14
GET_PROTOCOL_FEATURES = 15
SET_PROTOCOL_FEATURES = 16
GET_QUEUE_NUM = 17
SET_VRING_ENABLE = 18
SET_BACKEND_REQ_FD = 21
GET_CONFIG = 24
SET_CONFIG = 25

NAMES = {
    number: name
    for name, number in list(globals().items())
    if isinstance(number, int) and name.startswith(("GET_", "SET_", "RESET_"))
}

# Requests of the back-end.
BACKEND_CONFIG_CHANGE = 2

# Protocol features, as bits.
PROTOCOL_MQ = 1 << 0
PROTOCOL_LOG_SHMFD = 1 << 1
PROTOCOL_REPLY_ACK = 1 << 3
PROTOCOL_BACKEND_REQ = 1 << 5
PROTOCOL_CONFIG = 1 << 9

# Bits among the device's features that belong to vhost itself.
F_LOG_ALL = 1 << 26
F_PROTOCOL_FEATURES = 1 << 30

VRING_LOG = 1  # in the flags of a ring's addresses: changes of the used ring are logged
NO_FD = 1 << 8  # with a ring's index: no descriptor came along
INDEX_MASK = 0xFF

MOST_REGIONS = 8
MOST_CONFIG = 256
MOST_PAYLOAD = 4096  # far more than any message here has
MOST_FDS = MOST_REGIONS
LOG_PAGE = 4096


class Region:
    """A piece of guest memory: where it is for the guest, for the front-end, and in its file."""

    __slots__ = ("file_offset", "guest", "size", "user")

    def __init__(self, guest: int, size: int, user: int, file_offset: int) -> None:
        self.guest = guest
        self.size = size
        self.user = user
        self.file_offset = file_offset


class RingAddress:
    """Where the parts of a ring are, in the front-end's addresses. log: in the guest's, for the used ring."""

    __slots__ = ("available", "descriptors", "flags", "index", "log", "used")

    def __init__(self, index: int, flags: int, descriptors: int, used: int, available: int, log: int) -> None:
        self.index = index
        self.flags = flags
        self.descriptors = descriptors
        self.used = used
        self.available = available
        self.log = log


def parse_header(data: Buffer) -> tuple[int, int, int]:
    """(request, flags, bytes of payload) of a message."""
    request, flags, size = HEADER.unpack(data)
    if flags & VERSION_MASK != VERSION:
        raise PeerError(f"not a vhost-user message of version {VERSION} (flags {flags:#x})")
    if size > MOST_PAYLOAD:
        raise PeerError(f"a vhost-user message of {size} bytes is over the limit of {MOST_PAYLOAD}")
    return request, flags, size


def pack(request: int, payload: Buffer = b"", flags: int = 0) -> bytes:
    return HEADER.pack(request, VERSION | flags, len(payload)) + payload


def pack_u64(request: int, value: int, flags: int = 0) -> bytes:
    return pack(request, U64.pack(value), flags)


def pack_state(request: int, index: int, number: int, flags: int = 0) -> bytes:
    return pack(request, _STATE.pack(index, number), flags)


def pack_address(address: RingAddress, flags: int = 0) -> bytes:
    parts = (address.descriptors, address.used, address.available, address.log)
    return pack(SET_VRING_ADDR, _ADDRESS.pack(address.index, address.flags, *parts), flags)


def pack_regions(regions: list[Region], flags: int = 0) -> bytes:
    body = b"".join(_REGION.pack(one.guest, one.size, one.user, one.file_offset) for one in regions)
    return pack(SET_MEM_TABLE, _TABLE_HEAD.pack(len(regions), 0) + body, flags)


def pack_log(size: int, offset: int, flags: int = 0) -> bytes:
    return pack(SET_LOG_BASE, _LOG.pack(size, offset), flags)


def pack_config(request: int, offset: int, content: Buffer, flags: int = 0) -> bytes:
    return pack(request, _CONFIG.pack(offset, len(content), 0) + content, flags)


def _wrong(what: str, payload: Buffer) -> NoReturn:
    raise PeerError(f"a vhost-user message with {what} cannot have {len(payload)} bytes")


def parse_u64(payload: Buffer) -> int:
    if len(payload) != U64.size:
        _wrong("one number", payload)
    number: int = U64.unpack(payload)[0]
    return number


def parse_state(payload: Buffer) -> tuple[int, int]:
    """(index of the ring, number)."""
    if len(payload) != _STATE.size:
        _wrong("a ring's state", payload)
    index, number = _STATE.unpack(payload)
    return index, number


def parse_address(payload: Buffer) -> RingAddress:
    if len(payload) != _ADDRESS.size:
        _wrong("a ring's addresses", payload)
    return RingAddress(*_ADDRESS.unpack(payload))


def parse_regions(payload: Buffer) -> list[Region]:
    """The memory table. Regions do not overlap and do not wrap around."""
    if len(payload) < _TABLE_HEAD.size:
        _wrong("a memory table", payload)
    count, _ = _TABLE_HEAD.unpack_from(payload)
    if not 0 < count <= MOST_REGIONS:
        raise PeerError(f"a memory table of {count} regions; there may be 1 to {MOST_REGIONS}")
    # Some front-ends send room for all regions whatever their number.
    if len(payload) < _TABLE_HEAD.size + count * _REGION.size:
        _wrong(f"{count} memory regions", payload)
    found = [Region(*_REGION.unpack_from(payload, _TABLE_HEAD.size + n * _REGION.size)) for n in range(count)]
    for one in found:
        if not one.size or max(one.guest, one.user, one.file_offset) + one.size > 1 << 63:
            raise PeerError(f"a memory region of {one.size} bytes at {one.guest:#x} is not possible")
    for start in ("guest", "user"):
        ends = sorted((getattr(one, start), getattr(one, start) + one.size) for one in found)
        if any(ends[n][1] > ends[n + 1][0] for n in range(count - 1)):
            raise PeerError("regions of the memory table overlap")
    return found


def parse_log(payload: Buffer) -> tuple[int, int]:
    """(bytes of the log, where it begins in the file)."""
    if len(payload) != _LOG.size:
        _wrong("a log's place", payload)
    size, offset = _LOG.unpack(payload)
    if not 0 < size <= 1 << 40 or offset > 1 << 62:
        raise PeerError(f"a log of {size} bytes at {offset:#x} is not possible")
    return size, offset


def parse_config(payload: Buffer) -> tuple[int, bytes]:
    """(offset in the configuration space, bytes that are wanted or written)."""
    if len(payload) < _CONFIG.size:
        _wrong("a part of the configuration", payload)
    offset, size, _ = _CONFIG.unpack_from(payload)
    if offset + size > MOST_CONFIG or size != len(payload) - _CONFIG.size:
        raise PeerError(f"bytes {offset}+{size} of the configuration, with {len(payload)} bytes of payload")
    return offset, bytes(payload[_CONFIG.size :])
