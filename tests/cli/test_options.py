"""The parser of flags, and the help made from the same tables."""

from __future__ import annotations

import shlex

import pytest

from enban.cli import VERBS, load, verb_of
from enban.cli.common import human_size, key_values, shown, snapshot_meant
from enban.cli.options import WIDTH, Arguments, Flag, Verb, parse
from enban.errors import UsageError
from tests.cli.command import enban, refused

FLAGS = (
    Flag("-f --format", "format", value="FMT"),
    Flag("-p", "progress"),
    Flag("-q", "quiet"),
    Flag("--output", "form", value="FORM", choices=("human", "json")),
    Flag("--shrink", "shrink"),
)


def run(arguments: Arguments) -> int:
    return 0


VERB = Verb("try", "Try.", "try A B", FLAGS, run, operands=(0, 3), examples=())


@pytest.mark.parametrize(
    ("words", "values", "operands"),
    [
        ("-f raw a", {"-f": ["raw"]}, ["a"]),
        ("a -f raw b", {"-f": ["raw"]}, ["a", "b"]),
        ("-fraw a", {"-f": ["raw"]}, ["a"]),
        ("-pq a", {"-p": [""], "-q": [""]}, ["a"]),
        ("-pfqcow2 a", {"-p": [""], "-f": ["qcow2"]}, ["a"]),
        ("-pf qcow2 a", {"-p": [""], "-f": ["qcow2"]}, ["a"]),
        ("--format=raw", {"-f": ["raw"]}, []),
        ("--format raw", {"-f": ["raw"]}, []),
        ("--output=json --shrink", {"--output": ["json"], "--shrink": [""]}, []),
        ("a -5G", {}, ["a", "-5G"]),
        ("a +5G", {}, ["a", "+5G"]),
        ("- a", {}, ["-", "a"]),
        ("-q -- -f -p", {"-q": [""]}, ["-f", "-p"]),
        ("-f raw -f qcow2", {"-f": ["raw", "qcow2"]}, []),
        ("--format=", {"-f": [""]}, []),
        ("-f -p", {"-f": ["-p"]}, []),
    ],
)
def test_parse(words: str, values: dict[str, list[str]], operands: list[str]) -> None:
    arguments = parse(VERB, words.split())
    assert arguments.values == values
    assert arguments.operands == operands


def test_the_last_value_counts() -> None:
    arguments = parse(VERB, ["-f", "raw", "--format=qcow2"])
    assert arguments.text("-f") == "qcow2"
    assert arguments.all("-f") == ["raw", "qcow2"]
    assert arguments.text("--output", "human") == "human"
    assert not arguments.on("-q")


@pytest.mark.parametrize(
    "words",
    ["-x", "--nothing", "-f", "--format", "--shrink=1", "--output=xml", "-px", "a b c d", "--shr", "---"],
)
def test_wrong_words(words: str) -> None:
    with pytest.raises(UsageError):
        parse(VERB, words.split())


def test_key_values() -> None:
    assert key_values(["a=1,b=2", "c=x=y", "d"]) == {"a": "1", "b": "2", "c": "x=y", "d": "on"}
    assert key_values(["file=a,,b,c=,,"]) == {"file": "a,b", "c": ","}
    assert key_values([]) == {}
    for wrong in ("", "=1", "a=1,,,"):
        with pytest.raises(UsageError):
            key_values([wrong])


def test_snapshot_meants() -> None:
    assert snapshot_meant("before") == "before"
    assert snapshot_meant("snapshot.name=a b,,c=d") == "snapshot.name=a b,c=d"
    assert snapshot_meant("snapshot.id=1") == "snapshot.id=1"
    for wrong in ("snapshot.id=1,snapshot.name=a", "snapshot.date=1"):
        with pytest.raises(UsageError):
            snapshot_meant(wrong)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1024, "1 KiB"),
        (196616, "192 KiB"),
        (10 << 20, "10 MiB"),
        (1023 << 20, "0.999 GiB"),
        (1 << 40, "1 TiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_as_qemu_prints_them(value: int, text: str) -> None:
    assert human_size(value) == text


def test_names_cannot_write_to_the_terminal() -> None:
    assert shown("disk.qcow2") == "disk.qcow2"
    assert shown("диск 1") == "диск 1"
    assert shown("a\x1b[2Jb\nc\x7f") == "a\\x1b[2Jb\\x0ac\\x7f"


@pytest.mark.parametrize("name", sorted(VERBS))
def test_help_of_every_verb(name: str) -> None:
    verb = load(name)
    words = name.split()
    text = enban(*words, "--help").out
    assert text == enban(*words, "-h").out == enban("help", *words).out
    assert text.startswith(f"usage: enban {name} ")
    for flag in verb.flags:
        for spelling in flag.names:
            assert spelling in text
    assert len(verb.examples) >= 2
    for _, example in verb.examples:
        assert f"  enban {example}" in text
    assert max(map(len, text.splitlines())) <= WIDTH + 10


@pytest.mark.parametrize("name", sorted(VERBS))
def test_examples_in_the_help_parse(name: str) -> None:
    for _, example in load(name).examples:
        found, words = verb_of(shlex.split(example.split(" |")[0].split(" <")[0].split(" >")[0]))
        parse(load(found), words)


@pytest.mark.parametrize("name", sorted(VERBS))
def test_flags_that_every_verb_has(name: str) -> None:
    spellings = {spelling for flag in load(name).flags for spelling in flag.names}
    assert {"-h", "--help"} <= spellings
    # torture opens images of its own making only, these others none
    opens = name.split()[0] not in ("torture", "ctl", "serial", "cdrom", "keys")
    assert "--untrusted" in spellings or not opens
    assert len(spellings) == sum(len(flag.names) for flag in load(name).flags)


def test_overview() -> None:
    text = enban("--help").out
    for name, summary in VERBS.items():
        assert name in text
        assert summary in text
    assert enban(code=1).out == text
    assert enban("help").out == text


def test_unknown_verbs_and_flags() -> None:
    assert "there is no verb 'frobnicate'" in refused("frobnicate")
    assert "info has no flag --frobnicate; see: enban info --help" in refused("info", "--frobnicate", "x")
    assert "do not fit" in refused("info")
    assert "do not fit" in refused("info", "a", "b")
