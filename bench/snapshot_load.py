"""What snapshots, commit and rebase take: prepares fresh images, runs one command, prints its seconds.

    python -m bench.snapshot_load WORK IMAGE FOLDER COMMAND...

COMMAND is `qemu-img` or the enban command. WORK:

    create    an internal snapshot of IMAGE
    delete    deleting one, made by the same program
    commit    IMAGE's data into an empty image below it, IMAGE emptied
    rebase    an empty overlay of IMAGE onto an empty image: all of its data is copied
    open      no COMMAND: opening IMAGE in temporary snapshot mode, once the modules are loaded

What is prepared is on the disk before the clock starts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def copy(image: Path, target: Path) -> Path:
    """A copy with its holes."""
    subprocess.run(["cp", "--sparse=always", image, target], check=True)
    return target


def size_of(image: Path) -> str:
    facts = subprocess.run(["qemu-img", "info", "--output=json", image], check=True, capture_output=True)
    return str(json.loads(facts.stdout)["virtual-size"])


def prepare(work: str, image: Path, folder: Path, command: list[str]) -> list[str]:
    """The command to be timed, after all that it needs is there."""
    target, base = folder / "target.qcow2", folder / "base.qcow2"
    if work in ("create", "delete"):
        copy(image, target)
        if work == "delete":
            subprocess.run([*command, "snapshot", "-c", "kept", target], check=True)
        return [*command, "snapshot", f"-{work[0]}", "kept", str(target)]
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", base, size_of(image)], check=True)
    if work == "commit":
        copy(image, target)
        subprocess.run(["qemu-img", "rebase", "-u", "-b", base, "-F", "qcow2", target], check=True)
        return [*command, "commit", "-q", "-f", "qcow2", str(target)]
    words = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"]
    subprocess.run([*words, image, target], check=True)
    return [*command, "rebase", "-f", "qcow2", "-b", str(base), "-F", "qcow2", str(target)]


def run(work: str, image: Path, folder: Path, command: list[str]) -> float:
    """Seconds of one run."""
    if work == "open":
        import enban

        enban.open(image, snapshot=True).close()  # loads the modules: that is the start of a program
        started = time.perf_counter()
        disk = enban.open(image, snapshot=True)
        taken = time.perf_counter() - started
        disk.close()
        return taken
    with tempfile.TemporaryDirectory(dir=folder) as place:
        words = prepare(work, image.resolve(), Path(place).resolve(), command)
        os.sync()
        started = time.perf_counter()
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return time.perf_counter() - started


if __name__ == "__main__":
    print(run(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
