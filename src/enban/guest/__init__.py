"""Guests: virtual machines that run on QEMU while every block they read or write is ours.

    async with Machine(Settings(disks=["disk.qcow2"])) as machine:
        await machine.console.wait_for(b"login:")
        await machine.save("clean")

The parts: `settings` says what a machine is made of, `program` finds QEMU, `command` makes its command line,
`process` runs it, `qmp` talks to it, `disks` opens our disks and serves them on a private socket, `console`
is the serial line, `states` keeps and brings back the whole machine, `machine` puts them together, `control`
lets other processes speak to a machine that runs.

The rule of this room: QEMU never opens a disk of ours. What the guest has flushed is durable through our
engine, whoever dies first.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .machine import Machine
    from .settings import DiskSettings, Settings

__all__ = ["DiskSettings", "Machine", "Settings"]

_HOMES = {"Machine": "machine", "Settings": "settings", "DiskSettings": "settings"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'enban.guest' has no attribute '{name}'")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
