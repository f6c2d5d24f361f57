"""The doctor's verdicts: each cause is named, a healed one is no fault, and a clean session has none."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enban.serial.doctor import DEBUGGER, RUNNING, STOPPED, TARGET, Doctor
from enban.serial.injection import Injector
from enban.serial.tracking import MS, SECOND
from enban.wire.kd import constants as k
from enban.wire.kd import messages as m
from enban.wire.kd.parser import control_packet, data_packet
from tests.serial.kd_session import EXCEPTION, Session
from tests.wire.kd_helpers import packets

RESET = control_packet(k.RESET, 0)


# -- no fault where there is none --------------------------------------------------------------


def test_a_clean_session_is_healthy() -> None:
    session = Session()
    session.clean()
    assert session.names() == ["healthy"]
    assert session.doctor.state == RUNNING
    assert session.doctor.requests == 11
    (verdict,) = session.doctor.verdicts()
    assert "11 requests" in verdict.words()
    assert "the guest is running" in verdict.words()


def test_a_long_pause_is_no_fault() -> None:
    """A guest that runs undisturbed says nothing for hours; a person at the prompt thinks."""
    session = Session()
    session.clean()
    assert session.names(3_600_000) == ["healthy"]
    session.stop()
    session.ask()
    assert session.names(3_600_000) == ["healthy", "guest-stopped"]
    assert session.doctor.state == STOPPED


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_a_clean_session_in_small_pieces_is_healthy(chunk: int) -> None:
    session = Session()
    session.chunk, session.chunk_ns = chunk, 3_000  # 3 us a piece: far faster than any line
    session.clean(40)
    assert session.names() == ["healthy"]


def test_load_symbols_and_prompts_are_part_of_a_clean_session() -> None:
    session = Session()
    for name in ("ntoskrnl.exe", "hal.dll"):
        session.data(TARGET, k.STATE_CHANGE64, m.load_symbols64(name, base=0x1000))
        session.go()
        assert session.doctor.state == RUNNING
    prompt = m.prompt_string(b"Break repeatedly, break Once, Ignore? ", 4)
    session.data(TARGET, k.DEBUG_IO, prompt)
    assert session.doctor.state == STOPPED
    session.wait(20_000)
    session.data(DEBUGGER, k.DEBUG_IO, m.prompt_string(b"", 1) + b"i")
    assert session.doctor.state == RUNNING
    assert session.names() == ["healthy"]


def test_a_clean_detach_is_no_fault() -> None:
    session = Session()
    session.clean()
    session.close(DEBUGGER)
    assert session.faults(10_000) == []
    assert "peer-gone" in session.names()


def test_a_fresh_line_is_waited_for() -> None:
    assert Session().names(1000) == ["waiting"]


def test_a_session_with_load_before_any_packet_is_not_accused() -> None:
    """The firmware prints on the same port before Windows starts to debug."""
    session = Session()
    session.raw(TARGET, b"SeaBIOS (version 1.16.2)\r\nBooting from Hard Disk...\r\n")
    session.wait(3000)
    session.clean()
    assert session.faults() == []
    assert "healed" in session.names()


# -- the line ----------------------------------------------------------------------------------


def test_no_bytes() -> None:
    session = Session()
    session.raw(DEBUGGER, b"b")
    assert session.faults(2000) == []
    session.raw(DEBUGGER, RESET)
    assert session.faults(4000) == ["no-bytes"]
    (verdict,) = [v for v in session.doctor.verdicts() if v.grade == "fault"]
    assert "1 break-ins, 1 RESETs" in verdict.words()


@pytest.mark.parametrize(
    ("data", "words"),
    [(bytes(range(128, 255)), "baud rates"), (b"Welcome to GRUB!\r\n" * 8, "console")],
    ids=["baud", "console"],
)
def test_bytes_but_no_packets(data: bytes, words: str) -> None:
    session = Session()
    session.raw(TARGET, data)
    assert session.faults(3000) == ["no-packets"]
    assert words in session.doctor.verdicts()[0].advice
    session.clean()
    assert session.faults() == []


def test_an_echo() -> None:
    session = Session()
    for _ in range(3):
        session.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=False)
        session.raw(DEBUGGER, data_packet(k.STATE_CHANGE64, session.ids[TARGET], EXCEPTION))
        session.wait(1000)
    assert session.faults() == ["echo"]


def test_swapped_sides() -> None:
    session = Session()
    session.data(DEBUGGER, k.STATE_CHANGE64, EXCEPTION)
    assert session.faults() == ["sides-swapped"]


def damage(session: Session, payload: bytes) -> bytes:
    bad = bytearray(data_packet(k.MANIPULATE, session.ids[TARGET], payload))
    bad[30] ^= 1
    return bytes(bad)


def test_one_damaged_packet_is_a_note_once_it_was_sent_again() -> None:
    session = Session()
    session.stop()
    session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_VERSION))
    answer = m.manipulate(k.GET_VERSION)
    session.raw(TARGET, damage(session, answer))
    session.raw(DEBUGGER, control_packet(k.RESEND))
    session.data(TARGET, k.MANIPULATE, answer)
    session.clean(20)
    assert session.faults() == []
    (note,) = [v for v in session.doctor.verdicts() if v.name == "damaged"]
    assert "checksum" in note.words()
    assert note.places == [(TARGET, 257 + 16)]


def test_damage_that_goes_on_is_a_fault() -> None:
    session = Session()
    session.stop()
    answer = m.manipulate(k.GET_VERSION)
    for _ in range(4):
        session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_VERSION))
        session.raw(TARGET, damage(session, answer))
        session.raw(DEBUGGER, control_packet(k.RESEND))
        session.data(TARGET, k.MANIPULATE, answer)
    assert session.faults() == ["damaged"]


def test_a_packet_cut_short_with_nothing_after_it_is_a_fault() -> None:
    session = Session()
    session.clean()
    session.raw(TARGET, data_packet(k.STATE_CHANGE64, session.ids[TARGET], EXCEPTION)[:100])
    assert session.faults(1000) == []
    assert session.faults(1500) == []  # told as broken now; there is still time to send it again
    assert session.faults(4000) == ["damaged"]
    assert "cut off" in session.doctor.verdicts()[0].words()


def test_a_guest_that_is_left_alone_may_be_silent() -> None:
    assert Session().names(60_000) == ["no-bytes"]
    assert Session().faults(60_000) == []


# -- ACKs and ids ------------------------------------------------------------------------------


def test_a_packet_that_nobody_acknowledges() -> None:
    session = Session()
    for _ in range(5):
        session.data(TARGET, k.STATE_CHANGE64, m.load_symbols64("nt.exe"), acked=False)
        session.wait(1000)
    assert session.faults() == ["unacknowledged"]
    assert "sent 5 times" in session.doctor.verdicts()[0].words()


def test_the_debugger_is_silent_after_an_exception() -> None:
    session = Session()
    session.clean()
    for _ in range(4):
        session.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=False)
        session.wait(1000)
    assert session.faults() == ["frozen-exception"]
    verdict = session.doctor.verdicts()[0]
    assert "frozen, by design" in verdict.summary
    assert verdict.places == [(TARGET, session.doctor.target.bytes - 4 * 257)]
    session.ack(TARGET)  # the debugger comes at last
    session.ask()
    session.go()
    assert session.faults() == []
    assert any("waited 4.0 s" in line for line in session.doctor.verdicts()[-1].evidence)


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (k.STATE_CHANGE32, m.exception32(code=k.STATUS_BREAKPOINT, pc=0x80401000)),
        (k.DEBUG_IO, m.prompt_string(b"Break or ignore? ", 2)),
    ],
    ids=["32 bits", "prompt"],
)
def test_what_else_freezes_a_guest(kind: int, payload: bytes) -> None:
    session = Session()
    for _ in range(4):
        session.data(TARGET, kind, payload, acked=False)
        session.wait(1000)
    assert session.faults() == ["frozen-exception"]
    session.ack(TARGET)
    assert session.faults() == []


def test_a_debugger_that_dies_at_an_exception_leaves_the_guest_frozen() -> None:
    session = Session()
    session.clean()
    session.stop()
    session.ask()
    session.close(DEBUGGER)
    assert session.faults(1000) == ["peer-gone"]
    assert sorted(session.faults(4000)) == ["frozen-exception", "peer-gone"]
    session.doctor.opened(DEBUGGER, session.now_ns)
    assert session.faults(1000) == ["frozen-exception"]


def test_a_second_debugger_at_the_prompt_may_think() -> None:
    """The first one died; the next has the guest report again, looks around, and its user goes for lunch."""
    session = Session()
    session.stop()
    session.ask()
    session.close(DEBUGGER)
    session.wait(5000)
    session.doctor.opened(DEBUGGER, session.now_ns)
    session.raw(DEBUGGER, RESET)
    session.raw(TARGET, RESET)
    session.ids = [k.INITIAL_ID, k.INITIAL_ID]
    session.stop()
    session.ask()
    assert session.faults(3_600_000) == []
    session.go()
    assert session.faults(60_000) == []


def test_a_debugger_that_takes_an_exception_and_asks_nothing() -> None:
    session = Session()
    session.stop()
    assert session.faults(9000) == []
    assert session.faults(2000) == ["frozen-exception"]


def test_sync_kept_in_the_ack() -> None:
    session = Session()
    for _ in range(3):
        session.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=False)
        session.raw(DEBUGGER, control_packet(k.ACK, session.ids[TARGET]))
        session.wait(1000)
    assert session.faults() == ["wrong-id"]
    assert "still carry SYNC" in session.doctor.verdicts()[0].words()


def test_acks_for_another_packet() -> None:
    session = Session()
    for _ in range(5):
        session.data(TARGET, k.STATE_CHANGE64, EXCEPTION, acked=False)
        session.raw(DEBUGGER, control_packet(k.ACK, k.INITIAL_ID ^ 1))
        session.wait(1000)
    assert session.faults() == ["wrong-id"]


def test_a_debugger_that_goes_on_with_its_old_id() -> None:
    """The guest gave up and began anew; it acknowledges what comes with the old id, and drops it."""
    session = Session()
    session.stop()
    session.ask()
    session.ids[TARGET] = k.INITIAL_ID | k.SYNC
    session.stop()
    session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_CONTEXT), id=k.INITIAL_ID ^ 1)
    assert session.faults() == []
    assert session.faults(3000) == ["wrong-id"]
    assert f"{k.INITIAL_ID ^ 1:#x} where {k.INITIAL_ID:#x} is due" in session.doctor.verdicts()[0].words()


def test_acks_that_get_lost_behind_us() -> None:
    session = Session()
    session.clean()
    session.data(TARGET, k.STATE_CHANGE64, EXCEPTION)
    sent = session.ids[TARGET] ^ 1
    for _ in range(3):
        session.wait(1000)
        session.raw(TARGET, data_packet(k.STATE_CHANGE64, sent, EXCEPTION))
        session.raw(DEBUGGER, control_packet(k.ACK, sent))
    assert session.faults() == ["acks-lost"]


def test_a_single_lost_ack_heals() -> None:
    session = Session()
    session.stop()
    session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_VERSION))
    answer = m.manipulate(k.GET_VERSION)
    session.data(TARGET, k.MANIPULATE, answer)
    session.wait(1000)
    session.raw(TARGET, data_packet(k.MANIPULATE, session.ids[TARGET] ^ 1, answer))
    session.raw(DEBUGGER, control_packet(k.ACK, session.ids[TARGET] ^ 1))
    session.ask()
    assert session.faults() == []
    assert "1 packets again" in session.doctor.verdicts()[-1].words()


def test_a_retransmission_storm() -> None:
    """A relay holds packets back for longer than the guest waits."""
    session = Session()
    session.stop()
    for number in range(6):
        session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.READ_VIRTUAL))
        for _ in range(3):
            session.data(TARGET, k.MANIPULATE, m.manipulate(k.READ_VIRTUAL, bytes(500 + number)), acked=False)
            session.wait(1000)
        session.ack(TARGET)
    assert session.faults() == ["retransmission-storm"]
    assert "are repetitions" in session.doctor.verdicts()[0].words()


def test_reset_ping_pong() -> None:
    session = Session()
    session.stop()
    for _ in range(5):
        session.raw(DEBUGGER, RESET)
        session.raw(TARGET, RESET)
        session.raw(TARGET, data_packet(k.STATE_CHANGE64, k.INITIAL_ID, EXCEPTION))
        session.raw(DEBUGGER, control_packet(k.ACK, k.INITIAL_ID))
    assert session.faults() == ["reset-ping-pong"]
    session.ids = [k.INITIAL_ID ^ 1, k.INITIAL_ID]
    session.ask()
    assert session.faults() == []


def test_a_debugger_that_knocks_is_no_ping_pong() -> None:
    """ntoseye: a RESET every four seconds until somebody answers; each is answered once."""
    session = Session()
    for _ in range(5):
        session.raw(DEBUGGER, b"b")
        session.raw(DEBUGGER, RESET)
        session.raw(TARGET, RESET)
        session.wait(4000)
    assert "reset-ping-pong" not in session.names()


# -- requests and break-ins --------------------------------------------------------------------


def test_a_break_in_that_is_ignored() -> None:
    session = Session()
    session.clean()
    session.raw(DEBUGGER, b"b")
    assert session.faults(2000) == []
    session.raw(DEBUGGER, b"b")
    assert session.faults(2000) == ["break-in-ignored"]
    assert "2 break-ins" in session.doctor.verdicts()[0].words()
    session.stop()
    session.ask()
    assert session.faults() == []


def test_requests_that_nobody_acknowledges() -> None:
    session = Session()
    session.stop()
    for _ in range(4):
        session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_VERSION), acked=False)
        session.wait(1000)
    assert session.faults() == ["no-answer"]


def test_a_request_that_is_acknowledged_and_not_answered() -> None:
    session = Session()
    session.stop()
    session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_VERSION))
    assert session.faults(4000) == []
    assert session.faults(2000) == ["no-answer"]
    assert "GetVersion" in session.doctor.verdicts()[0].words()


def test_the_guest_goes_away_in_the_middle() -> None:
    session = Session()
    session.stop()
    session.data(DEBUGGER, k.MANIPULATE, m.manipulate(k.GET_VERSION))
    session.close(TARGET)
    assert session.faults() == ["peer-gone"]
    assert "unanswered: GetVersion" in session.doctor.verdicts()[0].words()
    assert session.faults(20_000) == ["peer-gone"]


def test_the_guest_ends_after_a_clean_session() -> None:
    session = Session()
    session.clean()
    session.close(TARGET)
    assert session.faults(10_000) == []


# -- slow --------------------------------------------------------------------------------------


def test_nagle() -> None:
    """The ACK goes at once, the answer waits for TCP's delayed ACK, whatever its size."""
    session = Session()
    session.stop()
    for number in range(20):
        session.ask(answer=bytes(100 * number), delay_ms=40 + number % 3)
    assert session.faults() == ["nagle"]


