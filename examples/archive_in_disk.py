"""Give a disk to a library that wants a file: list the tar or zip archive that an image holds.

    enban convert -c -f raw -O qcow2 files.zip files.qcow2      # any file is a raw disk
    python examples/archive_in_disk.py files.qcow2 [NAME]       # list it, or print one member

`Disk.stream()` is an `io.RawIOBase`; with `io.BufferedReader` around it small reads are cheap.
"""

from __future__ import annotations

import io
import sys
import tarfile
import zipfile
from typing import BinaryIO

import enban


def names(file: BinaryIO) -> list[str]:
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return archive.namelist()
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        return archive.getnames()


def member(file: BinaryIO, name: str) -> bytes:
    """The content of a member. Raises KeyError."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            return archive.read(name)
    file.seek(0)
    with tarfile.open(fileobj=file) as archive:
        content = archive.extractfile(name)
        if content is None:
            raise KeyError(f"{name} is not a regular file")
        return content.read()


def main(arguments: list[str]) -> int:
    if not 1 <= len(arguments) <= 2:
        print("usage: archive_in_disk.py IMAGE [NAME]", file=sys.stderr)
        return 2
    try:
        with enban.open(arguments[0]) as disk, io.BufferedReader(disk.stream(), 64 << 10) as file:
            if len(arguments) == 1:
                print("\n".join(names(file)))
            else:
                sys.stdout.buffer.write(member(file, arguments[1]))
                sys.stdout.flush()
    except KeyError as error:
        print(f"archive_in_disk: {error.args[0]}", file=sys.stderr)
        return 1
    except (tarfile.TarError, zipfile.BadZipFile):
        print(f"archive_in_disk: {arguments[0]} holds no tar or zip archive", file=sys.stderr)
        return 1
    except enban.EnbanError as error:
        print(f"archive_in_disk: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
