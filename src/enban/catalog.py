"""The table of drivers, and the opener that turns a name into a chain of nodes.

A reference is a path, a URI, a `json:{...}` string or a dictionary of options as in
qemu-img's --image-opts (`driver`, `file`, `backing`, ...). Opening goes down the chain in a
loop, not by recursion, asks the gate for every name that an image supplied, and refuses a
chain that comes back to a file it already holds.
"""

from __future__ import annotations

import os

from .block.door import Door, close_chain
from .block.gate import SIBLINGS
from .errors import (
    CorruptImageError,
    EnbanError,
    GateError,
    ImageError,
    LockedError,
    UnknownFormatError,
    UsageError,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .block.cipher import Passphrase
    from .block.gate import Gate
    from .block.node import Node
    from .block.runtime import Runtime
    from .block.storage import Storage

    Options = dict[str, Any]

_LOCAL = ("file", "host_device", "host_cdrom")  # names of QEMU's drivers for what is on this machine
FORMATS = ("raw", "qcow2", "qcow")
FILTERS = ("throttle", "trace", "delay", "faults", "writelog")  # see filters/options.py

# What can be said of a disk, by its format. _TUNING, which tells QEMU how to work, changes nothing in what
# the disk is and is passed over. All else is refused: `ofset=1M`, passed over, would be the wrong disk.
_OF_FORMATS = {"raw": ("offset", "size"), "qcow2": ("data-file", "encrypt"), "qcow": ("encrypt",)}
_OF_NODES = ("backing", "offset", "size", "data-file", "encrypt")
_TUNING = (
    *("aio", "auto-read-only", "cache", "cache-clean-interval", "cache-size", "detect-zeroes", "discard"),
    *("l2-cache-entry-size", "l2-cache-size", "lazy-refcounts", "node-name", "overlap-check"),
    *("pass-discard-other", "pass-discard-request", "pass-discard-snapshot", "refcount-cache-size"),
)

PROBE_BYTES = 512

# Content that marks formats we have no driver for: taken for raw, their bytes would be misread. Whatever QEMU
# would take for a format of its own is here, so that a raw image we write does not become one there.
_FOREIGN = (
    (b"KDMV", 0, "vmdk"),
    (b"COWD", 0, "vmdk"),
    (b"# Disk DescriptorFile", 0, "vmdk"),
    (b"<<< ", 0, "vdi"),
    (b"\x7f\x10\xda\xbe", 0x40, "vdi"),
    (b"vhdxfile", 0, "vhdx"),
    (b"conectix", 0, "vpc"),
    (b"WithoutFreeSpace", 0, "parallels"),
    (b"WithouFreSpacExt", 0, "parallels"),
    (b"QED\0", 0, "qed"),
    (b"LUKS\xba\xbe", 0, "luks"),
    (b"Bochs Virtual HD Image", 0, "bochs"),
    (b"#!/bin/sh\n#V2.0 Format\n", 0, "cloop"),
)


def probe(start: bytes | bytearray) -> str:
    """The format that the first 512 bytes of an image speak for; "raw" if none."""
    if start[:4] == b"QFI\xfb":
        version = int.from_bytes(start[4:8], "big")
        if version >= 2:  # of versions after 3 we know the name, to refuse them by it
            return "qcow2"
        if version == 1:
            return "qcow"
    for magic, offset, name in _FOREIGN:
        if start[offset : offset + len(magic)] == magic:
            return name
    return "vmdk" if _is_descriptor(start) else "raw"


def _is_descriptor(start: bytes | bytearray) -> bool:
    """A VMDK descriptor: a text whose first line that is neither empty nor a comment is its version."""
    if start[:1] not in (b"#", b" ", b"\r", b"\n", b"v"):
        return False
    for line in bytes(start).split(b"\n"):
        if line and not line.startswith(b"#") and line.strip(b" \r"):
            return line.rstrip(b"\r") in (b"version=1", b"version=2", b"version=3")
    return False


def parse_reference(reference: str | Options) -> Options:
    """Any reference as options: {"filename": ...} for a plain name.

    Raises UsageError, also for values of other types, which a `json:` reference may hold.
    """
    if isinstance(reference, dict):
        return reference
    if not isinstance(reference, str):
        raise UsageError(f"{reference!r} is neither a file name nor a group of options")
    if reference.startswith("json:"):
        from .wire.image_options import parse_json

        return parse_json(reference)
    return {"filename": reference}


class Opener:
    """Opens chains under one set of rules.

    cache: cache mode of every file. lock: take QEMU's image locks (not for `--force-share`).
    share_below: take none for backing files, so that another process may be writing to them.
    gate: what names found in images may be opened. metadata_only: no guest data will be touched.
    snapshot_name: id or name of the internal snapshot to show in place of the top image's active state.
    passphrase: of encrypted images that have no option `encrypt.key-file`.
    keyless: open encrypted images without it too; whoever then reads their data gets the error.
    empty_drive: a CD-ROM drive without a disc will do; its disk has 0 bytes until there is one.
    """

    def __init__(
        self,
        runtime: Runtime,
        *,
        gate: Gate = SIBLINGS,
        cache: str = "writeback",
        lock: bool = True,
        share_below: bool = False,
        metadata_only: bool = False,
        snapshot_name: str = "",
        passphrase: Passphrase = None,
        keyless: bool = False,
        empty_drive: bool = False,
    ) -> None:
        self.runtime = runtime
        self.gate = gate
        self.cache = cache
        self.lock = lock
        self.share_below = share_below
        self.metadata_only = metadata_only
        self.snapshot_name = snapshot_name
        self.passphrase = passphrase
        self.heirs_of: dict[str, Storage] = {}  # open storages whose locks go to those opened here, by name
        self.keyless = keyless
        self.empty_drive = empty_drive

    async def open_chain(
        self, reference: str | Options, *, format: str = "", writable: bool = False, backing: bool = True
    ) -> Node:
        """A node and, with `backing`, all below it (those read-only)."""
        seen: set[Any] = set()
        top = node = await self._open_one(parse_reference(reference), format, writable, seen)
        lock, self.lock = self.lock, self.lock and not self.share_below
        try:
            options = parse_reference(reference) if backing else None
            while options is not None:
                options = await self._open_below(top, node, options, seen)
                node = node.backing or node
        except BaseException:
            await _close_quietly(top)
            raise
        finally:
            self.lock = lock
        return top

    async def _open_below(self, top: Node, node: Node, options: Options, seen: set[Any]) -> Options | None:
        """Open what is next under a node, if there is anything; by which options it was opened."""
        try:
            below = self._below(node, options)
            if below is None:
                return None
            try:
                node.backing = await self._open_one(*below, False, seen)
            except LockedError as error:
                refuse_loop(top, error)
                raise
            return below[0]
        except EnbanError as error:
            if "backing" not in options:
                error.named_by(node.name, "backing file")
            raise

    def _below(self, node: Node, options: Options) -> tuple[Options, str] | None:
        """What to open under a node: as the options say, else as the image says."""
        if "backing" in options:
            wanted = options["backing"]
            if wanted in (None, ""):
                return None
            return parse_reference(wanted), ""
        if not node.backing_name:
            return None
        self.gate.check(node.backing_name, image=node.name, role="backing file")
        return self.resolve(node.backing_name, node.name), node.backing_format

    def resolve(self, reference: str, image: str) -> Options:
        """A name found in an image, as options; relative names start at the image's directory."""
        options = parse_reference(reference)
        _refuse_filters(options, image)
        filename = options.get("filename")
        if isinstance(filename, str) and not _scheme(filename):
            options = {**options, "filename": os.path.join(os.path.dirname(image), filename)}
        return options

    async def _open_one(self, options: Options, format: str, writable: bool, seen: set[Any]) -> Node:
        driver = str(options.get("driver", ""))
        if driver in FORMATS:
            inner = options.get("file", options.get("filename"))
            if inner is None:
                raise UsageError(f"driver {driver} needs a file", hint="give file.filename=...")
            format = driver
            _check_options(
                options, ("driver", "file", "filename", "backing", *_OF_FORMATS[driver]), driver, writable
            )
            storage = await self.open_storage(parse_reference(inner), writable=writable)
        else:
            own = {key: value for key, value in options.items() if key not in _OF_NODES}
            storage = await self.open_storage(own, writable=writable)
        try:
            if storage.identity in seen:
                raise loop(storage.name)
            seen.add(storage.identity)
            node = await self._open_format(storage, options, format, writable)
            if self.snapshot_name and len(seen) == 1:
                await node.show_snapshot(self.snapshot_name)
            return node
        except BaseException:
            await storage.close()
            raise

    async def _open_format(self, storage: Storage, options: Options, format: str, writable: bool) -> Node:
        name, guessed = storage.name, not format
        if guessed:
            format = probe(await storage.read(0, min(PROBE_BYTES, storage.size())))
        if format in FORMATS:
            for key in _OF_NODES:
                if key in options and key != "backing" and key not in _OF_FORMATS[format]:
                    raise _no_option(format, key, _OF_FORMATS[format])
        if format == "raw":
            from .formats.raw import RawNode
            from .units import parse_size

            length = options.get("size")
            return RawNode(
                name,
                self.runtime,
                storage,
                writable=writable,
                offset=parse_size(str(options.get("offset", 0))),
                length=None if length is None else parse_size(str(length)),
                probe=probe if guessed else None,
            )
        if format == "qcow2":
            return await self._open_qcow2(storage, options, writable)
        if format == "qcow":
            from .formats.qcow.opening import open_qcow

            return await open_qcow(
                name,
                self.runtime,
                storage,
                writable=writable,
                metadata_only=self.metadata_only or self.keyless,
                passphrase=lambda: self._passphrase(options, name),
            )
        if guessed:
            raise UnknownFormatError(
                f"the image looks like {format}, which is not supported",
                path=name,
                hint="to use its bytes as they are, say -f raw",
            )
        raise UnknownFormatError(
            f"format '{format}' is not known", path=name, hint=f"use {' or '.join(FORMATS)}"
        )

    async def _open_qcow2(self, storage: Storage, options: Options, writable: bool) -> Node:
        from .formats.qcow2.opening import data_file_name, open_qcow2
        from .wire.qcow2 import DIRTY

        node = await open_qcow2(
            storage.name, self.runtime, storage, writable=writable, metadata_only=self.metadata_only
        )
        if node.external and not self.metadata_only:
            given = options.get("data-file")
            if given is not None:
                node.data = await self.open_storage(parse_reference(given), writable=writable)
            else:
                name = data_file_name(node)
                if not name:
                    raise ImageError("the image needs a data file but names none", path=node.name)
                self.gate.check(name, image=node.name, role="data file")
                try:
                    node.data = await self.open_storage(self.resolve(name, node.name), writable=writable)
                except EnbanError as error:
                    error.named_by(node.name, "data file")
                    raise
        if writable and node.header.incompatible & DIRTY and not self.metadata_only:
            from .formats.qcow2.repair import repair_dirty

            try:
                await repair_dirty(node)
            except BaseException:
                if node.data is not storage:
                    await node.data.close()
                raise
        return node

    def _passphrase(self, options: Options, name: str) -> bytes | None:
        from .block.cipher import passphrase_for, read_key_file

        encrypt = options.get("encrypt")
        if isinstance(encrypt, dict) and "key-file" in encrypt:
            return read_key_file(str(encrypt["key-file"]))
        return passphrase_for(name, self.passphrase)

    def _open_disc(self, filename: str, writable: bool) -> Storage | None:
        """The disc in a CD-ROM drive; None if the file is something else."""
        from .storage import cdrom

        if filename == cdrom.DEFAULT:
            filename = cdrom.find_drive(filename)
        elif not cdrom.is_drive(filename):
            return None
        return cdrom.open_drive(filename, self.runtime, writable=writable, empty=self.empty_drive)

    async def _open_filter(self, driver: str, options: Options, writable: bool) -> Storage:
        """A filter and the storage behind it, named by `file`."""
        from .filters.options import open_filter

        inner = options.get("file")
        if inner is None:
            raise UsageError(f"filter {driver} needs a file", hint="give file.filename=...")
        below = await self.open_storage(parse_reference(inner), writable=writable)
        try:
            return open_filter(driver, below, options)
        except BaseException:
            await below.close()
            raise

    async def open_storage(self, options: Options, *, writable: bool, create: bool = False) -> Storage:
        """The storage that options name: a file, or whatever a URI's scheme says."""
        driver = str(options.get("driver", "file"))
        filename = options.get("filename")
        if driver in FILTERS:
            return await self._open_filter(driver, options, writable)
        if filename is None and "driver" not in options and isinstance(options.get("file"), dict):
            _check_options(options, ("file",), driver, writable)
            return await self.open_storage(options["file"], writable=writable, create=create)
        if driver == "nbd" or (driver == "file" and isinstance(filename, str) and is_nbd(filename)):
            from .storage.nbd import OPTIONS, open_nbd

            _check_options(options, OPTIONS, "nbd", writable)
            return await self.runtime.offload(open_nbd, options, self.runtime, writable)
        if driver in FORMATS:
            raise UsageError(f"driver {driver} cannot be the file of another driver")
        if driver not in _LOCAL or not isinstance(filename, str) or not filename:
            raise UsageError(
                f"driver '{driver}' is not known or needs a filename", hint="use driver=file,filename=..."
            )
        _check_options(options, ("driver", "filename"), driver, writable)
        filename = filename.removeprefix("file:")
        from .storage.host import is_block_device

        if filename.startswith("/dev/") or is_block_device(filename):
            disc = await self.runtime.offload(self._open_disc, filename, writable)
            if disc is not None:
                return disc
        from .storage.file import FileStorage, open_file

        elder = self.heirs_of.get(filename)
        return open_file(
            filename,
            self.runtime,
            writable=writable,
            cache=self.cache,
            lock=self.lock,
            create=create,
            heir_of=elder if isinstance(elder, FileStorage) else None,
        )


def loop(name: str) -> CorruptImageError:
    """The error of a chain that names one of its files again."""
    return CorruptImageError(
        "the backing chain comes back to this file", path=name, hint="run: enban rebase -u"
    )


def refuse_loop(top: Node, error: LockedError) -> None:
    """Raise CorruptImageError if what stands in the way of opening a file is the chain's own lock of it."""
    node: Node | None = top
    while node is not None:
        try:
            own = os.path.samefile(node.file.name, error.path)
        except OSError:
            own = False
        if own:
            raise loop(error.path) from error
        node = node.backing


def _check_options(options: Options, known: tuple[str, ...], driver: str, writable: bool) -> None:
    for key, value in options.items():
        if key == "read-only":
            if writable and str(value).lower() in ("on", "yes", "true", "y"):
                raise UsageError("the image is to be written, but its options say read-only")
        elif key not in known and key not in _TUNING:
            raise _no_option(driver, key, known)


def _no_option(driver: str, key: str, known: tuple[str, ...]) -> UsageError:
    return UsageError(f"driver {driver} has no option '{key}'", hint=f"there is {', '.join(known)}")


def _refuse_filters(options: Options, image: str) -> None:
    """Filters are for people to put into a chain: some write files. An image may not ask for them."""
    while isinstance(options, dict):
        if options.get("driver") in FILTERS:
            raise GateError(f"the image asks for the filter '{options['driver']}'", path=image)
        options = options.get("file", {})
        if not options:
            return


def _scheme(name: str) -> bool:
    return "://" in name or name.startswith(("nbd:", "file:", "json:"))


def is_nbd(name: str) -> bool:
    return name.startswith(("nbd:", "nbds:", "nbd+unix:", "nbds+unix:"))


async def _close_quietly(node: Node) -> None:
    try:
        await close_chain(node)
    except EnbanError:
        pass  # the error that led here is the one to report


async def open_door(
    reference: str | Options,
    runtime: Runtime,
    *,
    format: str = "",
    writable: bool = False,
    backing: bool = True,
    cache: str = "writeback",
    gate: Gate = SIBLINGS,
    lock: bool = True,
    snapshot: bool = False,
    snapshot_dir: str | None = None,
    snapshot_name: str = "",
    passphrase: Passphrase = None,
    keyless: bool = False,
    empty_drive: bool = False,
) -> Door:
    """Open a disk with its chain; both faces are made of this.

    snapshot: writes go to a temporary overlay (see `temporary`), in a file without a name in
        `snapshot_dir`; the image is only read. snapshot_name: an internal snapshot to show.
    """
    if snapshot_dir and not snapshot:
        raise UsageError("a directory for the temporary overlay goes with snapshot=True")
    if snapshot_name and writable and not snapshot:
        raise UsageError("an internal snapshot can only be read")
    opener = Opener(
        runtime,
        gate=gate,
        cache=cache,
        lock=lock,
        snapshot_name=snapshot_name,
        passphrase=passphrase,
        keyless=keyless,
        empty_drive=empty_drive,
    )
    if snapshot:
        return await _open_temporary(opener, reference, format, backing, snapshot_dir)
    node = await opener.open_chain(reference, format=format, writable=writable, backing=backing)
    return Door(node, writable=writable, writethrough=cache in ("writethrough", "directsync"))


async def _open_temporary(
    opener: Opener, reference: str | Options, format: str, backing: bool, directory: str | None
) -> Door:
    from .temporary import Temporary, make_overlay

    base = await opener.open_chain(reference, format=format, backing=backing)

    async def reopen(old: Node) -> Node:
        """The base once more, for writing; `old` has given its locks to it."""
        if opener.snapshot_name:
            raise UsageError("an internal snapshot can only be read", path=old.name)
        if not opener.lock:
            raise UsageError("force_share is for reading only", path=old.name)
        elders = {storage.name: storage for storage in (old.file, old.data)}
        opener.heirs_of = elders
        try:
            return await opener.open_chain(reference, format=format, writable=True, backing=False)
        except BaseException:
            for storage in elders.values():
                try:
                    await storage.hold(writing=False)
                except EnbanError:
                    pass  # the error that led here is the one to report
            raise
        finally:
            opener.heirs_of = {}

    try:
        node = await make_overlay(base, opener.runtime, directory)
    except BaseException:
        await _close_quietly(base)
        raise
    door = Door(node, writable=True)
    door.temporary = Temporary(door, node, reopen)
    return door
