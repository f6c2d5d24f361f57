"""CD-ROM drives: finding them, what lies in them, and a disc as a storage.

A drive is opened without waiting, so that it may be empty. Asked for its state it answers at
once; its size means something only when that state is "a disc": an open tray still has the size
of the disc that was in it, and an empty drive any size at all. After a change of discs the drive
must be opened again before the kernel shows the new one.

    state        of the drive      size
    DISC         4                 right
    NOT_READY    3                 nothing yet: it spins up
    OPEN         2                 stale
    EMPTY        1                 nothing
    UNKNOWN      0                 the drive does not tell

Sources: linux/cdrom.h, Documentation/userspace-api/ioctl/cdrom.rst, ECMA-119 (ISO 9660).
"""

from __future__ import annotations

import _thread
import errno
from time import monotonic, sleep

from ..block.runtime import drive
from ..block.storage import Storage
from ..errors import HostError, NoMediumError, ReadOnlyError, from_oserror
from . import kernel as k

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Hashable

    from ..block.runtime import Runtime
    from ..block.storage import ReadBuffer, WriteBuffer
    from ..units import HostOffset
    from .kernel import Kernel

UNKNOWN, EMPTY, OPEN, NOT_READY, DISC = range(5)
STATE_WORDS = {
    UNKNOWN: "unknown",
    EMPTY: "no disc",
    OPEN: "tray open",
    NOT_READY: "not ready",
    DISC: "disc",
}
SECTOR_BYTES = 2048
DEFAULT = "/dev/cdrom"

_KINDS = {100: "audio", 101: "data", 102: "data (mode 2)", 103: "XA", 104: "XA", 105: "audio and data"}
_LEAD_OUT = 0xAA
_LBA = 1
_DATA_TRACK = 4
_CHECK_S = 0.5  # while it is read, so often is looked whether the disc is still the same
_SETTLE_S = (0.1, 0.3, 0.6)
_NO_MEDIUM = getattr(errno, "ENOMEDIUM", 123)
_NOT_KNOWN = (errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EOPNOTSUPP, errno.EIO)


# -- finding drives --------------------------------------------------------------------------


def drives(kernel: Kernel | None = None) -> list[str]:
    """The device files of this machine's drives, sr0 before sr1 before sr10."""
    names = (kernel or k.KERNEL).drives()
    return ["/dev/" + name for name in sorted(names, key=lambda name: (len(name), name))]


def find_drive(name: str = "", *, with_disc: bool = False, kernel: Kernel | None = None) -> str:
    """The device file of a drive.

    name: a device file. "" or "/dev/cdrom" is the first drive, also on machines where that link is
        missing; with `with_disc` the first that has a disc, or the first if none has.
    Raises HostError if there is no drive, or `name` is none.
    """
    layer = kernel or k.KERNEL
    if name and (name != DEFAULT or layer.exists(name)):
        if not is_drive(name, layer):
            raise HostError(
                "is no CD-ROM drive" if layer.exists(name) else "there is no such device",
                path=name,
                hint="see: enban cdrom list",
                errno=errno.ENODEV,
            )
        return name
    found = drives(layer)
    if not found:
        raise HostError("there is no CD-ROM drive on this machine", errno=errno.ENODEV)
    if with_disc:
        for path in found:
            try:
                if Drive(path, layer).state() == DISC:
                    return path
            except HostError:
                continue  # one that cannot be looked at is not the one
    return found[0]


def is_drive(path: str, kernel: Kernel | None = None) -> bool:
    layer = kernel or k.KERNEL
    name = layer.device_name(path)
    return bool(name) and name in layer.drives()


# -- a drive ---------------------------------------------------------------------------------


class Disc:
    """What lies in a drive. size: bytes. kind: "data", "audio", ...; volume: its ISO 9660 name, "" if it
    has none. tracks: numbers of the first and the last, (0, 0) if it has no table of contents.
    lead_out: bytes, where the table of contents says that the disc ends, 0 if it does not."""

    __slots__ = ("kind", "lead_out", "size", "tracks", "volume")

    def __init__(self, size: int, kind: str, volume: str, tracks: tuple[int, int], lead_out: int) -> None:
        self.size = size
        self.kind = kind
        self.volume = volume
        self.tracks = tracks
        self.lead_out = lead_out


