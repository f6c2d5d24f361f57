"""`enban torture`: does a disk keep its promises? Crashes, faults, kills, storms, broken images.

Exit codes: 0 nothing found, 1 a promise was broken.
"""

from __future__ import annotations

from enban.cli import common
from enban.cli.options import Flag, Verb
from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments
    from enban.lab.campaign import Screen
    from enban.lab.parts import Part

PARTS = ("crash", "faults", "full", "storm", "kill", "fuzz")
SERVER = "an NBD address"
# What a flag is for, where it is not for everything.
FOR = {
    "--only": ("all", *PARTS),
    "--script": ("crash",),
    "--server": ("kill",),
    "--corpus": ("all", "fuzz"),
    "--overwrite": (SERVER,),
}
WITH_PEER = ("--peer", "--seed", "--count", "--output", "-p", "-q")
MOST = (1 << 63) - 1
LENGTHS = ("--quick", "--time", "--count")


def run(arguments: Arguments) -> int:
    from enban.lab.campaign import QUICK_S, Campaign, Screen

    if arguments.on("--list"):
        return _list()
    screen = Screen(plain=arguments.on("-p"), silent=arguments.on("-q"))
    if arguments.on("--peer"):
        return _peer(arguments, screen)
    what = arguments.operands[0] if arguments.operands else "all"
    _judge_flags(arguments, what)
    from pathlib import Path

    seed = _number(arguments, "--seed", 1)
    seconds = QUICK_S if arguments.on("--quick") else parse_duration(arguments.text("--time", "60s"))
    campaign = Campaign(
        _parts(arguments, what, seed),
        seed=seed,
        seconds=seconds,
        pieces=_number(arguments, "--count", 1, least=1) if arguments.on("--count") else 0,
        directory=Path(arguments.text("--findings", "torture-findings")),
        screen=screen,
    )
    findings = campaign.run()
    if arguments.text("--output") == "json":
        common.print_json(campaign.as_dict())
    elif not arguments.on("-q") or findings:
        print(campaign.table())
    if campaign.stopped is not None and not findings:
        raise campaign.stopped
    return 1 if findings else 0


def _is_address(what: str) -> bool:
    return "://" in what or what.startswith(("nbd:", "nbd+unix:"))


def _judge_flags(arguments: Arguments, what: str) -> None:
    """Refuse what would be left aside without a word. Raises UsageError."""
    kind = SERVER if _is_address(what) else what
    if kind not in ("all", *PARTS, SERVER):
        raise UsageError(f"there is no part '{what}'", hint=f"use all, {', '.join(PARTS)}, or {SERVER}")
    for flag, kinds in FOR.items():
        if arguments.on(flag) and kind not in kinds:
            raise UsageError(f"{flag} is for {', '.join(kinds)}", hint="see: enban torture --help")
    lengths = [flag for flag in LENGTHS if arguments.on(flag)]
    if len(lengths) > 1:
        raise UsageError(f"{' and '.join(lengths)} contradict each other", hint="give one of them")


def _parts(arguments: Arguments, what: str, seed: int) -> list[Part]:
    from enban.errors import from_oserror
    from enban.lab.campaign import make_parts

    if _is_address(what):
        from enban.lab.blackbox import BlackBoxPart

        if not arguments.on("--overwrite"):
            raise UsageError(
                "this overwrites what the export holds", hint="if that is wanted, say --overwrite"
            )
        return [BlackBoxPart(seed, what)]
    script, text = arguments.text("--script"), None
    if arguments.on("--script"):
        try:
            with open(script, encoding="utf-8") as file:
                text = file.read()
        except OSError as error:
            raise from_oserror(error, "read the script", script) from None
        except UnicodeDecodeError:
            raise UsageError("no text, so no script", path=script) from None
    corpus = arguments.text("--corpus")
    try:
        return make_parts(
            PARTS if what == "all" else (what,),
            seed,
            only=arguments.text("--only"),
            script=text,
            server=arguments.text("--server"),
            corpus=corpus,
        )
    except OSError as error:
        raise from_oserror(error, "read the corpus", corpus) from None


