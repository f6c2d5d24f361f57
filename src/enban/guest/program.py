"""Finding QEMU and what it can do here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess

from ..errors import HostError, UsageError

PROGRAM = "qemu-system-x86_64"
PACKAGE = "qemu-system-x86"
# The oldest one the tests run with. It can exchange the file under a node (`blockdev-reopen`), which live
# resizing needs, and make screenshots as PNG.
OLDEST = (7, 2)
_KVM_GET_API_VERSION, _KVM_API = 0xAE00, 12  # linux/kvm.h


def find_qemu(wanted: str = "") -> str:
    """The path of a QEMU that will do. Raises UsageError naming the package otherwise."""
    name = wanted or PROGRAM
    path = shutil.which(name)
    if path is None:
        raise UsageError(
            f"guests run on QEMU and {name} is not installed", hint=f"install the Debian package {PACKAGE}"
        )
    version = version_of(path)
    if version < OLDEST:
        raise UsageError(
            f"{path} is QEMU {version[0]}.{version[1]}, too old",
            hint=f"install {PACKAGE} {OLDEST[0]}.{OLDEST[1]} or newer",
        )
    return path


def version_of(path: str) -> tuple[int, int]:
    """(major, minor) that a QEMU program says it is."""
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise HostError(
            f"cannot run QEMU: {error}", path=path, hint=f"reinstall the Debian package {PACKAGE}"
        ) from error
    found = re.search(r"version (\d+)\.(\d+)", done.stdout)
    if found is None:
        words = (done.stderr or done.stdout).strip().splitlines()
        raise UsageError(
            f"{path} does not say which QEMU it is{': ' + words[0] if words else ''}",
            hint=f"install the Debian package {PACKAGE}",
        )
    return int(found[1]), int(found[2])


def kvm_trouble() -> str:
    """Why KVM cannot be used here; "" if nothing speaks against it."""
    try:
        import fcntl

        fd = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except (OSError, ImportError) as error:
        return f"/dev/kvm: {getattr(error, 'strerror', None) or error}"
    try:
        if fcntl.ioctl(fd, _KVM_GET_API_VERSION, 0) != _KVM_API:
            return "/dev/kvm is of another kind"
    except OSError as error:
        return f"/dev/kvm: {error.strerror}"
    finally:
        os.close(fd)
    return ""
