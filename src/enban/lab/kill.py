"""Kill: a server process under load, killed -9 at random moments, over and over.

The load comes over NBD from several connections at once. After each kill the image is checked by
the independent reader, compared with what was acknowledged, read by the engine, and served again
as it is. Now and then its leaks are repaired, and it must be clean then. What a kill leaves is in
the page cache: promise 1 demands of it what was flushed, as after a power cut.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from time import monotonic, sleep

import enban
from enban.block.runtime import BLOCKING, drive
from enban.errors import EnbanError, UsageError
from enban.storage.nbd.client import NbdStorage, open_nbd

from .findings import Finding
from .history import CELL, History
from .images import KIB, Image, pattern
from .oracle import CORRUPT, ENGINE, FOREIGN, Violation
from .parts import Part

KINDS = (
    Image("kill-4k", 512 * KIB, cluster_size=4096),
    Image("kill-4k-chain", 512 * KIB, cluster_size=4096, backing=pattern(300 * KIB, 3)),
    Image("kill-v2", 512 * KIB, cluster_size=4096, compat="0.10"),
    Image("kill-ext", 1024 * KIB, cluster_size=16384, extended_l2=True),
    Image("kill-512", 256 * KIB, cluster_size=512),
    Image("kill-qcow", 256 * KIB, format="qcow", cluster_size=4096, l2_entries=64),
    Image("kill-raw", 256 * KIB, format="raw"),
)
THREADS = 3
KILLS_A_LIFE = 8  # of an image, before a new one is made
START_S = 20.0
OURS = [sys.executable, "-m", "enban", "serve", "-q", "-f", "{format}", "-k", "{socket}", "{image}"]


class Server:
    """A process that serves one image on a unix socket. command: with {socket}, {image} and perhaps
    {format} in it; "" is our own `serve`. Raises Violation if it does not come up."""

    def __init__(self, image: Path, socket: Path, format: str, command: str = "") -> None:
        socket.unlink(missing_ok=True)
        self.socket = socket
        self._said: str | None = None
        words = words_of(command, socket, image, format)
        # The server is to run the code that is being tested, wherever this process has it from.
        paths = [str(Path(enban.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        try:
            self.process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=environment,
            )
        except OSError as error:
            raise UsageError(f"the server cannot be started: {words[0]}: {error.strerror}") from None

    def connect(self) -> NbdStorage:
        """A client's storage, as soon as the server answers."""
        deadline = monotonic() + START_S
        while True:
            try:
                return open_nbd(
                    {
                        "driver": "nbd",
                        "server": {"type": "unix", "path": str(self.socket)},
                        "connections": str(THREADS),
                        "reconnect-delay": "0",
                    },
                    BLOCKING,
                    True,
                )
            except EnbanError as error:
                if self.process.poll() is not None or monotonic() > deadline:
                    raise Violation(
                        ENGINE, f"the server did not come up: {error}; it said: {self.said() or 'nothing'}"
                    ) from error
                sleep(0.005)

    def kill(self) -> str:
        """kill -9; what it had said on standard error."""
        self.process.send_signal(signal.SIGKILL)
        return self.said()

    def said(self) -> str:
        """What it said on standard error, once it has ended; it is killed if need be."""
        if self._said is None:
            if self.process.poll() is None:
                self.process.kill()
            _, words = self.process.communicate()
            self._said = words.decode(errors="replace").strip()
        return self._said


def words_of(command: str, socket: Path, image: Path, format: str) -> list[str]:
    """A server's command with the places filled in; "" is our own. Raises UsageError."""
    try:
        wanted = shlex.split(command) if command else OURS
        return [word.format(socket=socket, image=image, format=format) for word in wanted]
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise UsageError(
            f"the server's command cannot be read: {error}",
            hint="it may have {socket}, {image} and {format} in braces",
        ) from None


