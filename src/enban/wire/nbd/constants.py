"""The numbers of the NBD protocol, by their names in its specification without the prefix `NBD_`.

Source: the NBD protocol document (NetworkBlockDevice/nbd, doc/proto.md), section "Values",
with its extended headers. All integers travel big-endian.
"""

from __future__ import annotations

DEFAULT_PORT = 10809  # registered with IANA

# Magic numbers of the handshake.
MAGIC_NBD = 0x4E42444D41474943  # "NBDMAGIC", opens every connection
MAGIC_OPTION = 0x49484156454F5054  # "IHAVEOPT", newstyle; also opens every option request
MAGIC_OLDSTYLE = 0x00420281861253  # follows "NBDMAGIC" where the server speaks oldstyle
MAGIC_OPTION_REPLY = 0x3E889045565A9

# Magic numbers of the transmission phase.
MAGIC_REQUEST = 0x25609513
MAGIC_EXTENDED_REQUEST = 0x21E41C71
MAGIC_SIMPLE_REPLY = 0x67446698
MAGIC_STRUCTURED_REPLY = 0x668E33EF
MAGIC_EXTENDED_REPLY = 0x6E8A278C

# Handshake flags (server, 16 bits) and client flags (32 bits) share their bits.
FLAG_FIXED_NEWSTYLE = 1 << 0
FLAG_NO_ZEROES = 1 << 1

# Options.
OPT_EXPORT_NAME = 1
OPT_ABORT = 2
OPT_LIST = 3
OPT_STARTTLS = 5
OPT_INFO = 6
OPT_GO = 7
OPT_STRUCTURED_REPLY = 8
OPT_LIST_META_CONTEXT = 9
OPT_SET_META_CONTEXT = 10
OPT_EXTENDED_HEADERS = 11

OPTION_NAMES = {
    OPT_EXPORT_NAME: "EXPORT_NAME",
    OPT_ABORT: "ABORT",
    OPT_LIST: "LIST",
    OPT_STARTTLS: "STARTTLS",
    OPT_INFO: "INFO",
    OPT_GO: "GO",
    OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
    OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
}

# Option replies; errors have bit 31 set.
REP_ACK = 1
REP_SERVER = 2
REP_INFO = 3
REP_META_CONTEXT = 4
REP_ERROR = 1 << 31
REP_ERR_UNSUP = REP_ERROR + 1
REP_ERR_POLICY = REP_ERROR + 2
REP_ERR_INVALID = REP_ERROR + 3
REP_ERR_PLATFORM = REP_ERROR + 4
REP_ERR_TLS_REQD = REP_ERROR + 5
REP_ERR_UNKNOWN = REP_ERROR + 6
REP_ERR_SHUTDOWN = REP_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD = REP_ERROR + 8
REP_ERR_TOO_BIG = REP_ERROR + 9
REP_ERR_EXT_HEADER_REQD = REP_ERROR + 10

# What each refusal means to a person.
REFUSAL_WORDS = {
    REP_ERR_UNSUP: "not supported",
    REP_ERR_POLICY: "forbidden by the server's policy",
    REP_ERR_INVALID: "called invalid",
    REP_ERR_PLATFORM: "not supported on the server's platform",
    REP_ERR_TLS_REQD: "refused without TLS",
    REP_ERR_UNKNOWN: "no such export",
    REP_ERR_SHUTDOWN: "refused because the server is shutting down",
    REP_ERR_BLOCK_SIZE_REQD: "refused unless block sizes are asked for",
    REP_ERR_TOO_BIG: "called too big",
    REP_ERR_EXT_HEADER_REQD: "refused without extended headers",
}

# Kinds of information about an export.
INFO_EXPORT = 0
INFO_NAME = 1
INFO_DESCRIPTION = 2
INFO_BLOCK_SIZE = 3