class Drive:
    """A CD-ROM drive by its device file. Each call opens it for its own time, so between calls the
    drive is free."""

    def __init__(self, path: str, kernel: Kernel | None = None) -> None:
        self.path = path
        self.kernel = kernel or k.KERNEL

    def state(self) -> int:
        """DISC, NOT_READY, OPEN, EMPTY or UNKNOWN. Raises HostError."""
        with _Session(self) as fd:
            return _state(self.kernel, fd, self.path)

    def disc(self) -> Disc | None:
        """What lies in it; None without a disc that can be read. Raises HostError."""
        fd, state, size = _open_settled(self.kernel, self.path)
        try:
            if state != DISC:
                return None
            tracks, lead_out = _contents(self.kernel, fd)
            try:
                kind = _KINDS.get(self.kernel.ioctl(fd, k.CDROM_DISC_STATUS), "unknown")
            except OSError:
                kind = "unknown"
            return Disc(size, kind, self._volume(fd, size), tracks, lead_out)
        finally:
            self.kernel.close(fd)

    def _volume(self, fd: int, size: int) -> str:
        """Volume identifier of the primary volume descriptor (ECMA-119, 8.4)."""
        with memoryview(bytearray(SECTOR_BYTES)) as sector:
            for place in range(16, 32):
                try:
                    if (place + 1) * SECTOR_BYTES > size:
                        break
                    if self.kernel.read_into(fd, sector, place * SECTOR_BYTES) < SECTOR_BYTES:
                        break
                except OSError:
                    break  # audio, or scratched there: it has no name then
                if bytes(sector[1:6]) != b"CD001" or sector[0] == 255:
                    break
                if sector[0] == 1:
                    return bytes(sector[40:72]).decode("ascii", "replace").rstrip(" \0")
        return ""

    def eject(self) -> None:
        """Open the tray. Raises HostError if the disc is mounted or the tray locked, or there is none.

        Who merely reads the disc does not keep it: reads then find no medium.
        """
        what = "eject the disc"
        # The kernel's SCSI layer takes this request past its own count of users, so it is asked for a
        # claim, which a mounted disc refuses; and a drive's refusal may come back as a positive number.
        refused = self._do(k.CDROMEJECT, 0, what, claim=True)
        if refused or self.state() == DISC:
            raise self._busy(what)

    def close_tray(self, *, wait_s: float = 10) -> int:
        """Close the tray and wait until the drive knows what lies in it; the state it ends in."""
        self._do(k.CDROMCLOSETRAY, 0, "close the tray")
        end = monotonic() + wait_s
        while True:
            state = self.state()
            if state not in (NOT_READY, OPEN) or monotonic() >= end:
                return state
            sleep(0.2)

    def lock(self, locked: bool) -> None:
        """Keep the tray from being opened with the drive's button, or let it."""
        self._do(k.CDROM_LOCKDOOR, int(locked), "lock the tray" if locked else "unlock the tray")

    def _do(self, request: int, argument: int, what: str, *, claim: bool = False) -> int:
        with _Session(self, claim=claim, what=what) as fd:
            try:
                return self.kernel.ioctl(fd, request, argument)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise self._busy(what) from error
                if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                    raise HostError(
                        f"cannot {what}: the drive is not able to", path=self.path, errno=error.errno
                    ) from error
                raise from_oserror(error, what, self.path) from error

    def _busy(self, what: str) -> HostError:
        return HostError(
            f"cannot {what}: the drive is mounted or locked",
            path=self.path,
            hint="unmount the disc, or run: enban cdrom unlock",
            errno=errno.EBUSY,
        )


class _Session:
    """A drive open for the time of a `with` block. claim: only if nobody has claimed it, to do `what`."""

    def __init__(self, drive: Drive, *, claim: bool = False, what: str = "") -> None:
        self._drive = drive
        self._claim = claim
        self._what = what
        self._fd = -1

    def __enter__(self) -> int:
        drive = self._drive
        try:
            self._fd = drive.kernel.open(drive.path, claim=self._claim)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise drive._busy(self._what) from error
            raise _not_opened(error, drive.path) from error
        return self._fd

    def __exit__(self, *_: object) -> None:
        self._drive.kernel.close(self._fd)


def _open(kernel: Kernel, path: str) -> int:
    try:
        return kernel.open(path)
    except OSError as error:
        raise _not_opened(error, path) from error


