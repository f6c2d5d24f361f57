"""The lab on other people's programs: their NBD servers, their driver, their view of our crashes."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from time import monotonic, sleep

import pytest

from enban.lab.kill import KillPart
from enban.lab.oracle import CORRUPT, FOREIGN
from tests.cli.command import enban as cli
from tests.support import needs

needs_qemu_nbd = needs("qemu-nbd", "qemu-utils")


def serve(words: list[str], socket: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = monotonic() + 20
    while not socket.exists():
        assert process.poll() is None and monotonic() < deadline
        sleep(0.01)
    return process


@needs_qemu_nbd
def test_a_black_box_on_qemu_nbd(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    image = tmp_path / "image.qcow2"
    cli("create", "-f", "qcow2", image, "2M")
    process = serve(
        ["qemu-nbd", "-t", "-k", str(socket), "-f", "qcow2", "--discard=unmap", str(image)], socket
    )
    try:
        uri = f"nbd+unix:///?socket={socket}"
        answer = json.loads(
            cli("torture", uri, "--overwrite", "--count", "2", "--output", "json", "--seed", "5").out
        )
    finally:
        process.terminate()
        process.wait(10)
    assert not answer["findings"]
    assert answer["parts"]["blackbox"]["reconnects"] == 2


@needs("nbdkit", "nbdkit")
def test_a_server_that_drops_writes_is_found(tmp_path: Path) -> None:
    socket = tmp_path / "socket"
    process = serve(
        [
            *("nbdkit", "-f", "-U", str(socket), "eval", "get_size=echo 1M", "pwrite=cat >/dev/null"),
            "pread=dd if=/dev/zero count=$3 iflag=count_bytes",
        ],
        socket,
    )
    words = ("torture", f"nbd+unix:///?socket={socket}", "--overwrite", "--count", "1")
    try:
        told = cli(*words, "--findings", tmp_path / "found", code=1)
    finally:
        process.terminate()
        process.wait(10)
    assert "FOREIGN in blackbox" in told.out and list((tmp_path / "found").iterdir())


@needs_qemu_nbd
def test_somebody_elses_server_is_killed(tmp_path: Path) -> None:
    part = KillPart(3, "kill-4k", server="qemu-nbd -t -k {socket} -f {format} {image}")
    try:
        finding = part.step()
    finally:
        part.close()
    # A finding about QEMU is no failure of ours, if QEMU says the same of the image: one life in ten ends
    # with a cluster that was freed and used again before its unlinking was written.
    assert finding is None or finding.kind in (CORRUPT, FOREIGN), finding.text
    if finding is not None and finding.kind == CORRUPT:
        assert finding.after is not None
        image = tmp_path / "found.qcow2"
        image.write_bytes(finding.after)
        told = subprocess.run(["qemu-img", "check", str(image)], capture_output=True, text=True, check=False)
        assert told.returncode == 2, f"{finding.text}\n{told.stdout}{told.stderr}"  # 3 would be leaks alone
    assert part.counts["kills"] == 8 or finding is not None


@pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None,
    reason="qemu-storage-daemon is missing (Debian package qemu-system-common)",
)
@pytest.mark.interop
def test_side_by_side_with_qemu(monkeypatch: pytest.MonkeyPatch) -> None:
    from enban.lab import peer

    monkeypatch.setattr(peer, "KINDS", peer.KINDS[:1])
    rows = json.loads(cli("torture", "--peer", "qemu", "--output", "json").out)
    ours, theirs = rows
    assert (ours["driver"], theirs["driver"]) == ("enban", "QEMU")
    assert ours["states"] > 1000 and theirs["states"] > 1000
    assert ours["corrupt"] == ours["lost"] == ours["foreign"] == 0
    assert theirs["corrupt"] == theirs["lost"] == 0  # as measured before by the same method
