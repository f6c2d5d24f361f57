"""Debuggers that come, go and speak in any order, and restarted guests, against a model of who is heard."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.serial.lines import Client, Running, bridge, until


class Model:
    """The bridge and what it should do, step by step."""

    def __init__(self, running: Running, folder: Path, chance: random.Random) -> None:
        self.running = running
        self.chance = chance
        self.paths = {name: str(folder / name) for name in "gdw"}
        self.guest = Client(f"unix:{self.paths['g']}").connect()
        self.debuggers: list[Client] = []
        self.watchers: list[Client] = []
        self.active: Client | None = None
        self.spoke: set[Client] = set()
        self.joined = self.left = self.said = 0
        self.join("guest: ")

    def join(self, what: str) -> None:
        self.joined += 1
        self.running.expect("is connected", self.joined)
        assert self.running.logged("is connected") == self.joined, what

    def gone(self) -> None:
        self.left += 1
        self.running.expect("is gone", self.left)

    def data(self) -> bytes:
        return self.chance.randbytes(self.chance.choice((1, 7, 300, 40_000)))

    # -- steps ---------------------------------------------------------------------------------

    def step_come(self) -> None:
        if len(self.debuggers) < 5:
            one = Client(f"unix:{self.paths['d']}").connect()
            self.debuggers.append(one)
            self.active = self.active or one
            self.join("debugger")

    def step_watch(self) -> None:
        if len(self.watchers) < 3:
            self.watchers.append(Client(f"unix:{self.paths['w']}").connect())
            self.join("watcher")

    def step_go(self) -> None:
        if self.debuggers:
            one = self.debuggers.pop(self.chance.randrange(len(self.debuggers)))
            self.spoke.discard(one)
            one.close()
            self.gone()
            if one is self.active:
                self.active = self.debuggers[0] if self.debuggers else None

    def step_watcher_goes(self) -> None:
        if self.watchers:
            self.watchers.pop().close()
            self.gone()

    def step_guest_restarts(self) -> None:
        self.guest.close()
        self.gone()
        self.guest = Client(f"unix:{self.paths['g']}").connect()
        self.join("guest")

    def step_guest_speaks(self) -> None:
        data = self.data()
        self.guest.send(data)
        self.said += len(data)
        # Until it has gone by, whoever comes is still in time for it.
        until(lambda: self.running.bridge.counters.bytes[0] == self.said, "the guest is drained")
        for one in (*self.debuggers, *self.watchers):
            assert one.receive(len(data)) == data

    def step_debugger_speaks(self) -> None:
        if not self.debuggers:
            return
        one = self.chance.choice(self.debuggers)
        if one is not self.active and self.active not in self.spoke:
            self.active = one
        data = self.data()
        one.send(data)
        if one is self.active:
            self.spoke.add(one)
            assert self.guest.receive(len(data)) == data
        else:
            assert self.guest.rest(0.02) == b""

    def step_watcher_speaks(self) -> None:
        if self.watchers:
            self.chance.choice(self.watchers).send(self.data())
            assert self.guest.rest(0.02) == b""

    def check(self) -> None:
        for one in (self.guest, *self.debuggers, *self.watchers):
            assert one.rest(0.0) == b"" and not one.up.read()

    def close(self) -> None:
        for one in (self.guest, *self.debuggers, *self.watchers):
            one.close()


SEEDS = [*range(4), *(pytest.param(seed, marks=pytest.mark.long) for seed in range(4, 40))]


@pytest.mark.parametrize("seed", SEEDS)
def test_any_order(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    paths = {name: tmp_path / name for name in "gdw"}
    with bridge(
        f"unix:{paths['g']},listen", f"unix:{paths['d']},listen", f"unix:{paths['w']},listen,watch"
    ) as running:
        model = Model(running, tmp_path, chance)
        steps = [getattr(model, name) for name in sorted(vars(Model)) if name.startswith("step_")]
        # More speaking than coming and going.
        weights = [4 if "speaks" in step.__name__ else 2 for step in steps]
        for _ in range(120):
            chance.choices(steps, weights)[0]()
            model.check()
        model.close()
