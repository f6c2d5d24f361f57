"""`enban cdrom`: the CD-ROM drives of this machine and what lies in them."""

from __future__ import annotations

from enban.cli import common
from enban.cli.common import human_size, shown
from enban.cli.options import Verb
from enban.errors import EnbanError, HostError, NoMediumError, UsageError
from enban.storage.cdrom import DISC, STATE_WORDS, Drive, drives, find_drive, is_drive

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enban.cli.options import Arguments
    from enban.storage.cdrom import Disc

_WORDS = {"list": 0, "info": 1, "eject": 1, "close": 1, "lock": 1, "unlock": 1, "read": 2}
NO_DRIVE = "there is no CD-ROM drive on this machine"


def run(arguments: Arguments) -> int:
    word, *names = arguments.operands
    if word not in _WORDS:
        raise UsageError(f"cdrom cannot '{word}'", hint=f"use {', '.join(_WORDS)}")
    if len(names) > _WORDS[word]:
        raise UsageError(f"cdrom {word}: too many names", hint="see: enban cdrom --help")
    if word == "list":
        return _list(arguments)
    if word == "read":
        return _read(arguments, names)
    drive = Drive(_drive_name(names))
    if word == "info":
        return _info(arguments, drive)
    if word == "eject":
        drive.eject()
        done = "ejected"
    elif word == "close":
        done = STATE_WORDS[drive.close_tray()]
    else:
        drive.lock(word == "lock")
        done = f"{word}ed"
    if not arguments.on("-q"):
        print(f"{drive.path}: {done}")
    return 0


def _drive_name(names: list[str]) -> str:
    """A device file, `first`, or the default: the first drive with a disc, else the first."""
    name = names[0] if names else ""
    if name == "first":
        return find_drive()
    return find_drive(name, with_disc=True) if not name else find_drive(name)


def _facts(drive: Drive) -> dict[str, Any]:
    """What there is to say of a drive; "error" where it cannot be looked at."""
    facts: dict[str, Any] = {"device": drive.path}
    model = drive.kernel.model(drive.kernel.device_name(drive.path))
    if model:
        facts["model"] = model
    try:
        state = drive.state()
        facts["state"] = STATE_WORDS[state]
        disc = drive.disc() if state == DISC else None
    except HostError as error:
        facts["error"] = str(error)
        return facts
    if disc is not None:
        facts |= {"size": disc.size, "kind": disc.kind}
        if disc.volume:
            facts["volume"] = disc.volume
        if disc.tracks != (0, 0):
            facts |= {"tracks": disc.tracks[1] - disc.tracks[0] + 1, "lead-out": disc.lead_out}
    return facts


def _list(arguments: Arguments) -> int:
    found = [_facts(Drive(path)) for path in drives()]
    if not found:
        raise HostError(NO_DRIVE)
    with_disc = next((facts["device"] for facts in found if facts.get("state") == STATE_WORDS[DISC]), "")
    if arguments.text("--output") == "json":
        for facts in found:
            facts["first"] = facts is found[0]
            facts["first-with-disc"] = facts["device"] == with_disc
        common.print_json(found)
        return 0
    print(f"{'Device':<12}{'State':<12}{'Size':<12}Volume")
    for facts in found:
        marks = ["first"] if facts is found[0] else []
        if facts["device"] == with_disc:
            marks.append("first with a disc")
        size = human_size(facts["size"]) if "size" in facts else "-"
        columns = f"{facts['device']:<12}{facts.get('state', 'error'):<12}{size:<12}"
        print(f"{columns}{shown(facts.get('volume', '-')):<18}{', '.join(marks)}".rstrip())
    for facts in found:
        if "error" in facts:
            common.complain(facts["error"])
    return 0


def _info(arguments: Arguments, drive: Drive) -> int:
    facts = _facts(drive)
    if "error" in facts:
        raise HostError(facts["error"])
    if arguments.text("--output") == "json":
        common.print_json(facts)
        return 0
    print(f"device: {facts['device']}")
    if "model" in facts:
        print(f"model: {shown(facts['model'])}")
    print(f"state: {facts['state']}")
    if "size" in facts:
        print(f"size: {human_size(facts['size'])} ({facts['size']} bytes)")
        print(f"kind: {facts['kind']}")
        print(f"volume: {shown(facts.get('volume', '')) or '-'}")
    if "tracks" in facts:
        agrees = "as the size says" if facts["lead-out"] == facts["size"] else "not as the size says"
        print(f"table of contents: {facts['tracks']} track(s), ends at {facts['lead-out']}, {agrees}")
    return 0


def _read(arguments: Arguments, names: list[str]) -> int:
    from enban.jobs.convert import convert

    if not names:
        raise UsageError("cdrom read needs the name of the new file", hint="see: enban cdrom --help")
    *named, target = names
    _check_target(target)
    drive = Drive(_drive_name(named))
    disc = drive.disc()
    if disc is None:
        raise NoMediumError(f"no medium in the drive ({STATE_WORDS[drive.state()]})", path=drive.path)
    if disc.kind == "audio":
        raise EnbanError("the disc holds audio tracks, no data to read", path=drive.path)
    with common.progress(arguments, "read") as progress:
        result = convert(drive.path, target, source_format="raw", progress=progress.update)
    if not arguments.on("-q"):
        print(f"{drive.path}: {result.size} bytes read{_doubt(disc)}")
    return 0


def _check_target(target: str) -> None:
    """A drive where the new file is to be named is a forgotten file: it would become a file of that name."""
    from os.path import dirname, exists

    if target == "first" or is_drive(target):
        raise UsageError(
            f"cdrom read needs the name of the new file, '{target}' is a drive",
            hint="for example: enban cdrom read DEV disc.iso",
        )
    if dirname(target) == "/dev" and not exists(target):
        raise HostError("there is no such device", path=target, hint="see: enban cdrom list")


def _doubt(disc: Disc) -> str:
    """A word on a table of contents that says the disc is longer."""
    if disc.lead_out > disc.size:
        return f"; its table of contents goes on to {disc.lead_out}"
    return ""


VERB = Verb(
    "cdrom",
    "List the CD-ROM drives of this machine, show what lies in one, open and close its tray, and read a "
    "disc into a file.",
    "cdrom [flags] list | info|eject|close|lock|unlock [DEV] | read [DEV] FILE",
    (
        common.OUTPUT,
        common.PROGRESS,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(1, 3),
    examples=(
        ("which drives are there, and what is in them?", "cdrom list"),
        ("make an image of the disc", "cdrom read disc.iso"),
        ("open the second drive's tray", "cdrom eject /dev/sr1"),
    ),
    notes="Without DEV it is the first drive that has a disc, or the first drive if none has one. DEV is a "
    "device file, /dev/cdrom (the first drive, also where that link is missing), or the word first. A disc "
    "is a disk like any other: enban info /dev/sr0, enban serve -r /dev/sr0.",
)
