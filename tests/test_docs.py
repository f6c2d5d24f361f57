"""The documentation says what is so: its blocks run, its links lead somewhere, its references are whole."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

import enban
import enban.aio
import enban.errors
from enban.block.disk import Disk
from enban.cli import VERBS
from scripts import cli_reference
from tests.docs_blocks import Reader, blocks, commands, matches

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
FOLLOWED = [
    ROOT / "README.md",
    DOCS / "tutorial.md",
    DOCS / "security.md",
    *sorted((DOCS / "how-to").glob("*.md")),
]
PAGES = [*ROOT.glob("*.md"), *sorted(DOCS.rglob("*.md"))]
WIDTH = 120
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> list[str]:
    """The lines outside of code blocks; those inside are left empty."""
    lines, inside = [], False
    for line in page.read_text().splitlines():
        fence = line.startswith("```")
        lines.append("" if inside or fence else line)
        inside ^= fence
    return lines


@pytest.mark.parametrize("page", FOLLOWED, ids=name_of)
def test_blocks_do_what_the_page_says(page: Path, tmp_path: Path) -> None:
    """If a page is behind: python -m tests.docs_blocks PAGE, and read what it changed."""
    told_not_to = all(not block.run for block in blocks(page) if block.language in ("console", "python"))
    assert Reader(page, tmp_path).follow() > 0 or told_not_to


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in LINK.findall("\n".join(prose(page))):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            assert anchor in anchors(linked), f"{name_of(page)} links to {target}"


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as forges make them."""
    found = HEADING.findall("\n".join(prose(page)))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *FOLLOWED[1:], *sorted((DOCS / "reference").glob("*.md"))],
    ids=name_of,
)
def test_lines_are_not_too_long(page: Path) -> None:
    """Tables and code are as wide as they must be."""
    long = [line for line in prose(page) if len(line) > WIDTH and not line.startswith("|")]
    assert not long


def test_every_page_is_in_the_index() -> None:
    listed = {
        (DOCS / target.partition("#")[0]).resolve()
        for target in LINK.findall((DOCS / "index.md").read_text())
    }
    missing = [name_of(page) for page in DOCS.rglob("*.md") if page not in listed and page.name != "index.md"]
    assert not missing


# -- the references ----------------------------------------------------------------------------


def test_the_command_reference_is_up_to_date() -> None:
    page = cli_reference.PAGE.read_text()
    assert cli_reference.updated(page) == page, "run scripts/cli_reference.py"
    for name in VERBS:
        assert f"<!-- generated: {name} -->" in page


def test_the_command_reference_shows_a_change() -> None:
    page = cli_reference.PAGE.read_text()
    assert cli_reference.updated(page.replace("`--shrink`", "`--smaller`")) == page
    section = page.index("\n## snapshot\n")
    without = page[:section] + page[page.index("\n## commit\n") :]
    assert "<!-- generated: snapshot -->" in cli_reference.updated(without)


def signature(name: str, function: object) -> str:
    """`name(parameters with their defaults)`, as the reference has it."""
    assert callable(function)
    found = inspect.signature(function)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in found.parameters.values()
        if parameter.name != "self"
    ]
    text = str(found.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    return name + re.sub(r"<Gate (\w+)>", lambda gate: gate[1].upper(), text)


def public(kind: type) -> dict[str, object]:
    return {name: value for name, value in vars(kind).items() if not name.startswith("_")}


API = " ".join((DOCS / "reference" / "api.md").read_text().split())


@pytest.mark.parametrize("name", [name for name in enban.__all__ if inspect.isfunction(getattr(enban, name))])
def test_functions_are_documented(name: str) -> None:
    assert f"`{signature(f'enban.{name}', getattr(enban, name))}`" in API


@pytest.mark.parametrize("name", [name for name, value in public(Disk).items() if inspect.isfunction(value)])
def test_methods_are_documented(name: str) -> None:
    assert f"`{signature(name, getattr(Disk, name))}`" in API
    other = getattr(enban.aio.AsyncDisk, name, None)
    if other is not None:
        assert signature(name, other) == signature(name, getattr(Disk, name))
    else:
        assert f"| `{signature(name, getattr(Disk, name))}` |" in API[API.index("`Disk` alone has") :]


@pytest.mark.parametrize("name", enban.aio.__all__)
def test_the_asyncio_face_is_documented(name: str) -> None:
    assert re.search(rf"`(enban\.aio\.)?{name}\b", API)


@pytest.mark.parametrize(
    "name", [name for name, value in public(Disk).items() if isinstance(value, property) and name != "node"]
)
def test_properties_are_documented(name: str) -> None:
    assert f"`{name}`" in API


@pytest.mark.parametrize("name", [n for n, v in vars(enban.errors).items() if inspect.isclass(v)])
def test_errors_are_documented(name: str) -> None:
    assert f"`{name}`" in API or f"`enban.{name}`" in API


# -- the instrument ----------------------------------------------------------------------------


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ echo one\ntwo\n```\n",
        "```console\n$ false\n```\n",
        "```console\n$ exit 0\n$ echo never\nnever\n```\n",
        "```python\nprint(1)\n```\n```text\n2\n```\n",
        "```python\nprint(1)\n```\n",
        "```python\nraise SystemExit(1)\n```\n",
    ],
    ids=["output", "exit code", "ended early", "python output", "unshown output", "python exit code"],
)
def test_a_page_that_is_wrong_is_found(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError):
        Reader(page_of(tmp_path, text), tmp_path).follow()


def test_a_page_that_is_right_passes(tmp_path: Path) -> None:
    text = """
```console
$ echo one \\
> two; echo 2026-01-02 03:04:05
one two
2025-12-31 00:00:00
$ false
$ echo $?
1
```

```python
print("first")
print("second")
```
```text
...
second
```

<!-- not run: it would fail -->
```console
$ false
```
"""
    page = page_of(tmp_path, text)
    assert Reader(page, tmp_path).follow() == 2
    assert [block.language for block in blocks(page)] == ["console", "python", "text", "console"]
    assert commands(blocks(page)[0])[0] == (
        "echo one \\\ntwo; echo 2026-01-02 03:04:05",
        "one two\n2025-12-31 00:00:00",
    )
    assert not matches("a...c", "abd") and matches("a...c", "abbc")
