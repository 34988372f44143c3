"""Every step of the protocol × role × fault × transport × landing, in a fleet of real processes, and with real engines.

python -m support.fault_matrix TABLE.json [VALUES …]              the rows that have all these values, or all of them
python -m support.fault_matrix TABLE.json --missing [VALUES …]    those of them that have no outcome yet
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import urlsplit

from support.fault_cases import CASTS, Case, Fault, engine_product, groups, product
from support.fleet import PRELOADED, SOURCES, STRUCK

from weft.protocol.events import Step
from weft.store_server import serve_store
from weft.testing.relay import Relay

WITNESS = "witness/0"
"""The other replica; its name comes later, so that what is for the struck one comes first."""
DELAY_SECONDS = 0.5
RECOVERY_SECONDS = 300.0
"""Longer than the rendezvous: a member that could not connect may wait for the end of it before it comes again."""
MISSING = "--missing"
NOT_RUN = "not run: failed once (no recovery in 120 s, or a rule too strict), not again since mended"
WITHOUT = ("failed: ", "not run: ")
"""How outcomes begin that say nothing."""
PAUSE_SECONDS = 0.05
"""Between versions."""
OPTIONS: dict[str, dict[str, Any]] = {"nixl": {"ucx_settings": {"TLS": "tcp"}}, "gloo": {}}
"""Everything goes over TCP, so that it can be cut."""
VERBS = {
    Fault.KILL: "kill", Fault.FREEZE: "freeze", Fault.CUT: "cut", Fault.CORRUPT: "corrupt", Fault.DELAY: "freeze",
}  # fmt: skip
BESIDE = (Step.OFFER, Step.BEGIN, Step.MOVE, Step.VERIFY)
"""With a shadow no weights that are served change before these are done."""


class Store:
    """A store in a process of its own, behind a relay."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._relay = Relay(0)
        self.url = f"tcp://127.0.0.1:{self._relay.port}"
        self.start()

    def start(self) -> None:
        """Start it, with nothing in it."""
        near, far = self._context.Pipe()
        self._process = self._context.Process(target=keep_store, args=(far,), daemon=True)
        self._process.start()
        far.close()
        assert near.poll(60), "the store has not come up"
        self._relay.to_port = near.recv()
        near.close()

    def kill(self) -> None:
        """SIGKILL."""
        self._process.kill()
        self._process.join(10)

    def freeze(self) -> None:
        """SIGSTOP."""
        self._send(signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT."""
        self._send(signal.SIGCONT)

    def cut(self) -> None:
        """End all connections; new ones can be made."""
        self._relay.cut()

    def close(self) -> None:
        """End it."""
        self.kill()
        self._relay.close()

    def _send(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)


def keep_store(pipe: Connection) -> None:
    """The process of a store."""
    with serve_store() as server:
        pipe.send(urlsplit(server.url).port)
        signal.pause()


class Arena:
    """A fleet of two sources and two replicas, one of which is struck, in which case after case is run."""

    def __init__(self, transport: str, landing: str, engine: str) -> None:
        self._cast = CASTS[engine]
        self._restarted: set[str] = set()
        self._gave_up = ""
        with ExitStack() as stack:
            self._store = Store()
            stack.callback(self._store.close)
            company = self._cast.company(
                self._store.url, "faults", transport, landing, limits=self._cast.limits, options=OPTIONS[transport]
            )
            self._company = stack.enter_context(company)
            self._company.start(*SOURCES, WITNESS)
            self._company.start(*self._cast.members, size=len(self._cast.members))
            for name in SOURCES:
                self._company.until(name, "open")
            self._catch_up()
            self._stack = stack.pop_all()

    def close(self) -> None:
        """End all processes."""
        self._stack.close()

    def run(self, case: Case) -> dict[str, Any]:
        """Strike, put right what has been struck, and see everybody serve a later version. A row of the table.

        Raises `AssertionError` that says what was not as promised.
        """
        company, name, stop = self._company, self._cast.processes[case.role], self._cast.stops[case.step]
        for said in company.said.values():
            said.clear()
        self._restarted, old = set(), company.version
        if stop not in SOURCES:
            company.tell(stop, case.step.value, old + 1)
        version = company.offer(case.step, stop)
        company.until(stop, "at", case.step.value, version)
        struck_at = time.monotonic()
        self._do(VERBS[case.fault], name)
        if (case.fault, name) != (Fault.KILL, stop):
            company.tell(stop, "go on")
        if case.fault is Fault.DELAY:
            time.sleep(DELAY_SECONDS)
            self._do("thaw", name)
        away = {name} if case.fault in (Fault.KILL, Fault.FREEZE) else set()
        for source in sorted(set(SOURCES) - away):
            self._end(source, version)
        if case.fault is Fault.KILL:
            self._restart(name)
        elif case.fault is Fault.FREEZE:
            self._do("thaw", name)
            if name in SOURCES:
                self._end(name, version)
        self._catch_up()
        return self._judged(case, old, version, struck_at)

    def _do(self, what: str, name: str) -> None:
        if name == "store":
            getattr(self._store, what)()
        else:
            getattr(self._company, what)(name)

    def _end(self, source: str, version: int) -> dict[str, str | None]:
        """How each replica has ended for a source; empty when it could not offer the version."""
        while True:
            what, *words = self._company.until(source)
            if words and words[0] == version:
                if what == "gave up":
                    self._gave_up = f"{source}: {words[1]}"
                return words[1] if what == "ended" else {}

    def _restart(self, name: str) -> None:
        """Start what was killed. Without one of its sources a trainer cannot go on: both are started again."""
        if name in SOURCES:
            self._restarted.add("trainer")
            for other in set(SOURCES) - {name}:
                self._company.kill(other)
            self._company.start(*SOURCES)
            for source in SOURCES:
                self._company.until(source, "open")
            self._gave_up = ""
        elif name == "store":
            self._restarted.add("store")
            self._store.start()
        else:
            lost = self._cast.lost(name)
            self._restarted.add(lost)
            self._company.start(lost, size=len(self._cast.members))

    def _catch_up(self) -> None:
        """Offer versions until everybody serves one."""
        limit, ended = time.monotonic() + RECOVERY_SECONDS, False
        while not ended:
            assert time.monotonic() < limit, f"not every replica has caught up: {str(self._said())[:2000]}"
            if self._gave_up:
                self._company.kill(SOURCES[0])
                self._restart(SOURCES[0])
            time.sleep(PAUSE_SECONDS)
            version = self._company.offer()
            outcomes = [self._end(source, version) for source in SOURCES]
            ended = all(o.get(replica, "absent") is None for o in outcomes for replica in (STRUCK, "witness"))
            said = self._said()  # lest those who go on speak to nobody
        for name in (*self._cast.members, WITNESS):
            if ("serves", version) not in [each[:2] for each in said[name]]:
                self._company.until(name, "serves", version)

    def _said(self) -> dict[str, list[tuple[Any, ...]]]:
        """What everybody has said so far in this row."""
        for name in (*self._cast.members, WITNESS):
            self._company.hear(name)
        return self._company.said

    def _judged(self, case: Case, old: int, version: int, struck_at: float) -> dict[str, Any]:
        name, members, said = self._cast.processes[case.role], self._cast.members, self._company.said
        for target in (*members, WITNESS):
            for what, *words in said[target]:
                mixed = {"serves": words[1:2], "failed": words[2:3]}.get(what, [])
                assert mixed in ([], [[]]), f"{target} serves a mixture: {what} {words}"
        lives = [member for member in members if (case.fault, member) != (Fault.KILL, self._cast.lost(name))]
        served = {self._served(member, old, version) for member in lives}
        assert len(served - {None}) < 2, f"the members serve {served}: {said}"
        serves = None if None in served or not served else served.pop()
        witnessed = self._served(WITNESS, old, version)
        if self._cast.lost(name) in members or case.fault is Fault.DELAY:
            assert witnessed == version, f"the other replica serves {witnessed}, not {version}: {said}"
            assert "trainer" not in self._restarted, f"the trainer could not go on: {said}"
        if case.fault is Fault.DELAY:
            assert serves == version, f"a delay has ended version {version}: {said}"
        after = case.fault is Fault.CORRUPT and case.step is Step.VERIFY  # what arrives next may be the pause
        if case.landing == "shadow" and case.step in BESIDE and lives and not after:
            assert serves is not None, f"nothing was served though no weights had changed: {said}"
        assert not (gone := self._company.gone()), f"{gone} did not survive: {said}"
        outcomes = {version: "committed", old: "kept the old version, caught up", None: "refused, caught up"}
        newest = version + 1 if self._restarted else version  # what was started again has to serve as well
        first = [next(w[2] for what, *w in said[m] if what == "serves" and w[0] >= newest) for m in members]
        return {
            **asdict(case), "outcome": outcomes[serves], "version": version, "version_served": serves,
            "other_replica": outcomes[witnessed], "restarted": sorted(self._restarted),
            "seconds_to_recover": round(max(first) - struck_at, 2),
        }  # fmt: skip

    def _served(self, target: str, old: int, version: int) -> int | None:
        """What a target served once the version had ended for it."""
        what, *words = next(each for each in self._company.said[target] if each[0] in ("serves", "failed"))
        if what == "failed":
            assert words[3] in (None, old), f"{target} serves {words[3]} after it has failed"
            return words[3]
        return version if words[0] == version else old


def rows(cases: Sequence[Case]) -> Iterator[dict[str, Any]]:
    """Run cases of one transport and landing, in a new fleet after each that fails."""
    arena: Arena | None = None
    try:
        for case in cases:
            if case.excluded:
                yield _row(case, f"not applicable: {case.excluded}")
                continue
            try:
                arena = arena or Arena(case.transport, case.landing, case.engine)
                yield arena.run(case)
            except Exception as error:  # noqa: BLE001  # a finding, which must not hide the others
                traceback.print_exc()
                yield _row(case, f"failed: {type(error).__name__}: {error}")
                if arena is not None:
                    arena.close()
                arena = None
    finally:
        if arena is not None:
            arena.close()


def _row(case: Case, outcome: str) -> dict[str, Any]:
    empty = dict.fromkeys(("version", "version_served", "other_replica", "restarted", "seconds_to_recover"))
    return {**asdict(case), "outcome": outcome, **empty}


def key_of(row: dict[str, Any]) -> str:
    """`Case.key` of a row."""
    return "/".join(row[name] for name in ("step", "role", "fault", "transport", "landing", "engine"))


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for, many fleets at a time, and put the rows into the table: the other ones stay."""
    out, words = Path(arguments[0]), set(arguments[1:]) - {MISSING}
    every = [*product(), *engine_product()]
    cases = [case for case in every if words <= set(case.key.split("/"))]
    table = {key_of(row): row for row in json.loads(out.read_text())} if out.exists() else {}
    if MISSING in arguments:
        cases = [case for case in cases if case.key not in table or table[case.key]["outcome"].startswith(WITHOUT)]
    lock = Lock()

    def run(group: list[Case]) -> None:
        for row in rows(group):
            print(*row.values(), flush=True)
            with lock:
                table[key_of(row)] = row
                ordered = [table[case.key] for case in every if case.key in table]
                lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in ordered)
                out.write_text(f"[\n{lines}\n]\n")

    for engine, cast in CASTS.items():
        with ThreadPoolExecutor(cast.at_once) as pool:
            list(pool.map(run, groups([case for case in cases if case.engine == engine])))
    return any(table[case.key]["outcome"].startswith("failed") for case in cases)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
