"""What can go wrong, sorted by what remains possible afterwards.

Every error enban raises on purpose is an `EnbanError` below. The class says whose
turn it is: the caller (`UsageError`), the machine we run on (`HostError`), the image
(`ImageError`), the other end of a connection (`PeerError`), or us (`InternalError`).
The facts stand in fields; `str()` gives one line: where, what, and what to do.

Foreign exceptions (OSError, zlib.error, ...) are translated where they arise: in
`storage` for the operating system, in `block.codec` for compression libraries.
"""

from __future__ import annotations

import errno as _errno
import os as _os


class EnbanError(Exception):
    """Base of all deliberate errors.

    what: what happened, one clause without a full stop.
    path: the file or URI it happened to, if one is known.
    offset: byte offset inside `path`, if one is known.
    hint: what the reader can do about it, one clause.
    role: what `path` is to the image that names it ("backing file of top.qcow2"), if an image does.
    """

    def __init__(self, what: str, *, path: str = "", offset: int | None = None, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.path = path
        self.offset = offset
        self.hint = hint
        self.role = ""

    def named_by(self, image: str, role: str) -> None:
        """Say which image names the file the error is about. The first to say so knows best; nobody need
        say it of an error of the image itself."""
        if not self.path:
            self.path = image
            self.what = f"{role}: {self.what}"
        elif not self.role and self.path != image:
            self.role = f"{role} of {image}"

    def __str__(self) -> str:
        where = f"{self.path} ({self.role})" if self.role else self.path
        text = f"{where}: {self.what}" if where else self.what
        if self.offset is not None:
            text += f" (at offset {self.offset:#x})"
        if self.hint:
            text += f"; {self.hint}"
        return text if text.isprintable() else "".join(map(_visible, text))


def _visible(character: str) -> str:
    """A character of a message. Names come from images and peers: none may forge a second line or move a
    terminal's cursor. Lone surrogates stay, they are the bytes of a file name that is no UTF-8."""
    if character.isprintable() or "\ud800" <= character <= "\udfff":
        return character
    return f"\\x{ord(character):02x}"


class UsageError(EnbanError, ValueError):
    """The call itself is wrong; nothing was changed."""


class OutOfRangeError(UsageError):
    """A request reaches outside the disk."""


class ReadOnlyError(UsageError):
    """A write to a disk, image or medium that was opened or is read-only."""


class ClosedError(UsageError):
    """The disk was closed before or while the request ran."""


class GateError(UsageError):
    """An image names another file and the gate does not allow it to be opened."""


class UnsupportedOperationError(UsageError):
    """This format or storage cannot do what was asked."""


class HostError(EnbanError, OSError):
    """The operating system refused; the request failed, the disk is as before.

    `errno` is set as for OSError.
    """

    def __init__(
        self, what: str, *, path: str = "", offset: int | None = None, hint: str = "", errno: int = _errno.EIO
    ) -> None:
        EnbanError.__init__(self, what, path=path, offset=offset, hint=hint)
        self.errno = errno
        self.strerror = _os.strerror(errno)

    # OSError takes its own view of the arguments; ours is the one that counts.
    __str__ = EnbanError.__str__


class NoSpaceError(HostError):
    """The file system or device is full; free some room and try again."""


class LockedError(HostError):
    """Another process holds the image."""


class NoMediumError(HostError):
    """The drive has no disc."""


class FlushFailedError(HostError):
    """An earlier fsync failed: what was written before it may be lost on this host.

    Sticky: the kernel may have dropped the pages and would call the next fsync a
    success, so the storage keeps refusing until it is opened again.
    """


class ImageError(EnbanError):
    """The image is broken, or it is not what it was said to be."""


class CorruptImageError(ImageError):
    """The image contradicts its own format."""


class CorruptDataError(ImageError):
    """Guest data stored in the image cannot be made out (a broken compressed cluster); tables are fine."""


class UnsupportedFeatureError(ImageError):
    """The image needs a feature this version does not have; it was not touched."""


class UnknownFormatError(ImageError):
    """No driver recognises the content, or the named format is not known."""


class PeerError(EnbanError):
    """The other end of a connection failed or broke the protocol."""


class CancelledError(EnbanError):
    """The job was cancelled; what it had half made is gone again."""


class InternalError(EnbanError):
    """Our own bug. Please report it with the line printed."""


_WORDS = {
    _errno.ENOENT: "no such file or directory",
    _errno.EACCES: "permission denied",
    _errno.EPERM: "operation not permitted",
    _errno.EISDIR: "is a directory",
    _errno.EROFS: "file system is read-only",
    _errno.EEXIST: "file exists already",
    _errno.EIO: "input/output error",
    _errno.EFBIG: "file would be too large for this file system",
    _errno.ELOOP: "too many symbolic links",
    _errno.ENAMETOOLONG: "file name too long",
    _errno.EMFILE: "too many open files",
}


def from_oserror(
    error: OSError, doing: str, path: str = "", offset: int | None = None, hint: str = ""
) -> HostError:
    """Translate an OSError met while `doing` something ("read", "open", ...)."""
    number = error.errno or _errno.EIO
    if number in (_errno.ENOSPC, _errno.EDQUOT):
        return NoSpaceError(
            f"cannot {doing}: no space left",
            path=path,
            offset=offset,
            hint=hint or "free some room and try again",
            errno=number,
        )
    if number in (getattr(_errno, "ENOMEDIUM", 123),):
        return NoMediumError(
            f"cannot {doing}: no medium in the drive", path=path, offset=offset, errno=number
        )
    words = _WORDS.get(number) or _os.strerror(number).lower()
    return HostError(f"cannot {doing}: {words}", path=path, offset=offset, hint=hint, errno=number)
