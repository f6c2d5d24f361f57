"""Discs that are changed while they are served.

NBD has no word for "another medium". So when the disc of an exported CD-ROM drive goes or another
one comes, the clients of the export are disconnected, and whoever connects again finds the disc
that is there now, or an export of 0 bytes while the drive is empty:

    changed -> reads fail (no medium, or changed) -> clients end -> adopt, new size
            -> clients that came meanwhile with the old size end too

No client ever reads the bytes of a disc other than the one whose size it was told.
"""

from __future__ import annotations

import threading

from ...errors import EnbanError
from ...formats.raw import RawNode
from ...storage.cdrom import STATE_WORDS, CdromStorage

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from .export import ServedExport
    from .server import Server

POLL_S = 1.0


def disc_of(export: ServedExport) -> CdromStorage | None:
    """The drive behind an export that follows its discs: a whole one, as raw."""
    node = export.door.node
    if isinstance(node, RawNode) and not node.sliced and isinstance(node.file, CdromStorage):
        return node.file
    return None


class MediaWatch:
    """Looks after the drives among a server's exports, in a thread of its own, between start and stop."""

    def __init__(self, server: Server, log: Callable[[str], None], *, poll_s: float = POLL_S) -> None:
        self._server = server
        self._log = log
        self._poll_s = poll_s
        self._end = threading.Event()
        self._watched = [
            (export, disc) for export in server.exports.values() if (disc := disc_of(export)) is not None
        ]
        self._troubled: set[ServedExport] = set()
        self._thread = threading.Thread(target=self._run, name="media", daemon=True)

    def start(self) -> None:
        if self._watched:
            self._thread.start()

    def stop(self) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        while not self._end.wait(self._poll_s):
            for export, disc in self._watched:
                try:
                    if disc.has_changed():
                        self._change(export, disc)
                    self._troubled.discard(export)
                except EnbanError as error:
                    if export not in self._troubled:  # said once, tried again each time
                        self._troubled.add(export)
                        self._log(str(error))

    def _change(self, export: ServedExport, disc: CdromStorage) -> None:
        self._server.end_clients(export)
        disc.adopt()
        node = export.door.node
        assert isinstance(node, RawNode)
        node.follow_storage()
        export.follow_disk()
        self._server.end_clients(export)  # those who came while the old size stood
        what = STATE_WORDS[disc.state]
        self._log(f"{disc.name}: {what}" + (f" of {disc.size()} bytes" if disc.size() else ""))
