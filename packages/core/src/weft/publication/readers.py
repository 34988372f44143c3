"""The replicas that read one copy of a holder: a fleet of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from weft.contracts import Store
from weft.deadline import Deadline, Deadlines
from weft.errors import RecordError, StoreError
from weft.fleet.member import cell_of
from weft.fleet.roll import Roll, RollBook, bell
from weft.job_store import JobStore
from weft.publication.cell import Cell
from weft.publication.copies import Copy
from weft.refit import Refit

_LOOK_SECONDS = 1.0
"""Between looks at what nobody rings for."""
_NONCE_BYTES = 8


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 serves from a copy, and whom. New fields go to the end, with defaults."""

    life: int
    version: int
    roll: int


class Readers:
    """Those who read one copy, at one member of its holder. Rank 0 admits them, and tells the other members."""

    def __init__(
        self, copy: Copy, fleet: str, rank: int, members: int, deadlines: Deadlines, options: Mapping[str, Any],
        served: Callable[[int, str, str], None],
    ) -> None:  # fmt: skip
        """`options` are those of the `Refit` of each; `served` as in `Cell`."""
        self.copy, self.fleet = copy, fleet
        self._rank, self._members, self._deadlines, self._options = rank, members, deadlines, options
        self._served = served
        self._cells: dict[str, Cell] = {}
        self._left: list[Cell] = []
        self._roll = Roll(0, {})
        self._turned: Turn | None = None
        self._heard: bytes | None = None

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that are served now, sorted."""
        return tuple(sorted(name for name, cell in list(self._cells.items()) if cell.alive))

    @property
    def admitted(self) -> int:
        """How many take part."""
        return len(self._roll.replicas)

    def open(self, records: JobStore, ringing: Store, deadline: Deadline) -> Roll:
        """Meet the other members; `ringing` is a connection of its own, since a watch occupies it. Returns whom to
        `take` first.
        """
        self._records, self._ringing = records, ringing
        self._book = RollBook(records, self._rank, self._members)
        self.root = f"{records.root}/published"
        """Of the keys of this copy."""
        first = self._book.open(0, deadline)
        self.life = first.number
        """Of the holder: what others have said is not for this one."""
        return first

    def admit(self) -> None:
        """Serve who has come, go on without who is gone, and tell the other members. By rank 0."""
        alive = self.replicas
        came = self._book.waiting()
        members = {name: number for name, number in self._roll.replicas.items() if name in alive}
        if came or members != self._roll.replicas:
            self.take(self._book.write({**members, **came}))
        turn = Turn(self.life, self.copy.version, self._roll.number)
        if turn != self._turned:
            self._records.put("turn", f"{self.root}/turn", turn)
            self._turned = turn

    def rest(self) -> None:
        """Until there may be something to do. By rank 0."""
        self._heard = self._ringing.watch(bell(self._records), self._heard, Deadline.after(_LOOK_SECONDS))

    def ring(self) -> None:
        """Have rank 0 look."""
        self._records.store.set(bell(self._records), os.urandom(_NONCE_BYTES))

    def turns(self) -> Iterator[Turn | None]:
        """What rank 0 serves, whenever it says so, and None now and then. By the others."""
        key, known = f"{self.root}/turn", None
        while True:
            known = self._ringing.watch(key, known, Deadline.after(_LOOK_SECONDS))
            turn = None if known is None else self._records.opened("turn", key, Turn, known)
            yield turn if turn is not None and turn.life == self.life else None

    def follow(self, number: int) -> None:
        """Serve whom rank 0 serves. By the others."""
        if number != self._roll.number:
            with suppress(RecordError):  # rank 0 has written others since, and says so in a newer turn
                self.take(self._book.read(number))

    def take(self, roll: Roll) -> None:
        """Leave the cells of those who are gone or have come back, and join those of newcomers."""
        before, self._roll = self._roll, roll
        self._left = [cell for cell in self._left if cell.running]
        former: dict[str, Cell] = {}
        for name in before.replicas:
            if roll.replicas.get(name) != before.replicas[name] and (cell := self._cells.pop(name, None)):
                cell.stop()
                former[name] = cell
        self._left += former.values()
        for name in roll.replicas:
            if before.replicas.get(name) != roll.replicas[name]:
                refit = Refit(source=self.copy, job=cell_of(self.fleet, name), **self._options)
                self._cells[name] = Cell(
                    name, refit, self.copy, self._deadlines, leads=self._rank == 0, ended=self._let_rank_0_look,
                    served=self._served, former=former.get(name),
                )  # fmt: skip

    def stop(self) -> None:
        """Serve nobody from now on; `join` waits for it."""
        for cell in list(self._cells.values()):
            cell.stop()

    def join(self) -> None:
        """Until all cells are left: a replica that is just joining is waited for."""
        for cell in [*self._left, *self._cells.values()]:
            cell.join()
        self._cells.clear()

    def _let_rank_0_look(self) -> None:
        if self._rank == 0:
            with suppress(StoreError):  # it looks by itself soon
                self.ring()