def test_a_115200_line() -> None:
    session = Session()
    session.chunk, session.chunk_ns = 16, 16 * 10 * SECOND // 115200
    session.stop()
    for number in range(20):
        session.ask(answer=bytes(40 * number))
    assert session.faults() == ["line-rate"]
    assert "115200 baud" in session.doctor.verdicts()[0].words()


def test_a_guest_that_thinks_is_not_nagle() -> None:
    session = Session()
    session.stop()
    for number in range(20):
        session.ask(answer=bytes(100 * number), delay_ms=10 + 7 * number)
    assert session.faults() == []


# -- remedies ----------------------------------------------------------------------------------


def test_remedies_are_off_by_default() -> None:
    session = Session()
    session.stop()
    injector = Injector(session.doctor)
    for _ in range(100):
        session.wait(1000)
        assert injector.due(session.now_ns) == []


def test_a_reset_for_a_frozen_guest() -> None:
    session = Session()
    injector = Injector(session.doctor, reset=True)
    session.clean()
    session.stop()
    session.ask()
    session.close(DEBUGGER)
    session.wait(10_000)
    assert injector.due(session.now_ns) == []  # nobody is there who would take the exception
    session.doctor.opened(DEBUGGER, session.now_ns)
    session.wait(1000)
    (injection,) = injector.due(session.now_ns)
    assert (injection.side, injection.data) == (TARGET, control_packet(k.RESET, k.INITIAL_ID))
    session.doctor.injected(injection.side, injection.data, injection.why, session.now_ns)
    assert injector.due(session.now_ns + 1) == []
    # The guest answers and reports the exception again; the debugger answers the RESET it did not ask for.
    session.raw(TARGET, control_packet(k.RESET))
    answer = control_packet(k.RESET, k.INITIAL_ID)
    ack = control_packet(k.ACK, k.INITIAL_ID)
    assert injector.passed(TARGET, RESET, session.now_ns) == RESET
    assert injector.passed(DEBUGGER, answer[:5], session.now_ns) == b""
    assert injector.passed(DEBUGGER, answer[5:] + ack, session.now_ns) == ack
    assert injector.passed(DEBUGGER, answer, session.now_ns) == answer  # one, and no more
    session.ids = [k.INITIAL_ID, k.INITIAL_ID]
    session.stop()
    session.ask()
    session.go()
    assert session.faults(1000) == []
    assert "injected: RESET to the target" in session.doctor.verdicts()[-1].words()