# Transmission flags.
FLAG_HAS_FLAGS = 1 << 0
FLAG_READ_ONLY = 1 << 1
FLAG_SEND_FLUSH = 1 << 2
FLAG_SEND_FUA = 1 << 3
FLAG_ROTATIONAL = 1 << 4
FLAG_SEND_TRIM = 1 << 5
FLAG_SEND_WRITE_ZEROES = 1 << 6
FLAG_SEND_DF = 1 << 7
FLAG_CAN_MULTI_CONN = 1 << 8
FLAG_SEND_RESIZE = 1 << 9
FLAG_SEND_CACHE = 1 << 10
FLAG_SEND_FAST_ZERO = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD = 1 << 12

# Commands.
CMD_READ = 0
CMD_WRITE = 1
CMD_DISC = 2
CMD_FLUSH = 3
CMD_TRIM = 4
CMD_CACHE = 5
CMD_WRITE_ZEROES = 6
CMD_BLOCK_STATUS = 7
CMD_RESIZE = 8

COMMAND_NAMES = (
    "READ",
    "WRITE",
    "DISC",
    "FLUSH",
    "TRIM",
    "CACHE",
    "WRITE_ZEROES",
    "BLOCK_STATUS",
    "RESIZE",
)

# Command flags.
CMD_FLAG_FUA = 1 << 0
CMD_FLAG_NO_HOLE = 1 << 1
CMD_FLAG_DF = 1 << 2
CMD_FLAG_REQ_ONE = 1 << 3
CMD_FLAG_FAST_ZERO = 1 << 4
CMD_FLAG_PAYLOAD_LEN = 1 << 5

# Reply chunks.
REPLY_FLAG_DONE = 1 << 0
REPLY_TYPE_NONE = 0
REPLY_TYPE_OFFSET_DATA = 1
REPLY_TYPE_OFFSET_HOLE = 2
REPLY_TYPE_BLOCK_STATUS = 5
REPLY_TYPE_BLOCK_STATUS_EXT = 6
REPLY_TYPE_IS_ERROR = 1 << 15
REPLY_TYPE_ERROR = REPLY_TYPE_IS_ERROR + 1
REPLY_TYPE_ERROR_OFFSET = REPLY_TYPE_IS_ERROR + 2

# Extent flags of the context base:allocation.
BASE_ALLOCATION = "base:allocation"
STATE_HOLE = 1 << 0
STATE_ZERO = 1 << 1

# Error numbers. They look like Linux's errno, and are fixed by the protocol instead.
EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
EOVERFLOW = 75
ENOTSUP = 95
ESHUTDOWN = 108

ERROR_WORDS = {
    EPERM: "operation not permitted",
    EIO: "input/output error",
    ENOMEM: "out of memory",
    EINVAL: "invalid request",
    ENOSPC: "no space left",
    EOVERFLOW: "too large",
    ENOTSUP: "not supported",
    ESHUTDOWN: "server is shutting down",
}

# Limits the specification sets.
MAX_STRING = 4096  # bytes of any string
MAX_MIN_BLOCK = 1 << 16
UNLIMITED_BLOCK = 0xFFFFFFFF  # a maximum block size that says "no limit"
MAX_STATUS_EXTENTS = 1 << 20  # in one status chunk

# Limits we set, where the specification leaves the choice.
DEFAULT_MAX_PAYLOAD = 1 << 25  # the size every peer can count on
MAX_OPTION = 1 << 16  # bytes of one option request or option reply
MAX_CONTEXT_QUERIES = 1024
MAX_REPLY_PIECES = 1024  # separate pieces of one read still out of order

# The styles of transmission messages a handshake can end in, in ascending order.
SIMPLE = 0  # compact requests, simple replies only
STRUCTURED = 1  # compact requests, replies in chunks
EXTENDED = 2  # 32-byte headers both ways, replies in chunks

# How a server treats TLS.
TLS_OFF = 0
TLS_ALLOWED = 1  # the client may ask for it; single exports may insist on it
TLS_REQUIRED = 2  # nothing else is answered before
