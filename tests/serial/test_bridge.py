"""The bridge carries bytes: every transport on either side, both ways at once, and who may speak."""

from __future__ import annotations

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest

from enban.serial.bridge import MOST_DEBUGGERS
from enban.serial.peer import QUEUE_BYTES
from tests.serial.lines import KINDS, Client, bridge, ends_of, open_files, until

PAIRS = [(guest, debugger) for guest in KINDS for debugger in KINDS]


@pytest.fixture
def client() -> Iterator[Callable[[str], Client]]:
    made: list[Client] = []

    def make(text: str) -> Client:
        made.append(Client(text))
        return made[-1]

    yield make
    for one in made:
        one.close()


def both_ways(a: Client, b: Client, size: int, seed: int) -> None:
    """Random bytes in random pieces, in both directions at once."""
    chance = random.Random(seed)
    down, up = chance.randbytes(size), chance.randbytes(size)
    got: dict[str, bytes] = {}
    failures: list[BaseException] = []

    def work(call: Callable[[], None]) -> threading.Thread:
        def guarded() -> None:
            try:
                call()
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=guarded, daemon=True)
        thread.start()
        return thread

    def receive(name: str, who: Client) -> None:
        got[name] = who.receive(size)

    threads = [
        work(lambda: a.send(down, chance.randint(1, 9000))),
        work(lambda: b.send(up, chance.randint(1, 9000))),
        work(lambda: receive("down", b)),
        work(lambda: receive("up", a)),
    ]
    for thread in threads:
        thread.join(30)
    assert not failures
    assert got["down"] == down
    assert got["up"] == up


@pytest.mark.parametrize(("guest", "debugger"), PAIRS, ids=lambda kind: str(kind))
def test_every_pair_carries_every_byte(
    guest: str, debugger: str, tmp_path: Path, client: Callable[[str], Client]
) -> None:
    before = open_files()
    inner, outer = ends_of(guest, tmp_path, "guest"), ends_of(debugger, tmp_path, "debugger")
    ends: list[Client] = []
    # A port has to be there before the bridge opens it; everything else may come later.
    for kind, names in ((guest, inner), (debugger, outer)):
        if kind == "tty":
            ends.append(client(names.client))
    with bridge(inner.bridge, outer.bridge) as running:
        a = ends.pop(0) if guest == "tty" else client(inner.client)
        b = ends.pop(0) if debugger == "tty" else client(outer.client)
        a.connect()
        b.connect()
        running.expect_guest()
        running.expect("is the active debugger")
        both_ways(a, b, 200_000, PAIRS.index((guest, debugger)))
        a.close()
        b.close()
    assert open_files() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_debuggers_come_and_go(kind: str, tmp_path: Path, client: Callable[[str], Client]) -> None:
    """The guest's link stays; what it says while nobody is there is gone, nothing of it comes later."""
    names = ends_of(kind, tmp_path, "debugger")
    guest = client(f"unix:{tmp_path / 'guest'},listen")
    first = client(names.client) if kind == "tty" else None
    with bridge(f"unix:{tmp_path / 'guest'}", names.bridge) as running:
        guest.connect()
        for turn in range(3):
            debugger = (first if turn == 0 and first else client(names.client)).connect()
            running.expect("is the active", turn + 1)
            both_ways(guest, debugger, 20_000, turn)
            debugger.close()
            running.expect("is gone", turn + 1)
            guest.send(b"nobody hears this")
            until(lambda: running.bridge.counters.bytes[0] % 20_000 != 0, "drained")
            sleep(0.05)
        assert not any("guest" in line and "is gone" in line for line in running.log)


@pytest.mark.parametrize("kind", KINDS)
def test_the_guest_may_be_started_again(kind: str, tmp_path: Path, client: Callable[[str], Client]) -> None:
    names = ends_of(kind, tmp_path, "guest")
    debugger = client(f"unix:{tmp_path / 'debugger'}")
    first = client(names.client) if kind == "tty" else None
    with bridge(names.bridge, f"unix:{tmp_path / 'debugger'},listen") as running:
        debugger.connect()
        running.expect("is the active debugger")
        for turn in range(3):
            guest = (first if turn == 0 and first else client(names.client)).connect()
            running.expect_guest(turn + 1)
            both_ways(guest, debugger, 20_000, turn)
            guest.close()
            running.expect("is gone", turn + 1)
            # As the line of a computer that is switched off.
            debugger.send(b"lost")
            running.expect("the guest is not there")


