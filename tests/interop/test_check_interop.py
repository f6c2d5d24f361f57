"""Check and repair beside `qemu-img check`: the same numbers for every image, sound or damaged, and
what we repaired QEMU finds sound."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from random import Random
from typing import Any

import pytest

from enban.errors import EnbanError
from enban.formats.common.findings import BEYOND_QEMU, SEVERITY, CheckResult
from enban.jobs.check import check
from enban.lab.damage import COPIED, Map, damage, guest
from tests.support import needs_qemu_img, needs_qemu_io, qemu_check, qemu_img, qemu_io

MIB = 1 << 20

IMAGES = {
    "default": "",
    "512": "cluster_size=512",
    "4k": "cluster_size=4k",
    "2M": "cluster_size=2M",
    "v2": "compat=0.10,cluster_size=4k",
    "1-bit": "cluster_size=512,refcount_bits=1",
    "2-bit": "cluster_size=1k,refcount_bits=2",
    "4-bit": "cluster_size=1k,refcount_bits=4",
    "8-bit": "cluster_size=4k,refcount_bits=8",
    "32-bit": "cluster_size=4k,refcount_bits=32",
    "64-bit": "cluster_size=1k,refcount_bits=64",
    "extended": "extended_l2=on,cluster_size=16k",
    "preallocated": "preallocation=metadata,cluster_size=4k",
    "preallocated-extended": "preallocation=metadata,extended_l2=on",
    "lazy": "lazy_refcounts=on,cluster_size=4k",
    "external": "data_file=external.raw,cluster_size=4k",
}
# QEMU 7.2's `check -r` of an image with bitmaps and snapshots loses the snapshots: few have both.
WITH_BITMAPS = ("default", "512", "1-bit", "2-bit", "32-bit")
DAMAGED = [name for name in IMAGES if name not in ("2M", "preallocated-extended")]  # large files

pytestmark = pytest.mark.interop


def fill(path: Path, size: int, random: Random, count: int) -> None:
    commands = []
    for number in range(count):
        offset = random.randrange(size) // 512 * 512
        length = max(512, min(size - offset, random.choice((512, 4096, 150000)) // 512 * 512))
        kind = random.choice(
            ("write -P {p}", "write -P {p}", "write -P {p}", "write -z", "write -z -u", "discard")
        )
        commands.append(f"{kind.format(p=number % 255 + 1)} {offset} {length}")
    qemu_io(path, *commands, cwd=path.parent)


def make(directory: Path, name: str) -> Path:
    """An image written by QEMU: data, zeroes, and where possible snapshots, compressed clusters, bitmaps."""
    options, random = IMAGES[name], Random(name)
    path, size = directory / f"{name}.qcow2", random.choice((MIB, 3 * MIB, 4 * MIB + 512))
    qemu_img("create", "-q", "-f", "qcow2", "-o", options or "compat=1.1", path, str(size), cwd=directory)
    fill(path, size, random, 20)
    if name in ("external", "preallocated", "preallocated-extended", "lazy"):
        return path
    if name != "extended":
        packed = directory / f"{name}-packed.qcow2"
        qemu_img("convert", "-c", "-O", "qcow2", *(("-o", options) if options else ()), path, packed)
        packed.replace(path)
        fill(path, size, random, 6)
    if name not in ("1-bit", "2-bit", "4-bit", "8-bit"):  # packed data may fill such a refcount alone
        for number in range(3):
            qemu_img("snapshot", "-c", f"s{number}", path)
            fill(path, size, random, 6)
        qemu_img("snapshot", "-d", "s1", path)
    if name in WITH_BITMAPS:
        qemu_img("bitmap", "--add", "-g", "4096", path, "marks")
        fill(path, size, random, 3)
    return path


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("images")
    return {name: make(directory, name) for name in IMAGES}


def by_qemu(path: Path, *repair: str) -> dict[str, Any] | None:
    """What qemu-img says; None if it does not get through."""
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", *repair, str(path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=path.parent,
        timeout=60,
    )
    try:
        facts: dict[str, Any] = json.loads(done.stdout)
    except ValueError:
        return None
    return facts


def as_qemu_counts(result: CheckResult) -> dict[str, Any]:
    """The numbers without the kinds of findings that QEMU does not have."""
    facts = result.as_dict()
    beyond = {kind: result.kinds.get(kind, 0) for kind in BEYOND_QEMU}
    for key, severity in (("corruptions", "corruption"), ("leaks", "leak")):
        less = sum(count for kind, count in beyond.items() if SEVERITY[kind] == severity)
        facts[key] = facts.get(key, 0) - less
        if not facts[key]:
            del facts[key]
    return facts


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("name", IMAGES)
def test_sound_images_give_the_same_json(images: dict[str, Path], name: str) -> None:
    result = check(images[name])
    assert result.clean
    assert result.as_dict() == by_qemu(images[name])


def compare(path: Path, note: object) -> set[str]:
    """The same numbers from both, but where QEMU stops looking earlier. Returns the kinds of findings."""
    theirs = by_qemu(path)
    try:
        result = check(path, format="qcow2")
    except EnbanError:
        assert theirs is None, (note, theirs)
        return set()
    if theirs is None:  # a bitmap directory it does not like ends its check
        assert not result.clean, note
        return set(result.kinds)
    ours = as_qemu_counts(result)
    if {"l1-no-table", "snapshot-table"} & set(result.kinds):
        return set()  # QEMU reads the header as an L2 table, and zeros as snapshots
    if "refcount-unreadable" in result.kinds:
        # QEMU does not look at what comes after a refcount that it cannot read.
        assert ours.pop("corruptions", 0) >= theirs.pop("corruptions", 0), note
        ours.pop("image-end-offset", 0)
        theirs.pop("image-end-offset", 0)
    assert ours == theirs, (note, result.kinds)
    return set(result.kinds)


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_images_give_the_same_numbers(images: dict[str, Path], name: str, tmp_path: Path) -> None:
    seen: set[str] = set()
    for seed in range(12):
        path = tmp_path / f"{seed}.qcow2"
        image = bytearray(images[name].read_bytes())
        note = (name, seed, damage(image, Random(f"{name} {seed}")))
        path.write_bytes(image)
        if name == "external":
            shutil.copy(images[name].parent / "external.raw", tmp_path)
        seen |= compare(path, note)
    assert len(seen) >= 2


@pytest.mark.long
@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("name", DAMAGED)
def test_many_damaged_images_give_the_same_numbers(
    images: dict[str, Path], name: str, tmp_path: Path
) -> None:
    if name == "external":
        shutil.copy(images[name].parent / "external.raw", tmp_path)
    path = tmp_path / "damaged.qcow2"
    for seed in range(1000, 1400):
        image = bytearray(images[name].read_bytes())
        note = (name, seed, damage(image, Random(f"{name} {seed}")))
        path.write_bytes(image)
        compare(path, note)


# -- repair ----------------------------------------------------------------------------------


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("name", [name for name in DAMAGED if name != "external"])
def test_what_was_repaired_is_sound_to_qemu(images: dict[str, Path], name: str, tmp_path: Path) -> None:
    clean = 0
    for seed in range(8):
        path = tmp_path / f"{seed}.qcow2"
        image = bytearray(images[name].read_bytes())
        note = (name, seed, damage(image, Random(f"repair {name} {seed}")))
        path.write_bytes(image)
        try:
            result = check(path, "all", format="qcow2")
        except EnbanError:
            continue
        if result.clean:
            assert by_qemu(path) == check(path).as_dict(), note
            clean += 1
    assert clean >= 2


def simple_damage(image: bytearray, random: Random) -> None:
    """Wrong refcounts and flags, but no cluster in use with refcount 0: that makes QEMU write all
    refcounts anew, and count in another way."""
    places = Map(image)
    data = places.data_places()
    for place in random.sample(data, min(3, len(data))):
        places.put(place, places.word(place) ^ COPIED)
    for place in random.sample(data, min(3, len(data))):
        places.put(place, 0)
        if places.step == 16:
            places.put(place + 8, 0)
    width = refcount_bytes(image)
    for _ in range(random.randrange(4) if width else 0):
        at = places.blocks[0] + width * random.randrange(20)
        count = int.from_bytes(image[at : at + width], "big")
        image[at : at + width] = (1 if count > 1 else 5).to_bytes(width, "big")


def refcount_bytes(image: bytearray) -> int:
    return 2 if Map(image).version == 2 else (1 << int.from_bytes(image[96:100], "big")) // 8


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("mode", ["leaks", "all"])
@pytest.mark.parametrize("name", ["4k", "v2", "1-bit", "2-bit", "8-bit", "64-bit", "extended", "lazy"])
def test_a_repair_fixes_and_counts_as_much(
    images: dict[str, Path], name: str, mode: str, tmp_path: Path
) -> None:
    for seed in range(5):
        ours, theirs = tmp_path / f"{seed}-ours.qcow2", tmp_path / f"{seed}-theirs.qcow2"
        image = bytearray(images[name].read_bytes())
        simple_damage(image, Random(f"{name} {seed}"))
        ours.write_bytes(image)
        theirs.write_bytes(image)
        before = guest(image)
        result = check(ours, mode)
        qemu = by_qemu(theirs, "-r", mode)
        assert qemu is not None
        assert guest(ours.read_bytes()) == before
        fixed = (qemu.get("corruptions-fixed", 0), qemu.get("leaks-fixed", 0))
        if "leak-past-end" not in result.repaired_kinds:
            assert (result.corruptions_fixed, result.leaks_fixed) == fixed, (seed, result.repaired)
        assert as_qemu_counts(check(ours)) == by_qemu(ours)
        if mode == "all":
            assert result.clean and by_qemu(ours) == check(ours).as_dict()


@needs_qemu_img
@needs_qemu_io
def test_qemu_goes_on_writing_where_we_repaired(images: dict[str, Path], tmp_path: Path) -> None:
    for name in ("4k", "extended", "64-bit"):
        path = tmp_path / f"{name}.qcow2"
        image = bytearray(images[name].read_bytes())
        places = Map(image)
        places.put(places.table[0], 0)  # all refcounts are gone
        path.write_bytes(image)
        before = guest(image)
        assert check(path, "all").clean
        fill(path, MIB, Random(name), 30)
        qemu_check(path)
        qemu_img("snapshot", "-c", "after", path)
        qemu_img("snapshot", "-d", "s0", path)
        qemu_check(path)
        assert check(path).clean and len(guest(path.read_bytes())) == len(before)


@needs_qemu_img
@needs_qemu_io
def test_a_repair_keeps_snapshots_and_bitmaps(images: dict[str, Path], tmp_path: Path) -> None:
    for mode in ("leaks", "all"):
        path = tmp_path / f"{mode}.qcow2"
        image = bytearray(images["default"].read_bytes())
        places = Map(image)
        places.put(places.data_places()[0], 0)
        path.write_bytes(image)
        before = json.loads(qemu_img("info", "--output=json", path))
        assert len(before["snapshots"]) == 2 and before["format-specific"]["data"]["bitmaps"]
        assert check(path, mode).leaks_fixed
        qemu_check(path)
        after = json.loads(qemu_img("info", "--output=json", path))
        assert after["snapshots"] == before["snapshots"]
        assert after["format-specific"] == before["format-specific"]
