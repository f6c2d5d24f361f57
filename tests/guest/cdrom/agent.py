"""Runs inside the guest, on the guest's Python: does what it is asked for over the serial line.

A request is a line of JSON, its answer a line `ANSWER {...}`: {"enban": [words]} runs the command;
open, read, changed, adopt and close are calls of the library on a disk that stays open between requests;
claim and release are what mounting a disc does to its drive;
{"start": [words]} leaves a command running, {"stop": 1} ends it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from typing import Any

sys.path.insert(0, "/enban/src")

import enban
from enban.cli import main
from enban.storage.cdrom import CdromStorage

disk: Any = None
running: list[subprocess.Popen[str]] = []
claimed: list[int] = []


def command(words: list[str]) -> dict[str, Any]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    return {"code": code, "out": out.getvalue(), "err": err.getvalue()}


def sha256(path: str) -> dict[str, Any]:
    with enban.open(path) as opened:
        digest = hashlib.sha256()
        for at in range(0, opened.size, 1 << 16):
            digest.update(opened.pread(min(1 << 16, opened.size - at), at))
        return {"size": opened.size, "sha256": digest.hexdigest()}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    global disk
    ((name, value),) = request.items()
    if name == "enban":
        return command(value)
    if name == "sha256":
        return sha256(value)
    if name == "open":
        disk = enban.open(value)
        return {"size": disk.size}
    if name == "read":
        offset, length = value
        return {"hex": disk.pread(length, offset).hex()}
    if name == "changed":
        assert isinstance(disk.node.file, CdromStorage)
        return {"changed": disk.node.file.has_changed()}
    if name == "adopt":
        disk.node.file.adopt()
        disk.node.follow_storage()
        return {"size": disk.size}
    if name == "close":
        disk.close()
        return {}
    if name == "claim":
        claimed.append(os.open(value, os.O_RDONLY | os.O_NONBLOCK | os.O_EXCL))
        return {}
    if name == "release":
        os.close(claimed.pop())
        return {}
    if name == "start":
        words = [sys.executable, "-c", "import sys; sys.path.insert(0, '/enban/src'); "]
        words[2] += "from enban.cli import main; sys.exit(main(sys.argv[1:]))"
        running.append(subprocess.Popen([*words, *value], stdout=subprocess.PIPE, text=True))
        stdout = running[-1].stdout
        assert stdout is not None
        return {"line": stdout.readline().strip()}
    if name == "stop":
        one = running.pop()
        one.terminate()
        return {"code": one.wait(20)}
    raise ValueError(name)


def serve() -> None:
    print(f"AGENT {sys.version.split()[0]}", flush=True)
    for line in sys.stdin:
        if not line.strip().startswith("{"):
            continue
        try:
            reply = answer(json.loads(line))
        except Exception as error:  # the test outside decides whether that is right
            reply = {"error": type(error).__name__, "text": str(error)}
        print("ANSWER " + json.dumps(reply), flush=True)


serve()
