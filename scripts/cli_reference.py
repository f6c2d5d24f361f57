"""Brings the generated parts of docs/reference/cli.md up to date with the verbs' own tables.

    .venv/bin/python scripts/cli_reference.py            # rewrites the page
    .venv/bin/python scripts/cli_reference.py --check    # exit code 1 if that would change it

What stands between `<!-- generated: NAME -->` and `<!-- end -->` comes from here; the text around it is
written by hand. NAME is a verb, `verbs`, or `options FORMAT`. A verb that the page does not have yet
gets a section at the end.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from enban.cli import VERBS, load
from enban.cli.options import Verb, wrapped
from enban.jobs.create import option_table

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference" / "cli.md"
PART = re.compile(r"(<!-- generated: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


def cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def verb_part(verb: Verb) -> list[str]:
    lines = ["", "```text", f"enban {verb.usage}", "```", "", *wrapped(verb.summary, -12), ""]
    if verb.notes:
        lines += [*wrapped(verb.notes, -12), ""]
    lines += ["| flag | |", "|---|---|"]
    for flag in verb.flags:
        names = ", ".join(f"`{name} {flag.value}".rstrip() + "`" for name in flag.names)
        lines.append(f"| {names} | {cell(flag.text)} |")
    lines += ["", "```sh"]
    for purpose, command in verb.examples:
        lines += [f"# {purpose}", f"enban {command}"]
    return [*lines, "```", ""]


def verbs_part() -> list[str]:
    rows = [f"| [`{name}`](#{name.replace(' ', '-')}) | {cell(summary)} |" for name, summary in VERBS.items()]
    return ["", "| verb | |", "|---|---|", *rows, ""]


def options_part(format: str) -> list[str]:
    rows = [f"| `{row.name}` | {cell(row.kind)} | {cell(row.text)} |" for row in option_table(format)]
    return ["", "| option | value | |", "|---|---|---|", *rows, ""]


def part(name: str) -> str:
    if name == "verbs":
        lines = verbs_part()
    elif name.startswith("options "):
        lines = options_part(name.removeprefix("options "))
    else:
        lines = verb_part(load(name))
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """The page with its generated parts as they should be."""
    for name in VERBS:
        if f"<!-- generated: {name} -->" not in page:
            page += f"\n## {name}\n\n<!-- generated: {name} -->\n<!-- end -->\n"
    return PART.sub(lambda found: found[1] + part(found[2]) + found[3], page)


def main(arguments: list[str]) -> int:
    before = PAGE.read_text()
    after = updated(before)
    if arguments == ["--check"]:
        if after != before:
            print(f"{PAGE.name} is behind the verbs: run scripts/cli_reference.py", file=sys.stderr)
        return int(after != before)
    PAGE.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
