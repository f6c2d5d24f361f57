"""Images of every kind, made by QEMU's programs: what the inspecting verbs are held against."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

from tests.support import KIB, MIB, qemu_img, qemu_io

Maker = Callable[[Path], Path]
ZOO: dict[str, Maker] = {}

# Writes that leave data, zeros and nothing in many places, in a disk of 4 MiB.
SCATTERED = (
    "write -P 1 0 4k",
    "write -P 2 100k 300k",
    "write -P 3 1M 65536",
    "write -z 1500k 200k",
    "write -z -u 1900k 90k",
    "write -P 4 2000k 10k",
    "discard 120k 130k",
    "write -P 5 3M 700k",
    "discard 3200k 64k",
    "write -P 6 4190208 4096",
)


def animal(name: str) -> Callable[[Maker], Maker]:
    def add(maker: Maker) -> Maker:
        ZOO[name] = maker
        return maker

    return add


def scattered_qcow2(path: Path, *options: str, size: str = "4M") -> Path:
    chosen = [word for option in options for word in ("-o", option)]
    qemu_img("create", "-q", "-f", "qcow2", *chosen, path, size, cwd=path.parent)
    qemu_io(path, *SCATTERED, cwd=path.parent)
    return path


def _plain(name: str, *options: str) -> None:
    @animal(name)
    def make(folder: Path) -> Path:
        return scattered_qcow2(folder / f"{name}.qcow2", *options)


_plain("v3")
_plain("v2", "compat=0.10")
_plain("cluster-512", "cluster_size=512")
_plain("cluster-4k-refcount-1", "cluster_size=4k,refcount_bits=1")
_plain("cluster-2M", "cluster_size=2M")
_plain("refcount-64", "refcount_bits=64")
_plain("lazy", "lazy_refcounts=on")
_plain("subclusters", "extended_l2=on")
_plain("subclusters-16k", "extended_l2=on,cluster_size=16k")
_plain("metadata", "preallocation=metadata")
_plain("metadata-refcount-1", "preallocation=metadata,refcount_bits=1,cluster_size=4k")
_plain("falloc", "preallocation=falloc")
_plain("full", "preallocation=full")
_plain("metadata-subclusters", "preallocation=metadata,extended_l2=on")
_plain("data-file", "data_file=data-file.raw")
_plain("raw-data-file", "data_file=raw-data-file.raw,data_file_raw=on")


@animal("raw")
def raw(folder: Path) -> Path:
    path = folder / "disk.raw"
    with path.open("wb") as file:
        file.truncate(4 * MIB)
        for offset in (0, 64 * KIB, 1 * MIB, 3 * MIB):
            file.seek(offset)
            file.write(os.urandom(40 * KIB))
    return path


@animal("raw-odd-size")
def raw_odd_size(folder: Path) -> Path:
    path = folder / "odd.raw"
    path.write_bytes(b"\x07" * 70001)
    return path


@animal("raw-empty")
def raw_empty(folder: Path) -> Path:
    path = folder / "empty.raw"
    path.write_bytes(b"")
    return path


@animal("raw-one-hole")
def raw_hole(folder: Path) -> Path:
    path = folder / "hole.raw"
    with path.open("wb") as file:
        file.truncate(1 * MIB)
    return path


@animal("qcow2-of-size-0")
def nothing(folder: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", folder / "nothing.qcow2", "0")
    return folder / "nothing.qcow2"


@animal("qcow2-empty")
def empty(folder: Path) -> Path:
    qemu_img("create", "-q", "-f", "qcow2", folder / "empty.qcow2", "64G")
    return folder / "empty.qcow2"


@animal("fragmented")
def fragmented(folder: Path) -> Path:
    path = folder / "fragmented.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", path, "8M")
    order = list(range(0, 2048, 2))
    random.Random(5).shuffle(order)
    qemu_io(path, *(f"write -P 9 {cluster * 4}k 4k" for cluster in order[:600]))
    return path


@animal("compressed")
def compressed(folder: Path) -> Path:
    source = scattered_qcow2(folder / "compressed-source.qcow2")
    qemu_img("convert", "-c", "-O", "qcow2", source, folder / "compressed.qcow2")
    qemu_io(folder / "compressed.qcow2", "write -P 8 130k 4k", "write -P 8 1M 64k")
    return folder / "compressed.qcow2"


@animal("compressed-zstd")
def compressed_zstd(folder: Path) -> Path:
    source = scattered_qcow2(folder / "zstd-source.qcow2")
    target = folder / "zstd.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "compression_type=zstd", source, target)
    return target


@animal("snapshots")
def snapshots(folder: Path) -> Path:
    path = scattered_qcow2(folder / "snapshots.qcow2")
    qemu_img("snapshot", "-c", "before", path)
    qemu_io(path, "write -P 11 0 64k", "discard 1M 64k")
    qemu_img("snapshot", "-c", "after", path)
    qemu_io(path, "write -P 12 2M 64k")
    return path


@animal("bitmaps")
def bitmaps(folder: Path) -> Path:
    path = scattered_qcow2(folder / "bitmaps.qcow2")
    qemu_img("bitmap", "--add", path, "first")
    qemu_img("bitmap", "--add", "--disable", "-g", "32k", path, "second")
    return path


def overlay(path: Path, base: Path, format: str, *options: str, size: str = "") -> Path:
    chosen = [word for option in options for word in ("-o", option)]
    words = ["create", "-q", "-f", "qcow2", *chosen, "-b", base.name, "-F", format]
    qemu_img(*words, path, *([size] if size else []))
    return path


@animal("chain")
def chain(folder: Path) -> Path:
    base = scattered_qcow2(folder / "chain-base.qcow2")
    middle = overlay(folder / "chain-middle.qcow2", base, "qcow2", "cluster_size=4k")
    qemu_io(middle, "write -P 21 200k 30k", "write -z 1M 8k", "discard 3100k 50k")
    top = overlay(folder / "chain.qcow2", middle, "qcow2")
    qemu_io(top, "write -P 22 64k 64k", "write -z 3M 64k")
    return top


@animal("chain-longer-than-raw-base")
def chain_raw(folder: Path) -> Path:
    base = folder / "short.raw"
    base.write_bytes(b"\x05" * 100_000 + bytes(200_000) + b"\x06" * 1_000)
    top = overlay(folder / "chain-raw.qcow2", base, "raw", size="2M")
    qemu_io(top, "write -P 31 0 64k", "write -P 31 1M 64k")
    return top


@animal("chain-short-middle")
def chain_short_middle(folder: Path) -> Path:
    base = scattered_qcow2(folder / "short-middle-base.qcow2")
    middle = overlay(folder / "short-middle.qcow2", base, "qcow2", size="1100k")
    top = overlay(folder / "short-middle-top.qcow2", middle, "qcow2", size="4M")
    qemu_io(top, "write -P 41 1M 64k")
    return top


@animal("chain-subclusters")
def chain_subclusters(folder: Path) -> Path:
    base = scattered_qcow2(folder / "subclusters-base.qcow2")
    top = overlay(folder / "chain-subclusters.qcow2", base, "qcow2", "extended_l2=on,cluster_size=128k")
    qemu_io(top, "write -P 51 4k 8k", "write -z 300k 12k", "write -P 52 1M 4k", "discard 1M 4k")
    return top
