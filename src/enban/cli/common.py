"""What several verbs share: flags, opening the images named, and text for people."""

from __future__ import annotations

import sys

from enban.block.gate import SIBLINGS, TRUSTED
from enban.cli.options import Flag
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from enban.block.disk import Disk
    from enban.block.gate import Gate
    from enban.cli.options import Arguments
    from enban.jobs.progress import Progress

    Reference = str | dict[str, Any]


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP arrived; the clean-up is that of Ctrl-C."""


CACHES = ("none", "writeback", "writethrough", "directsync", "unsafe")

FORMAT = Flag("-f --format", "Format of the image; found out from its content if not given", value="FMT")
IMAGE_OPTS = Flag("--image-opts", "Images are named by options (driver=qcow2,file.filename=disk.qcow2)")
FORCE_SHARE = Flag("-U --force-share", "Read an image although a running guest has it open")
UNTRUSTED = Flag(
    "--untrusted", "Of the files that an image names, open only those at or below its own directory"
)
QUIET = Flag("-q", "Print nothing but errors")
PROGRESS = Flag("-p", "Show progress also where there is no terminal")
OUTPUT = Flag("--output", "How to print: human or json", value="FORM", choices=("human", "json"))
CACHE = Flag("-t", f"Cache mode of the image written: {', '.join(CACHES)}", value="CACHE", choices=CACHES)
SOURCE_CACHE = Flag("-T", "Cache mode of the images read", value="CACHE", choices=CACHES)
OPTIONS = Flag("-o", "Options of the new image, name=value,...; `-o help` lists them", value="OPTIONS")
OBJECT = Flag(
    "--object",
    "A passphrase: secret,id=NAME,file=FILE; the option encrypt.key-secret=NAME stands for it",
    value="OBJECT",
)
HELP = Flag("-h --help", "Show this help")


def reference(arguments: Arguments, name: str) -> Reference:
    """An image as the user named it."""
    if not name:
        raise UsageError("the name of the image is empty")
    if arguments.on("--image-opts"):
        from enban.wire.image_options import parse_image_opts

        if arguments.on("-f"):
            raise UsageError("--image-opts and -f do not go together", hint="give the format as driver=")
        return with_key_files(arguments, parse_image_opts(name))
    if arguments.on("--object") and name.startswith("json:"):
        from enban.catalog import parse_reference

        return with_key_files(arguments, parse_reference(name))
    return name


def creation_options(arguments: Arguments) -> dict[str, str]:
    """The options of a new image, given by -o."""
    options = key_values(arguments.all("-o"))
    secret = options.pop("encrypt.key-secret", None)
    if secret is not None:
        options["encrypt.key-file"] = _key_file(arguments, secret)
    return options


def with_key_files(arguments: Arguments, options: dict[str, Any]) -> dict[str, Any]:
    """Image options with the file in place of each `encrypt.key-secret`, here and further down."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        if key == "key-secret":
            found["key-file"] = _key_file(arguments, str(value))
        else:
            found[key] = with_key_files(arguments, value) if isinstance(value, dict) else value
    return found


def _key_file(arguments: Arguments, secret: str) -> str:
    """The file of the secret with this id. Raises UsageError."""
    for text in arguments.all("--object"):
        kind, _, rest = text.partition(",")
        values = key_values([rest]) if rest else {}
        if kind not in ("secret", "qom-type=secret") or not values.keys() <= {"id", "file", "format"}:
            raise UsageError(
                f"--object '{text}' is not known", hint="give a passphrase as secret,id=NAME,file=FILE"
            )
        if values.get("id") == secret:
            if values.get("format", "raw") != "raw" or "file" not in values:
                raise UsageError(f"secret '{secret}' must be a file with the passphrase as it is")
            return values["file"]
    raise UsageError(f"there is no secret '{secret}'", hint=f"add --object secret,id={secret},file=FILE")


def ask_passphrase(new: str = "") -> Callable[[str], str | None]:
    """Asks at the terminal, once for each image; None where there is no terminal. `new`: the image
    being made, whose passphrase is asked for twice."""
    answers: dict[str, str] = {}

    def ask(name: str) -> str | None:
        if name not in answers and sys.stdin is not None and sys.stdin.isatty():
            from getpass import getpass
            from os.path import realpath

            answer = getpass(f"Passphrase of {shown(name)}: ")
            if new and realpath(new) == realpath(name):
                if not answer:
                    raise UsageError("an empty passphrase protects nothing", path=name)
                if getpass("Again: ") != answer:
                    raise UsageError("the two passphrases differ", path=name)
            answers[name] = answer
        return answers.get(name)

    return ask


