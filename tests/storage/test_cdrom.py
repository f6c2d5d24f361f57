"""CD-ROM drives in every state, over a fake kernel layer: found, looked at, read, changed while in use."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import HostError, NoMediumError, ReadOnlyError, UsageError
from enban.exports import sockets
from enban.exports.nbd import ServedExport, Server
from enban.exports.nbd.media import MediaWatch, disc_of
from enban.storage import cdrom
from enban.storage import kernel as k
from enban.storage.cdrom import DISC, EMPTY, NOT_READY, OPEN, UNKNOWN, CdromStorage, Drive, find_drive
from tests.cli.command import enban as run
from tests.cli.command import refused
from tests.exports.nbd_peer import Running, open_disk
from tests.fake_drives import BOGUS_SIZE, FakeDrive, FakeKernel, iso
from tests.support import Face

ONE = iso("FIRST_DISC", 200 * 2048)
TWO = iso("SECOND", 333 * 2048, seed=3)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeKernel]:
    """Gives this machine the drives of a test."""

    def have(links: dict[str, str] | None = None, **drives: FakeDrive) -> FakeKernel:
        fake = FakeKernel(drives, links=links)
        monkeypatch.setattr(k, "KERNEL", fake)
        return fake

    return have


# -- finding ---------------------------------------------------------------------------------


def test_drives_in_the_order_of_their_numbers(machine: Callable[..., FakeKernel]) -> None:
    machine(sr10=FakeDrive(), sr2=FakeDrive(ONE), sr0=FakeDrive(), sr1=FakeDrive(TWO))
    assert cdrom.drives() == ["/dev/sr0", "/dev/sr1", "/dev/sr2", "/dev/sr10"]
    assert find_drive() == find_drive("/dev/cdrom") == "/dev/sr0"
    assert find_drive(with_disc=True) == "/dev/sr1"
    assert find_drive("/dev/sr2") == "/dev/sr2"


def test_where_the_link_is_missing_or_there(machine: Callable[..., FakeKernel]) -> None:
    machine(links={"/dev/cdrom": "sr1"}, sr0=FakeDrive(), sr1=FakeDrive(ONE))
    assert find_drive("/dev/cdrom") == "/dev/cdrom"  # udev knows better
    assert find_drive() == "/dev/sr0"
    machine(sr3=FakeDrive(ONE))
    assert find_drive("/dev/cdrom") == "/dev/sr3"


def test_no_drive_and_no_disc(machine: Callable[..., FakeKernel]) -> None:
    machine()
    for name in ("", "/dev/cdrom"):
        with pytest.raises(HostError, match="no CD-ROM drive on this machine") as caught:
            find_drive(name)
        assert caught.value.errno == errno.ENODEV
    with pytest.raises(HostError, match="there is no such device"):
        find_drive("/dev/sr7")
    with pytest.raises(HostError, match="/dev/null: is no CD-ROM drive"):
        find_drive("/dev/null")
    fake = machine(sr0=FakeDrive(), sr1=FakeDrive(), sr2=FakeDrive(ONE))
    fake.all["sr2"].errors["open"] = errno.EACCES  # one that cannot be looked at
    assert find_drive(with_disc=True) == "/dev/sr0"
    with pytest.raises(HostError, match="only root and the group cdrom may"):
        Drive("/dev/sr2").state()


# -- states ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "words"),
    [(DISC, "disc"), (NOT_READY, "not ready"), (OPEN, "tray open"), (EMPTY, "no disc"), (UNKNOWN, "unknown")],
)
def test_each_state(machine: Callable[..., FakeKernel], state: int, words: str) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    fake.all["sr0"].state = state
    one = Drive("/dev/sr0")
    assert one.state() == state
    if state == DISC:
        disc = one.disc()
        assert disc is not None
        assert (disc.size, disc.volume, disc.kind) == (len(ONE), "FIRST_DISC", "data")
        assert (disc.tracks, disc.lead_out) == ((1, 1), len(ONE))
        with enban.open("/dev/sr0") as disk:
            assert disk.size == len(ONE) and disk.format == "raw"
    else:  # whatever the size says, nobody believes it
        assert one.disc() is None
        with pytest.raises(NoMediumError, match=rf"/dev/sr0: no medium in the drive \({words}\)") as caught:
            enban.open("/dev/sr0")
        assert caught.value.errno == errno.ENOMEDIUM
    assert not fake.opened


def test_a_drive_that_never_had_a_disc_has_no_size(machine: Callable[..., FakeKernel]) -> None:
    fake = machine(sr0=FakeDrive())
    assert fake.all["sr0"].size == BOGUS_SIZE
    storage = CdromStorage("/dev/sr0", BLOCKING)
    assert (storage.size(), storage.state) == (0, EMPTY)
    drive(storage.close())
    assert not fake.opened


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.ENOTTY, errno.EIO])
def test_a_drive_that_does_not_answer(machine: Callable[..., FakeKernel], number: int) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    fake.all["sr0"].errors[k.CDROM_DRIVE_STATUS] = number
    assert Drive("/dev/sr0").state() == UNKNOWN


def test_a_disc_without_a_table_of_contents_or_a_name(machine: Callable[..., FakeKernel]) -> None:
    fake = machine(sr0=FakeDrive(bytes(30 * 2048)))
    one = fake.all["sr0"]
    one.errors[k.CDROMREADTOCENTRY] = one.errors[k.CDROM_DISC_STATUS] = errno.EIO
    disc = Drive("/dev/sr0").disc()
    assert disc is not None
    assert (disc.size, disc.volume, disc.kind, disc.tracks, disc.lead_out) == (
        30 * 2048,
        "",
        "unknown",
        (0, 0),
        0,
    )
    one.put(bytes(100))  # shorter than its volume descriptor's place
    assert (Drive("/dev/sr0").disc() or pytest.fail("no disc")).volume == ""
    one.errors["read"] = errno.EIO
    one.put(ONE)
    assert (Drive("/dev/sr0").disc() or pytest.fail("no disc")).volume == ""


# -- transitions -----------------------------------------------------------------------------


def test_a_size_that_is_behind_is_not_believed(machine: Callable[..., FakeKernel]) -> None:
    """The table of contents says that the kernel has not noticed yet."""
    fake = machine(sr0=FakeDrive(TWO))
    hand = fake.all["sr0"]
    hand.stale = [len(ONE), len(ONE)]
    with enban.open("/dev/sr0") as disk:
        assert disk.size == len(TWO)
    hand.stale = [len(ONE)]
    assert (Drive("/dev/sr0").disc() or pytest.fail("no disc")).size == len(TWO)
    hand.lead_out = 400  # a disc whose table never agrees: the kernel's word counts
    with enban.open("/dev/sr0") as disk:
        assert disk.size == len(TWO)
    assert not fake.opened


def test_eject_close_and_lock(machine: Callable[..., FakeKernel]) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    one, hand = Drive("/dev/sr0"), fake.all["sr0"]
    one.lock(True)
    with pytest.raises(HostError, match="cannot eject the disc: the drive is mounted or locked"):
        one.eject()
    one.lock(False)
    one.eject()
    assert one.state() == OPEN and fake.all["sr0"].size == len(ONE)  # stale, as it is on a real one
    assert one.disc() is None
    hand.spin_up = 2
    assert one.close_tray() == DISC
    one.eject()
    hand.disc = None
    assert one.close_tray() == EMPTY
    hand.put(ONE)
    hand.mounted = True
    with pytest.raises(HostError, match="cannot eject the disc: the drive is mounted or locked; unmount"):
        one.eject()
    hand.mounted = False
    with enban.open("/dev/sr0") as disk:  # who only reads does not keep it
        one.eject()
        with pytest.raises(NoMediumError):
            disk.pread(10, 0)
    hand.put(ONE)
    calls: list[tuple[Callable[[], object], int, int, str]] = [
        (one.eject, k.CDROMEJECT, errno.EOPNOTSUPP, "the drive is not able to"),
        (one.close_tray, k.CDROMCLOSETRAY, errno.ENOSYS, "cannot close the tray: the drive is not able to"),
        (lambda: one.lock(True), k.CDROM_LOCKDOOR, errno.EIO, "cannot lock the tray: input/output error"),
    ]
    for call, request, number, words in calls:
        hand.errors[request] = number
        with pytest.raises(HostError, match=words):
            call()
    assert not fake.opened


def test_closing_waits_only_so_long(machine: Callable[..., FakeKernel]) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    fake.all["sr0"].spin_up = 1 << 30
    assert Drive("/dev/sr0").close_tray(wait_s=0.3) == NOT_READY


def patient(storage: CdromStorage) -> None:
    """As if the drive had been looked at long ago, so that the next read looks again."""
    storage._looked_s = time.monotonic() - 60


@pytest.mark.parametrize("timed", [True, False], ids=["timed", "untimed"])
def test_a_disc_that_goes_and_one_that_comes(
    machine: Callable[..., FakeKernel], face: Face, timed: bool
) -> None:
    fake = machine(sr0=FakeDrive(ONE, timed=timed))
    hand = fake.all["sr0"]

    async def scenario() -> None:
        disk = await face.open("/dev/sr0")
        storage = disk.node.file
        assert isinstance(storage, CdromStorage)
        assert await disk.pread(5000, 30_000) == ONE[30_000:35_000]
        patient(storage)
        assert await disk.pread(100, len(ONE) - 100) == ONE[-100:]

        hand.open_tray()  # the next read meets the missing disc
        with pytest.raises(NoMediumError, match=r"no medium in the drive \(tray open\) \(at offset 0x1000\)"):
            await disk.pread(10, 4096)
        assert storage.size() == len(ONE)
        hand.put(ONE)  # the same disc again: but it was gone, so it is a new one to whoever had it open
        with pytest.raises(HostError, match="the disc was changed"):
            await disk.pread(10, 0)
        storage.adopt()
        assert await disk.pread(10, 0) == ONE[:10]

        hand.put(TWO)  # quickly, between two reads
        patient(storage)
        with pytest.raises(HostError, match=r"the disc was changed .*; open it again") as caught:
            await disk.pread(10, 0)
        assert caught.value.errno == errno.ESTALE
        assert storage.has_changed()
        storage.adopt()
        assert not storage.has_changed() and storage.size() == len(TWO)
        assert await disk.pread(100, 0) == TWO[:100]

        hand.put(None)
        patient(storage)
        with pytest.raises(NoMediumError, match="no disc"):
            await disk.pread(10, 0)
        await disk.close()

    face.run(scenario())
    assert not fake.opened


def test_a_change_that_the_kernel_only_imagined(machine: Callable[..., FakeKernel]) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    with enban.open("/dev/sr0") as disk:
        fake.all["sr0"].changed_ms += 5000
        assert isinstance(disk.node.file, CdromStorage)
        patient(disk.node.file)
        assert disk.pread(10, 0) == ONE[:10]
        assert not disk.node.file.has_changed()


def test_between_two_looks_reads_ask_nothing(
    machine: Callable[..., FakeKernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    now = [100.0]
    monkeypatch.setattr(cdrom, "monotonic", lambda: now[0])
    with enban.open("/dev/sr0") as disk:
        fake.calls.clear()
        for at in range(0, 40_000, 4096):
            disk.pread(4096, at)
        assert fake.calls == []
        now[0] += 0.6
        disk.pread(4096, 0)
        looked = len(fake.calls)
        assert looked > 0
        disk.pread(4096, 4096)
        assert len(fake.calls) == looked


def test_scratches_are_told_from_a_missing_disc(machine: Callable[..., FakeKernel]) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    with enban.open("/dev/sr0") as disk:
        fake.all["sr0"].errors["read"] = errno.EIO
        with pytest.raises(HostError, match=r"cannot read the disc: input/output error \(at offset 0x800\)"):
            disk.pread(10, 2048)
        del fake.all["sr0"].errors["read"]
        fake.all["sr0"].disc = ONE[: 100 * 2048]
        with pytest.raises(HostError, match="ends before its size says"):
            disk.pread(4096, 100 * 2048 - 1)


def test_a_disc_cannot_be_written(machine: Callable[..., FakeKernel]) -> None:
    machine(sr0=FakeDrive(ONE))
    with pytest.raises(ReadOnlyError, match="a disc can only be read"):
        enban.open("/dev/sr0", writable=True)
    with enban.open("/dev/sr0") as disk, pytest.raises(ReadOnlyError):
        disk.pwrite(b"x", 0)
    storage = CdromStorage("/dev/sr0", BLOCKING)
    with pytest.raises(ReadOnlyError):
        drive(storage.write(b"x", 0))


# -- a disc is a disk like any other ---------------------------------------------------------


def test_info_and_convert(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    machine(sr0=FakeDrive(ONE))
    assert f"virtual size: 400 KiB ({len(ONE)} bytes)" in run("info", "/dev/sr0").out
    run("convert", "-O", "qcow2", "/dev/cdrom", tmp_path / "disc.qcow2")
    with enban.open(tmp_path / "disc.qcow2") as disk:
        assert disk.pread(disk.size, 0) == ONE
    (tmp_path / "disc.iso").write_bytes(ONE)
    assert "identical" in run("compare", "-f", "raw", tmp_path / "disc.iso", "/dev/sr0").out
    assert "a disc can only be read; open it for reading only (serve: -r)" in refused("serve", "/dev/sr0")


def test_the_verb(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    fake = machine(sr0=FakeDrive(), sr1=FakeDrive(ONE), sr2=FakeDrive(TWO))
    fake.all["sr2"].open_tray()
    lines = run("cdrom", "list").out.splitlines()
    assert lines == [
        "Device      State       Size        Volume",
        "/dev/sr0    no disc     -           -                 first",
        "/dev/sr1    disc        400 KiB     FIRST_DISC        first with a disc",
        "/dev/sr2    tray open   -           -",
    ]
    about = run("cdrom", "info").out
    assert about.splitlines() == [
        "device: /dev/sr1",
        "model: FAKE SR1",
        "state: disc",
        f"size: 400 KiB ({len(ONE)} bytes)",
        "kind: data",
        "volume: FIRST_DISC",
        f"table of contents: 1 track(s), ends at {len(ONE)}, as the size says",
    ]
    assert "state: no disc" in run("cdrom", "info", "first").out
    assert '"state": "tray open"' in run("cdrom", "info", "--output=json", "/dev/sr2").out
    target = tmp_path / "disc.iso"
    assert run("cdrom", "read", target).out == f"/dev/sr1: {len(ONE)} bytes read\n"
    assert target.read_bytes() == ONE
    assert "no medium in the drive (tray open)" in refused("cdrom", "read", "/dev/sr2", target)
    assert target.read_bytes() == ONE
    assert run("cdrom", "close", "/dev/sr2").out == "/dev/sr2: disc\n"
    run("cdrom", "-q", "read", "/dev/sr2", target)
    assert target.read_bytes() == TWO
    assert run("cdrom", "lock", "/dev/sr2").out == "/dev/sr2: locked\n"
    assert "is mounted or locked; unmount the disc" in refused("cdrom", "eject", "/dev/sr2")
    assert run("cdrom", "unlock", "/dev/sr2").out == "/dev/sr2: unlocked\n"
    assert run("cdrom", "eject").out == "/dev/sr1: ejected\n"
    assert fake.all["sr1"].state == OPEN
    assert run("cdrom", "eject").out == "/dev/sr2: ejected\n"  # the first that still has one
    assert not fake.opened


def test_what_the_verb_refuses(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    machine()
    for words in (["list"], ["info"], ["eject"], ["close"], ["read", str(tmp_path / "x")], ["info", "first"]):
        assert refused("cdrom", *words) == "enban: there is no CD-ROM drive on this machine"
    assert "cdrom cannot 'burn'" in refused("cdrom", "burn")
    assert "too many names" in refused("cdrom", "list", "/dev/sr0")
    fake = machine(sr0=FakeDrive(ONE))
    assert "needs the name of the new file" in refused("cdrom", "read")
    fake.all["sr0"].kind = 100
    assert "holds audio tracks" in refused("cdrom", "read", tmp_path / "x")
    fake.all["sr0"].errors["open"] = errno.EACCES
    assert "cannot open the drive: permission denied" in refused("cdrom", "info", "/dev/sr0")
    listed = run("cdrom", "list")
    assert "/dev/sr0    error" in listed.out  # and why
    assert "/dev/sr0: cannot open the drive: permission denied; only root and the group" in listed.err[0]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["first"], ["/dev/sr0"], ["/dev/cdrom"], ["first", "/dev/sr1"]])
def test_a_drive_is_no_new_file(
    machine: Callable[..., FakeKernel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """Who names the drive and forgets the file gets no file with the drive's name."""
    monkeypatch.chdir(tmp_path)
    machine(links={"/dev/cdrom": "sr0"}, sr0=FakeDrive(ONE), sr1=FakeDrive(TWO))
    said = refused("cdrom", "read", *words)
    assert f"cdrom read needs the name of the new file, '{words[-1]}' is a drive" in said
    assert "/dev/sr-none: there is no such device" in refused("cdrom", "read", "/dev/sr-none")
    assert not list(tmp_path.iterdir()) and not Path(words[-1]).is_file()
    assert not Path("/dev/sr-none").exists()


