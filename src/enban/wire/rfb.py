"""The remote framebuffer protocol (VNC) as pure bytes, as far as a front for keyboards needs it.

    ServerHandshake   towards a VNC client, up to its ClientInit
    ClientHandshake   towards a VNC server, up to its ServerInit
    ClientMessages    what a client sends afterwards, cut into messages: key events parsed, the rest as
                      it came
    key_event, extended_key_event, set_encodings, update_request   messages built

The rule: bytes in, events out, no sockets and no waiting; a length from the peer is checked against a limit
before anything waits for that many bytes. By RFC 6143 (RFB 3.8) and the community's rfbproto document
(versions 3.3 and 3.7, QEMU's extended key event, extended clipboard, resizing). What the server sends after
ServerInit is not looked into: a front passes it on.
"""

from __future__ import annotations

import struct

from enban.errors import PeerError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator

VERSION_3_3, VERSION_3_7, VERSION_3_8 = (3, 3), (3, 7), (3, 8)
SECURITY_NONE = 1

# Client messages (RFC 6143, 7.5, and rfbproto).
SET_PIXEL_FORMAT, SET_ENCODINGS, UPDATE_REQUEST, KEY_EVENT, POINTER_EVENT, CUT_TEXT = 0, 2, 3, 4, 5, 6
CONTINUOUS_UPDATES, FENCE, XVP, SET_DESKTOP_SIZE, QEMU_MESSAGE = 150, 248, 250, 251, 255
QEMU_EXTENDED_KEY, QEMU_AUDIO = 0, 1

MAX_ENCODINGS = 1024
MAX_CUT_TEXT = 1 << 20
MAX_NAME = 1 << 16
MAX_REASON = 1 << 12
MAX_FENCE = 64

_KEY = struct.Struct(">BBxxI")
_EXTENDED_KEY = struct.Struct(">BBHII")
_SERVER_INIT = struct.Struct(">HH16sI")


class RfbError(PeerError):
    """The other end of a VNC connection broke the protocol, or refused us."""


# -- messages built -----------------------------------------------------------------------------


def key_event(down: bool, keysym: int) -> bytes:
    """KeyEvent (RFC 6143, 7.5.4)."""
    return _KEY.pack(KEY_EVENT, down, keysym)


def extended_key_event(down: bool, keysym: int, keycode: int) -> bytes:
    """QEMU Extended Key Event (rfbproto). keycode: PC set 1, the prefix e0 as the high bit; keysym 0 for
    none."""
    return _EXTENDED_KEY.pack(QEMU_MESSAGE, QEMU_EXTENDED_KEY, down, keysym, keycode)


def set_encodings(encodings: list[int]) -> bytes:
    """SetEncodings (RFC 6143, 7.5.2)."""
    return struct.pack(f">BxH{len(encodings)}i", SET_ENCODINGS, len(encodings), *encodings)


def update_request(x: int, y: int, width: int, height: int, *, incremental: bool) -> bytes:
    """FramebufferUpdateRequest (RFC 6143, 7.5.3)."""
    return struct.pack(">BBHHHH", UPDATE_REQUEST, incremental, x, y, width, height)


class ServerInit:
    """How the server describes its screen (RFC 6143, 7.3.2): size in pixels, pixel format (16 bytes),
    name."""

    __slots__ = ("height", "name", "pixel_format", "width")

    def __init__(self, width: int, height: int, pixel_format: bytes, name: bytes) -> None:
        self.width = width
        self.height = height
        self.pixel_format = pixel_format
        self.name = name

    def to_bytes(self) -> bytes:
        return _SERVER_INIT.pack(self.width, self.height, self.pixel_format, len(self.name)) + self.name


# -- bytes in -----------------------------------------------------------------------------------


