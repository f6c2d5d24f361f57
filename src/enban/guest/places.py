"""Where machines that run are found: one private folder a machine, named like it.

    $XDG_RUNTIME_DIR/enban/NAME/        or /tmp/enban-UID/NAME/
        lock      locked by the process that runs the machine, for as long as it lives
        control   its control socket (see `control`); further sockets are between it and QEMU

Whoever may enter the folder may command the machine, so it is its owner's alone. A folder whose lock is free
is left over from a process that was killed, and is used again.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import tempfile

from ..errors import HostError, LockedError, UsageError, from_oserror

CONTROL = "control"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,31}")
# sun_path has 108 bytes; our longest socket name is short of 16.
_MOST_PATH = 90


def check_name(name: str) -> str:
    """The name of a machine. Raises UsageError."""
    if _NAME.fullmatch(name) is None:
        raise UsageError(
            f"'{name}' cannot be a machine's name", hint="use up to 32 letters, digits, dots, dashes"
        )
    return name


def name_for(path: str) -> str:
    """A name for a machine made from its first disk's file name."""
    stem = os.path.splitext(os.path.basename(path))[0]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).lstrip(".-")[:32]
    return name or "guest"


def base() -> str:
    """The folder of all machines of this user; made if missing. Raises HostError if it is not private."""
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    path = (
        os.path.join(runtime, "enban")
        if os.path.isdir(runtime)
        else os.path.join(tempfile.gettempdir(), f"enban-{os.getuid()}")
    )
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise from_oserror(error, "make the folder for running machines", path) from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise HostError(
            "the folder for running machines is not private",
            path=path,
            hint="remove it, or set XDG_RUNTIME_DIR",
            errno=errno.EPERM,
        )
    return path


class Place:
    """The folder of a machine that this process runs."""

    def __init__(self, name: str) -> None:
        """Claim the name. Raises LockedError if a machine of that name runs."""
        self.path = os.path.join(base(), check_name(name))
        if len(os.fsencode(self.path)) > _MOST_PATH:
            raise UsageError("path is too long for unix sockets", path=self.path, hint="set XDG_RUNTIME_DIR")
        try:
            os.makedirs(self.path, mode=0o700, exist_ok=True)
            self._lock = os.open(
                os.path.join(self.path, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise from_oserror(error, "make the machine's folder", self.path) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise from_oserror(error, "lock the machine's folder", self.path) from error
            raise LockedError(
                f"a machine named '{name}' runs already",
                hint="give this one another --name, or see: enban ctl NAME status",
                errno=errno.EBUSY,
            ) from None
        self._clear()

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def _clear(self) -> None:
        for name in os.listdir(self.path):
            if name != "lock":
                try:
                    os.unlink(self.file(name))
                except OSError:
                    pass  # whoever needs that name will say so

    def release(self) -> None:
        """Remove the folder and give the name up."""
        self._clear()
        try:
            os.unlink(self.file("lock"))
            os.rmdir(self.path)
        except OSError:
            pass  # somebody put a file there; an empty name is no harm
        os.close(self._lock)


def running() -> list[str]:
    """The names of the machines of this user that run now."""
    found = []
    folder = base()
    for name in sorted(os.listdir(folder)):
        try:
            fd = os.open(os.path.join(folder, name, "lock"), os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            found.append(name)
        finally:
            os.close(fd)
    return found
