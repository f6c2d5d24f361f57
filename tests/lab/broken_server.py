"""`enban serve` with a mistake: a flush is answered without having been done."""

from __future__ import annotations

import sys

from enban.cli import main
from enban.formats.qcow2.node import Qcow2Node


async def flush(node: Qcow2Node) -> None:
    pass


if __name__ == "__main__":
    type.__setattr__(Qcow2Node, "flush", flush)
    socket, image = sys.argv[1:]
    sys.exit(main(["serve", "-q", "-f", "qcow2", "-k", socket, image]))
