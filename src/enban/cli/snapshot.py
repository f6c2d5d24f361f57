"""`enban snapshot`: the internal snapshots of an image."""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments

_ACTIONS = ("-l", "-c", "-a", "-d")


def run(arguments: Arguments) -> int:
    chosen = [action for action in _ACTIONS if arguments.on(action)] or ["-l"]
    if len(chosen) > 1:
        raise UsageError(f"{' and '.join(chosen)} do not go together", hint="do one thing at a time")
    name = arguments.operands[0]
    action = chosen[0]
    if action == "-l":
        return _list(arguments, name)
    if arguments.on("-U"):
        raise UsageError("--force-share is for reading only")
    tag = arguments.text(action)
    with common.open_disk(arguments, name, format=arguments.text("-f"), writable=True) as disk:
        if action == "-c":
            disk.create_snapshot(tag)
        elif action == "-a":
            disk.apply_snapshot(tag)
        else:
            disk.delete_snapshot(tag)
    return 0


def _list(arguments: Arguments, name: str) -> int:
    from enban.cli.info import snapshot_lines
    from enban.jobs.info import image_info

    facts = image_info(
        common.reference(arguments, name),
        format=arguments.text("-f"),
        gate=common.gate(arguments),
        force_share=arguments.on("-U"),
    )[0]
    snapshots = facts.get("snapshots", [])
    if arguments.text("--output") == "json":
        common.print_json(snapshots)
    elif snapshots and not arguments.on("-q"):
        print("Snapshot list:")
        print("\n".join(snapshot_lines(snapshots)))
    return 0


VERB = Verb(
    "snapshot",
    "List, create, apply and delete the snapshots inside an image.",
    "snapshot [flags] [-l | -c NAME | -a NAME | -d NAME] FILE",
    (
        Flag("-l --list", "List the snapshots (also what happens without any of these four)"),
        Flag("-c --create", "Keep the present state of the disk under a name", value="NAME"),
        Flag("-a --apply", "Go back to a snapshot, by name or id; the present state is lost", value="NAME"),
        Flag("-d --delete", "Remove a snapshot, by name or id", value="NAME"),
        common.FORMAT,
        common.OUTPUT,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(1, 1),
    examples=(
        ("keep the state of today", "snapshot -c monday disk.qcow2"),
        ("go back to it", "snapshot -a monday disk.qcow2"),
        ("copy it out", "convert -l monday -O raw disk.qcow2 monday.img"),
    ),
    notes="Each of them happens as a whole or not at all, also if the power fails in the middle.",
)
