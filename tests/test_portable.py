"""Hosts without Linux's calls: their names are hidden before enban is imported, and the core runs.

This shows that nothing outside `storage/host.py` needs them. It does not replace a test on such a host.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# What Windows' Python has not, and what macOS' has not.
HIDE = """
import os, sys
WINDOWS = (
    "preadv pwritev pread pwrite copy_file_range posix_fallocate posix_fadvise fdatasync sendfile splice "
    "SEEK_DATA SEEK_HOLE O_DIRECT O_CLOEXEC RWF_NOWAIT RWF_DSYNC fchmod fchown"
).split()
MACOS = "copy_file_range posix_fallocate posix_fadvise fdatasync O_DIRECT RWF_NOWAIT RWF_DSYNC splice".split()
for name in {"windows": WINDOWS, "macos": MACOS}[sys.argv.pop(1)]:
    if hasattr(os, name):
        delattr(os, name)
"""
NO_FCNTL = "sys.modules['fcntl'] = None\n"


def hidden(system: str, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    start = HIDE + (NO_FCNTL if system == "windows" else "")
    return subprocess.run(
        [sys.executable, "-c", start + code, system, *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTEST_XDIST_WORKER": ""},
        timeout=280,
        check=False,
    )


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_every_core_module_imports(system: str) -> None:
    done = hidden(
        system,
        "import enban, enban.aio, enban.catalog\n"
        "import enban.storage.host as host\n"
        "from enban.cli import VERBS, load\n"
        "for name in VERBS:\n"
        "    if name != 'serve': load(name)\n"
        "import enban.formats.qcow2.check, enban.formats.qcow2.repair, enban.formats.qcow.opening\n"
        "assert not host.HAVE_COPY and not host.HAVE_DIRECT and not host.HAVE_NOWAIT\n"
        "print('imported')\n",
    )
    assert done.stdout == "imported\n", done.stderr[-2000:]


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_raw_and_qcow2_work(system: str, tmp_path: Path) -> None:
    """The whole way from the command: create, write, convert, snapshot, check, compare."""
    done = hidden(
        system,
        "import enban, hashlib\n"
        "from enban.cli import main\n"
        "from enban.storage import host\n"
        "folder = sys.argv[1]\n"
        "a, b, c = (os.path.join(folder, name) for name in ('a.qcow2', 'b.raw', 'c.qcow2'))\n"
        "assert main(['create', '-q', '-f', 'qcow2', '-o', 'preallocation=falloc', a, '4M']) == 0\n"
        "with enban.open(a, writable=True) as disk:\n"
        "    disk.pwrite(b'portable' * 5000, 70000)\n"
        "    disk.create_snapshot('s')\n"
        "    disk.write_zeroes(100000, 5000)\n"
        "    disk.discard(0, 1 << 20)\n"
        "    disk.flush()\n"
        "assert main(['convert', '-q', '-O', 'raw', a, b]) == 0\n"
        "assert main(['convert', '-q', '-c', '--verify', '-O', 'qcow2', b, c]) == 0\n"
        "for image in (a, c):\n"
        "    assert main(['check', '-q', image]) == 0\n"
        "assert main(['compare', '-q', a, c]) == 0\n"
        "with enban.open(a, writable=True) as disk:\n"
        "    disk.apply_snapshot('s')\n"
        "    assert disk.pread(40000, 70000) == b'portable' * 5000\n"
        "print('worked')\n",
        str(tmp_path),
    )
    assert done.stdout.splitlines()[-1:] == ["worked"], (done.stdout, done.stderr[-3000:])


CORE = [
    "tests/test_stateful.py",
    "tests/block",
    "tests/formats/test_raw.py",
    "tests/formats/qcow2/test_create.py",
    "tests/formats/qcow2/test_snapshots.py",
    "tests/jobs/test_convert.py",
]
# What these test is the Linux calls themselves, or a process that is killed.
LEAVE_OUT = (
    "not lock and not direct and not hole and not sparse and not interrupted and not killed and not resume"
)


@pytest.mark.parametrize("system", ["windows", "macos"])
def test_the_core_suite(system: str) -> None:
    """The engine's own tests, run where the names are missing."""
    more = (
        "and not interop and not random_damage and not no_larger and not copying_inside and not job_refuses"
    )
    done = hidden(
        system,
        "import pytest\nsys.exit(pytest.main(sys.argv[1:]))\n",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-k",
        f"{LEAVE_OUT} {more}",
        "-m",
        "not interop and not long",
        *CORE,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout.splitlines()[-1]
