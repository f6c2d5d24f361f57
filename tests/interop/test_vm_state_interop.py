"""VM state with QEMU: its savevm read by us, ours listed and loaded by it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import enban
from tests.support import (
    check_file,
    make_qcow2,
    needs_qemu_img,
    needs_qemu_io,
    needs_qemu_system,
    pattern,
    qemu_check,
    qemu_img,
    qemu_io,
)


def monitor(image: Path, *commands: str, options: tuple[str, ...] = ()) -> str:
    """Run a machine without a guest on an image and give its monitor commands."""
    words = "qemu-system-x86_64 -accel tcg -m 32 -display none -nodefaults -monitor stdio -device VGA -drive"
    done = subprocess.run(
        [*words.split(), f"if=virtio,format=qcow2,file={image}", *options],
        input="".join(f"{command}\n" for command in (*commands, "quit")),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and "rror" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done.stdout


@needs_qemu_system
@needs_qemu_img
def test_a_guest_that_qemu_saved_is_moved_by_us_and_resumed_by_qemu(tmp_path: Path) -> None:
    theirs = make_qcow2(tmp_path / "theirs.qcow2", 64 << 20)
    monitor(theirs, "savevm saved")
    check_file(theirs)
    with enban.open(theirs, snapshot_name="saved") as disk:
        state = disk.read_vm_state(disk.vm_state_size, 0)
    assert state[:4] == b"QEVM"
    with enban.open(theirs, writable=True) as disk:
        (entry,) = disk.snapshots
        assert entry.vm_state_size == len(state)
        clock_ns = entry.vm_clock_ns
        disk.apply_snapshot("saved")
        assert disk.read_vm_state(len(state), 0) == state
    qemu_check(theirs)

    # The state in an image of our own making, with other clusters.
    ours = make_qcow2(tmp_path / "ours.qcow2", 64 << 20, cluster_size=4096)
    with enban.open(ours, writable=True) as disk:
        disk.pwrite(pattern(100_000), 0)
        for place in range(0, len(state), 1 << 20):
            disk.write_vm_state(state[place : place + (1 << 20)], place)
        disk.create_snapshot("mine", vm_clock_ns=clock_ns)
        disk.pwrite(bytes(100_000), 0)
    qemu_check(ours)
    (line,) = [line for line in qemu_img("snapshot", "-l", ours).splitlines() if "mine" in line]
    assert "KiB" in line and " 0 B " not in line
    out = monitor(ours, "info status", "info snapshots", "savevm again", options=("-loadvm", "mine", "-S"))
    assert "paused" in out and "mine" in out
    qemu_check(ours)
    check_file(ours)
    with enban.open(ours, writable=True) as disk:
        assert disk.pread(100_000, 0) == pattern(100_000)
        assert [s.name for s in disk.snapshots] == ["mine", "again"]
        disk.apply_snapshot("again")
        assert disk.read_vm_state(4, 0) == b"QEVM"
        disk.delete_snapshot("mine")
    qemu_check(ours)
    monitor(ours, options=("-loadvm", "again", "-S"))


@needs_qemu_io
def test_the_area_is_where_qemu_looks_for_it(tmp_path: Path) -> None:
    for number, cluster in enumerate((512, 4096, 65536)):
        path = make_qcow2(tmp_path / f"disk{number}.qcow2", (40 << 20) + 512, cluster_size=cluster)
        with enban.open(path, writable=True) as disk:
            disk.write_vm_state(b"\xa1" * 200_000, 0)
            disk.create_snapshot("one")
            disk.apply_snapshot("one")
        qemu_io(path, "read -b -P 0xa1 0 199680", "write -b -P 0xb2 100k 4M")
        qemu_check(path)
        with enban.open(path, writable=True) as disk:
            assert disk.vm_state_size >= (100 << 10) + (4 << 20)
            assert disk.read_vm_state(4 << 20, 100 << 10) == b"\xb2" * (4 << 20)
            assert disk.read_vm_state(1000, 0) == b"\xa1" * 1000
            disk.delete_snapshot("one")
        qemu_check(path)
        qemu_img("snapshot", "-c", "theirs", path)  # takes the tables along, says that there is no state
        qemu_check(path)
        with enban.open(path, writable=True) as disk:
            disk.apply_snapshot("theirs")
            disk.delete_snapshot("theirs")
            disk.create_snapshot("ours")
        qemu_check(path)
        check_file(path)
