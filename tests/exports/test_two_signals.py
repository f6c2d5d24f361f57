"""A second SIGTERM while the disks are being closed must not lose what was answered."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import enban
from tests.support import make_qcow2

SLOW_CLOSE = """
import sys, time
from enban.block.door import Door
close = Door.close
async def slow(self):
    time.sleep(0.7)
    await close(self)
Door.close = slow
from enban.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_second_sigterm_does_not_lose_answered_writes(tmp_path: Path) -> None:
    path = make_qcow2(tmp_path / "disk.qcow2", 1 << 20)
    socket = tmp_path / "s"
    server = subprocess.Popen(
        [sys.executable, "-c", SLOW_CLOSE, "serve", "-k", str(socket), str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    uri = server.stdout.readline().strip()
    with enban.open(uri, writable=True, format="raw", gate=enban.TRUSTED) as disk:
        disk.pwrite(b"kept" * 1000, 8192)
    for _ in range(3):
        os.kill(server.pid, signal.SIGTERM)
        time.sleep(0.1)
    _, errors = server.communicate(timeout=30)
    assert server.returncode == 0, errors
    with enban.open(path) as disk:
        assert disk.pread(4000, 8192) == b"kept" * 1000
