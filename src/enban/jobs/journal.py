"""The journal of a resumable convert: how far it got, and for exactly which job.

It is a small JSON file beside the partial target, `<target>.enban-journal`, replaced as a
whole at each checkpoint, after the target was flushed. It counts only for the same sources
(path, size, time of change), target options and partial file.
"""

from __future__ import annotations

import json
import os
import time

from ..errors import from_oserror
from ..storage import host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..block.disk import Disk
    from ..block.node import Node

INTERVAL_S = 5.0


class Journal:
    """facts: whatever else must be equal for the job to be the same; JSON values."""

    def __init__(self, target: str, sources: list[Disk], facts: list[Any]) -> None:
        self.path = os.path.realpath(target) + ".enban-journal"
        self.job: Any = json.loads(json.dumps([facts, [_identity(disk.node) for disk in sources]]))
        self._saved = time.monotonic()

    def load(self) -> int:
        """The guest offset to go on from; 0 if there is no journal or it is of another job."""
        try:
            with open(self.path, encoding="utf-8") as file:
                content = json.load(file)
        except (OSError, ValueError):
            return 0
        if not isinstance(content, dict) or content.get("job") != self.job:
            return 0
        position = content.get("position")
        return position if isinstance(position, int) and position > 0 else 0

    def due(self) -> bool:
        return time.monotonic() - self._saved >= INTERVAL_S

    def save(self, position: int) -> None:
        """Record that everything before `position` is in the target, durably."""
        temporary = self.path + ".new"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump({"job": self.job, "position": position}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
            host.sync_directory(os.path.dirname(self.path))
        except OSError as error:
            raise from_oserror(error, "write the journal", self.path) from error
        self._saved = time.monotonic()

    def remove(self) -> None:
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise from_oserror(error, "remove the journal", self.path) from error


def _identity(node: Node | None) -> list[list[Any]]:
    """The files of a chain as they are now."""
    found = []
    while node is not None:
        try:
            status = os.stat(node.file.name)
            found.append([node.file.name, status.st_size, status.st_mtime_ns, node.format])
        except OSError:
            found.append([node.file.name, node.file.size(), 0, node.format])
        node = node.backing
    return found
