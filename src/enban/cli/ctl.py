"""`enban ctl`: speaks to a machine that `enban run` runs."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError
from enban.units import parse_size

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from enban.cli.options import Arguments

# What can be said: words, the names of further words, what it does.
REQUESTS = (
    ("status", "", "whether the guest runs, on what, for how long"),
    ("disks", "", "its disks and the disc in its drive"),
    ("pause", "", "stop the guest where it is"),
    ("resume", "", "let it go on"),
    ("shutdown", "", "ask the guest to shut down, end QEMU after --grace; --force ends QEMU at once"),
    ("reset", "", "as the reset button"),
    ("snapshot save", "TAG", "keep memory, devices and all disks"),
    ("snapshot load", "TAG", "bring all of that back"),
    ("snapshot list", "", "what is kept"),
    ("snapshot delete", "TAG", "give one up"),
    ("commit", "", "keep what was written since `run --snapshot`"),
    ("cdrom insert", "PATH", "put a disc into the drive"),
    ("cdrom eject", "", "take it out"),
    ("keys", "KEYS...", "press keys together, one chord after the other: ctrl-alt-delete"),
    ("type", "TEXT", "type a text on the guest's keyboard; -k is the layout the guest is set to"),
    ("console", "", "print what the guest's console has said, up to 1 MiB"),
    ("say", "TEXT", "type a line into the console"),
    ("expect", "PATTERN", "wait until the console says it (a regular expression), after the last such match"),
    ("screenshot", "FILE", "write what the screen shows to a PNG file"),
    ("disk resize", "DISK SIZE", "make a disk larger; the guest sees it"),
    ("disk snapshot", "DISK TAG", "snapshot of one disk alone"),
    ("disk pull", "DISK", "make a disk independent of its backing files"),
    ("disk backup", "DISK FILE", "copy a disk as it is now to a new image"),
)


def run(arguments: Arguments) -> int:
    from enban.guest.control import ask

    name, *words = arguments.operands
    request, values = _request(words)
    do = request.replace(" ", "-")
    settings: dict[str, Any] = {}
    if request == "keys":
        settings = {"chords": values}
    elif request == "type":
        settings = {"text": values[0], "layout": arguments.text("-k")}
    elif request == "shutdown":
        settings = {"force": arguments.on("--force"), "grace": _seconds(arguments.text("--grace", "30"))}
    elif request.startswith("disk "):
        settings["disk"] = values[0]
        if request == "disk resize":
            settings["size"] = parse_size(values[1])
        elif request == "disk snapshot":
            settings["tag"] = values[1]
        elif request == "disk backup":
            settings["path"] = _absolute(values[1])
            settings["bitmap"] = arguments.text("--bitmap")
            if arguments.on("--base"):
                settings["base"] = _absolute(arguments.text("--base"))
    elif request.startswith("snapshot ") and values:
        settings["tag"] = values[0]
    elif request == "say":
        settings["text"] = values[0]
    elif request == "expect":
        settings = {"pattern": values[0], "timeout": _seconds(arguments.text("--timeout", "60"))}
    elif request == "screenshot" or request == "cdrom insert":
        settings["path"] = _absolute(values[0])
    result = ask(name, do, **settings)
    if arguments.text("--output") == "json":
        common.print_json(result)
    elif request in _PRINTERS:
        _PRINTERS[request](result)
    return 0


def _request(words: Sequence[str]) -> tuple[str, list[str]]:
    """The request in the words after the name, and the words after it. Raises UsageError."""
    for request, values, _ in REQUESTS:
        parts = request.split()
        if list(words[: len(parts)]) == parts:
            rest = list(words[len(parts) :])
            wanted = values.split()
            if len(rest) == len(wanted) or (values.endswith("...") and rest):
                return request, rest
            raise UsageError(f"{request} takes {values or 'nothing more'}", hint="see: enban ctl --help")
    said = " ".join(words[:2])
    raise UsageError(
        f"a machine does not know '{said}'", hint=f"use {', '.join(request for request, _, _ in REQUESTS)}"
    )


def _absolute(path: str) -> str:
    """A path as the machine's process, which is in another folder, must be told it."""
    from os.path import abspath

    return path if "://" in path or path == "cdrom:" else abspath(path)


def _seconds(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise UsageError(f"'{text}' is no number of seconds")
    return int(text)


def _print_status(found: dict[str, Any]) -> None:
    print(f"{found['name']}: {found['status']}, {found['accel']}, ran for {found['ran-s']:.1f} s")
    memory = common.human_size(found["memory"])
    print(f"memory {memory}, {found['cpus']} processor(s), QEMU is process {found['qemu-pid']}")
    if found["snapshot"]:
        print("writes vanish at the end unless they are committed")


def _print_disks(found: list[dict[str, Any]]) -> None:
    for one in found:
        if one["id"] == "cdrom":
            print(f"cdrom  {one['file'] or 'empty'}")
            continue
        notes = [one["format"], one["bus"], common.human_size(one["size"])]
        notes += [] if one["writable"] else ["read-only"]
        notes += ["temporary"] if one["snapshot"] else []
        print(f"{one['id']}  {one['file']} ({', '.join(notes)})")


def _print_states(found: list[dict[str, Any]]) -> None:
    from time import localtime, strftime

    if not found:
        return
    print(f"{'TAG':<20} {'DATE':<19} {'GUEST TIME':>10} {'MEMORY':>10}")
    for one in found:
        date = strftime("%Y-%m-%d %H:%M:%S", localtime(one["date"]))
        size = common.human_size(one["vm-state-size"]) if one["complete"] else "incomplete"
        print(f"{one['tag']:<20} {date} {one['vm-clock-s']:>8.1f} s {size:>10}")


_PRINTERS: dict[str, Callable[[Any], None]] = {
    "status": _print_status,
    "disks": _print_disks,
    "snapshot list": _print_states,
    "snapshot save": lambda found: print(
        f"{common.human_size(found['vm-state-size'])} of memory and devices"
    ),
    "disk backup": lambda found: print(f"{common.human_size(found['copied'])} copied"),
    "disk pull": lambda found: print(f"{common.human_size(found)} copied"),
    "console": lambda found: print(found.replace("\r\n", "\n"), end=""),
    "expect": lambda found: print(found.replace("\r\n", "\n").rstrip("\r\n")),
    "commit": lambda found: print(f"{common.human_size(found)} written into the images"),
}


VERB = Verb(
    "ctl",
    "Speak to a guest that `enban run` runs, by its name.",
    "ctl NAME REQUEST",
    (
        Flag("-k --layout", "With type: keyboard layout, else the one `run -k` was told", value="LAYOUT"),
        Flag("--timeout", "With expect: seconds to wait (60)", value="SECONDS"),
        Flag("--bitmap", "With disk backup: have this bitmap record what changes from now on", value="NAME"),
        Flag("--base", "With disk backup: copy only what changed since this backup", value="FILE"),
        Flag("--force", "With shutdown: end QEMU without asking the guest"),
        Flag("--grace", "With shutdown: seconds the guest has (30)", value="SECONDS"),
        common.OUTPUT,
        common.HELP,
    ),
    run,
    operands=(2, -1),
    examples=(
        ("keep the whole machine as it is", "ctl disk snapshot save clean"),
        ("and bring it back", "ctl disk snapshot load clean"),
        ("see what it shows", "ctl disk screenshot screen.png"),
        ("type on a Japanese keyboard", "ctl disk type -k ja 'C:\\dir'"),
    ),
    words=[(f"{request} {values}".strip(), text) for request, values, text in REQUESTS],
)
