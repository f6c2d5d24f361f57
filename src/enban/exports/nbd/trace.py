"""Each request's life as a file for a trace viewer (Chrome's about:tracing, Perfetto).

Two kinds of lines are written (Trace Event Format, JSON array):

- on its own track, one bar a request from the moment its bytes were received until its reply
  was made ("b" and "e" events);
- on the track of the thread that served it, what happened in between, nested by time ("X"
  events): mapping, reserving and publishing space, waiting for a range lock (with its range),
  each storage call (with the file, the offset and the length), flushing.

Nothing of this exists while there is no trace: `watch` puts its wrappers on the one chain it is
given, and connections choose once, at their start, which way they go. With a trace every
request goes the long way, so its times are those of the engine, not of the short cuts.

The file is valid JSON when `close` was called; a viewer also takes it without the last bracket.
"""

from __future__ import annotations

import json
import os
import threading
from time import perf_counter_ns

from ...block.locks import RangeLocks
from ...errors import from_oserror
from ...wire.nbd.constants import COMMAND_NAMES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any

    from ...block.locks import HeldRange
    from ...block.node import Node
    from ...wire.nbd.messages import ParsedRequest

# What is recorded of a node and of a storage: method, whether it is a coroutine, words for it.
_NODE = (
    ("locate", False, "map"),
    ("lookup", False, "map"),
    ("locate_write", False, "map for overwriting"),
    ("claim", False, "reserve at once"),
    ("load", True, "load table"),
    ("reserve", True, "reserve"),
    ("publish", True, "publish"),
    ("abandon", True, "abandon"),
    ("zero", True, "zero by tables"),
    ("discard", True, "discard by tables"),
    ("flush", True, "flush tables"),
)
_STORAGE = (
    ("read_now", False, "read"),
    ("read_into", True, "read"),
    ("write_now", False, "write"),
    ("write", True, "write"),
    ("flush", True, "sync"),
    ("write_zeroes", True, "write zeroes"),
    ("discard", True, "discard"),
)
_FLUSH_AT = 512  # lines held before they are written


class Trace:
    """A trace being written to `path`. Thread-safe. Raises HostError if the file cannot be made."""

    def __init__(self, path: str) -> None:
        self._path = path
        try:
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise from_oserror(error, "create", path) from error
        self._file = os.fdopen(fd, "w", encoding="utf-8")
        self._pid = os.getpid()
        self._guard = threading.Lock()
        self._lines: list[str] = []
        self._number = 0
        self._zero_ns = perf_counter_ns()
        self._threads: set[int] = set()
        self._file.write("[\n")
        self._last = json.dumps(
            {"name": "process_name", "ph": "M", "pid": self._pid, "args": {"name": "enban serve"}}
        )

    # -- recording ---------------------------------------------------------------------------

    def _us(self, ns: int) -> float:
        return (ns - self._zero_ns) / 1000

    def _event(self, event: dict[str, Any]) -> None:
        thread = threading.get_ident() & 0xFFFFFFFF
        event["pid"], event["tid"] = self._pid, thread
        line = json.dumps(event)
        with self._guard:
            if self._file.closed:
                return
            if thread not in self._threads:
                self._threads.add(thread)
                name = {"name": threading.current_thread().name}
                self._append(
                    json.dumps(
                        {"name": "thread_name", "ph": "M", "pid": self._pid, "tid": thread, "args": name}
                    )
                )
            self._append(line)

    def _append(self, line: str) -> None:
        # A line is written when its successor is known, so that only the last has no comma.
        self._lines.append(self._last + ",\n")
        self._last = line
        if len(self._lines) >= _FLUSH_AT:
            self._write_out()

    def _write_out(self) -> None:
        lines, self._lines = self._lines, []
        try:
            self._file.writelines(lines)
        except OSError as error:
            self._file.close()
            raise from_oserror(error, "write the trace", self._path) from error

    def span(self, name: str, kind: str, start_ns: int, facts: dict[str, Any]) -> None:
        """Something that this thread did from `start_ns` until now."""
        now = perf_counter_ns()
        self._event(
            {
                "name": name,
                "cat": kind,
                "ph": "X",
                "ts": self._us(start_ns),
                "dur": (now - start_ns) / 1000,
                "args": facts,
            }
        )

    def request(self, request: ParsedRequest, received_ns: int) -> Life:
        """A context manager around the serving of a request."""
        with self._guard:
            self._number += 1
            return Life(self, self._number, request, received_ns)

    def close(self) -> None:
        """Complete the file."""
        with self._guard:
            if self._file.closed:
                return
            self._write_out()
            self._file.write(self._last + "\n]\n")
            self._file.close()

    # -- where to record ---------------------------------------------------------------------

    def watch(self, node: Node) -> None:
        """Record what the nodes and storages of a chain do from now on."""
        seen: set[int] = set()
        layer: Node | None = node
        while layer is not None:
            for method, is_coroutine, words in _NODE:
                self._wrap(layer, method, is_coroutine, words, "node", layer.name)
            layer.ranges = TracedLocks(self, layer)
            for storage in (layer.file, layer.data):
                if id(storage) not in seen:
                    seen.add(id(storage))
                    for method, is_coroutine, words in _STORAGE:
                        self._wrap(storage, method, is_coroutine, words, "storage", storage.name)
            layer = layer.backing

    def _wrap(
        self, target: object, method: str, is_coroutine: bool, words: str, kind: str, where: str
    ) -> None:
        call: Callable[..., Any] = getattr(target, method)
        name = f"{words} ({os.path.basename(where)})"

        def plain(*args: Any, **options: Any) -> Any:
            start = perf_counter_ns()
            try:
                return call(*args, **options)
            finally:
                self.span(name, kind, start, _facts(args))

        async def waiting(*args: Any, **options: Any) -> Any:
            start = perf_counter_ns()
            try:
                return await call(*args, **options)
            finally:
                self.span(name, kind, start, _facts(args))

        setattr(target, method, waiting if is_coroutine else plain)