def warn_of(arguments: Arguments, format: str, options: dict[str, str], size: int) -> None:
    """Say on standard error what there is to say of an image just made."""
    from enban.jobs.create import creation_warnings

    if not arguments.on("-q"):
        for line in creation_warnings(format, options, size):
            complain(f"warning: {line}")


def number(arguments: Arguments, flag: str, default: int, *, least: int = 0, most: int = 1 << 31) -> int:
    """The value of a flag that is a whole number. Raises UsageError."""
    text = arguments.text(flag, str(default))
    if not (text.isascii() and text.isdigit()) or not least <= int(text) <= most:
        raise UsageError(f"'{text}' is no number for {flag}", hint=f"use {least} to {most}")
    return int(text)


def gate(arguments: Arguments) -> Gate:
    """What names found in images may be opened: all of a user's own images, unless told otherwise."""
    return SIBLINGS if arguments.on("--untrusted") else TRUSTED


def open_disk(
    arguments: Arguments,
    name: str,
    *,
    format: str = "",
    writable: bool = False,
    cache: str = "writeback",
    snapshot_name: str = "",
    keyless: bool = False,
) -> Disk:
    """Open an image as the flags of a verb say. keyless: its data will not be read."""
    from enban.block.disk import Disk
    from enban.block.runtime import BLOCKING, drive
    from enban.catalog import open_door

    return Disk(
        drive(
            open_door(
                reference(arguments, name),
                BLOCKING,
                format=format,
                writable=writable,
                cache=cache,
                gate=gate(arguments),
                lock=not arguments.on("-U"),
                snapshot_name=snapshot_name,
                passphrase=None if keyless else ask_passphrase(),
                keyless=keyless,
            )
        )
    )


def progress(arguments: Arguments, label: str, *, unit: str = "bytes") -> Progress:
    from enban.jobs.progress import AUTO, PLAIN, SILENT, Progress

    mode = SILENT if arguments.on("-q") else PLAIN if arguments.on("-p") else AUTO
    return Progress(label, mode=mode, unit=unit)


def key_values(texts: list[str]) -> dict[str, str]:
    """`a=1,b=2` as a dictionary; a doubled comma stands for a comma, a name alone means `on`."""
    values: dict[str, str] = {}
    for text in texts:
        for item in text.replace(",,", "\0").split(","):
            key, equals, value = item.replace("\0", ",").partition("=")
            if not key:
                raise UsageError(f"'{text}' is not of the form name=value,...")
            values[key] = value if equals else "on"
    return values


def wants_list(texts: list[str]) -> bool:
    """Whether -o asks for the list of options."""
    return any(item in ("help", "?") for text in texts for item in text.split(","))


def print_options(format: str) -> None:
    from enban.cli.options import table
    from enban.jobs.create import option_table

    print(f"Options of format {format}:")
    for line in table([(f"{row.name}=<{row.kind}>", row.text) for row in option_table(format)]):
        print(line)


def shown(text: str) -> str:
    """Text from an image or a file name on one line of a terminal: control characters become visible."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def human_size(value: int) -> str:
    """A size as qemu-img prints it: `10 MiB`, three significant digits."""
    exponent = 0
    while exponent < 6 and value / (1 << 10 * exponent) >= 1000:
        exponent += 1
    return f"{value / (1 << 10 * exponent):0.3g} {('', 'Ki', 'Mi', 'Gi', 'Ti', 'Pi', 'Ei')[exponent]}B"


def print_json(value: object) -> None:
    from json import dumps

    print(dumps(value, indent=4))


def complain(text: str) -> None:
    """One line on standard error."""
    try:
        print(f"enban: {shown(text)}", file=sys.stderr)
    except (OSError, ValueError):
        pass  # nobody listens; the exit code still tells


def snapshot_meant(text: str) -> str:
    """The snapshot that -l means, as the image is asked for it: `snapshot.name=x`, `snapshot.id=1`, or a name
    or id as it is."""
    if not text.startswith("snapshot."):
        return text
    values = key_values([text])
    if len(values) != 1 or not values.keys() <= {"snapshot.name", "snapshot.id"}:
        raise UsageError(f"'{text}' does not name one snapshot", hint="use -l NAME, or -l snapshot.id=ID")
    return "=".join(*values.items())
