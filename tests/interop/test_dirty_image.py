"""An image that QEMU left dirty (lazy refcounts, killed) is repaired when it is opened for writing."""

from __future__ import annotations

import subprocess
from pathlib import Path

import enban
from tests.support import needs_qemu_io, qemu_check, qemu_img


@needs_qemu_io
def test_a_dirty_image_is_repaired_when_opened_for_writing(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "lazy_refcounts=on,compat=1.1", path, "16M")
    command = ["qemu-io", "-f", "qcow2", "-c", "write -P 7 0 1M", "-c", "flush", "-c", "abort", str(path)]
    subprocess.run(command, capture_output=True, check=False)
    before = path.read_bytes()
    assert before[79] & 1, "QEMU did not leave the image dirty"
    with enban.open(path) as disk:  # reading changes nothing
        assert disk.pread(1 << 20, 0) == b"\x07" * (1 << 20)
    assert path.read_bytes() == before
    with enban.open(path, writable=True) as disk:
        assert disk.pread(1 << 20, 0) == b"\x07" * (1 << 20)
        disk.pwrite(b"more" * 1000, 5 << 20)
    assert not path.read_bytes()[79] & 1
    assert qemu_check(path)["check-errors"] == 0
    with enban.open(path) as disk:
        assert disk.pread(1 << 20, 0) == b"\x07" * (1 << 20)
        assert disk.pread(4000, 5 << 20) == b"more" * 1000