class TracedLocks(RangeLocks):
    """Range locks that tell how long each was waited for."""

    __slots__ = ("_name", "_trace")

    def __init__(self, trace: Trace, node: Node) -> None:
        super().__init__(node.runtime)
        self._trace = trace
        self._name = f"wait for range lock ({os.path.basename(node.name)})"

    async def acquire(self, start: int, end: int) -> HeldRange:
        begun_ns = perf_counter_ns()
        held = await super().acquire(start, end)
        self._trace.span(self._name, "lock", begun_ns, {"offset": start, "length": end - start})
        return held


class Life:
    """One request from its arrival to its reply."""

    __slots__ = ("_number", "_received_ns", "_request", "_start_ns", "_trace")

    def __init__(self, trace: Trace, number: int, request: ParsedRequest, received_ns: int) -> None:
        self._trace = trace
        self._number = number
        self._request = request
        self._received_ns = received_ns
        self._start_ns = 0

    def __enter__(self) -> None:
        self._start_ns = perf_counter_ns()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        flags, command, cookie, offset, length, _ = self._request
        name = COMMAND_NAMES[command] if command < len(COMMAND_NAMES) else f"command {command}"
        facts = {"number": self._number, "offset": offset, "length": length, "flags": flags, "cookie": cookie}
        mine = self._trace
        mine.span(name, "serve", self._start_ns, facts)
        life = {"name": name, "cat": "request", "id": self._number}
        mine._event({**life, "ph": "b", "ts": mine._us(self._received_ns), "args": facts})
        mine._event({**life, "ph": "e", "ts": mine._us(perf_counter_ns()), "args": {}})


def _facts(args: tuple[Any, ...]) -> dict[str, Any]:
    """Offset and length out of the arguments of a call, which are numbers or a buffer and an offset."""
    numbers: list[int] = []
    length = None
    for arg in args:
        if isinstance(arg, int):
            numbers.append(arg)
        elif isinstance(arg, (bytes, bytearray, memoryview)):
            length = len(arg)
    facts: dict[str, Any] = {}
    if numbers:
        facts["offset"] = numbers[0]
    if length is not None:
        facts["length"] = length
    elif len(numbers) > 1:
        facts["length"] = numbers[1]
    return facts
