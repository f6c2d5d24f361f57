"""Reading the documentation's code blocks, and running them as a reader would.

All blocks of a page run in order in one folder of their own.

    ```console   lines that begin with `$ ` are typed into a shell (`> ` goes on with one), the lines
                 between are what it must print
    ```python    a program; a ```text block that follows it at once is what it must print

`...` in an expected line stands for anything, a line of its own for any lines. What differs from run to run
and from machine to machine (`VARYING`) is not compared. A comment `<!-- not run: why -->` before
a block leaves it out; blocks in other languages are not looked at.

`python -m tests.docs_blocks PAGE...` puts what is printed now into the pages; read the change before you
keep it.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
FENCE = re.compile(r"^```(\w*)$")
# What differs from run to run and from machine to machine.
VARYING = (
    (re.compile(r"(disk size: )[\d.]+ \w+"), r"\1*"),
    (re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"), "*"),
    (re.compile(r"socket=\S+"), "socket=*"),
    (re.compile(r"[\d.]+% fragmented, [\d.]+% compressed"), "*"),
    (re.compile(r"(Image end offset: )\d+"), r"\1*"),
)


@dataclass(slots=True)
class Block:
    """line: where in the page it begins. text: its lines. run: whether the page wants it run."""

    language: str
    line: int
    text: list[str]
    run: bool
    adjacent: bool  # nothing but empty lines between it and the block before


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    block: Block | None = None
    run, adjacent = True, False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        fence = FENCE.match(line)
        if block is not None:
            if line == "```":
                found.append(block)
                block, run, adjacent = None, True, True
            else:
                block.text.append(line)
        elif fence:
            block = Block(fence[1], number, [], run, adjacent)
        elif NOT_RUN.fullmatch(line):
            run = False
        elif line.strip():
            run, adjacent = True, False
    assert block is None, f"{page}: the block in line {block.line if block else 0} has no end"
    return found


def plain(text: str) -> str:
    for pattern, replacement in VARYING:
        text = pattern.sub(replacement, text)
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def matches(expected: str, got: str) -> bool:
    pattern = re.escape(plain(expected)).replace(re.escape("..."), ".*?")
    return re.fullmatch(pattern, plain(got), re.DOTALL) is not None


def commands(block: Block) -> list[tuple[str, str]]:
    """(command, expected output) of a console block."""
    found: list[tuple[list[str], list[str]]] = []
    for line in block.text:
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif line.startswith("> ") and found and not found[-1][1]:
            found[-1][0].append(line[2:])
        else:
            assert found, f"line {block.line}: a console block begins with a command"
            found[-1][1].append(line)
    return [("\n".join(command), "\n".join(output)) for command, output in found]


class Reader:
    """Somebody who follows a page, in `folder`, with `enban` and `python` at hand.

    rewrite: what is printed is put into `wanted` (line -> the block's text) instead of being judged.
    """

    def __init__(self, page: Path, folder: Path, *, rewrite: bool = False) -> None:
        self.page = page
        self.rewrite = rewrite
        self.wanted: dict[int, list[str]] = {}
        self.folder = folder / "here"
        self.folder.mkdir()
        programs = folder / "bin"
        programs.mkdir()
        for name, words in (("enban", "-m enban"), ("python", ""), ("python3", "")):
            script = programs / name
            script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {words} "$@"\n')
            script.chmod(0o755)
        self.environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin",
            "PYTHONPATH": str(ROOT / "src"),
            "CHECKOUT": str(ROOT),
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
        }

    def follow(self) -> int:
        """Run the whole page; the number of blocks that were run."""
        found = blocks(self.page)
        count = 0
        for index, block in enumerate(found):
            if not block.run or block.language not in ("console", "python"):
                continue
            count += 1
            if block.language == "console":
                self._console(block)
            else:
                after = found[index + 1] if index + 1 < len(found) else None
                shown = after if after is not None and after.adjacent and after.language == "text" else None
                self._python(block, shown)
        return count

    def _run(self, words: list[str], text: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            input=text,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=120,
            check=False,
        )

    def _console(self, block: Block) -> None:
        """One shell for the block. A command may fail only if `echo $?` comes next."""
        todo = commands(block)
        mark = "\x01"
        script = ["code=0"]
        for command, _ in todo:
            script += ["(exit $code)", command, "code=$?", f"printf '{mark}%d{mark}' $code"]
        done = self._run(["bash", "-c", "\n".join(script)])
        parts = done.stdout.split(mark)
        assert len(parts) == 2 * len(todo) + 1, f"{self.page.name}:{block.line}: ended early\n{done.stdout}"
        lines: list[str] = []
        for index, (command, expected) in enumerate(todo):
            got, code = parts[2 * index], int(parts[2 * index + 1])
            following = todo[index + 1][0] if index + 1 < len(todo) else ""
            where = f"{self.page.name}, block in line {block.line}\n$ {command}\n{got}"
            assert code == 0 or following == "echo $?", f"{where}ended with {code}"
            first, *more = command.splitlines()
            lines += [f"$ {first}", *(f"> {line}" for line in more)]
            lines += self._judge(expected, got, where).splitlines()
        self.wanted[block.line] = lines

    def _python(self, block: Block, shown: Block | None) -> None:
        done = self._run([sys.executable, "-"], "\n".join(block.text) + "\n")
        where = f"{self.page.name}, block in line {block.line}\n{done.stdout}"
        assert done.returncode == 0, where
        text = self._judge("\n".join(shown.text) if shown else "", done.stdout, where)
        if shown is not None:
            self.wanted[shown.line] = text.splitlines()

    def _judge(self, expected: str, got: str, where: str) -> str:
        """What the page should say."""
        if matches(expected, got):
            return expected
        assert self.rewrite, f"{where}--- is not what the page says:\n{expected}"
        return "\n".join(line.rstrip() for line in got.strip("\n").splitlines())


def rewrite(page: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(page, Path(folder), rewrite=True)
        reader.follow()
    lines = page.read_text().splitlines()
    for block in reversed(blocks(page)):
        if block.line in reader.wanted:
            lines[block.line : block.line + len(block.text)] = reader.wanted[block.line]
    page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        rewrite(Path(name))
