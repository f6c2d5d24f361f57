"""`python -m enban` is the `enban` command."""

from __future__ import annotations

import sys

from enban.cli import main

sys.exit(main())
