"""A signal may arrive at any step; the engine is left whole and the clean-up runs."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from tests.cli.command import environment

# A main thread that spends nearly all its time between taking a lock of the engine and giving it back.
PROGRAM = textwrap.dedent("""
    import os, sys
    from enban.block.locks import Mutex
    from enban.block.runtime import BLOCKING, drive, interruptible
    from enban.cli import signals

    mutex = Mutex(BLOCKING)

    @interruptible
    def host_call():
        sum(range(30))

    async def step():
        async with mutex:
            for _ in range(300):
                for _ in range(10):
                    sum(range(300))
                host_call()

    signals.catch()
    try:
        os.write(1, b"ready")
        while True:
            drive(step())
    except KeyboardInterrupt as error:
        print(type(error).__name__, "held" if mutex.held else "free")
        print("second", drive(mutex.__aenter__()))
    """)


def end_of(running: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """What it has printed when it ends, which must be soon."""
    try:
        return running.communicate(timeout=60)
    finally:
        running.kill()


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (signal.SIGINT, "KeyboardInterrupt"),
        (signal.SIGTERM, "Terminated"),
        (signal.SIGHUP, "Terminated"),
    ],
)
def test_no_lock_is_left_behind(number: int, name: str) -> None:
    for _ in range(8):
        with subprocess.Popen(
            [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
        ) as running:
            assert running.stdout is not None
            assert running.stdout.read(5) == b"ready"
            running.send_signal(number)
            out, err = end_of(running)
        assert (out.decode(), err) == (f"{name} free\nsecond None\n", b"")


def test_an_engine_that_never_waits_is_interrupted_all_the_same() -> None:
    program = PROGRAM.replace("            host_call()\n", "").replace("range(300):", "range(10**12):", 1)
    program = program.replace("signals.catch()", "signals._PATIENCE = 0.2\nsignals.catch()")
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment()
    ) as running:
        assert running.stdout is not None
        assert running.stdout.read(5) == b"ready"
        running.send_signal(signal.SIGTERM)
        out, err = end_of(running)
    assert out.decode().startswith("Terminated "), err


def test_an_ignored_signal_stays_ignored() -> None:
    program = (
        "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
        "from enban.cli import signals; signals.catch()\n"
        "print(signal.getsignal(signal.SIGHUP).name, signal.getsignal(signal.SIGTERM) is signals._arrived)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout == "SIG_IGN True\n"
