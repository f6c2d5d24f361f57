"""Deliberately broken variants of the engine, to see whether the lab finds them.

Each is a function that breaks one thing through pytest's monkeypatch, and the part of the lab that
must find it. They stand for mistakes that disk-image code has made.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pytest import MonkeyPatch

from enban.block import mover
from enban.block.door import Door
from enban.block.requests import Ledger, Request
from enban.block.storage import Storage
from enban.errors import HostError
from enban.filters.base import Filter
from enban.formats.qcow import barrier as qcow_barrier
from enban.formats.qcow2 import allocation, barrier, clearing, leaving, mapping, resize, switch
from enban.formats.qcow2.node import Qcow2Node
from enban.formats.raw import RawNode
from enban.lab import kill
from enban.wire.qcow2_entries import COMPRESSED, unpack_compressed

Break = Callable[[MonkeyPatch], None]

# name -> (part of the lab, kind of image or "" for all, long, how it is broken)
MUTANTS: dict[str, tuple[str, str, bool, Break]] = {}


def mutant(part: str, only: str = "", *, long: bool = False) -> Callable[[Break], Break]:
    def register(act: Break) -> Break:
        MUTANTS[act.__name__] = (part, only, long, act)
        return act

    return register


@mutant("crash")
def no_flush_between_tables_and_pointers(patch: MonkeyPatch) -> None:
    async def write(file: Storage, changes: barrier.Changes) -> None:
        for step in (changes.first, changes.second, changes.third):
            for offset, content in step:
                await file.write(content, offset)
        changes.settled = True
        await file.flush()

    patch.setattr(barrier, "_write", write)


@mutant("crash")
def pointers_before_refcounts(patch: MonkeyPatch) -> None:
    async def write(file: Storage, changes: barrier.Changes) -> None:
        for step in (changes.third, changes.second, changes.first):
            for offset, content in step:
                await file.write(content, offset)
            await file.flush()
        changes.settled = True

    patch.setattr(barrier, "_write", write)


@mutant("crash", long=True)
def freed_before_the_unlinking_is_durable(patch: MonkeyPatch) -> None:
    def unlink(node: Qcow2Node, cluster: int, count: int) -> None:
        node.quarantine.append((cluster, count, 0))

    patch.setattr(Qcow2Node, "unlink", unlink)


@mutant("crash", long=True)
def wrong_copied_flag(patch: MonkeyPatch) -> None:
    patch.setattr(allocation, "COPIED", 0)


@mutant("storm", "512")
def reused_while_a_request_still_reads(patch: MonkeyPatch) -> None:
    patch.setattr(Ledger, "oldest", property(lambda ledger: ledger.newest + 1))


@mutant("storm", "512-snap")
def write_in_place_lost_when_a_snapshot_is_made(patch: MonkeyPatch) -> None:
    """The lab found this one in the engine: a write in place was under way, a snapshot was made, and
    another write to the same cluster copied it too early."""
    patch.setattr(Qcow2Node, "switches", property(lambda node: 0, lambda node, value: None), raising=False)


@mutant("storm")
def request_lost_on_cancel(patch: MonkeyPatch) -> None:
    end = Ledger.end

    def forgetful(ledger: Ledger, request: Request, error: BaseException | None = None) -> None:
        if not isinstance(error, asyncio.CancelledError):
            end(ledger, request, error)

    patch.setattr(Ledger, "end", forgetful)


@mutant("storm", long=True)
def no_range_lock(patch: MonkeyPatch) -> None:
    """Two writes to one cluster may be under way at once."""

    async def lock(node: Any, offset: int, length: int) -> Any:
        return await node.ranges.acquire(1 << 62, (1 << 62) + 0)

    patch.setattr(mover, "lock_units", lock)


@mutant("faults")
def failed_write_keeps_its_clusters(patch: MonkeyPatch) -> None:
    async def abandon(node: Qcow2Node, pieces: list[Any]) -> None:
        for piece in pieces:
            if isinstance(piece.token, allocation.Link):
                node.cache.tables[piece.token.index].pins -= 1

    patch.setattr(Qcow2Node, "abandon", abandon)


@mutant("faults", long=True)
def failed_flush_called_a_success(patch: MonkeyPatch) -> None:
    flush = Qcow2Node.flush

    async def optimistic(node: Qcow2Node) -> None:
        try:
            await flush(node)
        except HostError:
            pass

    patch.setattr(Qcow2Node, "flush", optimistic)


@mutant("faults")
def failed_flush_forgets_its_changes(patch: MonkeyPatch) -> None:
    patch.setattr(barrier.Changes, "restore", lambda changes, node: changes.done())


@mutant("crash", "4k-v2-chain", long=True)
def partial_write_loses_the_backing_data(patch: MonkeyPatch) -> None:
    async def zeros(node: Any, piece: Any, start: int, length: int) -> bytearray | None:
        return bytearray(length) if length else None

    patch.setattr(mover, "_surroundings", zeros)


@mutant("crash", "1k-packed", long=True)
def compressed_cluster_frees_its_first_cluster_only(patch: MonkeyPatch) -> None:
    unlink_entry = Qcow2Node.unlink_entry

    def careless(node: Qcow2Node, entry: int) -> None:
        if entry & COMPRESSED:
            node.unlink(unpack_compressed(entry, node.cluster_bits)[0] >> node.cluster_bits, 1)
        else:
            unlink_entry(node, entry)

    patch.setattr(Qcow2Node, "unlink_entry", careless)


class _NoFlush(Filter):
    async def flush(self) -> None:
        pass


@mutant("crash", "512-snap")
def snapshot_switched_over_before_its_tables_are_durable(patch: MonkeyPatch) -> None:
    build = switch._Switch._build

    async def hasty(work: switch._Switch) -> bytes:
        file = work.node.file
        work.node.file = _NoFlush(file)
        try:
            return await build(work)
        finally:
            work.node.file = file

    patch.setattr(switch._Switch, "_build", hasty)


@mutant("crash", "512-snap", long=True)
def snapshot_does_not_count_its_clusters(patch: MonkeyPatch) -> None:
    async def nothing(work: switch._Switch, l1: Any, step: int) -> None:
        pass

    patch.setattr(switch._Switch, "_count", nothing)


@mutant("crash")
def flush_does_not_write_the_tables(patch: MonkeyPatch) -> None:
    async def flush(node: Qcow2Node) -> None:
        await node.file.flush()

    patch.setattr(Qcow2Node, "flush", flush)


@mutant("crash", "512-chain", long=True)
def zeroed_cluster_shows_the_backing_file(patch: MonkeyPatch) -> None:
    patch.setattr(clearing, "backing_reaches", lambda node, offset: False)


@mutant("crash", "qcow", long=True)
def qcow_pointers_before_tables(patch: MonkeyPatch) -> None:
    async def write(node: Any, changes: Any) -> None:
        for step in (changes.second, changes.first):
            for offset, content in step:
                await node.file.write(content, offset)
        changes.settled = True
        await node.file.flush()

    patch.setattr(qcow_barrier, "_write", write)


@mutant("crash", "raw", long=True)
def raw_flush_does_nothing(patch: MonkeyPatch) -> None:
    async def flush(node: RawNode) -> None:
        pass

    patch.setattr(RawNode, "flush", flush)


@mutant("crash")
def fua_is_ignored(patch: MonkeyPatch) -> None:
    async def durable(door: Door, work: Any, fua: bool) -> None:
        await work

    patch.setattr(Door, "_durable", durable)


@mutant("crash", long=True)
def hole_punched_after_the_cluster_is_used_again(patch: MonkeyPatch) -> None:
    late: list[tuple[Qcow2Node, int, int]] = []

    async def give_back(node: Qcow2Node, first: int, end: int, least: int) -> None:
        due, late[:] = late[:], [(node, first, end)]
        for other, start, stop in due:
            if other is node and stop > start:
                await node.file.discard(start << node.cluster_bits, stop - start << node.cluster_bits)

    patch.setattr(leaving, "_give_back", give_back)


@mutant("crash", "512", long=True)
def size_changed_before_the_tables(patch: MonkeyPatch) -> None:
    grow = resize._grow

    async def hasty(node: Qcow2Node, old: int, size: int, preallocation: str) -> None:
        await node.file.write(size.to_bytes(8, "big"), 24)
        await node.file.flush()
        await grow(node, old, size, preallocation)

    patch.setattr(resize, "_grow", hasty)


@mutant("kill", "kill-4k", long=True)
def server_answers_flushes_at_once(patch: MonkeyPatch) -> None:
    """In another process: the server is a program of its own."""
    program = Path(__file__).with_name("broken_server.py")
    patch.setattr(kill, "OURS", [sys.executable, str(program), "{socket}", "{image}"])


@mutant("fuzz", "fuzz-4k")
def bad_entry_raises_whatever(patch: MonkeyPatch) -> None:
    patch.setattr(mapping, "bad_entry", lambda node, offset, what: ValueError(what))