def _peer(arguments: Arguments, screen: Screen) -> int:
    from enban.lab.peer import side_by_side

    beside = [flag for flag in arguments.values if flag not in WITH_PEER] + arguments.operands
    if beside:
        raise UsageError(f"--peer has no use for {beside[0]}", hint=f"it takes {', '.join(WITH_PEER[1:])}")
    rows = side_by_side(_number(arguments, "--seed", 1), _number(arguments, "--count", 1, least=1), screen)
    if arguments.text("--output") == "json":
        common.print_json([row.as_dict() for row in rows])
    else:
        from enban.lab.peer import table

        print(table(rows))
    return 1 if any(row.ours and row.broken for row in rows) else 0


def _list() -> int:
    from enban.lab.campaign import make_parts

    for part in make_parts(PARTS, 1):
        print(f"{part.name}: {' '.join(image.name for image in part.kinds)}")
        part.close()
    return 0


def _number(arguments: Arguments, flag: str, default: int, *, least: int = 0) -> int:
    return common.number(arguments, flag, default, least=least, most=MOST)


def parse_duration(text: str) -> float:
    """Seconds of `90`, `90s`, `15m`, `8h`, `2d`. Raises UsageError."""
    unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}.get(text[-1:], 0)
    digits = text[:-1] if unit else text
    if not (digits.isascii() and digits.isdigit()) or not int(digits):
        raise UsageError(f"'{text}' is no time", hint="examples: 90s, 15m, 8h")
    return float(int(digits) * (unit or 1))


VERB = Verb(
    "torture",
    "Find out whether disks keep their promises: power cuts, failing and full disks, kill -9, many requests "
    "at once, broken images.",
    "torture [flags] [all|crash|faults|full|storm|kill|fuzz|nbd://...]",
    (
        Flag("--time", "How long: 90s, 15m, 8h (60s)", value="TIME"),
        Flag("--quick", "All of it in 30 seconds"),
        Flag("--seed", "Where to begin; the same seed does the same work (1)", value="N"),
        Flag("--only", "This kind of image alone; --list names them", value="KIND"),
        Flag("--count", "So many pieces of each part, in place of a time", value="N"),
        Flag("--script", "This workload alone: a script that a finding left (crash)", value="FILE"),
        Flag(
            "--server", "Another server to kill: a command with {socket} and {image} in it", value="COMMAND"
        ),
        Flag(
            "--corpus",
            "Images to try first: a directory of .img and zlib-packed .z files (fuzz)",
            value="DIR",
        ),
        Flag("--overwrite", "Yes, the content of the NBD export may be overwritten"),
        Flag(
            "--peer",
            "The crash explorer on QEMU's own qcow2 driver too, side by side with ours",
            value="PEER",
            choices=("qemu",),
        ),
        Flag("--findings", "Where findings are kept (torture-findings)", value="DIR"),
        Flag("--list", "Name the kinds of images of each part"),
        common.OUTPUT,
        common.PROGRESS,
        common.QUIET,
        common.HELP,
    ),
    run,
    operands=(0, 1),
    examples=(
        ("half a minute of everything", "torture --quick"),
        ("a night of it", "torture --time 8h"),
        ("do a finding again", "torture crash --only 512-chain --seed 7 --count 1"),
        ("somebody else's server", "torture nbd://127.0.0.1:10809/scratch --overwrite --time 5m"),
        ("kill somebody else's server", "torture kill --server 'qemu-nbd -t -k {socket} -f qcow2 {image}'"),
    ),
    notes="Exit code: 0 nothing was found, 1 a promise was broken. For each finding a directory is left with "
    "the seed, the shortest script that shows it, and the images before and after.",
)
