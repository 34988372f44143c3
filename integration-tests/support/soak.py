"""A soak: a fleet in processes whose replicas answer all the time, while a seeded generator does random faults to it.

`python -m support.soak --out FILE` is the long form: 1,000 refits over each transport and landing that is named.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter, defaultdict
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from support.holding import Holding
from support.soak_engine import FIGURES, numbers, prepare
from support.soak_member import SOURCES, Role, play

from weft.store_server import serve_store

REPLICAS = {"steady": 1, "struck": 2}
"""By name: how many members. Those of the first are never killed: what they hold is to be the same at the end."""
TARGETS = tuple(f"{name}/{rank}" for name, size in REPLICAS.items() for rank in range(size))
WEIGHTS = {
    "kill a target": 3, "kill a trainer": 1, "freeze": 3, "cut": 2, "cut from the store": 1, "delay": 3, "corrupt": 3,
}  # fmt: skip
GROWTH = Holding(allocated_bytes=16 << 20, objects=5000, descriptors=8, resident_bytes=1 << 40)
"""What a process may hold more than at its first look after `WARM_REFITS`. A member that stays once it has closed is
too much at once: its staging alone is 32 MiB.
"""
WARM_REFITS = 10
"""After them every cache is full."""
LONGEST_FREEZE_SECONDS = 6.0
QUIET_SECONDS = 180.0
"""After faults stop everybody must have the newest version by then."""


@dataclass(frozen=True, slots=True)
class Settings:
    """What is run."""

    seed: int
    transport: str
    landing: str
    refits: int
    """Versions that at least one replica installs."""
    between: float = 0.5
    """Mean seconds between two faults."""
    checkpoint: int = 100
    """Refits between two looks at what everybody holds, for which the faults stop a while."""
    seconds: float = 3600.0
    """After so long it stops where it is; the figures say how many refits there were."""


@dataclass(eq=False)
class Soak:
    """One run. A context manager that leaves no process behind."""

    settings: Settings
    version: int = 0
    refits: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    held: dict[str, list[tuple[int, Holding]]] = field(default_factory=lambda: defaultdict(list))
    """Per life of a process: refits so far, and what it held when all was quiet."""
    said: Counter[str] = field(default_factory=Counter)
    installed: dict[str, int] = field(default_factory=dict)
    """Newest version of each target."""
    calm: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """By replica: the most seconds without a new version while nothing was done to it or to the sources."""

    def __post_init__(self) -> None:
        self._random = random.Random(self.settings.seed)
        self._context = multiprocessing.get_context("spawn")
        self._stack = ExitStack()
        self._pipes: dict[str, Connection] = {}
        self._processes: dict[str, Any] = {}
        self._lives: Counter[str] = Counter()
        self._due: list[tuple[float, str, str]] = []
        """(when, what, to whom): starts and thaws that are still to come."""
        self._open: set[str] = set()
        self._ended: set[str] = set()
        self._since: dict[str, float] = {}
        """When something was last done to a process, or a replica had a new version."""
        self._outcomes: dict[str, str | None] = {}
        self._offered_at = 0.0

    def __enter__(self) -> Soak:
        self._folder = Path(self._stack.enter_context(TemporaryDirectory()))
        server = serve_store()
        self._stack.callback(server.close)
        self._store = server.url
        for replica, size in REPLICAS.items():
            prepare(self._folder, replica, size)
        for name in (*SOURCES, *TARGETS):
            self._start(name)
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self._kill(name)
        self._stack.close()

    def run(self) -> dict[str, Any]:
        """All refits, with faults, and what came of it. Raises `AssertionError` when something is not as promised."""
        self._settle()
        began, strike_at, look_at = time.monotonic(), time.monotonic(), self.settings.checkpoint
        while self.refits < self.settings.refits and time.monotonic() - began < self.settings.seconds:
            self._turn()
            if time.monotonic() >= strike_at:
                self._strike()
                strike_at = time.monotonic() + self._random.expovariate(1 / self.settings.between)
            if self.refits >= look_at:
                self._settle()
                look_at += self.settings.checkpoint
        self._settle()
        grown = self.grown()
        assert not grown, f"{self._where()}: processes hold more and more: {grown}"
        return self._figures(time.monotonic() - began)

    def grown(self) -> list[str]:
        """What each life of a process held at every look, where that has grown."""
        found = []
        for life, looks in self.held.items():
            warm = [(refit, asdict(held)) for refit, held in looks if refit >= WARM_REFITS]
            for what, most in asdict(GROWTH).items():
                row = [(refit, held[what]) for refit, held in warm]
                if row and max(row, key=lambda each: each[1])[1] > row[0][1] + most:
                    found.append(f"{life}: {what} {row}")
        return found

    def _settle(self) -> None:
        """Without faults: until every target has three versions in a row; then note what everybody holds."""
        limit, row = time.monotonic() + QUIET_SECONDS, 0
        while row < 3:
            before = self.version
            self._turn()
            assert time.monotonic() < limit, (
                f"{self._where()}: not all have the newest version {self.version}: {self.installed}, {self._outcomes}"
            )
            if self.version != before and not self._due:
                row = row + 1 if all(self.installed.get(name) == before for name in TARGETS) else 0
        counted = sum(map(len, self.held.values()))
        for name in self._processes:
            self._tell(name, "count")
        while sum(map(len, self.held.values())) < counted + len(self._processes):
            self._turn()
            assert time.monotonic() < limit, f"{self._where()}: not all have said what they hold"

    def _turn(self) -> None:
        """Offer when the last version has ended, do what is due, and listen for a moment."""
        now = time.monotonic()
        for each in [each for each in self._due if each[0] <= now]:
            self._due.remove(each)
            _, what, name = each
            if what == "start":
                self._start(name)
            elif name in self._processes:
                os.kill(self._processes[name].pid, signal.SIGCONT)
                self._since[name] = now
        if self._ended == set(SOURCES) and self._all_have_said(now):
            self._next()
        for pipe in wait(list(self._pipes.values()), 0.01):
            name = next((name for name, known in self._pipes.items() if known is pipe), None)
            if name is None:  # what another has said has ended it
                continue
            with suppress(EOFError, ConnectionResetError):
                self._hear(name, pipe.recv())
                continue
            raise AssertionError(f"{self._where()}: {name} has ended by itself")
        wrong = self._folder / "wrong"
        assert not wrong.exists(), f"{self._where()}: {wrong.read_text()}"
        assert now - self._offered_at < QUIET_SECONDS or not self._offered_at, f"{self._where()}: no version ends"

    def _all_have_said(self, now: float) -> bool:
        """Whether all targets that have installed the version have said so: they say it beside the sources."""
        there = {replica for replica, reason in self._outcomes.items() if reason is None}
        known = {name.split("/")[0] for name in TARGETS if self.installed.get(name) == self.version}
        return there <= known or now - self._offered_at > 1.0

    def _next(self) -> None:
        if self.version and None in self._outcomes.values():
            self.refits += 1
        self.version += 1
        self._ended, self._outcomes, self._offered_at = set(), {}, time.monotonic()
        for name in SOURCES:
            self._tell(name, "offer", self.version)

    def _hear(self, name: str, said: tuple[Any, ...]) -> None:
        self.said[said[0]] += 1
        match said:
            case ("open",):
                self._open.add(name)
                if self._open == set(SOURCES):
                    self._ended = set(SOURCES)
            case ("ended", version, outcomes):
                assert version == self.version, f"{self._where()}: {name} ended {version}"
                self._ended.add(name)
                if name == SOURCES[0]:
                    self._outcomes = outcomes
            case ("installed", version, flipped):
                assert not flipped, f"{self._where()}: {name} has installed version {version} with a changed byte"
                self.installed[name] = version
                self._serves(name.split("/")[0])
            case ("holds", held):
                self.held[f"{name}#{self._lives[name]}"].append((self.refits, held))
            case ("failed", text):
                self.said["digest"] += "digest" in text
                if name in SOURCES:
                    self._restart_trainer()

    def _serves(self, replica: str) -> None:
        now = time.monotonic()
        done = [when for name, when in self._since.items() if name.split("/")[0] in (replica, "trainer")]
        self.calm[replica] = max(self.calm[replica], now - max(done))
        self._since[replica] = now

    def _restart_trainer(self) -> None:
        """As a scheduler does when one rank of a job is gone: all of them anew, which go on counting."""
        self._open, self._ended, self._outcomes = set(), set(), {}
        for name in SOURCES:
            self._kill(name)
            self._due.append((time.monotonic() + self._random.uniform(0, 1), "start", name))

    def _strike(self) -> None:
        """One random fault, unless what it would strike is down already."""
        what = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
        name = self._random.choice((*SOURCES, *TARGETS))
        seconds = self._random.uniform(0.05, LONGEST_FREEZE_SECONDS) * self._random.random()
        if what == "kill a trainer":
            name = self._random.choice(SOURCES)
        elif what == "kill a target":
            name = self._random.choice([each for each in TARGETS if each.startswith("struck")])
        elif what == "corrupt":
            name = self._random.choice(TARGETS)
        late = what == "kill a trainer" and self.refits > self.settings.refits / 2  # so that one lives for long
        if late or name not in self._processes or any(due[2] == name for due in self._due):
            return
        self.faults[what] += 1
        self._since[name] = time.monotonic()
        match what:
            case "kill a target":
                self._kill(name)
                self._due.append((time.monotonic() + seconds, "start", name))
            case "kill a trainer":
                self._restart_trainer()
            case "freeze":
                os.kill(self._processes[name].pid, signal.SIGSTOP)
                self._due.append((time.monotonic() + seconds, "thaw", name))
            case _:
                self._tell(name, what, self._random.getrandbits(32), seconds)

    def _start(self, name: str) -> None:
        near, far = self._context.Pipe()
        settings = self.settings
        role = Role(
            name, self._store, "soak", settings.transport, settings.landing, str(self._folder),
            REPLICAS.get(name.split("/")[0], 0),
        )  # fmt: skip
        self._processes[name] = self._context.Process(target=play, args=(role, far), daemon=True)
        self._processes[name].start()
        far.close()
        self._pipes[name] = near
        self._lives[name] += 1
        self._since[name] = time.monotonic()

    def _kill(self, name: str) -> None:
        if name in self._processes:
            self._processes[name].kill()
            self._processes.pop(name).join(10)
            self._pipes.pop(name).close()

    def _tell(self, name: str, *what: Any) -> None:
        with suppress(BrokenPipeError):  # `_turn` finds out
            self._pipes[name].send(what)

    def _where(self) -> str:
        return f"{self.settings}, version {self.version}, refit {self.refits}, faults {dict(self.faults)}"

    def _figures(self, seconds: float) -> dict[str, Any]:
        replicas = {}
        for replica in REPLICAS:
            figures = dict(zip(FIGURES, numbers(self._folder / replica).tolist(), strict=True))
            longest = figures.pop("longest") / 1e9
            kept = {what: figures[what] for what in ("reads", "waited", "refused", "lost", "versions")}
            replicas[replica] = {
                **kept, "longest_seconds_between_answers": round(longest, 3),
                "longest_undisturbed_seconds_without_a_version": round(self.calm[replica], 3),
            }  # fmt: skip
        lives = {name: held for name, held in self.held.items() if len(held) > 1}
        return {
            "seed": self.settings.seed, "transport": self.settings.transport, "landing": self.settings.landing,
            "refits": self.refits, "versions_offered": self.version, "seconds": round(seconds, 1),
            "faults": dict(self.faults), "digest_errors": self.said["digest"], "failures_told": self.said["failed"],
            "replicas": replicas,
            "held": {
                name: [{"refit": refit, **asdict(found)} for refit, found in held] for name, held in lives.items()
            },
        }  # fmt: skip


def main(arguments: list[str]) -> None:
    """Run what is asked for, and write one JSON list of figures."""
    parser = argparse.ArgumentParser(prog="python -m support.soak")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--refits", type=int, default=1000)
    parser.add_argument("--case", nargs="+", default=["nixl:in_place", "gloo:shadow"], metavar="TRANSPORT:LANDING")
    parser.add_argument("--seconds", type=float, default=3600.0, help="most of one case")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    figures = []
    for case in options.case:
        with Soak(Settings(options.seed, *case.split(":"), options.refits, seconds=options.seconds)) as soak:
            figures.append(soak.run())
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
        print(f"{case}: {figures[-1]['replicas']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
