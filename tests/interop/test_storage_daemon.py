"""qemu-storage-daemon: snapshots it makes of our images while it serves them, overlays over its exports."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.errors import LockedError, ReadOnlyError
from tests.support import check_file, make_qcow2, needs, pattern, qemu_check

needs_daemon = needs("qemu-storage-daemon", "qemu-system-common")


class Daemon:
    """A running daemon that serves one image; `do` gives it QMP commands."""

    def __init__(self, process: subprocess.Popen[str], uri: str) -> None:
        self.process = process
        self.uri = uri

    def do(self, command: str, **arguments: Any) -> Any:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        stdin.flush()
        while True:
            answer = json.loads(stdout.readline())
            if "return" in answer or "error" in answer:
                assert "error" not in answer, answer
                return answer["return"]


@contextmanager
def daemon(image: Path, driver: str, *, writable: bool) -> Iterator[Daemon]:
    socket = image.with_suffix(".sock")
    read_only = "off" if writable else "on"
    flags = {
        "chardev": "stdio,id=c",
        "monitor": "chardev=c",
        "blockdev": f"driver=file,node-name=f,filename={image},read-only={read_only}",
        "blockdev ": f"driver={driver},node-name=n,file=f,read-only={read_only}",
        "nbd-server": f"addr.type=unix,addr.path={socket}",
        "export": f"type=nbd,id=e,node-name=n,name=d,writable={'on' if writable else 'off'}",
    }
    words = [word for name, value in flags.items() for word in (f"--{name.strip()}", value)]
    process = subprocess.Popen(
        ["qemu-storage-daemon", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()  # its greeting
        served = Daemon(process, f"nbd+unix:///d?socket={socket}")
        served.do("qmp_capabilities")
        for _ in range(100):
            if socket.exists():
                break
            time.sleep(0.05)
        yield served
        served.do("quit")
        assert process.wait(30) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@needs_daemon
def test_snapshots_made_while_it_serves(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 4 << 20)
    with enban.open(path, writable=True) as disk:
        disk.pwrite(pattern(500_000, 1), 0)
        disk.create_snapshot("ours")
    with daemon(path, "qcow2", writable=True) as served:
        with pytest.raises(LockedError):
            enban.open(path, writable=True)
        with enban.open(served.uri, writable=True, format="raw") as disk:
            disk.pwrite(pattern(500_000, 2), 0)
            disk.flush()
            served.do("blockdev-snapshot-internal-sync", device="n", name="theirs")
            disk.pwrite(pattern(500_000, 3), 0)
        served.do("blockdev-snapshot-delete-internal-sync", device="n", name="ours")
    check_file(path)
    qemu_check(path)
    with enban.open(path, writable=True) as disk:
        assert [snapshot.name for snapshot in disk.snapshots] == ["theirs"]
        assert disk.pread(500_000, 0) == pattern(500_000, 3)
        disk.apply_snapshot("theirs")
        assert disk.pread(500_000, 0) == pattern(500_000, 2)
        disk.delete_snapshot("theirs")
    qemu_check(path)


@needs_daemon
@pytest.mark.parametrize("writable", [True, False])
def test_a_temporary_overlay_over_its_export(tmp_path: Path, writable: bool) -> None:
    base = tmp_path / "base.raw"
    base.write_bytes(pattern(4 << 20))
    with daemon(base, "raw", writable=writable) as served:
        with enban.open(served.uri, snapshot=True, format="raw") as disk:
            disk.pwrite(b"over", 1 << 20)
            assert disk.pread(8, 1 << 20) == b"over" + pattern(4 << 20)[(1 << 20) + 4 :][:4]
            if writable:
                disk.commit()
                disk.pwrite(b"gone", 0)
            else:
                with pytest.raises(ReadOnlyError, match="the export is read-only"):
                    disk.commit()
                assert disk.pread(4, 1 << 20) == b"over"
        with enban.open(served.uri, format="raw") as disk:
            expected = b"over" if writable else pattern(4 << 20)[1 << 20 :][:4]
            assert disk.pread(4, 1 << 20) == expected and disk.pread(4, 0) == pattern(4)
