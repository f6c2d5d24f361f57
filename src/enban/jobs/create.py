"""Making images: `create`, and the targets of jobs that write a new image.

Every option is checked before a file is touched. The image is made under a temporary name
(`jobs.output`) and gets its own when it is complete and durable.
"""

from __future__ import annotations

import os

from enban.block.disk import Disk
from enban.block.door import Door
from enban.block.gate import TRUSTED
from enban.block.runtime import BLOCKING, drive
from enban.catalog import Opener
from enban.errors import EnbanError, ImageError, NoSpaceError, UsageError
from enban.jobs.output import Output
from enban.units import SECTOR, align_up, parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType
    from typing import Any

    from enban.block.cipher import Passphrase
    from enban.block.gate import Gate
    from enban.block.node import Node
    from enban.block.storage import Storage
    from enban.storage.file import FileStorage

    Value = str | int | bool

# Kinds of option value.
TEXT, SIZE, BOOL, NUMBER = "str", "size", "bool (on/off)", "num"


class Option:
    """One creation option: its name as in qemu-img's -o, its kind and what it means."""

    __slots__ = ("kind", "name", "text")

    def __init__(self, name: str, kind: str, text: str) -> None:
        self.name = name
        self.kind = kind
        self.text = text

    def read(self, value: str) -> Value:
        """The value as text, number or truth. Raises UsageError."""
        if self.kind == SIZE:
            return parse_size(value)
        if self.kind == NUMBER:
            if not (value.isdigit() and value.isascii()):
                raise UsageError(f"option '{self.name}' needs a number, not '{value}'")
            return int(value)
        if self.kind == BOOL:
            if value in ("on", "yes", "true", "y"):
                return True
            if value in ("off", "no", "false", "n"):
                return False
            raise UsageError(f"option '{self.name}' is on or off, not '{value}'")
        return value


_SIZE = Option("size", SIZE, "Virtual size of the disk")
_BACKING = (
    Option("backing_file", TEXT, "Image that shows where this one holds nothing"),
    Option("backing_fmt", TEXT, "Format of the backing file"),
)

# What can be made. A format other than raw has a module `create` with a class of options,
# whose `header` checks them, and `write_empty`.
_OPTIONS: dict[str, tuple[Option, ...]] = {
    "raw": (Option("preallocation", TEXT, "Space to take at once: off, falloc or full"), _SIZE),
    "qcow2": (
        *_BACKING,
        Option("cluster_size", SIZE, "Size of a cluster, a power of two from 512 to 2M"),
        Option("compat", TEXT, "Compatibility level: 0.10 (v2) or 1.1 (v3)"),
        Option("compression_type", TEXT, "How clusters are compressed: zlib or zstd"),
        Option("data_file", TEXT, "File that holds the guest's data, beside this one for the tables"),
        Option("data_file_raw", BOOL, "Keep the data file readable as a raw image"),
        Option("extended_l2", BOOL, "Divide each cluster into 32 subclusters"),
        Option("lazy_refcounts", BOOL, "Allow reference counts to be updated late"),
        Option("preallocation", TEXT, "Space to take at once: off, metadata, falloc or full"),
        Option("refcount_bits", NUMBER, "Width of a reference count, a power of two from 1 to 64"),
        _SIZE,
    ),
    "qcow": (
        *_BACKING,
        Option("cluster_size", SIZE, "Size of a cluster, a power of two from 512 to 64K"),
        Option("encrypt.format", TEXT, "Encrypt the data: aes, which is weak"),
        Option("encrypt.key-file", TEXT, "File with the passphrase; without it, it is asked for"),
        Option("encryption", BOOL, "The old way to say encrypt.format=aes"),
        Option("l2_entries", NUMBER, "Clusters that a table maps, a power of two from 64 to 8192"),
        _SIZE,
    ),
}
FORMATS = tuple(_OPTIONS)


def option_table(format: str) -> tuple[Option, ...]:
    """The options a format can be created with. Raises UsageError for an unknown format."""
    try:
        return _OPTIONS[format]
    except KeyError:
        raise UsageError(
            f"images of format '{format}' cannot be made", hint=f"use {' or '.join(FORMATS)}"
        ) from None