class Load:
    """Threads that send random requests until the connection is gone."""

    def __init__(self, storage: NbdStorage, history: History, seed: int) -> None:
        self.storage = storage
        self.history = history
        self.size = len(history.initial)
        self.flushes: list[tuple[int, int]] = []
        self.requests = 0
        self.wrong: list[str] = []
        self._threads = [
            threading.Thread(target=self._work, args=(Random(seed * 100 + number),), daemon=True)
            for number in range(THREADS)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(30)
            if thread.is_alive():
                raise Violation(ENGINE, "a client still waits for an answer of a server that is dead")

    def _work(self, random: Random) -> None:
        storage, history = self.storage, self.history
        while True:
            kind = random.choices(("write", "zero", "trim", "flush", "read"), (60, 12, 10, 6, 12))[0]
            length = random.choice((512, 512, 4096, 8192, 20480))
            offset = random.randrange((self.size - length) // 512) * 512
            event = None
            try:
                if kind == "flush":
                    began = history.now()
                    drive(storage.flush())
                    self.flushes.append((began, history.now()))
                elif kind == "read":
                    drive(storage.read(offset, length))
                else:
                    value = history.stamp() if kind == "write" else bytes(CELL)
                    event = history.begin(offset, length, value)
                    if kind == "write":
                        drive(storage.write(value * (length // CELL), offset))
                    elif kind == "zero":
                        drive(storage.write_zeroes(offset, length, unmap=random.random() < 0.5))
                    else:
                        drive(storage.discard(offset, length))
                    history.end(event, certain=kind != "trim")
                self.requests += 1
            except EnbanError:
                return  # the server is gone: what was under way may have happened


class KillPart(Part):
    """Each piece: serve, load, kill, check, compare. server: the command of another server to kill."""

    name = "kill"
    kinds: Sequence[Image] = KINDS

    def __init__(
        self,
        seed: int,
        only: str = "",
        tick: Callable[[], None] | None = None,
        *,
        server: str = "",
        least_s: float = 0.01,
    ) -> None:
        super().__init__(seed, only, tick)
        self.server = server
        self.least_s = least_s
        self._directory: Path | None = None
        self.serving: Server | None = None
        if server:
            self.kinds = [image for image in self.kinds if image.format != "qcow"]

    @property
    def directory(self) -> Path:
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="enban-kill-"))
        return self._directory

    def work(self, image: Image, seed: int) -> None:
        path = self.directory / "image"
        if image.backing:
            (self.directory / "below").write_bytes(image.backing)
        path.write_bytes(image.empty())
        initial = image.shown()
        for number in range(KILLS_A_LIFE):
            self.beat()
            initial = self._kill_once(image, seed * KILLS_A_LIFE + number, path, initial)
        if image.format == "qcow2":
            enban.check(path, repair="leaks", format="qcow2")
            report = image.view(path.read_bytes()).check()
            if not report.clean:
                raise Violation(CORRUPT, f"{image}, seed {seed}: repaired, and still: {report}")

    def _kill_once(self, image: Image, seed: int, path: Path, initial: bytes) -> bytes:
        random = Random(seed)
        server = self.serving = Server(path, self.directory / "socket", image.format, self.server)
        try:
            storage = self._connect(server)
            load = Load(storage, History(initial), seed)
            load.start()
            sleep(self.least_s + random.random() ** 2 * 0.25)
        finally:
            said = server.kill()
        load.join()
        now = load.history.now()
        self.count("kills")
        self.count("requests", load.requests)
        self.count("flushes", len(load.flushes))
        what = f"{image}, kill {seed}"
        if said and not self.server:
            raise Violation(ENGINE, f"{what}: the server said: {said}")
        return self._judge(image, path, load, now, what)

    def _connect(self, server: Server) -> NbdStorage:
        """A server of somebody else that has never come up was given to us wrongly: that is no finding."""
        try:
            return server.connect()
        except Violation as violation:
            if self.server and not self.counts.get("kills"):
                raise UsageError(str(violation), hint="try the command by hand") from None
            raise

    def _judge(self, image: Image, path: Path, load: Load, now: int, what: str) -> bytes:
        content = path.read_bytes()
        view = image.view(content)
        report = view.check()
        if report.corruptions:
            raise Violation(CORRUPT, f"{what}: {report.corruptions[:4]}", image=content)
        self.count("with leaks", bool(report.leaks))
        seen = view.read()
        flushed = max((began for began, _ in load.flushes), default=0)
        try:
            load.history.check_crash(seen, flushed, now, load.history.by_cell())
        except AssertionError as error:
            raise Violation(FOREIGN, f"{what}: {error}", image=content) from error
        with enban.open(path, format=image.format) as disk:
            if disk.pread(disk.size, 0) != seen:
                raise Violation(ENGINE, f"{what}: the engine reads something else", image=content)
        return seen

    def found(self, image: Image, seed: int, violation: Violation) -> Finding:
        server = f" --server {shlex.quote(self.server)}" if self.server else ""
        again = (
            f"enban torture kill --seed {seed} --only {image} --count 1{server} "
            "(moments differ from run to run)"
        )
        return Finding(self.name, image.name, seed, violation, again=again)

    def close(self) -> None:
        if self.serving is not None and self.serving.process.poll() is None:
            self.serving.kill()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)


def open_descriptors() -> int:
    """How many descriptors this process has open; -1 where that cannot be seen."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return -1
