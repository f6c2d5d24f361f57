"""Fuzz: images broken with knowledge of their structure, used in every way there is.

Whatever an image says: using it ends in data or in one EnbanError of one line. No other exception,
no hang, no memory in proportion to a number that the image states. A check that follows a repair
says what the repair said. `one` does a single input; `fuzz/fuzz_images.py` gives it to a
coverage-guided fuzzer.
"""

from __future__ import annotations

import signal
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any

from enban.block.codec import deflater
from enban.block.disk import Disk
from enban.block.runtime import BLOCKING, drive
from enban.catalog import FORMATS, probe
from enban.errors import EnbanError, UnsupportedFeatureError, UnsupportedOperationError, UsageError
from enban.storage.memory import MemoryStorage

from .damage import SHAPES, Map, damage, make_image
from .images import KIB, Image, pattern
from .oracle import ENGINE, Violation
from .parts import Part

if TYPE_CHECKING:
    from types import FrameType

MIB = 1 << 20
MOST_S = 10.0  # for one input
MOST_MEMORY = 256 * MIB  # growth of the process by one input
LIMIT = 64 * MIB  # of an image that grows
PIECES = 16  # of a piece of work

QCOW_SHAPES: dict[str, dict[str, Any]] = {
    "qcow": {"cluster_size": 512, "l2_entries": 64},
    "qcow-4k": {"cluster_size": 4096},
}
KINDS = (
    *(Image(f"fuzz-{shape}", 0, **options) for shape, options in SHAPES.items()),
    *(Image(f"fuzz-{shape}", 0, format="qcow", **options) for shape, options in QCOW_SHAPES.items()),
    Image("fuzz-raw", 0, format="raw"),
)