def read_options(format: str, options: Mapping[str, str]) -> dict[str, Value]:
    """Options by their kinds. Raises UsageError for a name or value that is not valid."""
    rows = {row.name: row for row in option_table(format)}
    values: dict[str, Value] = {}
    for name, text in options.items():
        row = rows.get(name)
        if row is None:
            if name == "backing_file":
                raise UsageError(f"an image of format {format} cannot have a backing file")
            if name.startswith("encrypt"):
                raise UsageError(
                    f"format {format} has no option '{name}'",
                    hint="only qcow images can be made encrypted, with -o encrypt.format=aes",
                )
            raise UsageError(f"format {format} has no option '{name}'", hint="list the options with -o help")
        values[name] = row.read(text)
    return values


class Target:
    """A new image while a job fills it. Leaving its `with` block without `commit` or `keep` discards it.

    path: the final name. temporary: where it is until then. disk: the image, open for writing over
    its backing chain. resumed: it was begun by an earlier job. in_place: `path` is a device, whose
    old content is still there.
    """

    def __init__(self, disk: Disk, outputs: list[Output]) -> None:
        self.disk = disk
        self._outputs = outputs  # the image last: it names the others
        main = outputs[-1]
        self.path = main.path
        self.temporary = main.temporary
        self.resumed = main.resumed
        self.in_place = main.in_place

    def commit(self) -> None:
        """Make the image durable, then let it appear under its name. Raises HostError, ImageError."""
        try:
            self.disk.close()
            for output in self._outputs:
                output.commit()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Remove what was made, if it was not committed or kept."""
        _abandon(self.disk)
        for output in self._outputs:
            output.discard()

    def keep(self) -> None:
        """Make what is there durable and leave it under its temporary name, for a later `resume`."""
        self.disk.close()
        for output in self._outputs:
            output.keep()

    def __enter__(self) -> Target:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _tell_final_name(error, self._outputs)
        self.discard()


def _tell_final_name(error: BaseException | None, outputs: list[Output]) -> None:
    """Have an error speak of the file that was asked for: the one it happened to is about to go."""
    if isinstance(error, EnbanError):
        for output in outputs:
            if error.path == output.temporary:
                error.path = output.path


def _abandon(disk: Disk) -> None:
    """Close a disk nobody wants any more, without the wait for a flush."""
    disk.node.writable = False
    try:
        disk.close()
    except EnbanError:
        pass  # the file goes anyway; what led here is the error to report


class _MadeOpener(Opener):
    """Opens an image over storages that are open (and locked) already."""

    def __init__(
        self,
        outputs: list[Output],
        *,
        gate: Gate,
        cache: str,
        passphrase: Passphrase,
        keyless: bool,
    ) -> None:
        super().__init__(
            BLOCKING, gate=gate, cache=cache, share_below=keyless, passphrase=passphrase, keyless=keyless
        )
        self._made: dict[str, Storage] = {output.temporary: output.storage for output in outputs}
        self._final_names = {output.temporary: output.path for output in outputs}

    def _passphrase(self, options: dict[str, Any], name: str) -> bytes | None:
        return super()._passphrase(options, self._final_names.get(name, name))

    async def open_storage(self, options: dict[str, Any], *, writable: bool, create: bool = False) -> Storage:
        made = self._made.pop(str(options.get("filename")), None)
        return made or await super().open_storage(options, writable=writable, create=create)


def prepare_target(
    path: str,
    format: str,
    options: Mapping[str, str],
    *,
    size: int,
    cache: str = "writeback",
    gate: Gate = TRUSTED,
    resume: bool = False,
    unchecked: bool = False,
    passphrase: Passphrase = None,
    keyless: bool = False,
) -> Target:
    """Begin a new image at `path`.

    options: as given to -o, without `size`. size: virtual size in bytes, rounded up to whole sectors.
    cache: cache mode of the files made. gate: for names in the backing chain below the one given.
    resume: go on with what an earlier job kept, if it is there. unchecked: do not open the backing file.
    passphrase: of an encrypted image without option encrypt.key-file, and of its backing files.
    keyless: no data will be read or written: no passphrase is needed, and the backing files may be in use.
    Raises UsageError, HostError (LockedError if the file to be replaced is in use), ImageError.
    """
    values = read_options(format, options)
    if "size" in values:
        raise UsageError("the size is given twice")
    if not path:
        raise UsageError("the name of the new image is empty")
    size = align_up(size, SECTOR)
    _header(format, size, values)  # refuses what cannot be made before a file is touched
    backing = _backing_options(path, values)
    if backing is not None and not unchecked:
        _refuse_self(path, backing)
    outputs: list[Output] = []
    try:
        if "data_file" in values:
            outputs.append(Output(_beside(path, str(values["data_file"])), cache=cache, resume=resume))
        outputs.append(Output(path, cache=cache, resume=resume))
        if len({output.path for output in outputs}) < len(outputs):
            raise UsageError("the data file is the image itself", path=path)
        if resume and not all(output.resumed for output in outputs):
            _close_outputs(outputs)  # there was nothing, or only a part: begin anew
            outputs.clear()
            return prepare_target(
                path,
                format,
                options,
                size=size,
                cache=cache,
                gate=gate,
                unchecked=unchecked,
                passphrase=passphrase,
                keyless=keyless,
            )
        opener = _MadeOpener(outputs, gate=gate, cache=cache, passphrase=passphrase, keyless=keyless)
        disk = _fill(outputs, opener, format, values, backing, size, unchecked)
    except BaseException as error:
        _tell_final_name(error, outputs)
        _close_outputs(outputs)
        raise
    return Target(disk, outputs)


def _close_outputs(outputs: list[Output]) -> None:
    for output in outputs:
        try:
            drive(output.storage.close())
        finally:
            output.discard()


def _fill(
    outputs: list[Output],
    opener: Opener,
    format: str,
    values: dict[str, Value],
    backing: dict[str, Any] | None,
    size: int,
    unchecked: bool,
) -> Disk:
    """Write an empty image into the outputs' storages and open it."""
    image = outputs[-1]
    if not image.resumed:
        for output in outputs:
            _size_file(output, format if output is image else "raw", size)
        drive(_write_empty(image.storage, format, size, values))
    reference: dict[str, Any] = {"filename": image.temporary}
    if len(outputs) > 1:
        reference["data-file"] = {"filename": outputs[0].temporary}
    if "encrypt.key-file" in values:
        reference["encrypt"] = {"key-file": values["encrypt.key-file"]}
    if backing is not None:
        reference["backing"] = backing
    try:
        node = drive(opener.open_chain(reference, format=format, writable=True, backing=not unchecked))
    except ImageError as error:
        if image.resumed:
            raise UsageError(f"cannot resume: {error}", hint="start again without --resume") from error
        raise
    disk = Disk(Door(node, writable=True, writethrough=opener.cache in ("writethrough", "directsync")))
    try:
        if image.resumed:
            if node.size != size:
                raise UsageError(
                    f"cannot resume: the partial image has {node.size} bytes, not {size}",
                    path=image.temporary,
                    hint="start again without --resume",
                )
        else:
            drive(_preallocate(disk, format, values))
    except BaseException:
        _abandon(disk)
        raise
    return disk