class _Machine:
    """Bytes in, in any pieces. A subclass's `_run` yields how many bytes it needs next and is sent them;
    what it leaves in `_out` is to be sent, what it leaves in `_events` was understood."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._out = bytearray()
        self._events: list[Message] = []
        self._steps = self._run()
        self._wanted = next(self._steps)
        self.done = False

    def _run(self) -> Generator[int, bytes, None]:
        raise NotImplementedError

    def receive(self, data: bytes) -> None:
        """Take bytes from the peer and go on as far as they lead. Raises RfbError; after that, hang up."""
        self._data += data
        place = 0
        try:
            while not self.done and len(self._data) - place >= self._wanted:
                piece = bytes(self._data[place : place + self._wanted])
                place += self._wanted
                self._wanted = self._steps.send(piece)
        except StopIteration:
            self.done = True
        finally:
            del self._data[:place]

    def to_send(self) -> bytes:
        """What we have to say now, once."""
        out = bytes(self._out)
        self._out.clear()
        return out

    @property
    def rest(self) -> bytes:
        """What was received beyond the end of this conversation."""
        return bytes(self._data)


def _version(line: bytes) -> tuple[int, int]:
    """The version that a peer's first 12 bytes name, lowered to one we speak (RFC 6143, 7.1.1)."""
    if (
        line[:4] != b"RFB "
        or line[7:8] != b"."
        or line[11:] != b"\n"
        or not (line[4:7] + line[8:11]).isdigit()
    ):
        raise RfbError(f"this is not the VNC protocol, it begins with {line!r}")
    version = int(line[4:7]), int(line[8:11])
    for known in (VERSION_3_8, VERSION_3_7, VERSION_3_3):
        if version >= known:
            return known
    raise RfbError(f"RFB version {version[0]}.{version[1]} is too old", hint="3.3 is the least")


class ServerHandshake(_Machine):
    """Our side towards a client, up to its ClientInit; no password is asked for (RFC 6143, 7.1 to 7.3.1).

    When `done`, `shared` is whether the client lets others stay."""

    def __init__(self) -> None:
        self.shared = True
        super().__init__()

    def _run(self) -> Generator[int, bytes, None]:
        self._out += b"RFB 003.008\n"
        version = _version((yield 12))
        if version == VERSION_3_3:
            self._out += struct.pack(">I", SECURITY_NONE)
        else:
            self._out += bytes([1, SECURITY_NONE])
            choice = (yield 1)[0]
            if choice != SECURITY_NONE:
                raise RfbError(f"the client chose security type {choice}, which was not offered")
            if version == VERSION_3_8:
                self._out += struct.pack(">I", 0)
        self.shared = (yield 1) != b"\0"


class ClientHandshake(_Machine):
    """Our side towards a server, up to its ServerInit, which is `init` when `done`.

    shared: whether other clients may stay. A server that wants a password is refused by name."""

    def __init__(self, *, shared: bool = True) -> None:
        self.init: ServerInit | None = None
        self._shared = shared
        super().__init__()

    def _run(self) -> Generator[int, bytes, None]:
        version = _version((yield 12))
        self._out += b"RFB %03d.%03d\n" % version
        if version == VERSION_3_3:
            offered = [*struct.unpack(">I", (yield 4))]
        else:
            offered = list((yield (yield 1)[0]))
        if offered in ([], [0]):
            raise RfbError(f"the VNC server refuses: {_text((yield from self._long_text(MAX_REASON)))}")
        if SECURITY_NONE not in offered:
            kinds = ", ".join(map(str, offered))
            raise RfbError(
                f"the VNC server wants a password or more (security types {kinds})",
                hint="give QEMU's VNC no password and a unix socket of its own",
            )
        if version != VERSION_3_3:
            self._out += bytes([SECURITY_NONE])
        if version == VERSION_3_8 and (yield 4) != bytes(4):
            raise RfbError(f"the VNC server refuses: {_text((yield from self._long_text(MAX_REASON)))}")
        self._out += bytes([self._shared])
        width, height, pixel_format, length = _SERVER_INIT.unpack((yield _SERVER_INIT.size))
        _check_length("name of a screen", length, MAX_NAME)
        self.init = ServerInit(width, height, pixel_format, (yield length))

    def _long_text(self, limit: int) -> Generator[int, bytes, bytes]:
        (length,) = struct.unpack(">I", (yield 4))
        _check_length("reason", length, limit)
        return (yield length)


