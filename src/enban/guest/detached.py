"""A machine in the background: this very command again, in a session of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

from ..errors import PeerError, from_oserror
from . import places

# Names the descriptor on which the machine's process tells its name, and that it runs.
READY_FD = "ENBAN_READY_FD"


def detach(words: list[str]) -> str:
    """Start `enban` with these words in the background; the machine's name once it runs.

    Raises PeerError with what it said if it does not come to that.
    """
    receiver, sender = os.pipe()
    with tempfile.TemporaryFile() as said:
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "enban", *words],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
                pass_fds=[sender],
                env={**os.environ, READY_FD: str(sender)},
                start_new_session=True,
            )
        except OSError as error:
            raise from_oserror(error, "start", sys.executable) from error
        finally:
            os.close(sender)
        with open(receiver, "rb") as ready:
            name = ready.read()
        if name:
            return name.decode()
        code = process.wait()
        said.seek(0)
        lines = said.read().decode(errors="replace").strip().splitlines()
        reason = lines[-1].removeprefix("enban: ") if lines else f"exit code {code}"
        raise PeerError(f"the machine does not start: {reason}")


def tell_ready(name: str) -> None:
    """In the machine's process: it runs. What it says from now on goes to its log file. Does nothing if
    nobody waits, that is if it is not in the background."""
    fd = os.environ.pop(READY_FD, "")
    if not fd.isdigit():
        return
    log = os.open(log_path(name), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    os.dup2(log, 2)
    os.close(log)
    os.write(int(fd), name.encode())
    os.close(int(fd))


def log_path(name: str) -> str:
    """Where a machine in the background complains."""
    return os.path.join(places.base(), f"{name}.log")