def _size_file(output: Output, format: str, size: int) -> None:
    storage = output.storage
    if storage.fixed_size:
        if format == "raw" and storage.size() < size:
            raise NoSpaceError(
                f"the device has {storage.size()} bytes but the image needs {size}",
                path=output.path,
                errno=28,
            )
    elif format == "raw":
        drive(storage.truncate(size))


def _keywords(values: Mapping[str, Value]) -> dict[str, Value]:
    """Options as the arguments of a format's class of options; the size is given apart."""
    return {
        name.replace(".", "_").replace("-", "_"): value for name, value in values.items() if name != "size"
    }


def _header(format: str, size: int, values: Mapping[str, Value]) -> Any:
    """The header of an image with these options; None for raw. Raises UsageError."""
    if format == "raw":
        if values.get("preallocation", "off") not in ("off", "falloc", "full"):
            raise UsageError(
                f"preallocation '{values['preallocation']}' is not possible for raw",
                hint="use off, falloc or full",
            )
        return None
    chosen: Any = _keywords(values)
    if format == "qcow":
        from enban.formats.qcow.create import QcowOptions

        return QcowOptions(size, **chosen).header()
    from enban.formats.qcow2.create import Qcow2Options

    return Qcow2Options(size, **chosen).header()


def creation_warnings(format: str, options: Mapping[str, str], size: int) -> list[str]:
    """What whoever makes such an image should know, one line each; options as for `prepare_target`."""
    if format != "qcow":
        return []
    from enban.formats.qcow.create import QcowOptions

    chosen: Any = _keywords(read_options(format, options))
    return QcowOptions(size, **chosen).warnings()


