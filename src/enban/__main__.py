"""`python -m enban` is the `enban` command."""

from __future__ import annotations

from enban.cli import program

program()
