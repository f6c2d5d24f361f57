"""What a row of the bench is: one small declarative entry.

Commands are written as one would type them, with placeholders in braces:

    {raw-2G} {qcow2-2G} {zlib-2G} {meta-1T} ...   an input, made on demand (see inputs.py)
    {out}                                         the file this command writes
    {folder}                                      where the bench works, for temporary files
    {python}                                      the interpreter running the bench

The first word of `peer` is the program that must be installed for the row to run; `ours` is what follows
the enban command. A new row is a new entry in a `cases_*.py` file, nothing else.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass

import bench

PLACEHOLDER = re.compile(r"\{([^{}]*)\}")
NOT_INPUTS = frozenset({"folder", "out", "python"})


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    peer: str
    ours: str
    # Peer time / our time must be at least this; None: shown, not judged.
    goal: float | None = None
    # Format of {out}. After the unmeasured round both outputs must read identical.
    out: str = ""
    # Our {out} may not be larger than the peer's.
    no_larger: bool = False
    # Our peak memory may not exceed this.
    peak_mib: int | None = None
    # Both commands must print the same JSON document.
    same_json: bool = False
    # The peer is expected not to finish: it runs once, for this long at most, and the ratio becomes "> x".
    peer_bound_s: float | None = None
    # The code with which the peer ends when all is well; its output is compared in any case.
    peer_code: int = 0
    # Short commands deserve more samples: pairs are multiplied by this.
    more: int = 1
    # The last line each command prints is its figure, in seconds, in place of the time it took. `ours` is
    # then a whole command, and the enban command is appended to it.
    self_timed: bool = False
    # Programs besides the peer's that must be installed.
    needs: tuple[str, ...] = ()

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs in the order of their first use."""
        found = PLACEHOLDER.findall(self.peer) + PLACEHOLDER.findall(self.ours)
        return [name for name in dict.fromkeys(found) if name not in NOT_INPUTS]

    @property
    def peer_program(self) -> str:
        return self.peer.split(maxsplit=1)[0]


def expand(command: str, values: Mapping[str, str]) -> list[str]:
    """The words of a command with its placeholders filled; a value is never split, whatever is in it."""
    return [PLACEHOLDER.sub(lambda match: values[match[1]], word) for word in shlex.split(command)]


def all_cases() -> list[Case]:
    """Every case of every `cases_*` module, in the order of module names and entries."""
    cases: list[Case] = []
    for module in sorted(found.name for found in pkgutil.iter_modules(bench.__path__)):
        if module.startswith("cases_"):
            cases += importlib.import_module(f"bench.{module}").CASES
    names = [case.name for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(
            f"two bench cases share a name: {sorted(name for name in names if names.count(name) > 1)[0]}"
        )
    return cases