class Message:
    """A client's message: `raw` as it came."""

    __slots__ = ("raw",)

    def __init__(self, raw: bytes) -> None:
        self.raw = raw


class KeyMessage(Message):
    """A key event. keysym: X's number. keycode: of an extended event, PC set 1 with e0 as the high bit;
    else None."""

    __slots__ = ("down", "keycode", "keysym")

    def __init__(self, raw: bytes, down: bool, keysym: int, keycode: int | None) -> None:
        super().__init__(raw)
        self.down = down
        self.keysym = keysym
        self.keycode = keycode


class ClientMessages(_Machine):
    """What a client sends after the handshake, message by message. Raises RfbError for one that is not
    known, since its length is not known either, and for a length over its limit."""

    def next_event(self) -> Message | None:
        """The next whole message, None when more bytes are needed."""
        return self._events.pop(0) if self._events else None

    def _run(self) -> Generator[int, bytes, None]:
        fixed = {SET_PIXEL_FORMAT: 19, UPDATE_REQUEST: 9, POINTER_EVENT: 5, CONTINUOUS_UPDATES: 9, XVP: 3}
        while True:
            kind = yield 1
            number = kind[0]
            if number in fixed:
                self._events.append(Message(kind + (yield fixed[number])))
            elif number == KEY_EVENT:
                raw = kind + (yield _KEY.size - 1)
                _, down, keysym = _KEY.unpack(raw)
                self._events.append(KeyMessage(raw, down != 0, keysym, None))
            elif number == QEMU_MESSAGE:
                yield from self._qemu(kind)
            elif number == SET_ENCODINGS:
                head = yield 3
                (count,) = struct.unpack(">xH", head)
                _check_length("list of encodings", count, MAX_ENCODINGS, "entries")
                self._events.append(Message(kind + head + (yield 4 * count)))
            elif number == CUT_TEXT:
                head = yield 7
                # Negative: the extended clipboard, as long as the number without its sign.
                (length,) = struct.unpack(">3xi", head)
                _check_length("clipboard", abs(length), MAX_CUT_TEXT)
                self._events.append(Message(kind + head + (yield abs(length))))
            elif number == FENCE:
                head = yield 8
                _check_length("fence", head[7], MAX_FENCE)
                self._events.append(Message(kind + head + (yield head[7])))
            elif number == SET_DESKTOP_SIZE:
                head = yield 7
                self._events.append(Message(kind + head + (yield 16 * head[5])))
            else:
                raise RfbError(f"a client's message of type {number} is not known")

    def _qemu(self, kind: bytes) -> Generator[int, bytes, None]:
        """Messages of QEMU's own: extended key events, and sound (rfbproto, "QEMU Client Message")."""
        sub = yield 1
        if sub[0] == QEMU_EXTENDED_KEY:
            raw = kind + sub + (yield _EXTENDED_KEY.size - 2)
            _, _, down, keysym, keycode = _EXTENDED_KEY.unpack(raw)
            self._events.append(KeyMessage(raw, down != 0, keysym, keycode))
        elif sub[0] == QEMU_AUDIO:
            operation = yield 2
            # Operation 2 sets a sample format of six bytes; the others have no more.
            more = (yield 6) if operation == b"\0\2" else b""
            self._events.append(Message(kind + sub + operation + more))
        else:
            raise RfbError(f"a client's QEMU message of type {sub[0]} is not known")


def _check_length(what: str, length: int, limit: int, unit: str = "bytes") -> None:
    if length > limit:
        raise RfbError(f"a {what} of {length} {unit} is over the limit of {limit}")


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace")
