"""Copying disks from one format to another: what `enban convert` does.

`copier` moves the bytes; here sources and target are opened, and the target gets its name.
Nothing shows under that name before all of it is there: an interrupted convert leaves
nothing, or with `resume` a partial file and a journal from which the same call goes on.
"""

from __future__ import annotations

import os

from ..block.disk import Disk
from ..block.gate import TRUSTED
from ..block.runtime import BLOCKING, drive
from ..catalog import open_door
from ..errors import EnbanError, ImageError, UnsupportedOperationError, UsageError
from ..units import align_up
from .copier import PIECE, ConvertResult, Copier, run_workers
from .create import prepare_target
from .sources import ZEROES, Sources

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from typing import Any

    from ..block.bitmaps import Bitmaps, Bits
    from ..block.cipher import Passphrase
    from ..block.gate import Gate
    from .progress import Report

    Reference = str | os.PathLike[str] | dict[str, Any]

MAX_WORKERS = 16
DEFAULT_SPARSE = 4096  # bytes of zeros worth leaving out, as in qemu-img


def convert(
    sources: Reference | Sequence[Reference],
    target: str | os.PathLike[str],
    *,
    source_format: str = "",
    target_format: str = "raw",
    options: dict[str, str] | None = None,
    compress: bool = False,
    target_exists: bool = False,
    sparse_size: int | None = None,
    snapshot: str = "",
    backing: str = "",
    backing_format: str = "",
    source_cache: str = "writeback",
    target_cache: str = "writeback",
    workers: int | None = None,
    out_of_order: bool = False,
    offload: bool = False,
    gate: Gate = TRUSTED,
    force_share: bool = False,
    verify: bool = False,
    resume: bool = False,
    bitmaps: bool = False,
    skip_broken_bitmaps: bool = False,
    passphrase: Passphrase = None,
    progress: Report | None = None,
) -> ConvertResult:
    """Copy `sources` (one after the other) to `target`.

    sources: paths, URIs or options; "-" is standard input, raw. target: a path; "-" is standard
        output, for raw only.
    options: creation options of the target as text, named as qemu-img's -o.
    compress: pack every cluster. target_exists: write into an existing image (-n).
    sparse_size: bytes of zeros worth leaving out; 0 writes them all; None is 4096.
    snapshot: an internal snapshot of the source to copy instead of its active state.
    backing: the target becomes an overlay of this image, and only what the source's top layer
        holds is copied (-B).
    target_cache: "writeback" makes the result durable before it gets its name; "unsafe" does not.
    workers: threads, by default one a processor, at most 16. out_of_order: do not keep the
        target in guest order. offload: copy inside the host where that is possible (-C).
    verify: read the target back and compare. resume: keep what is done if interrupted, and go on
        from there when called again.
    bitmaps: copy the source's dirty bitmaps too; `skip_broken_bitmaps`: but for inconsistent ones.
    passphrase: of encrypted images, sources and target, as for `enban.open`.

    Raises UsageError, HostError, ImageError; the target is then as it was before.
    """
    target = os.fspath(target)
    sources = [sources] if isinstance(sources, (str, dict, os.PathLike)) else list(sources)
    references = [source if isinstance(source, dict) else os.fspath(source) for source in sources]
    if resume and (target_exists or "-" in (target, *references)):
        raise UsageError("resume needs a source and a target that are files, and a target that is new")
    if verify and target == "-":
        raise UsageError("what went to standard output cannot be verified")
    if bitmaps and ("-" in (target, *references) or snapshot):
        raise UsageError("bitmaps are those of an image's active state, and go from file to file")
    wanted = {name: str(value) for name, value in (options or {}).items()}
    if backing:
        wanted["backing_file"] = backing
        if backing_format:
            wanted["backing_fmt"] = backing_format
    if references == ["-"]:
        from .pipes import convert_stdin

        refused = {
            "a source format other than raw": source_format not in ("", "raw"),
            "a target that exists (-n)": target_exists,
            "verify": verify,
            "a snapshot (-l)": bool(snapshot),
            "a backing file": bool(wanted.get("backing_file")),
            "copying inside the host (-C)": offload,
        }
        for what, asked in refused.items():
            if asked:
                raise UsageError(f"standard input does not go with {what}", hint="store it in a file first")

        return convert_stdin(
            target,
            target_format,
            wanted,
            cache=target_cache,
            gate=gate,
            compress=compress,
            passphrase=passphrase,
            progress=progress,
        )
    if "-" in references:
        raise UsageError("standard input can only be the one source")
    disks: list[Disk] = []
    try:
        for reference in references:
            disks.append(
                Disk(
                    drive(
                        open_door(
                            reference,
                            BLOCKING,
                            format=source_format,
                            cache=source_cache,
                            gate=gate,
                            lock=not force_share,
                            snapshot_name=snapshot,
                            passphrase=passphrase,
                        )
                    )
                )
            )
        inputs = Sources(disks, top_only=bool(wanted.get("backing_file")), dense=sparse_size == 0)
        if target == "-":
            from .pipes import write_stdout

            return write_stdout(inputs, target_format, progress)
        run = _Run(inputs, target, target_format, wanted)
        run.compress, run.sparse_size, run.offload = compress, sparse_size, offload
        run.workers = min(workers or os.cpu_count() or 1, MAX_WORKERS)
        run.out_of_order, run.cache, run.gate = out_of_order, target_cache, gate
        run.verify, run.progress, run.passphrase = verify, progress, passphrase
        if bitmaps:
            run.bitmaps = _check_bitmaps(disks, target_format, skip_broken=skip_broken_bitmaps)
        if target_exists:
            return run.into_existing()
        return run.resumable() if resume else run.new()
    finally:
        for disk in disks:
            disk.close()


