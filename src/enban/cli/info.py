"""`enban info`: what an image is."""

from __future__ import annotations

from enban.cli import common
from enban.cli.common import human_size, shown
from enban.cli.options import Flag, Verb
from enban.jobs.info import image_info

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from enban.cli.options import Arguments


def run(arguments: Arguments) -> int:
    chain = arguments.on("--backing-chain")
    found = image_info(
        common.reference(arguments, arguments.operands[0]),
        format=arguments.text("-f"),
        chain=chain,
        gate=common.gate(arguments),
        force_share=arguments.on("-U"),
    )
    if arguments.text("--output") == "json":
        common.print_json(found if chain else found[0])
    else:
        print("\n\n".join("\n".join(describe(info)) for info in found))
    return 0


def describe(info: dict[str, Any]) -> list[str]:
    """The facts of one image, for people."""
    size = info["virtual-size"]
    lines = [
        f"image: {shown(info['filename'])}",
        f"file format: {info['format']}",
        f"virtual size: {human_size(size)} ({size} bytes)",
        f"disk size: {human_size(info['actual-size']) if 'actual-size' in info else 'unavailable'}",
    ]
    if info.get("encrypted"):
        lines.append("encrypted: yes")
    if "cluster-size" in info:
        lines.append(f"cluster_size: {info['cluster-size']}")
    if info.get("dirty-flag"):
        lines.append("cleanly shut down: no")
    if "backing-filename" in info:
        name, full = info["backing-filename"], info["full-backing-filename"]
        actual = f" (actual path: {shown(full)})" if full != name else ""
        lines.append(f"backing file: {shown(name)}{actual}")
        if "backing-filename-format" in info:
            lines.append(f"backing file format: {shown(info['backing-filename-format'])}")
    if info.get("snapshots"):
        lines += ["Snapshot list:", *snapshot_lines(info["snapshots"])]
    if "format-specific" in info:
        lines.append("Format specific information:")
        lines += _tree(info["format-specific"]["data"], 4)
    return lines


def snapshot_lines(snapshots: list[dict[str, Any]]) -> list[str]:
    from time import localtime, strftime

    lines = [f"{'ID':<9} {'TAG':<16} {'VM SIZE':>8} {'DATE':>19} {'VM CLOCK':>12} {'ICOUNT':>10}"]
    for snapshot in snapshots:
        date = strftime("%Y-%m-%d %H:%M:%S", localtime(snapshot["date-sec"]))
        seconds = snapshot["vm-clock-sec"]
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
        clock += f".{snapshot['vm-clock-nsec'] // 1_000_000:03d}"
        icount = str(snapshot.get("icount", ""))
        lines.append(
            f"{shown(snapshot['id']):<9} {shown(snapshot['name']):<16} "
            f"{human_size(snapshot['vm-state-size']):>8} {date:>19} {clock:>12} {icount:>10}"
        )
    return lines


def _tree(value: Any, indent: int) -> list[str]:
    """Nested facts, one a line, dashes in names as blanks."""
    lines = []
    items = value.items() if isinstance(value, dict) else ((f"[{i}]", v) for i, v in enumerate(value))
    for key, item in items:
        label = " " * indent + key.replace("-", " ") + ":"
        if isinstance(item, dict | list):
            lines += [label, *_tree(item, indent + 4)]
        else:
            text = str(item).lower() if isinstance(item, bool) else shown(str(item))
            lines.append(f"{label} {text}")
    return lines


VERB = Verb(
    "info",
    "Show what an image is: format, sizes, backing file, snapshots, and what its format knows besides.",
    "info [flags] FILE",
    (
        common.FORMAT,
        common.OUTPUT,
        Flag("--backing-chain", "Show every image of the backing chain, top first"),
        common.IMAGE_OPTS,
        common.OBJECT,
        common.FORCE_SHARE,
        common.UNTRUSTED,
        common.HELP,
    ),
    run,
    operands=(1, 1),
    examples=(
        ("one image", "info disk.qcow2"),
        ("the image and all it is based on, for a program", "info --backing-chain --output=json disk.qcow2"),
        ("an image that a guest is using", "info -U disk.qcow2"),
    ),
)
