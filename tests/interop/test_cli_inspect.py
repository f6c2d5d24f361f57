"""info, map, measure, check and compare give what qemu-img gives, on images of every kind."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.command import enban
from tests.cli.zoo import ZOO, scattered_qcow2
from tests.support import needs_qemu_img, needs_qemu_io, qemu_img

pytestmark = pytest.mark.interop


class Zoo:
    """Makes each image once and keeps it; the tests only read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Path] = {}

    def __getitem__(self, name: str) -> Path:
        if name not in self._made:
            (self.folder / name).mkdir()
            self._made[name] = ZOO[name](self.folder / name)
        return self._made[name]


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    return Zoo(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(params=sorted(ZOO))
def image(request: pytest.FixtureRequest, zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    made = zoo[request.param]
    monkeypatch.chdir(made.parent)  # QEMU looks for data files from here
    yield Path(made.name)


def peer(*words: str | Path) -> tuple[int, str]:
    done = subprocess.run(
        ["qemu-img", *map(str, words)], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout


@needs_qemu_img
@needs_qemu_io
class TestSame:
    def test_info_json(self, image: Path) -> None:
        ours = json.loads(enban("info", "--output=json", image).out)
        assert ours == json.loads(qemu_img("info", "--output=json", image))

    def test_info_human(self, image: Path) -> None:
        assert enban("info", image).out == qemu_img("info", image)

    def test_info_of_the_chain(self, image: Path) -> None:
        ours = json.loads(enban("info", "--backing-chain", "--output=json", image).out)
        assert ours == json.loads(qemu_img("info", "--backing-chain", "--output=json", image))
        assert enban("info", "--backing-chain", image).out == qemu_img("info", "--backing-chain", image)

    def test_map_json(self, image: Path) -> None:
        assert enban("map", "--output=json", image).out == qemu_img("map", "--output=json", image)

    def test_map_human(self, image: Path) -> None:
        code, out = peer("map", image)
        assert enban("map", image, code=code).out == out

    @pytest.mark.parametrize(
        ("offset", "length"), [("5000", "70000"), ("0", "1"), ("1M", "1M"), ("3000k", "64M"), ("1G", "1M")]
    )
    def test_map_of_a_part(self, image: Path, offset: str, length: str) -> None:
        words: list[str | Path] = [
            "map",
            "--output=json",
            f"--start-offset={offset}",
            f"--max-length={length}",
            image,
        ]
        assert enban(*words).out == qemu_img(*words)

    @pytest.mark.parametrize(
        "target",
        [
            "-O raw",
            "-O qcow2",
            "-O qcow2 -o compat=0.10",
            "-O qcow2 -o cluster_size=512",
            "-O qcow2 -o cluster_size=2M,extended_l2=on",
            "-O qcow2 -o refcount_bits=64,cluster_size=4k",
            "-O qcow2 -o preallocation=full",
        ],
    )
    def test_measure(self, image: Path, target: str) -> None:
        words: list[str | Path] = ["measure", *target.split(), image]
        code, out = peer(*words)  # 1 where the disk is too large for the clusters
        assert enban(*words, code=code).out == out
        if not code:
            ours = json.loads(enban(*words, "--output=json").out)
            assert ours == json.loads(qemu_img(*words, "--output=json"))

    def test_check(self, image: Path) -> None:
        code, out = peer("check", image)
        assert enban("check", image, code=code).out == out
        if code != 63:
            ours = json.loads(enban("check", "--output=json", image, code=code).out)
            assert ours == json.loads(peer("check", "--output=json", image)[1])


@needs_qemu_img
@pytest.mark.parametrize(
    "words",
    [
        "-O raw --size 1000",
        "-O qcow2 --size 0",
        "-O qcow2 --size 1",
        "-O qcow2 --size 10G",
        "-O qcow2 --size 8T -o cluster_size=2M",
        "-O qcow2 --size 123456789 -o refcount_bits=1,cluster_size=512",
        "-O qcow2 --size 5G -o preallocation=metadata",
        "-O qcow2 --size 5G -o preallocation=falloc,extended_l2=on",
    ],
)
def test_measure_of_a_size(words: str) -> None:
    assert enban("measure", *words.split()).out == qemu_img("measure", *words.split())


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize("snapshot", ["before", "2", "snapshot.name=after", "snapshot.id=1"])
def test_measure_of_a_snapshot(zoo: Zoo, snapshot: str) -> None:
    words: list[str | Path] = ["measure", "-O", "qcow2", "-l", snapshot, zoo["snapshots"]]
    assert enban(*words).out == qemu_img(*words)


PAIRS = [
    ("v3", "v2"),
    ("v3", "cluster-512"),
    ("v3", "metadata"),
    ("v3", "subclusters"),
    ("v3", "raw"),
    ("v3", "bitmaps"),
    ("raw", "raw"),
    ("raw-one-hole", "qcow2-empty"),
    ("raw-empty", "qcow2-of-size-0"),
    ("raw-odd-size", "raw-one-hole"),
    ("chain", "v3"),
    ("v3", "compressed-zstd"),
    ("cluster-4k-refcount-1", "fragmented"),
    ("chain-longer-than-raw-base", "raw-one-hole"),
]


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_compare(zoo: Zoo, one: str, other: str) -> None:
    for first, second in ((zoo[one], zoo[other]), (zoo[other], zoo[one])):
        code, out = peer("compare", first, second)
        assert code in (0, 1)
        assert enban("compare", first, second, code=code).out == out
        assert enban("compare", "-q", first, second, code=code).out == ""


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_compare_strictly(zoo: Zoo, one: str, other: str) -> None:
    code, out = peer("compare", "-s", zoo[one], zoo[other])
    assert enban("compare", "-s", zoo[one], zoo[other], code=code).out == out


@needs_qemu_img
@pytest.mark.parametrize("words", [("nothing-here", "nothing-here"), ("nothing-here", "@")])
def test_compare_with_what_is_not_there(zoo: Zoo, words: tuple[str, str]) -> None:
    names = [str(zoo["raw"]) if word == "@" else word for word in words]
    code, _ = peer("compare", *names)
    enban("compare", *names, code=code)


@needs_qemu_img
@needs_qemu_io
def test_image_opts_and_json_names(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    path = zoo["chain"]
    monkeypatch.chdir(path.parent)
    options = f"driver=qcow2,file.filename={path.name}"
    assert enban("map", "--output=json", "--image-opts", options).out == qemu_img(
        "map", "--output=json", "--image-opts", options
    )
    name = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": path.name}})
    assert enban("map", "--output=json", f"json:{name}").out == qemu_img("map", "--output=json", path.name)


@needs_qemu_img
@needs_qemu_io
@pytest.mark.parametrize(("damage", "code"), [("leak", 3), ("lost", 2), ("both", 2)])
def test_check_and_repair_of_damage(tmp_path: Path, damage: str, code: int) -> None:
    """What is found and repaired is counted as QEMU counts it, and both leave a clean image."""
    ours, theirs = scattered_qcow2(tmp_path / "ours.qcow2"), tmp_path / "theirs.qcow2"
    image = bytearray(ours.read_bytes())
    block = int.from_bytes(image[65536 : 65536 + 8], "big")
    l1 = int.from_bytes(image[40:48], "big")
    l2 = int.from_bytes(image[l1 : l1 + 8], "big") & 0x00FF_FFFF_FFFF_FE00
    data = next(
        offset
        for i in range(20)
        if (offset := int.from_bytes(image[l2 + 8 * i : l2 + 8 * i + 8], "big") & 0x00FF_FFFF_FFFF_FE00)
    )
    if damage != "lost":  # a cluster that is counted and that nobody uses
        place = block + 2 * (len(image) >> 16)
        image += bytes(65536)
        image[place : place + 2] = b"\0\1"
    if damage != "leak":  # a cluster in use that is not counted
        image[block + 2 * (data >> 16) : block + 2 * (data >> 16) + 2] = b"\0\0"
    ours.write_bytes(image)
    theirs.write_bytes(image)
    got, out = peer("check", theirs)
    assert got == code
    assert enban("check", ours, code=code).out == out
    report = json.loads(peer("check", "--output=json", theirs)[1])
    assert {**json.loads(enban("check", "--output=json", ours, code=code).out), "filename": ""} == {
        **report,
        "filename": "",
    }
    got, out = peer("check", "-r", "all", theirs)
    assert enban("check", "-r", "all", ours, code=got).out.splitlines()[:5] == out.splitlines()[:5]
    assert peer("check", ours)[0] == 0
    qemu_img("compare", ours, theirs)