def convert_disk(
    disk: Disk,
    target: str,
    *,
    target_format: str = "raw",
    options: dict[str, str] | None = None,
    gate: Gate = TRUSTED,
    verify: bool = False,
    progress: Report | None = None,
) -> ConvertResult:
    """Copy a disk that is open, and not written meanwhile, to a new image; otherwise as `convert`."""
    run = _Run(Sources([disk], top_only=False), target, target_format, dict(options or {}))
    run.workers = min(os.cpu_count() or 1, MAX_WORKERS)
    run.gate, run.verify, run.progress = gate, verify, progress
    return run.new()


def _check_bitmaps(disks: list[Disk], format: str, *, skip_broken: bool) -> list[str]:
    """Before anything is copied: the bitmaps that will be. Raises UsageError, ImageError."""
    if format != "qcow2":
        raise UnsupportedOperationError(f"format {format} has no dirty bitmaps", hint="use -O qcow2")
    if len(disks) != 1:
        raise UsageError("bitmaps are copied from a single source")
    names = []
    for info in disks[0].bitmaps():
        if not info.inconsistent:
            names.append(info.name)
        elif not skip_broken:
            raise ImageError(
                f"bitmap {info.name!r} is inconsistent and cannot be copied",
                path=disks[0].name,
                hint="remove it, or leave it out with --skip-broken-bitmaps",
            )
    return names


def _merge(name: str, bits: Bits) -> Callable[[Bitmaps], Coroutine[Any, Any, None]]:
    async def merge(found: Bitmaps) -> None:
        await found.merge(name, bits)

    return merge


