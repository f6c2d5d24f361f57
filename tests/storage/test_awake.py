"""What a file in the place of the host's device is told, and when."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import pytest

from enban.errors import HostError
from enban.storage.awake import KeepAwake
from tests.cli.command import refused
from tests.exports.nbd_peer import MIB, open_disk, serving
from tests.support import pattern

AWAKE, ANY = 0, 2_000_000_000


def told(device: Path) -> list[int]:
    """The times in microseconds that were written, in order."""
    return [number for (number,) in struct.iter_unpack("=i", device.read_bytes())]


def wait_until_let_go(awake: KeepAwake) -> None:
    deadline = time.monotonic() + 20
    while awake.held:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_processors_are_awake_from_the_first_use_until_a_while_after_the_last(tmp_path: Path) -> None:
    device = tmp_path / "device"
    device.touch()
    awake = KeepAwake(str(device), idle_s=0.2)
    assert told(device) == [ANY]  # opening it asks for nothing
    until = time.monotonic() + 1
    while time.monotonic() < until:
        awake.use()
        assert awake.held
        time.sleep(0.01)
    assert told(device) == [ANY, AWAKE]
    wait_until_let_go(awake)
    assert told(device) == [ANY, AWAKE, ANY]
    awake.use()
    assert told(device) == [ANY, AWAKE, ANY, AWAKE]
    awake.close()
    assert told(device) == [ANY, AWAKE, ANY, AWAKE, ANY]
    awake.use()  # too late: nothing happens
    assert told(device)[-1] == ANY and not awake.held


def test_a_server_keeps_them_awake_for_a_quick_client_only(tmp_path: Path) -> None:
    device, path = tmp_path / "device", tmp_path / "d.raw"
    device.touch()
    path.write_bytes(pattern(MIB))
    awake = KeepAwake(str(device), idle_s=0.2)
    door = open_disk(path, format="raw", writable=False)
    with serving(door, folder=tmp_path, spin_us=20_000, awake=awake) as server, server.peer() as peer:
        server.server.threads.most = 1  # also on a machine with one processor
        deadline = time.monotonic() + 20
        while not awake.held:
            assert time.monotonic() < deadline
            peer.read(0, 4096)
        wait_until_let_go(awake)
        assert told(device) == [ANY, AWAKE, ANY]
    awake.close()


def test_a_host_that_cannot_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        HostError, match=r"cannot keep processors awake: .*only Linux can, for root"
    ) as caught:
        KeepAwake(str(tmp_path / "none"))
    assert caught.value.path == str(tmp_path / "none")


def test_the_command_wants_clients_that_are_looked_for(tmp_path: Path) -> None:
    path = tmp_path / "d.raw"
    path.write_bytes(bytes(MIB))
    assert "leave out --spin-us 0" in refused("serve", "--keep-awake", "--spin-us", "0", path)


@pytest.mark.skipif(
    not os.access("/dev/cpu_dma_latency", os.W_OK),
    reason="/dev/cpu_dma_latency is missing or not for this user",
)
def test_the_real_device(tmp_path: Path) -> None:
    awake = KeepAwake(idle_s=0.1)
    with open("/dev/cpu_dma_latency", "rb") as device:
        awake.use()
        assert struct.unpack("=i", device.read(4)) == (AWAKE,)
        wait_until_let_go(awake)
    awake.close()
