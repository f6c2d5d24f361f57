"""Models of a slow line, and the bridge's quick eye for packets."""

from __future__ import annotations

import random
from pathlib import Path
from threading import Thread
from time import monotonic, sleep

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enban.serial.counters import DEBUGGER, TARGET, Counters
from enban.serial.frames import Framing, Latest
from enban.serial.pace import Pace
from enban.wire.kd import constants as k
from enban.wire.kd.parser import control_packet, data_packet
from tests.serial.lines import Client, bridge

# -- pace ----------------------------------------------------------------------------------------


def carry(pace: Pace, count: int, now: float, step_s: float) -> float:
    """When the last of so many bytes has passed, looked at every step_s."""
    pace.begin(now)
    while count:
        now += step_s
        passed = min(count, pace.room(now))
        pace.passed(passed, now)
        count -= passed
    pace.rest()
    return now


@pytest.mark.parametrize("baud", [300, 9600, 115200, 1_000_000])
@pytest.mark.parametrize("step_s", [0.0005, 0.004, 0.015])
def test_bytes_take_their_time(baud: int, step_s: float) -> None:
    pace = Pace(baud)
    count = max(10, baud // 20)
    took = carry(pace, count, 100.0, step_s) - 100.0
    assert count * 10 / baud <= took + 1e-6
    assert took <= count * 10 / baud + max(2 * step_s, 10 / baud)


def test_silence_earns_nothing() -> None:
    """After an hour of silence a byte takes as long as ever, and a late user does not get a burst."""
    pace = Pace(9600)
    carry(pace, 100, 0.0, 0.001)
    pace.begin(3600.0)
    assert pace.room(3600.0) == 0
    assert pace.room(3600.0 + 10 / 9600) == 1
    assert pace.room(3700.0) == pace.most <= 20


def test_a_paced_line_is_as_slow_as_a_cable_and_holds_its_source_back(tmp_path: Path) -> None:
    """No backlog: what the guest could send ahead of the line is what the kernel's buffers take, and the
    bridge holds next to nothing."""
    data = random.Random(1).randbytes(3000)
    paths = tmp_path / "g", tmp_path / "d"
    with bridge(f"fifo:{paths[0]}", f"unix:{paths[1]},listen,pace=115200") as running:
        guest = Client(f"fifo:{paths[0]},swap").connect()
        debugger = Client(f"unix:{paths[1]}").connect()
        running.expect("is the active debugger")
        running.expect_guest()
        started = monotonic()
        sender = Thread(target=guest.send, args=(data,), daemon=True)
        sender.start()
        assert debugger.receive(1500) == data[:1500]
        assert running.bridge.counters.bytes[0] - 1500 < 600
        assert debugger.receive(1500) == data[1500:]
        took = monotonic() - started
        assert took >= 3000 * 10 / 115200 * 0.95
        # The other way, too: eight bytes there and eight back are at least 16 byte times.
        started = monotonic()
        for _ in range(10):
            debugger.send(b"12345678")
            assert guest.receive(8) == b"12345678"
            guest.send(b"abcdefgh")
            assert debugger.receive(8) == b"abcdefgh"
        assert monotonic() - started >= 10 * 16 * 10 / 115200 * 0.95
        guest.close()
        debugger.close()


# -- frames --------------------------------------------------------------------------------------

PIECES = st.one_of(
    st.binary(max_size=30),
    st.sampled_from([b"0", b"00", b"000", b"0000", b"i", b"iii", b"iiii", b"b", b"0" * 40, b"i" * 40]),
    st.builds(control_packet, st.sampled_from(k.CONTROL_TYPES), st.just(k.INITIAL_ID)),
    st.builds(data_packet, st.sampled_from(k.DATA_TYPES), st.just(k.INITIAL_ID), st.binary(max_size=60)),
)


@settings(max_examples=300)
@given(st.lists(PIECES, max_size=12), st.randoms(use_true_random=False))
def test_any_bytes_give_the_same_frames_however_they_are_cut(
    pieces: list[bytes], chance: random.Random
) -> None:
    data = b"".join(pieces)
    whole, cut = Framing(), Framing()
    wanted = [(f.type, f.id, f.data) for f in whole.receive(data)]
    got, at = [], 0
    while at < len(data):
        step = chance.randint(1, 9)
        got += [(f.type, f.id, f.data) for f in cut.receive(data[at : at + step])]
        at += step
    assert got == wanted
    for framing in (cut, whole):
        assert data.endswith(framing.partial)
        assert len(framing.partial) <= k.MAX_PACKET


@given(
    st.lists(
        st.tuples(
            st.binary(max_size=20).map(lambda noise: noise.replace(b"0", b"-").replace(b"i", b"-")),
            st.builds(data_packet, st.sampled_from(k.DATA_TYPES), st.just(1), st.binary(max_size=99)),
        ),
        max_size=8,
    )
)
def test_packets_between_noise_are_found(parts: list[tuple[bytes, bytes]]) -> None:
    frames = Framing().receive(b"".join(noise + packet for noise, packet in parts))
    assert [frame.data for frame in frames] == [packet for _, packet in parts]


def test_long_runs_take_no_time() -> None:
    framing = Framing()
    started = monotonic()
    for _ in range(20):
        framing.receive(b"0" * 65536)
        framing.receive(b"i" * 65536)
    assert monotonic() - started < 2
    assert [f.type for f in framing.receive(control_packet(k.ACK))] == [k.ACK]


# -- who comes late ------------------------------------------------------------------------------

STOP = data_packet(k.STATE_CHANGE64, k.INITIAL_ID | k.SYNC, b"s" * 240)
NEXT = data_packet(k.MANIPULATE, k.INITIAL_ID ^ 1, b"n" * 56)


def test_the_newest_unacknowledged_packet_is_kept() -> None:
    latest = Latest()
    latest.from_target(b"text\r\n" + STOP)
    assert latest.for_latecomer() == STOP
    latest.from_debugger(control_packet(k.ACK, k.INITIAL_ID ^ 1))  # of another packet
    latest.from_target(control_packet(k.ACK, k.INITIAL_ID))
    assert latest.for_latecomer() == STOP
    latest.from_target(NEXT[:20])
    assert latest.for_latecomer() == STOP + NEXT[:20]
    latest.from_target(NEXT[20:])
    assert latest.for_latecomer() == NEXT
    latest.from_debugger(control_packet(k.ACK, k.INITIAL_ID ^ 1))
    assert latest.for_latecomer() == b""
    latest.from_target(STOP)
    latest.from_debugger(NEXT)  # data is an acknowledgment, too
    assert latest.for_latecomer() == b""
    latest.from_target(STOP)
    latest.clear()
    assert latest.for_latecomer() == b""


def test_a_late_debugger_gets_it(tmp_path: Path) -> None:
    with bridge(f"unix:{tmp_path / 'g'},listen", f"unix:{tmp_path / 'd'},listen") as running:
        guest = Client(f"unix:{tmp_path / 'g'}").connect()
        guest.send(b"booting\r\n" + STOP + STOP[:50])
        until_bytes = len(b"booting\r\n" + STOP) + 50
        while running.bridge.counters.bytes[TARGET] < until_bytes:
            sleep(0.002)
        debugger = Client(f"unix:{tmp_path / 'd'}").connect()
        assert debugger.receive(len(STOP) + 50) == STOP + STOP[:50]
        guest.send(STOP[50:])
        assert debugger.receive(len(STOP) - 50) == STOP[50:]
        debugger.send(control_packet(k.ACK, k.INITIAL_ID))
        assert guest.receive(16) == control_packet(k.ACK, k.INITIAL_ID)
        debugger.close()
        running.expect("is gone")
        # Acknowledged: the next one gets nothing that it did not ask for.
        debugger = Client(f"unix:{tmp_path / 'd'}").connect()
        assert debugger.rest() == b""
        debugger.close()
        assert running.logged("came late") == 1
        assert running.bridge.counters.packets == [2, 1]
        guest.close()


def test_counters() -> None:
    counters = Counters()
    counters.bytes[TARGET] = 1000
    counters.packet(DEBUGGER, True, 1_000_000)
    counters.packet(TARGET, False, 3_000_000)  # the ACK ends the trip
    counters.packet(TARGET, True, 9_000_000)
    counters.packet(DEBUGGER, False, 9_500_000)
    counters.packet(TARGET, True, 99_000_000)
    assert counters.packets == [3, 2]
    assert counters.round_trips == 1
    assert counters.round_trip_ms() == (2.0, 2.0)
    text = counters.rates()
    assert "round trip 2.00 ms (longest 2.00)" in text and "packets/s" in text
    assert counters.rates().startswith("guest 0 B/s 0 packets/s, debugger 0 B/s 0 packets/s")