class _Run:
    """One convert to a file, with its settings."""

    compress = False
    sparse_size: int | None = None
    offload = False
    workers = 1
    out_of_order = False
    cache = "writeback"
    gate = TRUSTED
    verify = False
    progress: Report | None = None
    passphrase: Passphrase = None
    bitmaps: Sequence[str] = ()

    def __init__(self, sources: Sources, target: str, format: str, options: dict[str, str]) -> None:
        self.sources = sources
        self.target = target
        self.format = format
        self.options = options

    def new(self) -> ConvertResult:
        size = align_up(self.sources.size, 512)
        target = prepare_target(
            self.target,
            self.format,
            self.options,
            size=size,
            cache=self.cache,
            gate=self.gate,
            passphrase=self.passphrase,
        )
        with target:
            copier = self._copier(target.disk, fresh=not target.in_place or self.format != "raw", start=0)
            self._vet_bitmaps(target.disk)
            run_workers(copier, self.workers)
            self._verify(target.disk, copier.result)
            self._copy_bitmaps(target.disk)
            target.commit()
        return self._finished(copier)

    def into_existing(self) -> ConvertResult:
        door = open_door(
            self.target,
            BLOCKING,
            format=self.format,
            writable=True,
            cache=self.cache,
            gate=self.gate,
            passphrase=self.passphrase,
        )
        with Disk(drive(door)) as disk:
            if disk.size < self.sources.size:
                raise UsageError(
                    f"the target has {disk.size} bytes but the source has {self.sources.size}",
                    path=self.target,
                    hint="enlarge it with enban resize",
                )
            copier = self._copier(disk, fresh=False, start=0)
            self._vet_bitmaps(disk)
            run_workers(copier, self.workers)
            disk.flush()
            self._verify(disk, copier.result)
            self._copy_bitmaps(disk)
        return self._finished(copier)

    def resumable(self) -> ConvertResult:
        from .journal import Journal

        size = align_up(self.sources.size, 512)
        facts = [self.format, self.options, self.compress, self.sparse_size, size]
        journal = Journal(self.target, self.sources.disks, facts)
        start = journal.load()
        target = prepare_target(
            self.target,
            self.format,
            self.options,
            size=size,
            cache="writeback" if self.cache == "unsafe" else self.cache,
            gate=self.gate,
            resume=start > 0,
            passphrase=self.passphrase,
        )
        if not target.resumed:
            start = 0
        with target:
            copier = self._copier(target.disk, fresh=True, start=start)
            copier.result.resumed_at = start
            if target.resumed:
                self._drop_bitmaps(target.disk)
            self._vet_bitmaps(target.disk)

            def checkpoint() -> None:
                if journal.due():
                    position = copier.completed()
                    target.disk.flush()
                    journal.save(position)

            try:
                run_workers(copier, self.workers, checkpoint)
            except BaseException:
                position = copier.completed()
                try:
                    target.keep()  # flushes
                    journal.save(position)
                except EnbanError:
                    pass  # the last checkpoint still stands
                raise
            self._verify(target.disk, copier.result)
            self._copy_bitmaps(target.disk)
            target.commit()
            journal.remove()
        return self._finished(copier)

    def _copier(self, disk: Disk, *, fresh: bool, start: int) -> Copier:
        if self.compress and not disk.node.codec:
            raise UsageError(f"format {disk.format} cannot hold compressed clusters", path=self.target)
        if self.compress and disk.node.cipher is not None:
            raise UnsupportedOperationError(
                "an encrypted image cannot hold compressed clusters",
                path=self.target,
                hint="use one of the two",
            )
        for source in self.sources.disks:
            if source.node.file.identity == disk.node.file.identity:
                raise UsageError("source and target are the same file", path=self.target)
        grain = DEFAULT_SPARSE if self.sparse_size is None else self.sparse_size
        return Copier(
            self.sources,
            disk,
            size=min(disk.size, self.sources.size) if not fresh else disk.size,
            fresh=fresh,
            grain=grain,
            compress=self.compress,
            out_of_order=self.out_of_order,
            offload=self.offload,
            start=start,
            progress=self.progress,
            result=ConvertResult(self.sources.size),
        )

    def _drop_bitmaps(self, disk: Disk) -> None:
        """Those that an interrupted run had copied: each is copied as a whole."""
        there = {info.name for info in disk.bitmaps()} if self.bitmaps else set()
        for name in there & set(self.bitmaps):
            disk.remove_bitmap(name)

    def _vet_bitmaps(self, disk: Disk) -> None:
        """Refuse, before anything is copied, bitmaps that the target cannot take. Raises UsageError."""
        if not self.bitmaps:
            return
        there = {info.name for info in disk.bitmaps()}
        target = drive(disk.door.bitmaps())
        for info in self.sources.disks[0].bitmaps():
            if info.name in self.bitmaps:
                if info.name in there:
                    raise UsageError(f"there is a bitmap {info.name!r} already", path=self.target)
                target.vet(info.name, info.granularity)

    def _copy_bitmaps(self, disk: Disk) -> None:
        source = self.sources.disks[0]
        known = {info.name: info for info in source.bitmaps()} if self.bitmaps else {}
        for name in self.bitmaps:
            info = known[name]
            disk.add_bitmap(name, granularity=info.granularity, enabled=False)
            bits = drive(drive(source.door.bitmaps()).bits(name)).copy()
            bits.resize(disk.size)
            drive(disk.door.change_bitmaps(_merge(name, bits)))
            if info.enabled:
                disk.enable_bitmap(name)

    def _verify(self, disk: Disk, result: ConvertResult) -> None:
        if not self.verify:
            return
        disk.flush()
        mine, theirs = bytearray(PIECE), bytearray(PIECE)
        for start in range(0, self.sources.size, PIECE):
            n = min(PIECE, self.sources.size - start)
            if n < PIECE:
                mine, theirs = bytearray(n), bytearray(n)
            position = 0
            while position < n:
                length, kind = self.sources.extent(start + position, n - position)
                with memoryview(theirs)[position : position + length] as part:
                    if kind == ZEROES:
                        part[:] = bytes(length)
                    else:
                        self.sources.read(part, start + position)
                position += length
            disk.readinto(mine, start)
            if mine != theirs:
                raise EnbanError(
                    "the target does not read back as the source",
                    path=self.target,
                    offset=start,
                    hint="suspect the medium or memory of this machine",
                )
        result.verified = True

    def _finished(self, copier: Copier) -> ConvertResult:
        if self.progress is not None:
            self.progress(copier.size, copier.size)
        return copier.result
