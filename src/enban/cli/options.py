"""Flags of the command line: tables, a parser and the help made from them.

A verb states its flags as a table of `Flag`; parsing follows getopt as qemu-img uses it:
short flags may be bundled and carry their value (`-pq`, `-fqcow2`), long ones take it after
`=` or as the next word, operands may stand anywhere, `--` ends the flags. A word like `-5G`
is an operand, for no flag is a digit. (The standard library's parsers take longer to import
than all of `enban info`.)
"""

from __future__ import annotations

from enban.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

WIDTH = 100


class Flag:
    """One flag.

    names: its spellings, the one used in code first. value: what stands for its value in the
    help, "" if it has none. text: what it does. choices: the values allowed, any if empty.
    """

    __slots__ = ("choices", "names", "text", "value")

    def __init__(self, names: str, text: str, *, value: str = "", choices: Sequence[str] = ()) -> None:
        self.names = tuple(names.split())
        self.text = text
        self.value = value
        self.choices = choices


class Arguments:
    """A parsed command line. Flags are asked for by the first of their names; `order` is how they came.

    operands: the words that are no flags; those after `--`, which are among them, again in `tail`.
    """

    __slots__ = ("operands", "order", "tail", "values", "verb")

    def __init__(self, verb: str) -> None:
        self.verb = verb
        self.operands: list[str] = []
        self.order: list[str] = []
        self.tail: list[str] = []
        self.values: dict[str, list[str]] = {}

    def on(self, name: str) -> bool:
        return name in self.values

    def text(self, name: str, default: str = "") -> str:
        """The value given last."""
        found = self.values.get(name)
        return found[-1] if found else default

    def all(self, name: str) -> list[str]:
        return self.values.get(name, [])


class Verb:
    """One verb: its name, what it does, how it is called, its flags and the code behind it.

    operands: (least, most) number of words that are not flags; most -1 for any number.
    examples: (what it is for, command line without `enban`). words: (words that may follow, what they do).
    """

    __slots__ = ("examples", "flags", "name", "notes", "operands", "run", "summary", "usage", "words")

    def __init__(
        self,
        name: str,
        summary: str,
        usage: str,
        flags: Sequence[Flag],
        run: Callable[[Arguments], int],
        *,
        operands: tuple[int, int],
        examples: Sequence[tuple[str, str]],
        notes: str = "",
        words: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.name = name
        self.summary = summary
        self.usage = usage
        self.flags = flags
        self.run = run
        self.operands = operands
        self.examples = examples
        self.notes = notes
        self.words = words


def parse(verb: Verb, words: Sequence[str]) -> Arguments:
    """Read the words after the verb. Raises UsageError."""
    by_name = {name: flag for flag in verb.flags for name in flag.names}
    found = Arguments(verb.name)
    rest = list(reversed(words))
    while rest:
        word = rest.pop()
        if word == "--":
            found.tail = rest[::-1]
            found.operands += found.tail
            break
        if len(word) < 2 or word[0] != "-" or word[1].isdigit():
            found.operands.append(word)
        elif word.startswith("--"):
            name, equals, value = word.partition("=")
            flag = by_name.get(name)
            if flag is None:
                raise _unknown(verb, name)
            if equals and not flag.value:
                raise UsageError(f"flag {name} takes no value", hint=_see(verb))
            _store(verb, found, flag, name, value if equals else _value(verb, flag, name, rest))
        else:
            _read_bundle(verb, by_name, found, word, rest)
    least, most = verb.operands
    if len(found.operands) < least or (most >= 0 and len(found.operands) > most):
        raise UsageError(f"{len(found.operands)} names do not fit: {verb.usage}", hint=_see(verb))
    return found


def _read_bundle(verb: Verb, by_name: dict[str, Flag], found: Arguments, word: str, rest: list[str]) -> None:
    place = 1
    while place < len(word):
        name = "-" + word[place]
        flag = by_name.get(name)
        if flag is None:
            raise _unknown(verb, name)
        place += 1
        if flag.value:
            value = word[place:] if place < len(word) else _value(verb, flag, name, rest)
            _store(verb, found, flag, name, value)
            return
        _store(verb, found, flag, name, "")


def _value(verb: Verb, flag: Flag, name: str, rest: list[str]) -> str:
    if not flag.value:
        return ""
    if not rest:
        raise UsageError(f"flag {name} needs a value ({flag.value})", hint=_see(verb))
    return rest.pop()


def _store(verb: Verb, found: Arguments, flag: Flag, name: str, value: str) -> None:
    if flag.choices and value not in flag.choices:
        raise UsageError(f"flag {name} does not know '{value}'", hint=f"use {' or '.join(flag.choices)}")
    found.order.append(flag.names[0])
    found.values.setdefault(flag.names[0], []).append(value)


def _unknown(verb: Verb, name: str) -> UsageError:
    return UsageError(f"{verb.name} has no flag {name}", hint=_see(verb))


def _see(verb: Verb) -> str:
    return f"see: enban {verb.name} --help"


def help_text(verb: Verb) -> str:
    """The help of a verb."""
    lines = [f"usage: enban {verb.usage}", "", *wrapped(verb.summary, 0), ""]
    if verb.notes:
        lines += [*wrapped(verb.notes, 0), ""]
    if verb.words:
        lines += [*table(verb.words), ""]
    rows = [
        (", ".join(f"{name} {flag.value}".rstrip() for name in flag.names), flag.text) for flag in verb.flags
    ]
    lines += table(rows)
    lines += ["", "examples:"]
    for purpose, command in verb.examples:
        lines += [f"  # {purpose}", f"  enban {command}"]
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Two columns, the second wrapped."""
    left = min(28, max(len(name) for name, _ in rows) + 2)
    lines = []
    for name, text in rows:
        first, *more = wrapped(text, left + 2)
        if len(name) > left - 2:
            lines.append("  " + name)
            lines.append(" " * (left + 2) + first)
        else:
            lines.append("  " + name.ljust(left) + first)
        lines += [" " * (left + 2) + line for line in more]
    return lines


def wrapped(text: str, indent: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and len(line) + len(word) + 1 > WIDTH - indent:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, line]