def test_bytes_sent_before_leaving_arrive(tmp_path: Path, client: Callable[[str], Client]) -> None:
    """Also those that were queued when their sender left, on either side."""
    data = random.Random(5).randbytes(150_000)
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        debugger.send(data)
        debugger.close()
        assert guest.receive(len(data)) == data
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active", 2)
        guest.send(data)
        guest.close()
        assert debugger.receive(len(data)) == data


def test_a_slow_reader_loses_nothing_and_holds_the_sender_back(
    tmp_path: Path, client: Callable[[str], Client]
) -> None:
    data = random.Random(6).randbytes(4 << 20)
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        sender = threading.Thread(target=guest.send, args=(data,), daemon=True)
        sender.start()
        sleep(0.3)
        assert sender.is_alive()
        assert running.bridge.counters.bytes[0] <= QUEUE_BYTES + (1 << 20)
        assert debugger.receive(len(data), pause_s=0.001) == data
        sender.join(5)
        # The other way nothing is ever lost: a guest that does not read just keeps its debugger waiting.
        sender = threading.Thread(target=debugger.send, args=(data,), daemon=True)
        sender.start()
        sleep(1.3)
        assert sender.is_alive()
        assert guest.receive(len(data)) == data
    assert not running.logged("loses bytes")


def test_a_debugger_that_takes_nothing_does_not_hold_the_guest_for_ever(
    tmp_path: Path, client: Callable[[str], Client]
) -> None:
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen", stall_s=0.2) as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        guest.send(bytes(4 << 20))
        until(lambda: running.bridge.counters.bytes[0] == 4 << 20, "the guest was drained")
        running.expect("takes nothing")
        running.expect("loses bytes")
        # Once it reads again it is heard and held back for again; what it gets is in order.
        while debugger.rest(0.2):
            pass
        both_ways(guest, debugger, 500_000, 7)


def test_watchers_see_the_guest_and_are_not_heard(tmp_path: Path, client: Callable[[str], Client]) -> None:
    data = random.Random(8).randbytes(100_000)
    record = tmp_path / "record"
    with bridge(
        f"unix:{tmp_path / 'g'},listen",
        f"unix:{tmp_path / 'd'},listen",
        f"unix:{tmp_path / 'w'},listen,watch",
        f"file:{record}",
    ) as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        watcher = client(f"unix:{tmp_path / 'w'}").connect()
        first = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        second = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is connected", 5)
        first.send(b"first")
        assert guest.receive(5) == b"first"
        second.send(b"second")
        watcher.send(b"watcher")
        running.expect("only watches", 2)
        guest.send(data)
        for one in (first, second, watcher):
            assert one.receive(len(data)) == data
        assert guest.rest() == b""
        # The active one leaves, the next is heard.
        first.close()
        running.expect("is the active", 2)
        second.send(b"again")
        assert guest.receive(5) == b"again"
        status = running.bridge.status()
        assert "active" in status and "watching" in status and "7 not passed on" in status
    assert record.read_bytes() == data


def test_who_is_silent_gives_way_to_who_speaks(tmp_path: Path, client: Callable[[str], Client]) -> None:
    """A program that only looks may have come first."""
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        speaker = client(f"unix:{tmp_path / 'd'}").connect()
        speaker.send(b"hello")
        assert guest.receive(5) == b"hello"


