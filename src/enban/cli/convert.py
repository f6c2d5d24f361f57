"""`enban convert`: disks to another format."""

from __future__ import annotations

import sys

from enban.cli import common
from enban.cli.common import human_size
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.jobs.convert import convert
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments

MOST_WORKERS = 16


def run(arguments: Arguments) -> int:
    target_format = arguments.text("-O", "raw")
    if common.wants_list(arguments.all("-o")):
        common.print_options(target_format)
        return 0
    if arguments.on("--skip-broken-bitmaps") and not arguments.on("--bitmaps"):
        raise UsageError("--skip-broken-bitmaps goes with --bitmaps")
    if len(arguments.operands) < 2:
        raise UsageError("convert needs a source and a target", hint="see: enban convert --help")
    *sources, target = arguments.operands
    options = common.creation_options(arguments)
    with common.progress(arguments, "convert") as progress:
        result = convert(
            ["-" if name == "-" else common.reference(arguments, name) for name in sources],
            _target(arguments, target),
            source_format=arguments.text("-f"),
            target_format=target_format,
            options=options,
            compress=arguments.on("-c"),
            target_exists=arguments.on("-n"),
            sparse_size=parse_size(arguments.text("-S")) if arguments.on("-S") else None,
            snapshot=common.snapshot_meant(arguments.text("-l")),
            backing=arguments.text("-B"),
            backing_format=arguments.text("-F"),
            source_cache=arguments.text("-T", "writeback"),
            target_cache=arguments.text("-t", "writeback"),
            workers=_workers(arguments.text("-m")),
            out_of_order=arguments.on("-W"),
            offload=arguments.on("-C"),
            gate=common.gate(arguments),
            force_share=arguments.on("-U"),
            verify=arguments.on("--verify"),
            resume=arguments.on("--resume"),
            bitmaps=arguments.on("--bitmaps"),
            skip_broken_bitmaps=arguments.on("--skip-broken-bitmaps"),
            passphrase=common.ask_passphrase(new="" if arguments.on("-n") else target),
            progress=progress.update,
        )
    if not arguments.on("-q"):
        # Standard output may be the image itself.
        stream = sys.stderr if target == "-" else sys.stdout
        if result.resumed_at:
            print(f"resumed: {human_size(result.resumed_at)} were there already", file=stream)
        if result.verified:
            print("verified: the target reads back as the source", file=stream)
    if not arguments.on("-n"):
        common.warn_of(arguments, target_format, options, result.size)
    return 0


def _target(arguments: Arguments, name: str) -> str:
    if not arguments.on("--target-image-opts"):
        if not name:
            raise UsageError("the name of the target is empty")
        return name
    if not arguments.on("-n"):
        raise UsageError("--target-image-opts needs -n: options name an image that exists")
    if arguments.on("-O"):
        raise UsageError("--target-image-opts and -O do not go together", hint="give the format as driver=")
    from json import dumps

    from enban.wire.image_options import parse_image_opts

    return "json:" + dumps(common.with_key_files(arguments, parse_image_opts(name)))


def _workers(text: str) -> int | None:
    if not text:
        return None
    if not (text.isdigit() and 1 <= int(text) <= MOST_WORKERS):
        raise UsageError(f"-m {text} is not possible", hint=f"use 1 to {MOST_WORKERS}")
    return int(text)


VERB = Verb(
    "convert",
    "Copy one or more disks (one after the other) into a new image. It appears under its name when it is "
    "complete and durable; what fails or is interrupted leaves nothing.",
    "convert [flags] SOURCE... TARGET",
    (
        common.FORMAT,
        Flag("-O", "Format of the target: raw (if not given), qcow2, qcow", value="FMT"),
        common.OPTIONS,
        Flag("-c", "Compress"),
        Flag("-S", "Leave out runs of zeros of this size; 0 writes all of them", value="SIZE"),
        Flag("-l", "Take an internal snapshot of the source: its name or id", value="SNAPSHOT"),
        Flag(
            "-B", "Make the target an overlay of this image, with the source's top layer only", value="FILE"
        ),
        Flag("-F", "Format of the image given with -B", value="FMT"),
        Flag("-n", "Write into the existing image TARGET instead of making a new one"),
        Flag("-m", f"Number of threads, at most {MOST_WORKERS}", value="N"),
        Flag("-W", "Let pieces be written out of order"),
        Flag("-C", "Copy inside the kernel or file system where that is possible"),
        Flag("--verify", "Read the target back and compare it with the source"),
        Flag("--bitmaps", "Copy the source's dirty bitmaps too"),
        Flag("--skip-broken-bitmaps", "With --bitmaps: leave out those that are inconsistent"),
        Flag("--resume", "Go on where an interrupted convert with --resume stopped"),
        common.CACHE,
        common.SOURCE_CACHE,
        common.PROGRESS,
        common.QUIET,
        common.IMAGE_OPTS,
        common.OBJECT,
        Flag("--target-image-opts", "TARGET is named by options; needs -n"),
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(0, -1),
    examples=(
        ("raw to qcow2", "convert -f raw -O qcow2 disk.img disk.qcow2"),
        ("as small as possible", "convert -c -O qcow2 -o compression_type=zstd disk.img disk.qcow2"),
        ("from a pipe", "convert -f raw -O qcow2 - disk.qcow2 < disk.img"),
        ("to a pipe", "convert -O raw disk.qcow2 - | gzip > disk.img.gz"),
    ),
    notes="SOURCE - reads a raw disk from standard input; TARGET - writes one to standard output, raw only.",
)