async def _write_empty(storage: FileStorage, format: str, size: int, values: Mapping[str, Value]) -> None:
    header = _header(format, size, values)
    if format == "qcow":
        from enban.formats.qcow.create import write_empty as write_empty_qcow

        await write_empty_qcow(storage, header)
    elif format == "qcow2":
        from enban.formats.qcow2.create import write_empty

        await write_empty(storage, header)


async def _preallocate(disk: Disk, format: str, values: Mapping[str, Value]) -> None:
    mode = str(values.get("preallocation", "off"))
    if values.get("data_file_raw") and mode == "off":
        mode = "metadata"  # what another program writes to the data file must show
    node: Any = disk.node
    if mode == "off" or not node.size:
        return
    if format == "raw":
        from enban.formats.raw import preallocate

        await preallocate(node.file, 0, node.size, mode)
    else:
        await node.preallocate(0, node.size, mode)


# -- the backing file ----------------------------------------------------------------------


def _beside(path: str, name: str) -> str:
    """A name stored in an image as seen from here: relative ones start at the image's directory."""
    return os.path.join(os.path.dirname(path), name)


def backing_reference(path: str, name: str, format: str) -> dict[str, Any]:
    """How to open what the image at `path` will name as its backing file."""
    options = Opener(BLOCKING).resolve(name, path)
    if not format or "driver" in options:
        return options
    return {"driver": format, "file": options}


def _backing_options(path: str, values: Mapping[str, Value]) -> dict[str, Any] | None:
    name = str(values.get("backing_file", ""))
    return backing_reference(path, name, str(values.get("backing_fmt", ""))) if name else None


def _refuse_self(path: str, backing: dict[str, Any]) -> None:
    inner = backing.get("file", backing)
    name = inner.get("filename") if isinstance(inner, dict) else None
    if isinstance(name, str) and _same_file(path, name):
        raise UsageError("an image cannot be its own backing file", path=path)


def _refuse_in_chain(path: str, node: Node | None) -> None:
    """What is open without locks must not be replaced by what is made above it."""
    while node is not None:
        if _same_file(path, node.file.name) or _same_file(path, node.data.name):
            raise UsageError("the new image would replace a file of its own backing chain", path=path)
        node = node.backing


def _same_file(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False  # one of them is not there yet, or no file


def open_backing(
    path: str,
    name: str,
    format: str,
    *,
    gate: Gate,
    force_share: bool = False,
    passphrase: Passphrase = None,
    keyless: bool = False,
) -> Disk:
    """The backing file that an image at `path` would get, open for reading.

    Its format must be said, so that a raw one is never taken for something else later; the error
    tells what it seems to be. Raises UsageError, HostError, ImageError.
    """
    opener = Opener(BLOCKING, gate=gate, lock=not force_share, passphrase=passphrase, keyless=keyless)
    disk = Disk(Door(drive(opener.open_chain(backing_reference(path, name, format))), writable=False))
    if not format:
        detected = disk.format
        disk.close()
        raise UsageError(
            "a backing file needs its format", path=name, hint=f"it looks like {detected}: add -F {detected}"
        )
    return disk


def create(
    path: str | os.PathLike[str],
    format: str = "raw",
    options: Mapping[str, str] | None = None,
    *,
    size: int | None = None,
    unchecked: bool = False,
    gate: Gate = TRUSTED,
) -> int:
    """Make a new, empty image and return its virtual size in bytes.

    options: as qemu-img's -o, `size` among them if it is not given. Without a size the image is as
    large as its backing file, which a running guest may have open. unchecked: do not look at that file.
    Raises UsageError, HostError (LockedError, NoSpaceError), ImageError.
    """
    path = os.fspath(path)
    wanted = dict(options or {})
    given = read_options(format, wanted).get("size")
    if given is not None:
        if size is not None:
            raise UsageError("the size is given twice")
        size = int(given)
        del wanted["size"]
    backing = wanted.get("backing_file", "")
    if backing and not unchecked:
        with open_backing(
            path, backing, wanted.get("backing_fmt", ""), gate=gate, force_share=True, keyless=True
        ) as below:
            _refuse_self(path, backing_reference(path, backing, ""))
            _refuse_in_chain(path, below.node)
            size = below.size if size is None else size
    if size is None:
        raise UsageError("a new image needs a size", path=path)
    with prepare_target(
        path, format, wanted, size=size, gate=gate, unchecked=unchecked, keyless=True
    ) as target:
        made = target.disk.size
        target.commit()
    return made