def test_a_disc_longer_than_its_size(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    fake.all["sr0"].lead_out = 202
    assert "not as the size says" in run("cdrom", "info").out
    assert f"its table of contents goes on to {202 * 2048}" in run("cdrom", "read", tmp_path / "x").out


# -- changed while it is served --------------------------------------------------------------


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


class Served:
    """A drive's export with the watch over its discs, until the block ends."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.door = open_disk(Path("/dev/sr0"), writable=False, empty_drive=True)
        self.export = ServedExport(self.door, "", read_only=True, **options)
        self.running = Running([self.export], folder)
        self.log: list[str] = []
        self.watch = MediaWatch(self.running.server, self.log.append, poll_s=0.02)

    def __enter__(self) -> Served:
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.stop()
        self.running.stop()
        drive(self.door.close())


def test_clients_see_another_disc(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    hand = fake.all["sr0"]
    with Served(tmp_path) as served:
        one = served.running.peer()
        assert one.session.export.size == len(ONE)
        assert one.read(1000, 5000) == ONE[1000:6000]
        hand.put(TWO)
        wait_until(lambda: served.log != [])
        assert served.log == [f"/dev/sr0: disc of {len(TWO)} bytes"]
        assert one.socket.recv(1) == b""  # it was disconnected
        with served.running.peer() as two:
            assert two.session.export.size == len(TWO)
            assert two.read(2048, 2048) == TWO[2048:4096]
        served.log.clear()
        hand.open_tray()
        wait_until(lambda: served.log == ["/dev/sr0: tray open"])
        with served.running.peer() as empty:
            assert empty.session.export.size == 0
        hand.put(ONE)
        wait_until(lambda: len(served.log) == 2)
        with served.running.peer() as three:
            assert three.session.export.size == len(ONE)
            assert three.read(0, 2048) == ONE[:2048]
    assert not fake.opened


def test_our_own_client_reports_the_change(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    with Served(tmp_path) as served:
        uri = f"nbd+unix:///?socket={served.running.path}"
        with enban.open(uri) as disk:
            assert disk.pread(100, 0) == ONE[:100]
            fake.all["sr0"].put(TWO)
            wait_until(lambda: served.log != [])
            with pytest.raises(enban.EnbanError, match=f"{len(ONE)} bytes before, {len(TWO)} now"):
                disk.pread(100, 0)
        with enban.open(uri) as disk:
            assert disk.pread(disk.size, 0) == TWO


def test_trouble_with_a_drive_is_told_once(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    fake = machine(sr0=FakeDrive(ONE))
    with Served(tmp_path) as served:
        fake.all["sr0"].errors["open"] = errno.ENXIO
        fake.all["sr0"].put(TWO)
        wait_until(lambda: served.log != [])
        time.sleep(0.2)
        assert len(served.log) == 1 and "cannot open the drive" in served.log[0]
        del fake.all["sr0"].errors["open"]
        wait_until(lambda: len(served.log) == 2)
        assert served.log[1] == f"/dev/sr0: disc of {len(TWO)} bytes"


def test_slices_and_other_disks_are_left_alone(machine: Callable[..., FakeKernel], tmp_path: Path) -> None:
    machine(sr0=FakeDrive(ONE))
    (tmp_path / "x.raw").write_bytes(ONE)
    door = open_disk(tmp_path / "x.raw", writable=False)
    assert disc_of(ServedExport(door)) is None
    reference = {"driver": "raw", "offset": "4096", "file": {"filename": "/dev/sr0"}}
    with enban.open(reference) as disk:
        assert disc_of(ServedExport(disk.door)) is None
        assert disk.pread(10, 0) == ONE[4096:4106]
    drive(door.close())
    server = Server([ServedExport(door)], [sockets.listen_unix(str(tmp_path / "s"))])
    watch = MediaWatch(server, lambda text: None)
    watch.start()
    watch.stop()
    server.stop()
    server.run()


def test_open_names_that_are_no_drives(machine: Callable[..., FakeKernel]) -> None:
    machine(sr0=FakeDrive(ONE))
    with pytest.raises(HostError, match="is not a regular file or block device"):
        enban.open("/dev/null")
    with pytest.raises(UsageError, match="not known"):
        enban.open({"driver": "floppy", "filename": "/dev/sr0"})
    with enban.open({"driver": "host_cdrom", "filename": "/dev/sr0"}) as disk:
        assert disk.size == len(ONE)