def _not_opened(error: OSError, path: str) -> HostError:
    hint = "only root and the group cdrom may" if error.errno in (errno.EACCES, errno.EPERM) else ""
    return from_oserror(error, "open the drive", path, hint=hint)


def _open_settled(kernel: Kernel, path: str) -> tuple[int, int, int]:
    """(a new descriptor of a drive, its state, the size of what lies in it or 0). Raises HostError.

    For a moment after a change the kernel may read the new disc and still have the size of the one before.
    The table of contents comes from the disc itself: where it disagrees the drive is opened again, for the
    second that this may take. Some discs never agree; then it is the kernel's word that counts.
    """
    for wait_s in (*_SETTLE_S, 0.0):
        fd = _open(kernel, path)
        try:
            state = _state(kernel, fd, path)
            if state != DISC:
                return fd, state, 0
            size = kernel.size(fd)
            if not wait_s or _contents(kernel, fd)[1] in (0, size):
                break
        except OSError as error:
            kernel.close(fd)
            if isinstance(error, HostError):
                raise
            raise from_oserror(error, "look at the disc", path) from error
        kernel.close(fd)
        sleep(wait_s)
    return fd, state, size


def _contents(kernel: Kernel, fd: int) -> tuple[tuple[int, int], int]:
    """(first and last track, end of the last in bytes) by the table of contents; zeros if there is none."""
    header = bytearray(2)
    # struct cdrom_tocentry: track, adr and control, format, -, address (4), data mode, - - -
    entry = bytearray((_LEAD_OUT, 0, _LBA, 0)) + bytearray(8)
    try:
        kernel.ioctl(fd, k.CDROMREADTOCHDR, header)
        kernel.ioctl(fd, k.CDROMREADTOCENTRY, entry)
    except OSError:
        return (0, 0), 0
    import sys

    lead_out = int.from_bytes(entry[4:8], sys.byteorder, signed=True)
    return (header[0], header[1]), max(lead_out, 0) * SECTOR_BYTES


def _state(kernel: Kernel, fd: int, path: str) -> int:
    try:
        state = kernel.ioctl(fd, k.CDROM_DRIVE_STATUS, k.CDSL_CURRENT)
    except OSError as error:
        if error.errno in _NOT_KNOWN:
            return UNKNOWN
        raise from_oserror(error, "ask the drive for its state", path) from error
    return state if state in STATE_WORDS else UNKNOWN


def _changed_ms(kernel: Kernel, fd: int) -> int:
    """When the disc was changed last, by the kernel's clock; 0 where the kernel (before 5.15) or the
    drive does not tell. CDROM_MEDIA_CHANGED is no help: it says yes on nearly every first question."""
    import sys

    answer = bytearray(16)
    try:
        kernel.ioctl(fd, k.CDROM_TIMED_MEDIA_CHANGE, answer)
    except OSError:
        return 0
    return int.from_bytes(answer[:8], sys.byteorder, signed=True)


# -- a disc as a storage ---------------------------------------------------------------------


