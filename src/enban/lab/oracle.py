"""What each sector of a disk may hold.

For each 512-byte sector the oracle keeps the values it has had since the last flush that was
acknowledged: after a crash any of them is legal and nothing else, because a disk writes whole
sectors. Snapshots must show exactly what the disk showed when they were made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from .workload import Operation

SECTOR = 512

# Kinds of violation, from bad to worse.
LEAK = "leak"  # a clean close left clusters counted that nobody uses
FOREIGN = "foreign"  # bytes in a sector that were never written there, or not since the last flush
LOST = "lost"  # a sector shows what it held before the last flush
CORRUPT = "corrupt"  # the independent check finds the tables wrong
ENGINE = "engine"  # the engine raised, hung or answered wrongly


class Violation(AssertionError):
    """A promise was broken. kind: one of the above; image: the bytes that show it, if there are any."""

    def __init__(self, kind: str, text: str, *, image: bytes | bytearray | None = None) -> None:
        super().__init__(text)
        self.kind = kind
        self.image = image


class Oracle:
    """model: what the guest sees now. sizes: sizes the disk may have after a crash.
    legal: by sector, all values since the last flush; a sector not in it has its model value.
    snapshots: by name, what must be there; possible: snapshots that may be there too, or may be gone."""

    def __init__(self, content: bytes | bytearray, *, keep_past: bool = False) -> None:
        self.model = bytearray(content)
        self.legal: dict[int, set[bytes]] = {}
        self.sizes = {len(content)}
        self.snapshots: dict[str, bytes] = {}
        self.possible: dict[str, bytes] = {}
        self._past: dict[int, set[bytes]] | None = {} if keep_past else None

    def sector(self, number: int) -> bytes:
        return bytes(self.model[number * SECTOR : (number + 1) * SECTOR])

    def outcomes(self, operation: Operation) -> dict[int, bytes]:
        """The sectors an operation changes (or may change), with their new values."""
        kind, offset, end = operation.kind, operation.offset, operation.offset + operation.length
        if kind in ("write", "fua", "packed"):
            new = operation.content[: operation.length]
        elif kind in ("zero", "discard"):
            new = bytes(operation.length)
        elif kind == "apply":
            new = self.snapshots[operation.name]
            offset, end = 0, len(new)
        else:
            return {}
        after = {}
        for number in range(offset // SECTOR, (end - 1) // SECTOR + 1):
            first = number * SECTOR
            if first >= offset and first + SECTOR <= end:
                after[number] = new[first - offset : first - offset + SECTOR]
                continue
            value = bytearray(self.sector(number))
            start, last = max(offset, first), min(end, first + len(value))
            value[start - first : last - first] = new[start - offset : last - offset]
            after[number] = bytes(value)
        return after

    def begin(self, operation: Operation) -> None:
        """From now on a crash may show the operation's effect."""
        if operation.kind == "resize":
            self.sizes.add(operation.length)
            for number in range(len(self.model) // SECTOR, operation.length // SECTOR):
                self.legal[number] = {bytes(SECTOR)}
        elif operation.kind == "snapshot":
            self.possible[operation.name] = bytes(self.model)
        elif operation.kind == "delete":
            kept = self.snapshots.pop(operation.name, None)
            if kept is not None:
                self.possible[operation.name] = kept
        for number, value in self.outcomes(operation).items():
            before = self.sector(number)
            if before != value:
                self.legal.setdefault(number, {before}).add(value)
                if self._past is not None:
                    self._past.setdefault(number, {before}).add(value)

    def done(self, operation: Operation) -> None:
        """It was acknowledged. A discard's effect is learnt by `observe`."""
        kind = operation.kind
        if kind in ("flush", "reopen"):
            self.legal.clear()
        elif kind == "resize":
            del self.model[operation.length :]
            self.model.extend(bytes(operation.length - len(self.model)))
            if len(self.sizes) > 1:
                self.legal.clear()  # a change of the size makes all before it durable
            self.sizes = {operation.length}
        elif kind == "snapshot":
            self.snapshots[operation.name] = self.possible.pop(operation.name)
            self.legal.clear()  # as a change of the tables does
        elif kind == "delete":
            self.possible.pop(operation.name, None)
        elif kind == "apply":
            self.model[:] = self.snapshots[operation.name]
            self.legal.clear()
        elif kind != "discard":
            for number, value in self.outcomes(operation).items():
                self.model[number * SECTOR : number * SECTOR + len(value)] = value
            if kind == "fua":
                self._fua(operation)

    def _fua(self, operation: Operation) -> None:
        """What was written through is durable, and its sectors with it; of others nothing is known."""
        for number in self.outcomes(operation):
            self.legal.pop(number, None)

    def failed(self, operation: Operation) -> None:
        """It ended with an error: whether a snapshot came or went is not known."""
        if operation.kind == "delete" and operation.name in self.possible:
            self.snapshots[operation.name] = self.possible.pop(operation.name)

    def observe(self, operation: Operation, content: bytes, *, what: str = "") -> None:
        """`content` is what the disk shows after a discard or a failed operation: each of its
        sectors has its old or its new value, all others are as before. It is the model from now on."""
        if len(content) != len(self.model):
            raise Violation(ENGINE, f"{what}: size {len(content)} is not {len(self.model)}")
        if content == self.model:
            return
        outcomes = self.outcomes(operation)
        for number in range(-(-len(content) // SECTOR)):
            seen = content[number * SECTOR : (number + 1) * SECTOR]
            if seen != self.sector(number) and seen != outcomes.get(number):
                raise Violation(FOREIGN, f"{what}: sector {number} is neither old nor new")
        self.model[:] = content

    def check_now(self, content: bytes, what: str) -> None:
        """`content` is what was read without any crash."""
        if content != self.model:
            number = next(n for n in range(len(content) // SECTOR + 1) if self._differs(content, n))
            raise Violation(FOREIGN, f"{what}: sector {number} does not read as it was written")

    def _differs(self, content: bytes, number: int) -> bool:
        return content[number * SECTOR : (number + 1) * SECTOR] != self.sector(number)

    def check_crash(self, content: bytes | bytearray, *, what: str = "") -> None:
        """`content` is the whole disk as found after a crash."""
        if len(content) not in self.sizes:
            raise Violation(CORRUPT, f"{what}: size {len(content)} is not one of {sorted(self.sizes)}")
        model = self.model
        if content == model:
            return
        rest = bytearray(content)  # with what may differ made equal
        for number, allowed in self.legal.items():
            start = number * SECTOR
            seen = bytes(content[start : start + SECTOR])
            if not seen:
                continue  # behind the end of a disk that has its smaller size
            if seen not in allowed:
                raise self._wrong(number, seen, what)
            if len(model) >= start + len(seen):
                rest[start : start + len(seen)] = model[start : start + len(seen)]
        short = min(len(rest), len(model))
        if rest[:short] != model[:short]:
            for number in range(-(-short // SECTOR)):
                if (
                    rest[number * SECTOR : (number + 1) * SECTOR]
                    != model[number * SECTOR : (number + 1) * SECTOR]
                ):
                    seen = bytes(content[number * SECTOR : (number + 1) * SECTOR])
                    raise self._wrong(number, seen, what)

    def wrong_sectors(self, content: bytes | bytearray) -> tuple[int, int]:
        """(lost, foreign): how many sectors of a crashed disk show something old, something else."""
        lost = foreign = 0
        for number in range(len(content) // SECTOR):
            seen = bytes(content[number * SECTOR : (number + 1) * SECTOR])
            allowed = self.legal.get(number)
            if seen != self.sector(number) and (allowed is None or seen not in allowed):
                if self._past is not None and seen in self._past.get(number, ()):
                    lost += 1
                else:
                    foreign += 1
        return lost, foreign

    def _wrong(self, number: int, seen: bytes, what: str) -> Violation:
        old = self._past is not None and seen in self._past.get(number, ())
        if old or number not in self.legal:
            return Violation(LOST, f"{what}: sector {number} lost its flushed value")
        return Violation(FOREIGN, f"{what}: sector {number} holds a foreign value")

    def check_snapshots(self, seen: Mapping[str, bytes], names: Iterable[str], what: str) -> None:
        """names: the snapshots a crashed image has; seen: what they show."""
        names = set(names)
        for name in self.snapshots.keys() - names:
            raise Violation(LOST, f"{what}: snapshot '{name}' is gone")
        for name in names - self.snapshots.keys() - self.possible.keys():
            raise Violation(CORRUPT, f"{what}: snapshot '{name}' was deleted, or never made")
        for name, content in seen.items():
            expected = self.snapshots.get(name) or self.possible[name]
            if content != expected:
                raise Violation(LOST, f"{what}: snapshot '{name}' does not show what it kept")
