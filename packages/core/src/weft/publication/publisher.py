"""One member of a holder of versions: it publishes, and goes on."""

from __future__ import annotations

import logging
import math
import os
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch

from weft.authentication import Secret
from weft.connection import host_identity
from weft.contracts import Source, Store
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, RecordError, StoreError, WeftError
from weft.facts import Facts, facts_of
from weft.fleet.member import cell_of
from weft.fleet.roll import Roll, RollBook, bell
from weft.heartbeat import Heartbeat
from weft.job_store import JobStore
from weft.opened import Opened
from weft.policy import Policy
from weft.publication.cell import Cell
from weft.publication.copies import Copies
from weft.publication.holders import Directory, Holder, fleet_of
from weft.refit import Refit
from weft.roster import Expect
from weft.stores import open_store

_LOG = logging.getLogger(__name__)
_LOOK_SECONDS = 1.0
"""Between looks at what nobody rings for."""
_NONCE_BYTES = 8
_KEPT_COUNTS = 2
"""Versions whose count of members stays: the one that is served, and the next."""


class Coming(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 publishes next. New fields go to the end, with defaults."""

    life: int
    version: int
    served: int
    """What it serves until `version` is complete: whoever does not yet takes it over first."""


class Turn(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 serves, and whom. New fields go to the end, with defaults."""

    life: int
    version: int
    roll: int


class Publisher(Opened):
    """One member of a holder: the trainer, or a replica that passes on what it has read. Every member makes one.

    `publish` copies the weights into host memory and returns; threads serve the newest whole version to every
    `Subscriber` that asks, while training runs on. A version is served once all members have published it. Memory on
    the host: twice the source's bytes. Use it as a context manager; `publish` is for one thread.
    """

    def __init__(
        self, *, source: Source, rank: int, members: int, store: str, job: str, name: str, holder: str = "trainer",
        transport: str, transport_options: Mapping[str, Any] | None = None, deadlines: Deadlines | None = None,
        policy: Policy | None = None, host: str | None = None, domain: str | None = None,
        secret: Secret | bytes | str | None = None, original: bool = True,
    ) -> None:  # fmt: skip
        """`holder` is the name by which subscribers know all members together; `original` says that the versions are
        its own, and not read from another holder.
        """
        if not 0 <= rank < members:
            raise ConfigError(f"Publisher: rank is {rank}, expected 0 to {members - 1}")
        host = host or host_identity()
        self._source, self._rank, self._members = source, rank, members
        self._store_url, self._name, self._job = store, name, job
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        policy, self._deadlines = published(policy), deadlines or Deadlines()
        if policy.shadow:  # what a replica has fetched it installs when that suits it
            self._deadlines = replace(self._deadlines, commit=math.inf)
        self._fleet = fleet_of(job, holder)
        self._holder = Holder(holder, self._fleet, members, -1, "", host, domain or host, original)
        self._options: dict[str, Any] = {
            "transport": transport, "transport_options": transport_options, "store": store, "name": name,
            "expect": Expect(members, 1), "policy": policy, "host": host, "domain": domain,
            "deadlines": replace(self._deadlines, rendezvous=self._deadlines.begin), "secret": self._secret,
        }  # fmt: skip
        self._stack = ExitStack()
        self._stopping = threading.Event()
        self._filling, self._noting = threading.Lock(), threading.Lock()
        self._cells: dict[str, Cell] = {}
        self._left: list[Cell] = []
        self._counted: deque[int] = deque()
        self._roll = Roll(0, {})
        self._digests: dict[int, str] = {}
        self._heart = Heartbeat(f"holder {holder}")
        self._failure: BaseException | None = None
        self._last = -1

    @property
    def version(self) -> int:
        """The version that this member serves; -1 before the first."""
        return self._copies.version

    @property
    def failure(self) -> BaseException | None:
        """Why it serves nobody any more, if it does not."""
        return self._failure

    @property
    def coming(self) -> int:
        """The version that was published last; -1 before the first."""
        return self._last

    @property
    def replicas(self) -> tuple[str, ...]:
        """Those that it serves now, sorted."""
        return tuple(sorted(name for name, cell in list(self._cells.items()) if cell.alive))

    def open(self) -> None:
        """Allocate, and meet the other members. Collective. Raises `DeadlineError` that names who did not come."""
        deadline = Deadline.after(self._deadlines.rendezvous)
        try:
            self._copies = Copies(self._source)
            self._store = self._opened(deadline)
            self._ringing = self._opened(deadline)  # a watch occupies its connection
            self._records = JobStore(self._store, self._fleet, self._secret)
            self._book = RollBook(self._records, self._rank, self._members)
            self._directory = Directory(JobStore(self._store, self._job, self._secret))
            address = self._directory.keep(self._copies.layout().encoded)
            self._records.put("layout", f"{self._records.root}/layout/{self._rank}", address)
            first = self._book.open(0, deadline)
            self._holder = msgspec.structs.replace(self._holder, layouts=self._layouts(), facts=self._facts())
            self._life, self._root = first.number, f"{self._records.root}/published"
            self._attendant = threading.Thread(target=self._run, name=f"attendant of {self._name}", daemon=True)
            self._stack.callback(self._leave)
            self._take(first)
            self._attendant.start()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Serve nobody any more: replicas in the middle of a version abort it and read from another holder.

        Waits for a replica that is just joining, for `Deadlines.begin` at most. Idempotent.
        """
        self._stack.close()

    def publish(self, version: int, deadline: Deadline | None = None) -> None:
        """Copy the weights as they are now, to be served once every member has published them. They may change then.

        Versions grow; all members publish the same. Other members wait for that of rank 0, and for replicas that still
        read what is to be replaced, and raise `DeadlineError` at the deadline (without one, after `begin` and `move`).
        When rank 0 has gone on to another version meanwhile, this one is left out.
        """
        if self._failure is not None:
            raise self._failure
        if version <= self._last:
            raise ConfigError(f"version {version} is published after {self._last}: versions must grow")
        self._last = version
        with self._filling:
            if self._rank == 0:
                coming = Coming(self._life, version, self._copies.stay())
                self._records.put("coming", f"{self._root}/coming", coming)
            elif not self._ready(version, deadline or Deadline.after(self._deadlines.begin + self._deadlines.move)):
                return
            self._copies.fill(version)
        if self._store.add(self._filled(version), 1) == self._members:
            self._ring()
        if self._rank == 0:
            self._counted.append(version)
            if len(self._counted) > _KEPT_COUNTS:
                self._store.delete(self._filled(self._counted.popleft()))

    def _ready(self, version: int, limit: Deadline) -> bool:
        """Wait until the next copy may be replaced; False when the version is left out."""
        coming = self._records.await_record(
            "coming", f"{self._root}/coming", Coming, lambda c: c.life == self._life and c.version >= version, limit
        )
        if coming is None:
            raise DeadlineError(f"version {version} of the member of rank 0", limit.seconds, ["rank 0"])
        if coming.version > version:
            return False
        if coming.served == self._copies.coming:
            self._copies.turn()
        if coming.served >= self._copies.coming:
            self._copies.await_version(coming.served, limit)
        return True

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._lead() if self._rank == 0 else self._follow()
                except StoreError as error:
                    _LOG.warning("%s serves nobody new until the store is back: %s", self._name, error)
                    self._stopping.wait(_LOOK_SECONDS)
        except BaseException as error:  # noqa: BLE001  # for the next `publish`
            if not self._stopping.is_set():
                _LOG.error("%s does not serve any more: %s", self._name, error)
                self._failure = error

    def _lead(self) -> None:
        """Take over what is complete, admit who has come, and say what is held."""
        said: Holder | None = None
        turned, known = Turn(self._life, -1, self._life), None
        while not self._stopping.is_set():
            self._heart.touch(self._deadlines.begin + self._deadlines.move)
            if self._filling.acquire(blocking=False):  # else it is rung when that is done
                try:
                    if self._store.add(self._filled(self._copies.coming), 0) == self._members:
                        self._copies.turn()
                finally:
                    self._filling.release()
            alive = self.replicas
            came = self._book.waiting()
            members = {name: number for name, number in self._roll.replicas.items() if name in alive}
            if came or members != self._roll.replicas:
                self._take(self._book.write({**members, **came}))
            turn = Turn(self._life, self._copies.version, self._roll.number)
            if turn != turned:
                self._records.put("turn", f"{self._root}/turn", turn)
                turned = turn
            version = self._copies.version
            holder = msgspec.structs.replace(
                self._holder, version=version, digest=self._digests.get(version, ""), readers=len(self._roll.replicas)
            )
            if holder != said:
                self._heart.hold(partial(self._directory.say, holder))
                said = holder
            known = self._ringing.watch(bell(self._records), known, Deadline.after(_LOOK_SECONDS))

    def _follow(self) -> None:
        """Serve what rank 0 serves, and whom it admits."""
        key, known = f"{self._root}/turn", None
        while not self._stopping.is_set():
            known = self._ringing.watch(key, known, Deadline.after(_LOOK_SECONDS))
            turn = None if known is None else self._records.opened("turn", key, Turn, known)
            if turn is None or turn.life != self._life:
                continue
            if turn.version == self._copies.coming:
                self._copies.turn()
            if turn.roll != self._roll.number:
                with suppress(RecordError):  # rank 0 has written others since, and says so in a newer turn
                    self._take(self._book.read(turn.roll))

    def _take(self, roll: Roll) -> None:
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
                refit = Refit(source=self._copies, job=cell_of(self._fleet, name), **self._options)
                self._cells[name] = Cell(
                    name, refit, self._copies, self._deadlines, leads=self._rank == 0, ended=self._let_rank_0_look,
                    served=self._note, former=former.get(name),
                )  # fmt: skip

    def _layouts(self) -> str:
        """The address of the list of all members' layouts; at the others nobody asks for it."""
        if self._rank:
            return ""
        keys = [f"{self._records.root}/layout/{rank}" for rank in range(self._members)]
        return self._directory.keep(
            msgspec.msgpack.encode(sorted({self._records.find("layout", key, str) or "" for key in keys}))
        )

    def _facts(self) -> Facts:
        devices = {memory.device for memory in self._source.memory().values()}
        return facts_of(min(devices, key=str, default=torch.device("cpu")), self._source)

    def _note(self, version: int, digest: str) -> None:
        """What a replica has read, and its digest."""
        with self._noting:
            known = self._digests.setdefault(version, digest)
            self._digests = {each: of for each, of in self._digests.items() if each >= version}
        if known != digest:
            self._failure = WeftError(
                f"version {version} of {self._holder.name} has digest {known}, but {digest} in a replica that has read "
                "it later: the copy has changed while it was served"
            )
            _LOG.error("%s", self._failure)
            self._vanish()
        self._let_rank_0_look()

    def _vanish(self) -> None:
        """Nobody is to be served from now on: those who read now ask another holder."""
        self._stopping.set()
        self._heart.end()
        for cell in list(self._cells.values()):
            cell.stop()

    def _let_rank_0_look(self) -> None:
        if self._rank == 0:
            with suppress(StoreError):  # it looks by itself soon
                self._ring()

    def _ring(self) -> None:
        self._store.set(bell(self._records), os.urandom(_NONCE_BYTES))

    def _filled(self, version: int) -> str:
        return f"{self._root}/filled/{self._life}/{version}"

    def _opened(self, deadline: Deadline) -> Store:
        store = open_store(self._store_url, deadline)
        self._stack.callback(store.close)
        return store

    def _leave(self) -> None:
        self._vanish()
        self._let_rank_0_look()
        if self._attendant.ident is not None:
            self._attendant.join()
        self._vanish()  # whom the attendant has admitted meanwhile
        for cell in [*self._left, *self._cells.values()]:
            cell.join()
        self._cells.clear()


def published(policy: Policy | None) -> Policy:
    """The policy, with the drive that publishers and subscribers agree on."""
    return msgspec.structs.replace(policy or Policy(), drive="published")
