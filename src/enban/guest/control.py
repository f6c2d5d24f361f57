"""Speaking to a machine that another process runs.

Over the control socket in the machine's folder (see `places`): a client sends one line, a JSON object {"do":
WORD, ...arguments}, and gets one line back, {"result": ...} or {"error": TEXT}; then the next, or it ends.
One client cannot hold up another; the machine itself puts in order what must not overlap.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from ..errors import EnbanError, PeerError, UsageError
from . import places
from .machine import Machine

MOST_LINE = 1 << 20


class ControlServer:
    """Answers on the control socket of a machine that has been started."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        assert self.machine.place is not None
        self._server = await asyncio.start_unix_server(
            self._serve, self.machine.place.file(places.CONTROL), limit=MOST_LINE
        )

    async def close(self) -> None:
        """Stop listening; who was being answered gets its answer."""
        if self._server is not None:
            self._server.close()
        if self._clients:
            _, late = await asyncio.wait(self._clients, timeout=5)
            for task in late:
                task.cancel()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            while True:
                try:
                    line = await reader.readline()
                except ValueError:
                    writer.write(b'{"error": "the request is too long"}\n')
                    await writer.drain()
                    return
                if not line:
                    return
                self._clients.add(task)
                # What has begun ends, whether or not the client still waits.
                answer = await asyncio.shield(asyncio.ensure_future(self._answer(line)))
                writer.write(json.dumps(answer).encode() + b"\n")
                await writer.drain()
                self._clients.discard(task)
        except ConnectionError:
            pass
        finally:
            self._clients.discard(task)
            writer.close()

    async def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise UsageError("a request is a JSON object")
            action = ACTIONS.get(str(request.pop("do", "")))
            if action is None:
                raise UsageError("no such request", hint=f"use {', '.join(ACTIONS)}")
            return {"result": await action(self.machine, request)}
        except EnbanError as error:
            return {"error": str(error)}
        except (ValueError, KeyError, TypeError) as error:
            return {"error": f"the request is not understood: {error}"}


Action = Callable[[Machine, Mapping[str, Any]], Awaitable[Any]]


async def _status(machine: Machine, request: Mapping[str, Any]) -> Any:
    return {
        "name": machine.name,
        "status": await machine.status(),
        "accel": machine.accel,
        "pid": os.getpid(),
        "qemu-pid": machine.pid,
        "memory": machine.settings.memory,
        "cpus": machine.settings.cpus,
        "snapshot": machine.settings.snapshot,
        "ran-s": round(machine.vm_clock_ns / 1e9, 3),
    }


async def _disks(machine: Machine, request: Mapping[str, Any]) -> Any:
    found = [
        {
            "id": one.id,
            "file": one.name,
            "format": one.disk.format,
            "size": one.disk.size,
            "bus": one.bus,
            "writable": one.writable,
            "snapshot": one.snapshot,
            "requests": one.disk.door.ledger.done,
        }
        for one in machine.disks
    ]
    disc = machine.disk_set.cdrom
    found.append({"id": "cdrom", "file": disc.name if disc else "", "size": disc.disk.size if disc else 0})
    return found


async def _shutdown(machine: Machine, request: Mapping[str, Any]) -> Any:
    if request.get("force"):
        await machine.kill()
    else:
        await machine.shutdown(float(request.get("grace", 30)))


async def _snapshot_list(machine: Machine, request: Mapping[str, Any]) -> Any:
    return [
        {
            "tag": one.tag,
            "date": one.date_s,
            "vm-clock-s": one.vm_clock_ns / 1e9,
            "vm-state-size": one.vm_state_size,
            "complete": one.complete,
        }
        for one in await machine.states()
    ]


async def _snapshot_save(machine: Machine, request: Mapping[str, Any]) -> Any:
    state = await machine.save(str(request["tag"]))
    return {"vm-state-size": state.vm_state_size}


async def _keys(machine: Machine, request: Mapping[str, Any]) -> Any:
    await machine.press(" ".join(map(str, request.get("chords", ()))))


async def _type(machine: Machine, request: Mapping[str, Any]) -> Any:
    await machine.type_text(str(request["text"]), str(request.get("layout", "")))


async def _expect(machine: Machine, request: Mapping[str, Any]) -> Any:
    pattern, timeout_s = str(request["pattern"]), float(request.get("timeout", 60))
    try:
        found = await machine.console.wait_for(pattern.encode(), timeout_s)
    except re.error as error:
        raise UsageError(f"'{pattern}' is no regular expression: {error}") from error
    except TimeoutError:
        raise PeerError(f"the guest's console has not said '{pattern}' within {timeout_s:g} s") from None
    return found[0].decode(errors="replace")


async def _console(machine: Machine, request: Mapping[str, Any]) -> Any:
    return machine.console.text.decode(errors="replace")


async def _backup(machine: Machine, request: Mapping[str, Any]) -> Any:
    result = await machine.backup_disk(
        str(request["disk"]),
        str(request["path"]),
        bitmap=str(request.get("bitmap", "")),
        base=str(request.get("base", "")),
    )
    return {"copied": result.copied, "full": result.full}


ACTIONS: dict[str, Action] = {
    "status": _status,
    "disks": _disks,
    "pause": lambda machine, request: machine.pause(),
    "resume": lambda machine, request: machine.resume(),
    "reset": lambda machine, request: machine.reset(),
    "shutdown": _shutdown,
    "snapshot-list": _snapshot_list,
    "snapshot-save": _snapshot_save,
    "snapshot-load": lambda machine, request: machine.load(str(request["tag"])),
    "snapshot-delete": lambda machine, request: machine.delete_state(str(request["tag"])),
    "commit": lambda machine, request: machine.commit(),
    "cdrom-insert": lambda machine, request: machine.insert_cdrom(str(request["path"])),
    "cdrom-eject": lambda machine, request: machine.eject_cdrom(),
    "console": _console,
    "say": lambda machine, request: machine.console.write(str(request["text"]).encode() + b"\n"),
    "expect": _expect,
    "keys": _keys,
    "type": _type,
    "screenshot": lambda machine, request: machine.screenshot(str(request["path"])),
    "disk-resize": lambda machine, request: machine.resize_disk(str(request["disk"]), int(request["size"])),
    "disk-snapshot": lambda machine, request: machine.snapshot_disk(
        str(request["disk"]), str(request["tag"])
    ),
    "disk-pull": lambda machine, request: machine.pull_disk(str(request["disk"])),
    "disk-backup": _backup,
}


def ask(name: str, do: str, **arguments: Any) -> Any:
    """Have the machine of a name do something, and return its result. Blocking; for other processes.

    Raises UsageError if no such machine runs, PeerError with what it says if it refuses.
    """
    path = os.path.join(places.base(), places.check_name(name), places.CONTROL)
    with socket.socket(socket.AF_UNIX) as sock:
        try:
            sock.connect(path)
        except OSError:
            known = places.running()
            raise UsageError(
                f"no machine named '{name}' runs",
                hint=f"these do: {', '.join(known)}" if known else "start one with: enban run",
            ) from None
        try:
            sock.sendall(json.dumps({"do": do, **arguments}).encode() + b"\n")
            answer = sock.makefile("rb").readline()
        except OSError as error:
            raise PeerError(f"the machine '{name}' ended meanwhile") from error
    if not answer:
        if do == "shutdown":
            return None  # its last answer can be overtaken by its end
        raise PeerError(f"the machine '{name}' ended meanwhile")
    reply = json.loads(answer)
    if "error" in reply:
        raise PeerError(str(reply["error"]))
    return reply.get("result")