def original(image: Image, seed: int) -> bytearray:
    """A sound, used image to break."""
    shape = image.name.removeprefix("fuzz-")
    if image.format == "qcow2":
        return make_image(shape, seed)
    kind = Image(shape, 60 * KIB, format=image.format, **image.options)
    storage = MemoryStorage(BLOCKING, kind.empty())
    if image.format == "raw":
        return storage.content
    disk = Disk(drive(kind.open(storage)))
    random = Random(seed)
    for number in range(20):
        offset = random.randrange(disk.size // 512) * 512
        if random.random() < 0.7:
            disk.pwrite(pattern(min(3000, disk.size - offset), number + 1), offset)
        else:
            cluster = disk.node.cluster_size
            packed = deflater("zlib")(bytes([number]) * cluster)
            disk.write_packed(packed, offset // cluster * cluster)
    disk.close()
    return storage.content


def mutate(content: bytearray, format: str, dice: Random) -> str:
    """Break an image where it matters; says what was done."""
    if format == "qcow2" and dice.random() < 0.5:
        return ", ".join(damage(content, dice))
    notes = []
    spots = _spots(content, format)
    for _ in range(dice.choice((1, 1, 2, 4))):
        if len(content) < 16:
            break
        known = spots and dice.random() < 0.85
        place = dice.choice(spots) if known else dice.randrange(len(content) - 8)
        width = dice.choice((1, 4, 8))
        place = min(place, len(content) - width)
        old = int.from_bytes(content[place : place + width], "big")
        new = dice.choice(
            (
                old ^ 1 << dice.randrange(8 * width),
                old ^ 1 << dice.randrange(8 * width),
                dice.getrandbits(8 * width),
                0,
                (1 << 8 * width) - 1,
                dice.randrange(len(content)) // 512 * 512,
                old + dice.choice((1, 8, 512, 4096)),
            )
        ) & ((1 << 8 * width) - 1)
        content[place : place + width] = new.to_bytes(width, "big")
        notes.append(f"{width} bytes at {place:#x}: {old:#x} -> {new:#x}")
    if dice.random() < 0.1:
        cut = dice.randrange(len(content))
        del content[cut:]
        notes.append(f"cut at {cut:#x}")
    return ", ".join(notes)


def _spots(content: bytearray, format: str) -> list[int]:
    """Where numbers stand that matter."""
    if format == "qcow2":
        places = Map(content)
        return [
            *range(4, 112, 4),
            *places.l1,
            *places.snapshot_l1,
            *places.table[:4],
            *places.blocks[:4],
            *places.l2_places(),
            *((places.snapshots_offset + at for at in range(0, 64, 4)) if places.snapshots_offset else ()),
        ]
    if format == "qcow":
        l1 = int.from_bytes(content[40:48], "big")
        tables = [int.from_bytes(content[at : at + 8], "big") for at in range(l1, l1 + 16, 8)]
        entries = [at for table in tables if 0 < table < len(content) for at in range(table, table + 512, 8)]
        return [*range(4, 48), *range(l1, l1 + 16, 8), *(at for at in entries if at + 8 <= len(content))]
    return [0, 4, 8]


def one(content: bytes | bytearray, format: str = "", note: str = "") -> bool:
    """Use an image in every way. format: "" goes by the content. Whether it could be opened.
    Raises Violation for anything but an EnbanError of one line."""
    format = format or probe(bytes(content[:512]))
    if format not in FORMATS:
        return False
    opened = _read(content, format, note)
    _check(content, format, note)
    _change(content, format, note)
    return opened


def _open(content: bytes | bytearray, format: str, *, writable: bool) -> Disk:
    storage = MemoryStorage(BLOCKING, content, limit=LIMIT)
    storage.name = "mutant"
    kind = Image("mutant", 0, format=format)
    return Disk(drive(kind.open(storage, writable=writable)))


def _try(note: str, calls: list[Callable[[], object]]) -> None:
    for call in calls:
        try:
            call()
        except EnbanError as error:
            text = str(error)
            if "\n" in text or not text.isprintable():
                raise Violation(ENGINE, f"{note}: an error of several lines: {text!r}") from error
        except Violation:
            raise
        except Exception as error:
            raise Violation(ENGINE, f"{note}: {type(error).__name__}: {error}") from error


def _read(content: bytes | bytearray, format: str, note: str) -> bool:
    opened: list[Disk] = []
    _try(note, [lambda: opened.append(_open(content, format, writable=False))])
    if not opened:
        return False
    disk = opened[0]
    size = disk.size
    calls: list[Callable[[], object]] = [
        partial(disk.pread, min(64 * KIB, size - at), at) for at in range(0, min(size, 256 * KIB), 64 * KIB)
    ]
    calls += [
        lambda: disk.pread(min(size, 1000), max(0, size - 1000)),
        lambda: sum(extent.length for extent in disk.map(0, min(size, MIB))),
        lambda: drive(disk.node.describe()),
        disk.close,
    ]
    _try(note, calls)
    return True


def _change(content: bytes | bytearray, format: str, note: str) -> None:
    opened: list[Disk] = []
    _try(note, [lambda: opened.append(_open(content, format, writable=True))])
    if not opened:
        return
    disk = opened[0]
    size = disk.size

    def pack() -> None:
        if disk.node.codec:
            disk.write_packed(deflater(disk.node.codec)(bytes(disk.node.cluster_size)), 0)

    def snapshots() -> None:
        for name in [snapshot.id for snapshot in disk.snapshots][:2]:
            disk.apply_snapshot(name)
        disk.create_snapshot("fuzz")
        disk.delete_snapshot("fuzz")

    _try(
        note,
        [
            lambda: disk.pwrite(b"\xdb" * min(700, size), 0),
            lambda: disk.pwrite(b"\xdb" * min(700, size), max(0, size - 700)),
            lambda: disk.write_zeroes(0, min(size, 20 * KIB)),
            disk.flush,
            lambda: disk.discard(0, min(size, 40 * KIB)),
            pack,
            snapshots,
            lambda: disk.resize(min(size, 1 << 30) // 512 * 512 + 4096),
            disk.flush,
            disk.close,
        ],
    )


def _check(content: bytes | bytearray, format: str, note: str) -> None:
    if format == "qcow":
        from enban.formats.qcow.check import check_image as check_qcow
        from enban.formats.qcow.opening import open_qcow

        storage = MemoryStorage(BLOCKING, content, name="mutant")
        node = []
        _try(
            note,
            [
                lambda: node.append(
                    drive(open_qcow("mutant", BLOCKING, storage, writable=False, metadata_only=True))
                )
            ],
        )
        if node:
            _try(note, [lambda: drive(check_qcow(node[0]))])
    elif format == "qcow2":
        mode = ("all", "all", "leaks")[zlib.crc32(content) % 3]
        _try(note, [partial(_repair, content, mode, note)])


def _repair(content: bytes | bytearray, mode: str, note: str) -> None:
    """Repair, check what came of it: the repair must have told the truth, and its work must last."""
    from enban.formats.qcow2.check import check_image
    from enban.formats.qcow2.opening import open_qcow2
    from enban.formats.qcow2.repair import repair_image

    storage = MemoryStorage(BLOCKING, content, name="mutant", limit=LIMIT)
    node = drive(open_qcow2("mutant", BLOCKING, storage, writable=True, metadata_only=True))
    result = drive(repair_image(node, mode))
    drive(node.close())
    again = drive(open_qcow2("mutant", BLOCKING, storage, writable=False, metadata_only=True))
    try:
        after = drive(check_image(again))
    except (UnsupportedFeatureError, UnsupportedOperationError) as error:
        raise Violation(ENGINE, f"{note}: repaired ({mode}), then not checked: {error}") from error
    told, found = (result.corruptions, result.leaks), (after.corruptions, after.leaks)
    if told != found:
        raise Violation(ENGINE, f"{note}: the repair ({mode}) said {told}, a check then says {found}")


class Watch:
    """Bounds one input: an alarm where signals work, and a look at the clock and at memory afterwards."""

    def __init__(self, note: str) -> None:
        self.note = note

    def __enter__(self) -> Watch:
        self.began = monotonic()
        self.memory = _peak_memory()
        self.alarmed = threading.current_thread() is threading.main_thread()
        if self.alarmed:
            self.before = signal.signal(signal.SIGALRM, self._ring)
            signal.setitimer(signal.ITIMER_REAL, MOST_S)
        return self

    def _ring(self, number: int, frame: FrameType | None) -> None:
        raise Violation(ENGINE, f"{self.note}: still running after {MOST_S:.0f} seconds")

    def __exit__(self, *_: object) -> None:
        if self.alarmed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self.before)
        grown = _peak_memory() - self.memory
        if grown > MOST_MEMORY:
            raise Violation(ENGINE, f"{self.note}: {grown >> 20} MiB of memory were taken")


def _peak_memory() -> int:
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class FuzzPart(Part):
    """Each piece: some mutants of one image. corpus: a directory of inputs (see `load`), tried first."""

    name = "fuzz"
    kinds = KINDS

    def __init__(
        self,
        seed: int,
        only: str = "",
        tick: Callable[[], None] | None = None,
        *,
        corpus: Path | None = None,
    ) -> None:
        super().__init__(seed, only, tick)
        self._corpus = load(corpus) if corpus is not None else []
        self._last = bytearray()

    def work(self, image: Image, seed: int) -> None:
        while self._corpus:
            name, content = self._corpus.pop()
            self._one(content, "", f"corpus file {name}")
        base = original(image, seed % 7)
        for number in range(PIECES):
            content = bytearray(base)
            note = f"{image}, seed {seed}, number {number}: " + mutate(
                content, image.format, Random(f"{image} {seed} {number}")
            )
            self._one(content, image.format, note)

    def _one(self, content: bytearray, format: str, note: str) -> None:
        self._last = content
        self.count("images")
        try:
            with Watch(note):
                self.count("opened", one(content, format, note))
        except Violation as violation:
            violation.image = content
            raise
        self.beat()


def load(directory: Path) -> list[tuple[str, bytearray]]:
    """A corpus: the files of a directory ending in .img, and in .z, which are inflated. Raises OSError,
    UsageError for a directory without such files or one that cannot be inflated."""
    found = []
    for path in sorted(directory.iterdir()):
        if path.suffix in (".z", ".img"):
            raw = path.read_bytes()
            try:
                found.append((path.name, bytearray(zlib.decompress(raw) if path.suffix == ".z" else raw)))
            except zlib.error as error:
                raise UsageError(f"no file packed by zlib: {error}", path=str(path)) from None
    if not found:
        raise UsageError("no images for the fuzzer here", path=str(directory), hint="they end in .img or .z")
    return found
