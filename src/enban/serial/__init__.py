"""Serial lines: transports, the bridge that joins them, and the doctor of kernel-debugging sessions.

    transports   how bytes of a line reach this process
    bridge       joins one guest with its debuggers
    port         a debug port for a guest that enban runs: `debug_port`
    doctor       says why a debugging session stands still; recording keeps one

Nothing here is imported before it is used.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .port import debug_port as debug_port

__all__ = ["debug_port"]


def __getattr__(name: str) -> object:
    if name == "debug_port":
        from .port import debug_port

        return debug_port
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
