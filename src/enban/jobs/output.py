"""A file that appears whole or not at all.

    make <path>.enban-partial -> fill it -> flush -> rename to <path> -> flush the directory

While it is made, the file it will replace is kept locked, so neither a running guest nor
another enban has it open when it goes. The partial file is locked too, from its first moment
until it has its name: an unlocked one was left behind by a job that was killed, and the next
job for the same target replaces it or, when asked to resume, goes on with it.

    whoever holds the lock of the file that stands under the partial name may remove or rename
    it; after every locking is looked whether the file still stands there

Block devices cannot be replaced by a rename and are written in place.
"""

from __future__ import annotations

import errno
import os
import stat

from enban.block.runtime import BLOCKING, drive
from enban.catalog import is_nbd
from enban.errors import EnbanError, HostError, LockedError, UsageError, from_oserror
from enban.storage import host
from enban.storage.file import open_file

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.storage.file import FileStorage

SUFFIX = ".enban-partial"
_LONGEST_NAME = 255  # bytes, on the file systems in use


def partial_name(path: str) -> str:
    """Where a file is made before it gets its name: in the same directory."""
    directory, name = os.path.split(path)
    room = _LONGEST_NAME - len(SUFFIX)
    encoded = os.fsencode(name)
    if len(encoded) > room:
        from hashlib import sha256

        digest = sha256(encoded).hexdigest()[:16]
        name = os.fsdecode(encoded[: room - 17]) + "-" + digest
    return os.path.join(directory, name + SUFFIX)


class Output:
    """One file in the making. Ends in exactly one of `commit`, `discard` and `keep`.

    path: the final name, symbolic links followed. temporary: its name until then.
    storage: the open file; whoever takes it over also closes it before the end.
    resumed: `storage` is what an earlier job left. in_place: a device; nothing is renamed.
    """

    def __init__(self, path: str, *, cache: str = "writeback", resume: bool = False) -> None:
        if is_nbd(path):
            raise UsageError(
                "an NBD export cannot be made from here",
                path=path,
                hint="write into it with: enban convert -n",
            )
        self.path = os.path.realpath(path)
        self.temporary = partial_name(self.path)
        self.resumed = False
        self.in_place = False
        self._open = True
        self._hold = -1  # keeps the lock when the storage is closed
        self._replaced: FileStorage | None = None
        self._status: os.stat_result | None = None
        try:
            self._status = os.stat(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise from_oserror(error, "look at", self.path) from error
        if self._status is not None and stat.S_ISBLK(self._status.st_mode):
            self.in_place = True
            self.temporary = self.path
            self.storage = open_file(self.path, BLOCKING, writable=True, cache=cache)
            return
        if self._status is not None:
            if not stat.S_ISREG(self._status.st_mode):
                raise UsageError(
                    "is not a regular file or block device, so no image can be made there", path=self.path
                )
            self._replaced = self._lock_replaced()
        try:
            self.storage = self._make(cache, resume)
        except BaseException:
            self._unlock()
            raise

    def _lock_replaced(self) -> FileStorage:
        try:
            return open_file(self.path, BLOCKING, writable=True)
        except LockedError as error:
            raise LockedError(
                "is in use by another process or by this job itself, so it cannot be replaced",
                path=self.path,
                errno=error.errno or errno.EAGAIN,
            ) from error

    def _make(self, cache: str, resume: bool) -> FileStorage:
        if os.path.lexists(self.temporary):
            storage = self._take_over(cache)
            if resume:
                self.resumed = True
                return storage
            try:
                if host.HAVE_LOCKS:
                    self._remove()  # while its lock is ours
            finally:
                drive(storage.close())
                self._let_go()
            if not host.HAVE_LOCKS:
                self._remove()  # such a host does not remove open files
        try:
            storage = open_file(self.temporary, BLOCKING, writable=True, cache=cache, create=True)
        except LockedError as error:
            raise self._busy() from error
        except EnbanError as error:
            number = getattr(error, "errno", 0)
            if number == errno.EEXIST:
                raise self._busy() from error
            if self._replaced is not None and number in (errno.EACCES, errno.EPERM, errno.EROFS):
                error.hint = "the image is made beside its final name, so the directory must be writable"
            raise
        self._hold_lock(storage)
        try:
            self._dress()
        except OSError as error:
            self._remove()
            drive(storage.close())
            raise from_oserror(error, "set the owner and mode of", self.temporary) from error
        return storage

    def _take_over(self, cache: str) -> FileStorage:
        """Open the partial file of a job that is no more."""
        try:
            regular = stat.S_ISREG(os.lstat(self.temporary).st_mode)
            if regular:
                storage = open_file(self.temporary, BLOCKING, writable=True, cache=cache)
        except (LockedError, FileNotFoundError) as error:
            raise self._busy() from error
        except HostError as error:
            if error.errno == errno.ENOENT:  # gone since we looked
                raise self._busy() from error
            raise
        if not regular:
            raise UsageError(
                "stands where a partial image would be made", path=self.temporary, hint="remove it"
            )
        self._hold_lock(storage)
        return storage

    def _hold_lock(self, storage: FileStorage) -> None:
        """Keep the lock of a storage until `_let_go`, if the file still has its name."""
        self._hold = os.dup(storage.fileno())
        if not self._has_name():
            drive(storage.close())
            self._let_go()
            raise self._busy()

    def _has_name(self) -> bool:
        """Whether the file we hold is the one under the partial name."""
        try:
            return os.path.samestat(os.fstat(self._hold), os.lstat(self.temporary))
        except FileNotFoundError:
            return False

    def _busy(self) -> LockedError:
        return LockedError(
            "another process is making this image now",
            path=self.path,
            hint="wait for it or stop it",
            errno=errno.EAGAIN,
        )

    def commit(self) -> None:
        """Give the file its name. Its storage is closed and was flushed. Raises HostError."""
        if self.in_place:
            self._open = False
            return
        if not host.HAVE_LOCKS:
            self._unlock()  # there an open file could not be replaced, and nothing is locked anyway
        elif not self._has_name():
            raise HostError("the partial image was removed while it was made", path=self.temporary)
        try:
            os.replace(self.temporary, self.path)
            self._open = False
            host.sync_directory(os.path.dirname(self.path))
        except OSError as error:
            raise from_oserror(error, "give the finished image its name", self.path) from error
        finally:
            if not self._open:
                self._unlock()

    def _dress(self) -> None:
        """Mode and owner of the file that is replaced, as if it had been written over, before there is
        anything in it that others must not read."""
        status = self._status
        if status is None:
            return
        if hasattr(os, "chown"):
            try:
                os.chown(self.temporary, status.st_uid, status.st_gid)
            except PermissionError:
                pass  # only root gives files away; the mode is what protects the content
        os.chmod(self.temporary, stat.S_IMODE(status.st_mode))

    def discard(self) -> None:
        """Remove what was made. Its storage is closed."""
        if self._open:
            self._open = False
            try:
                if not self.in_place and self._has_name():
                    if not host.HAVE_LOCKS:
                        self._let_go()
                    self._remove()
            finally:
                self._unlock()

    def keep(self) -> None:
        """Leave the partial file for a later job to resume. Its storage is closed and was flushed."""
        self._open = False
        self._unlock()

    def _remove(self) -> None:
        try:
            os.unlink(self.temporary)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise from_oserror(error, "remove", self.temporary) from error

    def _let_go(self) -> None:
        hold, self._hold = self._hold, -1
        if hold >= 0:
            os.close(hold)

    def _unlock(self) -> None:
        self._let_go()
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            drive(replaced.close())
