"""`enban info` starts fast because it imports little. This is the list it may not grow."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.command import environment
from tests.support import make_qcow2

HEAVY = {
    "argparse",
    "asyncio",
    "concurrent.futures",
    "contextlib",
    "ctypes",
    "dataclasses",
    "enum",
    "functools",
    "getopt",
    "importlib.metadata",
    "inspect",
    "isal",
    "json",
    "logging",
    "numpy",
    "optparse",
    "pathlib",
    "re",
    "shutil",
    "signal",
    "socket",
    "subprocess",
    "tempfile",
    "threading",
    "traceback",
    "typing",
    "zlib",
    "zstandard",
}
PROGRAM = """
import sys
from enban.cli import main
code = main(sys.argv[1:])
print(code, *sorted(sys.modules), file=sys.stderr)
"""


@pytest.mark.parametrize("backing", [False, True])
def test_info_imports_nothing_heavy(tmp_path: Path, backing: bool) -> None:
    path = make_qcow2(tmp_path / "base.qcow2", 1 << 20)
    if backing:
        path = make_qcow2(tmp_path / "top.qcow2", 1 << 20, backing_file="base.qcow2", backing_fmt="qcow2")
    # -S and -I: without what this Python's site-packages import at start.
    source = str(Path(__file__).parents[2] / "src")
    done = subprocess.run(
        [
            sys.executable,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {source!r})\n{PROGRAM}",
            "info",
            "--backing-chain",
            str(path),
        ],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    code, *modules = done.stderr.split()
    assert code == "0"
    assert "virtual size: 1 MiB" in done.stdout
    found = HEAVY & set(modules)
    assert not found, f"enban info imports {sorted(found)}"
    ours = [name for name in modules if name.startswith("enban")]
    assert not [name for name in ours if name.startswith(("enban.cli.", "enban.jobs."))] or {
        name for name in ours if name.startswith(("enban.cli.", "enban.jobs."))
    } == {"enban.cli.common", "enban.cli.options", "enban.cli.info", "enban.jobs.info"}
    assert len(modules) < 90, f"{len(modules)} modules"