def test_a_break_in_is_repeated() -> None:
    session = Session()
    session.clean()
    injector = Injector(session.doctor, break_in=True)
    session.raw(DEBUGGER, b"b")
    session.wait(1000)
    assert injector.due(session.now_ns) == []
    session.wait(3000)
    (injection,) = injector.due(session.now_ns)
    assert (injection.side, injection.data) == (TARGET, b"b")


@given(st.lists(st.binary(max_size=40) | st.just(RESET), max_size=8), st.integers(0, 200))
def test_only_one_reset_is_ever_left_out(pieces: list[bytes], cut: int) -> None:
    injector = Injector(Doctor(), reset=True)
    injector._swallow_until_ns = SECOND
    stream = b"".join(pieces)
    got = injector.passed(DEBUGGER, stream[:cut], 5) + injector.passed(DEBUGGER, stream[cut:], 6)
    got += injector.released(2 * SECOND)
    at = stream.find(b"i" * 4 + b"\x06\0\0\0")
    whole = at >= 0 and len(stream) - at >= 16
    assert got == (stream[:at] + stream[at + 16 :] if whole else stream)


# -- any bytes ---------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.sampled_from([TARGET, DEBUGGER]),
            packets() | st.binary(max_size=30) | st.just(b"b"),
            st.integers(0, 4000),
            st.integers(0, 9),
        ),
        max_size=30,
    )
)
def test_any_session_gets_some_verdict(steps: list[tuple[int, bytes, int, int]]) -> None:
    doctor = Doctor()
    injector = Injector(doctor, break_in=True, reset=True)
    now_ns = 0
    for side, data, ms, other in steps:
        now_ns += ms * MS
        if other == 0:
            doctor.closed(side, now_ns)
        elif other == 1:
            doctor.opened(side, now_ns)
        doctor.saw(side, data, now_ns)
        for injection in injector.due(now_ns):
            doctor.injected(injection.side, injection.data, injection.why, now_ns)
    for wait in (0, 2, 20):
        for verdict in doctor.verdicts(now_ns + wait * SECOND):
            assert verdict.words()
            assert verdict.as_dict()["name"] == verdict.name
    assert doctor.verdicts()


def test_memory_does_not_grow_with_a_session() -> None:
    session = Session()
    session.stop()

    def rounds(count: int) -> None:
        for number in range(count):
            session.ask(answer=bytes(number % 500))
            session.raw(TARGET, b"noise" * 9)
            session.raw(TARGET, data_packet(k.MANIPULATE, session.ids[TARGET], bytes(60))[:-3])
            session.raw(DEBUGGER, control_packet(k.RESEND))
            session.raw(DEBUGGER, RESET)
            session.ids = [k.INITIAL_ID, k.INITIAL_ID]
            session.doctor.verdicts()

    rounds(100)
    tracemalloc.start()
    try:
        rounds(50)
        before = tracemalloc.get_traced_memory()[0]
        rounds(400)
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < 20_000, grown