class CdromStorage(Storage):
    """The disc in a drive, or the drive waiting for one: then its size is 0.

    What was opened is one disc. When that is taken out, reads raise NoMediumError; when another one lies
    there, they say that the disc was changed. `adopt` goes over to whatever lies in the drive now.
    """

    fixed_size = True
    writable = False

    def __init__(self, path: str, runtime: Runtime, kernel: Kernel | None = None) -> None:
        self.name = path
        self.runtime = runtime
        self._kernel = kernel or k.KERNEL
        self._guard = _thread.allocate_lock()  # one reader at a time: a drive has one head
        self._fd = -1
        self._size = 0
        self._state = UNKNOWN
        self._changed_ms = 0
        self._mark: tuple[int, bytes] = (0, b"")
        self._looked_s = 0.0
        self._gone = False  # what was adopted is not there any more
        self.adopt()

    @property
    def identity(self) -> Hashable:
        return "drive", self._kernel.device_name(self.name) or self.name

    @property
    def state(self) -> int:
        """The drive's state when it was last adopted."""
        return self._state

    def size(self) -> int:
        return self._size

    def allocated(self) -> int:
        return 0

    def adopt(self) -> None:
        """Take what lies in the drive now, if anything, for the disc to read. Raises HostError."""
        with self._guard:
            fd, state, size = _open_settled(self._kernel, self.name)
            old, self._fd = self._fd, fd
            if old >= 0:
                self._kernel.close(old)
            self._state, self._size = state, size
            self._changed_ms = _changed_ms(self._kernel, fd)
            self._mark = self._mark_of(fd) if state == DISC else (0, b"")
            self._gone = False
            self._looked_s = monotonic()

    def _mark_of(self, fd: int) -> tuple[int, bytes]:
        """What tells one disc from another: its size and its first volume descriptor."""
        sector = bytearray(SECTOR_BYTES)
        try:
            n = self._kernel.read_into(fd, memoryview(sector), 16 * SECTOR_BYTES)
            return self._kernel.size(fd), bytes(sector[:n])
        except OSError:
            return self._kernel.size(fd), b""

    def has_changed(self) -> bool:
        """Whether something else, or nothing, lies in the drive than what was adopted. Raises HostError."""
        with self._guard:
            return self._fd >= 0 and self._look()

    def _look(self) -> bool:
        """`has_changed`; the guard is held."""
        if self._gone:
            return True
        self._looked_s = monotonic()
        state = _state(self._kernel, self._fd, self.name)
        if (state == DISC) != (self._state == DISC):
            self._gone = True
        elif state == DISC:
            changed_ms = _changed_ms(self._kernel, self._fd)
            if changed_ms != self._changed_ms or not changed_ms:
                # The kernel's word is no proof: the same disc may have been put back.
                fd = _open(self._kernel, self.name)
                try:
                    self._gone = self._mark_of(fd) != self._mark
                finally:
                    self._kernel.close(fd)
                self._changed_ms = changed_ms
        return self._gone

    def read_now(self, buffer: WriteBuffer, offset: HostOffset) -> bool:
        if not self.runtime.blocking:
            return False
        self._read(memoryview(buffer), offset)
        return True

    async def read_into(self, buffer: WriteBuffer, offset: HostOffset) -> None:
        await self.runtime.offload(self._read, memoryview(buffer), offset)

    def _read(self, view: memoryview, offset: HostOffset) -> None:
        want = max(0, min(len(view), self._size - offset))
        with self._guard:
            if self._gone or self._state != DISC or monotonic() - self._looked_s > _CHECK_S:
                self._refuse_another(offset)
            try:
                n = self._kernel.read_into(self._fd, view[:want], offset)
            except OSError as error:
                self._refuse_another(offset)
                raise from_oserror(error, "read the disc", self.name, offset) from error
            if n < want:
                self._refuse_another(offset)
                raise HostError("the disc ends before its size says", path=self.name, offset=offset + n)
        view[want:] = bytes(len(view) - want)

    def _refuse_another(self, offset: HostOffset) -> None:
        """Raise unless the disc that was adopted is there; the guard is held."""
        if self._state == DISC and not self._look():
            return
        state = _state(self._kernel, self._fd, self.name)
        if state != DISC:
            raise NoMediumError(
                f"no medium in the drive ({STATE_WORDS[state]})",
                path=self.name,
                offset=offset,
                errno=_NO_MEDIUM,
            )
        raise HostError(
            "the disc was changed", path=self.name, offset=offset, hint="open it again", errno=errno.ESTALE
        )

    async def write(self, buffer: ReadBuffer, offset: HostOffset) -> None:
        raise ReadOnlyError("a disc can only be read", path=self.name)

    async def flush(self) -> None:
        pass

    async def close(self) -> None:
        with self._guard:
            fd, self._fd = self._fd, -1
        if fd >= 0:
            self._kernel.close(fd)


def open_drive(path: str, runtime: Runtime, *, writable: bool, empty: bool = False) -> CdromStorage:
    """The disc in a drive. empty: a drive without one will do.

    Raises ReadOnlyError, NoMediumError, HostError.
    """
    if writable:
        raise ReadOnlyError("a disc can only be read", path=path, hint="open it for reading only (serve: -r)")
    storage = CdromStorage(path, runtime)
    if storage.state != DISC and not empty:
        drive(storage.close())
        raise NoMediumError(
            f"no medium in the drive ({STATE_WORDS[storage.state]})", path=path, errno=_NO_MEDIUM
        )
    return storage
