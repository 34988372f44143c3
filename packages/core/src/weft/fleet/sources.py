"""The sources' side of a fleet."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from weft.authentication import Secret
from weft.contracts import Source
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, RefitAbortedError, WeftError
from weft.fleet.member import cell_of
from weft.fleet.offer import FleetOffer
from weft.fleet.roll import Roll, RollBook
from weft.fleet.shared import SharedSource
from weft.job_store import JobStore
from weft.offer import Offer
from weft.opened import Opened
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.stores import CountedStore, open_store
from weft.wire import Notice

_LOG = logging.getLogger(__name__)
_MOST_FAILURES = 2
"""Versions in a row that a replica may fail to install before the fleet goes on without it."""
_ROLL_CALLS = 3
"""Cells over which the roll is told: one would do, if all sources had it."""


class Fleet(Opened):
    """One source of a job whose replicas come and go. Every source makes one, with its rank among them.

    Replicas are `FleetMember`s of the same job. They are admitted, and given up after a loss, between versions: in
    `offer`, as the source of rank 0 decides for all. Each replica that joins may hold an offer up by `Deadlines.begin`
    at most. Use it as a context manager; for one thread.
    """

    def __init__(
        self, *, source: Source, rank: int, sources: int, replicas: int = 1, store: str, job: str, name: str,
        transport: str, transport_options: Mapping[str, Any] | None = None, deadlines: Deadlines | None = None,
        policy: Policy | None = None, host: str | None = None, domain: str | None = None,
        secret: Secret | bytes | str | None = None,
    ) -> None:  # fmt: skip
        """`replicas` must have come before `open` returns; more may come at any time."""
        if not 0 <= rank < sources:
            raise ConfigError(f"Fleet: rank is {rank}, expected 0 to {sources - 1}")
        (policy or Policy()).check_alone()
        self._source, self._rank, self._sources, self._replicas = source, rank, sources, replicas
        self._store_url, self._job = store, job
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        self._deadlines = deadlines or Deadlines()
        # A replica that joins must not hold the others up for longer than one that does not begin.
        self._joining = replace(self._deadlines, rendezvous=self._deadlines.begin)
        self._options: dict[str, Any] = {
            "transport": transport, "transport_options": transport_options, "store": store, "name": name,
            "expect": Expect(sources, 1), "policy": policy, "host": host, "domain": domain, "secret": secret,
        }  # fmt: skip
        self._shared: SharedSource | None = None
        self._store: CountedStore | None = None
        self._book: RollBook | None = None
        self._roll = Roll(0, {})
        self._cells: dict[str, Refit] = {}
        self._failures: dict[str, int] = {}
        self._offer: FleetOffer | None = None

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that take part now, sorted."""
        return tuple(sorted(self._cells))

    def open(self) -> None:
        """Meet the other sources, wait for as many replicas as expected, and join their cells. Collective.

        Raises `DeadlineError` that names who did not come, and what `Refit.open` raises.
        """
        deadline = Deadline.after(self._deadlines.rendezvous)
        try:
            self._shared = SharedSource(self._source)
            self._store = CountedStore(open_store(self._store_url, deadline))
            self._book = RollBook(JobStore(self._store, self._job, self._secret), self._rank, self._sources)
            self._take(self._book.open(self._replicas, deadline))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up what has not ended, and leave all cells, whatever of it fails. Idempotent."""
        with ExitStack() as stack:
            if self._store is not None:
                stack.callback(self._store.close)
            for cell in self._cells.values():
                stack.callback(cell.close)
            self._cells, self._store, self._book, self._shared = {}, None, None, None
            self._roll, self._offer, self._failures = Roll(0, {}), None, {}

    def offer(self, version: int) -> FleetOffer:
        """Admit who has come, go on without who is lost, and offer this source's weights as `version`.

        The weights must not change before `FleetOffer.released` has returned. A former offer that has not ended is
        withdrawn. All sources offer the same versions, which grow.
        """
        if self._book is None or self._store is None:
            raise ConfigError("the fleet is not open: use `with Fleet(...) as fleet`, or call open() first")
        store, own = self._store, self._store.operations
        self._settle(version)
        self._take(self._lead(self._book, version) if self._rank == 0 else self._follow(self._book, version))
        cells = list(self._cells.values())
        before = own + sum(cell.store_operations for cell in cells)
        offers: dict[str, Offer] = {}
        made = FleetOffer(
            version, offers, self._deadlines,
            lambda: store.operations + sum(cell.store_operations for cell in cells) - before,
        )  # fmt: skip
        try:
            for name in sorted(self._cells):
                self._offer_to(name, version, offers)
        except BaseException as error:
            made.withdraw(f"{type(error).__name__}: {error}")
            raise
        self._offer = made
        return made

    def _offer_to(self, name: str, version: int, offers: dict[str, Offer]) -> None:
        """What is wrong in one cell ends that one; what is wrong with the version ends the offer."""
        try:
            offers[name] = self._cells[name].offer(version)
        except ConfigError:
            raise
        except WeftError as error:
            self._spoil(name, error)

    def _spoil(self, name: str, error: WeftError) -> None:
        _LOG.warning("the fleet goes on without replica %s: %s", name, error)
        self._failures[name] = _MOST_FAILURES

    def _settle(self, version: int) -> None:
        """Count who did not install the last version."""
        if self._offer is not None:
            self._offer.withdraw(f"version {version} is offered instead")
            for name, reason in self._offer.outcomes.items():
                self._failures[name] = 0 if reason is None else self._failures.get(name, 0) + 1
            self._offer = None

    def _lead(self, book: RollBook, version: int) -> Roll:
        """Decide who takes part, and tell the other sources."""
        lost: set[str] = set()
        for name, cell in self._cells.items():
            self._pump(name)  # who has left since has said so
            if sources := sorted(set(cell.lost).intersection(cell.roles.sources)):
                raise RefitAbortedError(version, [f"{', '.join(sources)} is gone: restart the trainer"])
            lost.update([name] if cell.lost else [])
        gone = {*lost, *(name for name, failed in self._failures.items() if failed >= _MOST_FAILURES)}
        kept = {name: number for name, number in self._roll.replicas.items() if name in self._cells.keys() - gone}
        came = book.waiting()
        changes = kept != self._roll.replicas or came
        roll = book.write({**kept, **came}) if changes else self._roll
        if not self._cells:
            book.say(version, roll)
        for name in sorted(self._cells)[:_ROLL_CALLS]:
            wire, roles = self._cells[name].loop.wire, self._cells[name].roles
            for source in roles.sources:
                if source != wire.me.name:
                    wire.tell(source, version, Notice("roll", numbers=(roll.number,)))
        return roll

    def _follow(self, book: RollBook, version: int) -> Roll:
        """Hear who takes part from rank 0, over whatever cell it comes."""
        deadline = Deadline.after(self._deadlines.begin)
        if not self._cells:
            return self._read(book, version, deadline)
        heard: list[int] = []

        def ready() -> bool:
            for name, cell in self._cells.items():
                self._pump(name)
                heard.extend(notice.numbers[0] for _, notice in cell.loop.wire.take(version, "roll"))
            if not heard and all(cell.loop.wire.lost([cell.roles.source_leader]) for cell in self._cells.values()):
                raise RefitAbortedError(version, ["the source of rank 0 is gone: restart the trainer"])
            return bool(heard)

        deadline.wait(ready, f"the roll of version {version}", lambda: ["the source of rank 0"])
        return self._roll if heard[0] == self._roll.number else book.read(heard[0])

    def _read(self, book: RollBook, version: int, deadline: Deadline) -> Roll:
        """Without a cell: what rank 0 says in the store. It says nothing there while it has cells that this source
        could not join; then this one goes on without them, which rank 0 finds out.
        """
        found: list[Roll] = []

        def ready() -> bool:
            found.extend([roll] if (roll := book.told(version)) else [])
            return bool(found) or bool(self._roll.replicas)

        book.until(ready, f"the roll of version {version}", lambda: ["the source of rank 0"], deadline)
        return found[0] if found else self._roll

    def _pump(self, name: str) -> None:
        try:
            self._cells[name].loop.wire.pump()
        except WeftError as error:
            self._spoil(name, error)

    def _take(self, roll: Roll) -> None:
        """Leave the cells of those who are gone or have come back, and join those of newcomers."""
        before, self._roll = self._roll, roll
        for name in sorted(before.replicas):
            if roll.replicas.get(name) != before.replicas[name]:
                self._failures.pop(name, None)
                if cell := self._cells.pop(name, None):
                    self._leave(name, cell)
        for name in sorted(roll.replicas.keys() - self._cells.keys()):
            if before.replicas.get(name) != roll.replicas[name]:  # else it was tried
                self._join(name, first=not before.number)

    def _leave(self, name: str, cell: Refit) -> None:
        try:
            cell.close()
        except WeftError as error:
            _LOG.warning("leaving the cell of replica %s: %s", name, error)

    def _join(self, name: str, *, first: bool) -> None:
        deadlines = self._deadlines if first else self._joining
        cell = Refit(source=self._shared, job=cell_of(self._job, name), deadlines=deadlines, **self._options)
        try:
            cell.open()
        except WeftError as error:
            if first:
                raise
            _LOG.warning("replica %s could not join, and must come again: %s", name, error)
            return
        self._cells[name] = cell
        if (cell.roles.source_leader == cell.name) != (self._rank == 0):
            raise ConfigError(
                f"the source of rank 0 must be the first by name, but that is {cell.roles.source_leader}: "
                f"{cell.name} has rank {self._rank}"
            )
