"""`python -m bench.same_json FILE FILE`: exits 0 if both hold the same JSON document, whatever its spacing.

A process of its own: a million extents take a gigabyte once parsed, and the harness must stay small.
"""

from __future__ import annotations

import filecmp
import json
import sys
from pathlib import Path


def main(one: str, other: str) -> int:
    if filecmp.cmp(one, other, shallow=False):
        return 0
    try:
        same = json.loads(Path(one).read_bytes()) == json.loads(Path(other).read_bytes())
    except ValueError as error:
        print(f"the output is not JSON: {error}", file=sys.stderr)
        return 1
    if not same:
        print("our JSON is not the peer's", file=sys.stderr)
    return int(not same)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