def test_a_cable_gives_way_after_a_long_silence(
    tmp_path: Path, client: Callable[[str], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody can tell whether a debugger is still at its end."""
    monkeypatch.setattr("enban.serial.bridge.SILENT_S", 0.5)
    cable = client(f"pty:{tmp_path / 'tty'}")
    with bridge(
        f"unix:{tmp_path / 'g'},listen", f"tty:{tmp_path / 'tty'}", f"unix:{tmp_path / 'd'},listen"
    ) as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        running.expect_guest()
        cable.connect().send(b"cable")
        assert guest.receive(5) == b"cable"
        other = client(f"unix:{tmp_path / 'd'}").connect()
        other.send(b"too early")
        running.expect("only watches")
        sleep(0.6)
        other.send(b"other")
        assert guest.receive(5) == b"other"
        sleep(0.6)
        cable.send(b"not now")  # who is at a socket is there until it leaves
        running.expect("only watches", 2)


def test_a_watcher_that_does_not_read_slows_nobody(tmp_path: Path, client: Callable[[str], Client]) -> None:
    with bridge(
        f"unix:{tmp_path / 'g'},listen",
        f"unix:{tmp_path / 'd'},listen",
        f"unix:{tmp_path / 'w'},listen,watch",
    ) as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        client(f"unix:{tmp_path / 'w'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        both_ways(guest, debugger, 2 << 20, 9)
        running.expect("is too slow")


def test_only_so_many_debuggers(tmp_path: Path, client: Callable[[str], Client]) -> None:
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        here = [client(f"unix:{tmp_path / 'd'}").connect() for _ in range(MOST_DEBUGGERS + 1)]
        running.expect("is connected", MOST_DEBUGGERS)
        here[0].close()
        running.expect("is connected", MOST_DEBUGGERS + 1)


def test_the_second_guest_waits(tmp_path: Path, client: Callable[[str], Client]) -> None:
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        first = client(f"unix:{tmp_path / 'g'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        second = client(f"unix:{tmp_path / 'g'}").connect()
        second.send(b"second")
        first.send(b"first.")
        assert debugger.receive(6) == b"first."
        assert debugger.rest() == b""
        first.close()
        assert debugger.receive(6) == b"second"


def test_tcp_links_never_wait(tmp_path: Path, client: Callable[[str], Client]) -> None:
    """Two small packets one way while the other side is silent: Nagle would hold the second for 40 ms."""
    inner, outer = ends_of("tcp-listen", tmp_path, "g"), ends_of("tcp-connect", tmp_path, "d")
    with bridge(inner.bridge, outer.bridge) as running:
        guest, debugger = client(inner.client).connect(), client(outer.client).connect()
        running.expect("is the active debugger")
        taken = []
        for _ in range(50):
            started = monotonic()
            debugger.send(b"a")
            debugger.send(b"b")
            assert guest.receive(2) == b"ab"
            guest.send(b"c")
            assert debugger.receive(1) == b"c"
            taken.append(monotonic() - started)
        # With Nagle all but the very first take 40 ms; without, only those for which the machine has no time.
        assert sorted(taken)[len(taken) // 4] < 0.03


def test_without_descriptors_it_goes_on(
    tmp_path: Path, client: Callable[[str], Client], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that has no more of them for a while: the line that is up stays up, others come later."""
    real, spent, met = socket.socket, [True], threading.Event()

    class Spent(socket.socket):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            if spent[0] and threading.current_thread() is not threading.main_thread():
                met.set()
                raise OSError(errno.EMFILE, "Too many open files")
            super().__init__(*arguments, **options)

    with bridge(
        f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'}", f"unix:{tmp_path / 'e'}"
    ) as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'},listen").connect()
        running.expect("is the active debugger")
        monkeypatch.setattr("enban.serial.transports.sockets.socket.socket", Spent)
        assert met.wait(10)
        both_ways(guest, debugger, 10_000, 3)
        spent[0] = False
        monkeypatch.setattr("enban.serial.transports.sockets.socket.socket", real)
        client(f"unix:{tmp_path / 'e'},listen").connect()
        running.expect("debugger: ", 2)


class Spy:
    def __init__(self) -> None:
        self.bytes = [b"", b""]
        self.events: list[str] = []

    def opened(self, side: int, when_ns: int) -> None:
        self.events.append(f"opened {side}")

    def closed(self, side: int, when_ns: int) -> None:
        self.events.append(f"closed {side}")

    def saw(self, side: int, data: bytes, when_ns: int) -> None:
        self.bytes[side] += data

    def injected(self, side: int, data: bytes, why: str, when_ns: int) -> None:
        self.events.append(f"injected {data!r}")

    def tick(self, when_ns: int) -> None:
        pass


class Broken(Spy):
    def saw(self, side: int, data: bytes, when_ns: int) -> None:
        raise ValueError("no good")


def test_observers_see_what_went_through(tmp_path: Path, client: Callable[[str], Client]) -> None:
    spy = Spy()
    with bridge(
        f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen", observers=[Broken(), spy]
    ) as running:
        guest = client(f"unix:{tmp_path / 'g'}").connect()
        debugger = client(f"unix:{tmp_path / 'd'}").connect()
        running.expect("is the active debugger")
        guest.send(b"from the guest")
        assert debugger.receive(14) == b"from the guest"
        debugger.send(b"back")
        assert guest.receive(4) == b"back"
        debugger.close()
        running.expect("is gone")
    assert spy.bytes == [b"from the guest", b"back"]
    assert spy.events == ["opened 0", "opened 1", "closed 1"]
    assert running.logged("Broken failed and sees no more: no good")
