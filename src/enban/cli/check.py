"""`enban check`: look for damage in an image, and repair it.

Exit codes: 0 clean (perhaps after a repair), 1 the check could not be done, 2 damage, 3 only
leaked clusters, 63 the format has no check.
"""

from __future__ import annotations

import sys

from enban.cli import common
from enban.cli.common import shown
from enban.cli.options import Flag, Verb
from enban.errors import UnsupportedOperationError
from enban.jobs.check import check

TYPE_CHECKING = False
if TYPE_CHECKING:
    from enban.cli.options import Arguments
    from enban.jobs.check import CheckResult, Finding

EXIT_NO_CHECK = 63


def run(arguments: Arguments) -> int:
    repair = arguments.text("-r") or None
    try:
        with common.progress(arguments, "check", unit="") as progress:
            result = check(
                common.reference(arguments, arguments.operands[0]),
                repair,
                arguments.text("-f"),
                progress.update,
                force_share=arguments.on("-U"),
                cache=arguments.text("-T", "writeback"),
                gate=common.gate(arguments),
            )
    except UnsupportedOperationError as error:
        common.complain(str(error))
        return EXIT_NO_CHECK
    if arguments.text("--output") == "json":
        common.print_json(result.as_dict())
    elif not arguments.on("-q"):
        _print(result)
    return result.exit_code


def _print(result: CheckResult) -> None:
    if result.leaks_fixed or result.corruptions_fixed:
        _print_findings(result.repaired)
        print("The following inconsistencies were found and repaired:\n")
        print(f"    {result.leaks_fixed} leaked clusters\n    {result.corruptions_fixed} corruptions\n")
        print("Double checking the fixed image now...")
    _print_findings(result.findings)
    if not (result.corruptions or result.leaks or result.check_errors):
        print("No errors were found on the image.")
    if result.corruptions:
        print(f"\n{result.corruptions} errors were found on the image.")
        print("Data may be corrupted, or further writes to the image may corrupt it.")
    if result.leaks:
        print(f"\n{result.leaks} leaked clusters were found on the image.")
        print("This means waste of disk space, but no harm to data.")
    if result.check_errors:
        print(f"\n{result.check_errors} internal errors have occurred during the check.")
    total, used = result.total_clusters, result.allocated_clusters
    if total and used:
        print(
            f"{used}/{total} = {used * 100 / total:.2f}% allocated, "
            f"{result.fragmented_clusters * 100 / used:.2f}% fragmented, "
            f"{result.compressed_clusters * 100 / used:.2f}% compressed clusters"
        )
    if result.image_end_offset:
        print(f"Image end offset: {result.image_end_offset}")


def _print_findings(findings: list[Finding]) -> None:
    sys.stdout.flush()
    for finding in findings:
        print(f"{finding.severity}: {shown(str(finding))}", file=sys.stderr)


VERB = Verb(
    "check",
    "Look for damage in the tables of an image, and repair it if asked to.",
    "check [flags] FILE",
    (
        common.FORMAT,
        Flag(
            "-r --repair",
            "Repair: `leaks` frees what is counted but not used, `all` also what is damaged",
            value="WHAT",
            choices=("leaks", "all"),
        ),
        common.OUTPUT,
        common.SOURCE_CACHE,
        common.PROGRESS,
        common.QUIET,
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(1, 1),
    examples=(
        ("is the image sound?", "check disk.qcow2"),
        ("give back space lost in a crash", "check -r leaks disk.qcow2"),
    ),
    notes="Exit code: 0 clean, 1 not checked, 2 damaged, 3 leaked clusters only, 63 the format has no check.",
)
