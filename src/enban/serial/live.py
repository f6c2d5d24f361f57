"""The doctor, the recorder and the injector on a line in use: made, told of, and closed."""

from __future__ import annotations

from time import monotonic_ns

from ..errors import EnbanError
from .doctor import Doctor
from .injection import Injector
from .recording import Recorder
from .verdicts import FAULT, SLOW

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from ..wire.kd.parser import Event
    from .looking import Observer


class Live:
    """observers and injector are for the bridge; call `tick` about once a second and `close` at the end.

    record: the folder of the recording, "" for none. doctor: have faults told to `log` when they appear
    and when they are gone. Raises HostError and UsageError for a folder that cannot be made.
    """

    def __init__(
        self,
        *,
        record: str = "",
        doctor: bool = False,
        inject_reset: bool = False,
        inject_break_in: bool = False,
        log: Callable[[str], None],
    ) -> None:
        self.observers: list[Observer] = []
        self.injector: Injector | None = None
        self._log = log
        self._tells = doctor
        self._recorder = Recorder(record, monotonic_ns()) if record else None
        self._doctor: Doctor | None = None
        self._known: set[str] = set()
        if self._recorder is not None:
            self.observers.append(self._recorder)
        if record or doctor or inject_reset or inject_break_in:
            # After the recorder: bytes are recorded before what is said of them.
            self._doctor = Doctor(on_event=self._event if self._recorder is not None else None)
            self.observers.append(self._doctor)
            if inject_reset or inject_break_in:
                self.injector = Injector(self._doctor, break_in=inject_break_in, reset=inject_reset)

    def _event(self, side: int, event: Event, when_ns: int) -> None:
        """For the recorder. If it cannot write any more, the doctor goes on without it."""
        assert self._recorder is not None
        try:
            self._recorder.event(side, event, when_ns)
        except EnbanError as error:
            self._log(f"nothing more is recorded: {error}")

    def tick(self) -> None:
        """Tell what has become wrong, and what has come right again."""
        if self._doctor is None or not self._tells:
            return
        verdicts = self._doctor.verdicts(monotonic_ns())
        bad = {verdict.name: verdict for verdict in verdicts if verdict.grade in (FAULT, SLOW)}
        for name, verdict in bad.items():
            if name not in self._known:
                self._say(verdict.words())
        for name in sorted(self._known - bad.keys()):
            self._log(f"doctor: no longer so: {name}")
        self._known = set(bad)

    def _say(self, words: str) -> None:
        for line in words.splitlines():
            self._log(f"doctor: {line}")

    def close(self) -> None:
        """The last word, and the end of the recording. May be called twice. Raises HostError if the recording
        is not whole."""
        if self._doctor is not None and self._tells:
            for verdict in self._doctor.verdicts(monotonic_ns()):
                self._say(verdict.words())
            self._tells = False
        if self._recorder is not None:
            self._recorder.close(monotonic_ns())

    def __enter__(self) -> Live:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
