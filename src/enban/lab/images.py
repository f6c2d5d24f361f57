"""Kinds of image to work on: how each is made, opened by the engine, and read by other eyes.

They are small on purpose: in an image of a few dozen clusters every kind of neighbourhood comes
up within minutes, and its states can be checked by the thousand.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from enban.block.door import Door
from enban.block.runtime import BLOCKING, drive
from enban.formats.qcow.opening import open_qcow
from enban.formats.qcow2.opening import open_qcow2
from enban.formats.raw import RawNode
from enban.storage.memory import MemoryStorage

from .oracle import CORRUPT, Violation
from .qcow2_reader import Memo, Qcow2Reader, Report
from .qcow_reader import QcowReader

if TYPE_CHECKING:
    from enban.block.node import Node
    from enban.block.runtime import Runtime
    from enban.block.storage import Storage

KIB = 1024


def pattern(length: int, seed: int = 1) -> bytes:
    """Bytes in which every 8-byte word is different and not zero."""
    first = (seed & 0xFFFFFF) << 40 | 0xA5
    return b"".join((first | number << 8).to_bytes(8, "little") for number in range(-(-length // 8)))[:length]


class Medium(MemoryStorage):
    """Memory that behaves as a file does where that matters: a discarded range reads as zeros."""

    async def discard(self, offset: int, length: int) -> None:
        length = min(length, len(self.content) - offset)
        if length > 0:
            self.content[offset : offset + length] = bytes(length)


class Image:
    """A kind of image.

    format: raw, qcow or qcow2; options: creation options; backing: the bytes below it; size: of the disk.
    resizes, snapshots, packs: whether a workload resizes it, makes snapshots in it, how eagerly it
        writes compressed clusters (weight).
    """

    def __init__(
        self,
        name: str,
        size: int,
        *,
        format: str = "qcow2",
        backing: bytes = b"",
        resizes: bool = False,
        snapshots: bool = False,
        packs: int = 9,
        **options: Any,
    ) -> None:
        self.name = name
        self.size = size
        self.format = format
        self.resizes = resizes
        self.snapshots = snapshots
        self.backing = backing
        if backing:
            options["backing_file"] = "below"
        self.options = options
        self.cluster: int = options.get("cluster_size", 65536 if format == "qcow2" else 4096)
        self.external = "data_file" in options
        self.packs = 0 if self.external or format == "raw" else packs

    def __repr__(self) -> str:
        return self.name

    def below(self, runtime: Runtime = BLOCKING) -> Node | None:
        if not self.backing:
            return None
        return RawNode("backing", runtime, MemoryStorage(runtime, self.backing), writable=False)

    def shown(self) -> bytes:
        """What the guest sees of the empty image."""
        return self.backing[: self.size].ljust(self.size, b"\0")

    def empty(self) -> bytearray:
        """The bytes of a new image."""
        storage = MemoryStorage(BLOCKING)
        if self.format == "raw":
            storage.content.extend(bytes(self.size))
        elif self.format == "qcow":
            from enban.formats.qcow.create import QcowOptions, write_empty

            drive(write_empty(storage, QcowOptions(self.size, **self.options).header()))
        else:
            from enban.formats.qcow2.create import Qcow2Options
            from enban.formats.qcow2.create import write_empty as write_qcow2

            drive(write_qcow2(storage, Qcow2Options(self.size, **self.options).header()))
        return storage.content

    async def open(self, storage: Storage, data: Storage | None = None, *, writable: bool = True) -> Door:
        """A door to the image in a storage of any runtime; data: its external data file."""
        node: Node
        if self.format == "raw":
            node = RawNode(storage.name, storage.runtime, storage, writable=writable)
        elif self.format == "qcow":
            node = await open_qcow(storage.name, storage.runtime, storage, writable=writable)
        else:
            node = await open_qcow2(storage.name, storage.runtime, storage, writable=writable)
        node.backing = self.below(storage.runtime)
        if data is not None:
            node.data = data
        return Door(node, writable=writable)

    def view(
        self,
        image: bytes | bytearray,
        data: bytes | bytearray | None = None,
        *,
        memo: Memo | None = None,
    ) -> View:
        """The image through the independent reader of its format. Raises Violation, here and in what
        the view does, where it cannot be read."""
        return View(self, image, data, memo)


class View:
    """What the independent reader says: `check`, `read`, `snapshots`."""

    def __init__(
        self, image: Image, content: bytes | bytearray, data: bytes | bytearray | None, memo: Memo | None
    ) -> None:
        self._image = image
        self._content = content
        self._reader: Qcow2Reader | QcowReader | None = None
        with _Readable(content):
            if image.format == "qcow2":
                self._reader = Qcow2Reader(content, data_file=data, memo=memo)
            elif image.format == "qcow":
                self._reader = QcowReader(content)

    def check(self) -> Report:
        with _Readable(self._content):
            return self._check()

    def _check(self) -> Report:
        if isinstance(self._reader, Qcow2Reader):
            return self._reader.check()
        if isinstance(self._reader, QcowReader):
            return Report(corruptions=self._reader.problems())
        return Report()

    def read(self) -> bytes:
        if self._reader is None:
            return bytes(self._content)
        with _Readable(self._content):
            return self._reader.read(backing=self._image.backing)

    def snapshots(self) -> dict[str, bytes]:
        """What each internal snapshot shows."""
        if not isinstance(self._reader, Qcow2Reader):
            return {}
        with _Readable(self._content):
            return {
                shot.name: self._reader.read(backing=self._image.backing, snapshot=shot.name)
                for shot in self._reader.snapshots
            }


class _Readable:
    """What the readers stumble over (they are plain, and trust what they read) is damage of the image."""

    def __init__(self, content: bytes | bytearray) -> None:
        self.content = content

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, Violation):
            what = f"cannot be read: {type(error).__name__}: {error}"
            raise Violation(CORRUPT, what, image=self.content) from error


# The kinds the tests of qcow2 have always used, then those of the other formats.
IMAGES = (
    Image("512", 24 * KIB, cluster_size=512, resizes=True),
    Image("512-rc64", 40 * KIB, cluster_size=512, refcount_bits=64),
    Image("4k-rc1-chain", 60 * KIB + 512, cluster_size=4096, refcount_bits=1, backing=pattern(48 * KIB, 5)),
    Image("512-chain", 20 * KIB, cluster_size=512, backing=pattern(12 * KIB + 512, 5), resizes=True),
    Image("4k-v2-chain", 64 * KIB, cluster_size=4096, compat="0.10", backing=pattern(80 * KIB, 5)),
    Image(
        "16k-ext-chain", 100 * KIB, cluster_size=16384, extended_l2=True, backing=pattern(64 * KIB + 512, 5)
    ),
)
EXTERNAL = Image("4k-data", 64 * KIB, cluster_size=4096, data_file="d")
SNAPSHOTS = (
    Image("512-snap", 24 * KIB, cluster_size=512, snapshots=True),
    Image("1k-v2-snap", 40 * KIB, cluster_size=1024, compat="0.10", snapshots=True),
    Image(
        "16k-ext-snap-chain",
        100 * KIB,
        cluster_size=16384,
        extended_l2=True,
        snapshots=True,
        backing=pattern(64 * KIB + 512, 6),
    ),
)
OTHERS = (
    Image("raw", 24 * KIB, format="raw"),
    Image("qcow", 24 * KIB, format="qcow", cluster_size=512, l2_entries=64),
    Image(
        "qcow-4k-chain",
        80 * KIB,
        format="qcow",
        cluster_size=4096,
        l2_entries=64,
        backing=pattern(50 * KIB, 7),
    ),
    Image("512-lazy", 24 * KIB, cluster_size=512, lazy_refcounts=True),
    Image("1k-v2", 40 * KIB, cluster_size=1024, compat="0.10"),
    Image("1k-packed", 32 * KIB, cluster_size=1024, packs=60),
    Image("64k", 512 * KIB),
)
ALL = (*IMAGES, *SNAPSHOTS, *OTHERS)


def by_name(name: str) -> Image:
    """The kind of a name. Raises KeyError."""
    for image in (*ALL, EXTERNAL):
        if image.name == name:
            return image
    raise KeyError(name)
