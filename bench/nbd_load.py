"""One NBD server under one load: starts it, loads it, stops it, prints what a request took in seconds.

    python -m bench.nbd_load WORK IMAGE FOLDER qemu-nbd          the better of aio=threads, aio=io_uring
    python -m bench.nbd_load WORK IMAGE FOLDER ENBAN-COMMAND...

Works are in WORKS. IMAGE (qcow2) is not changed: works that write use a copy beside it, or a new image in
FOLDER. qemu-nbd's aio mode `native` needs O_DIRECT, which is another thing than the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

RUN_S = 2


@dataclass(frozen=True, slots=True)
class Work:
    """fio: its job. on: "image" (read only), "copy" or "new" (an empty image of 16 GiB). cold: not in the
    page cache; otherwise all of it is. flags: more for enban serve. The job "" is nbdcopy of the whole image,
    once."""

    fio: str
    on: str = "image"
    cold: bool = False
    flags: tuple[str, ...] = ()


_READ_1 = "--rw=randread --bs=4k --iodepth=1"
_WRITE_1 = "--rw=randwrite --bs=4k --iodepth=1"
_READ_32 = "--rw=randread --bs=4k --iodepth=32"
_READ_4X32 = f"{_READ_32} --numjobs=4 --thread"

WORKS = {
    "randread-32": Work(_READ_32),
    "randwrite-32": Work("--rw=randwrite --bs=4k --iodepth=32", on="copy"),
    "allocate-32": Work("--rw=randwrite --bs=4k --iodepth=32 --size=16g", on="new"),
    "randread-1": Work(_READ_1),
    "randwrite-1": Work(_WRITE_1, on="copy"),
    "randread-1-awake": Work(_READ_1, flags=("--keep-awake",)),
    "randwrite-1-awake": Work(_WRITE_1, on="copy", flags=("--keep-awake",)),
    "randread-32-simple": Work(_READ_32, flags=("--no-sr",)),
    "randread-1-simple": Work(_READ_1, flags=("--no-sr",)),
    "randread-4x32-simple": Work(_READ_4X32, flags=("--no-sr",)),
    "read-256k": Work("--rw=read --bs=256k --iodepth=8"),
    "write-256k": Work("--rw=write --bs=256k --iodepth=8", on="copy"),
    "randread-4x32": Work(_READ_4X32),
    "cold-32": Work(_READ_32, cold=True),
    "nbdcopy": Work(""),
}


def main(arguments: list[str]) -> int:
    name, image, folder, *server = arguments
    work = WORKS[name]
    only = ["-r"] if work.on == "image" else []  # both serve what is only read read-only
    with tempfile.TemporaryDirectory(dir=folder) as room:
        socket = os.path.join(room, "socket")
        if server == ["qemu-nbd"]:
            common = ["qemu-nbd", "-f", "qcow2", "-k", socket, "-t", "-e", "16", "--discard=unmap", *only]
            commands = [[*common, f"--aio={aio}"] for aio in ("threads", "io_uring")]
        else:
            commands = [[*server, "serve", "-q", "-k", socket, *work.flags, *only]]
        print(min(measure(work, Path(image), Path(room), command, socket) for command in commands))
    return 0


def measure(work: Work, image: Path, room: Path, command: list[str], socket: str) -> float:
    """Seconds a request (for nbdcopy: in all)."""
    disk = prepare(work, image, room)
    server = subprocess.Popen([*command, str(disk)], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 30
        while not os.path.exists(socket):
            if server.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{command[0]} does not serve")
            time.sleep(0.02)
        time.sleep(0.2)
        return load(work, f"nbd+unix:///?socket={socket}")
    finally:
        # Killed, so that it does not first write out what nobody will read.
        server.kill()
        server.wait(60)
        if os.path.exists(socket):
            os.unlink(socket)
        if work.on == "new":
            disk.unlink()


def prepare(work: Work, image: Path, room: Path) -> Path:
    if work.on == "new":
        disk = room / "new.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16G"], check=True)
        return disk
    if work.on == "copy":
        # Made once and written to by everybody: its clusters stay where they are.
        disk = image.with_name("nbd-" + image.name)
        if not disk.exists():
            shutil.copyfile(image, disk)
            forget(disk)
        # In single pages, as small writes leave it: in a larger one each of them is searched for its block.
        read_all(disk, os.POSIX_FADV_RANDOM)
        return disk
    if work.cold:
        forget(image)
    else:
        read_all(image)
    return image


def forget(path: Path) -> None:
    """Have nothing of a file in the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_all(path: Path, advice: int = os.POSIX_FADV_NORMAL) -> None:
    """Have the page cache hold all of a file: hosts take back what was not used for seconds."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, advice)
        while file.readinto(buffer):
            pass


def load(work: Work, uri: str) -> float:
    if not work.fio:
        started = time.perf_counter()
        subprocess.run(["nbdcopy", uri, "null:"], check=True)
        return time.perf_counter() - started
    command = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", "--size=1g", *work.fio.split()]
    command += [f"--runtime={RUN_S}", "--time_based", "--randrepeat=0", "--norandommap", "--group_reporting"]
    done = subprocess.run([*command, "--output-format=json"], check=True, capture_output=True, text=True)
    (job,) = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
    return float(1 / (job["read"]["iops"] + job["write"]["iops"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
