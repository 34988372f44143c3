"""One member of a holder of versions: it publishes, and goes on."""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import msgspec
import torch

from weft.authentication import Secret
from weft.connection import host_identity
from weft.contracts import Source, Store
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, StoreError, WeftError
from weft.facts import Facts, facts_of
from weft.job_store import JobStore
from weft.opened import Opened
from weft.policy import Policy
from weft.publication.copies import Copies, Copy, copies_bytes
from weft.publication.holders import Directory, Holder, fleet_of
from weft.publication.listing import Listing
from weft.publication.readers import Readers
from weft.roster import Expect
from weft.stores import open_store

_LOG = logging.getLogger(__name__)
_AGAIN_SECONDS = 1.0
"""Between attempts while the store is away."""
_KEPT_COUNTS = 2
"""Versions whose count of members stays: the one that is served, and the next."""


class Coming(msgspec.Struct, frozen=True, array_like=True):
    """What rank 0 publishes next. New fields go to the end, with defaults."""

    life: int
    version: int
    served: int
    """What it serves until `version` is complete: whoever does not yet takes it over first."""


class Publisher(Opened):
    """One member of a holder: the trainer, or a replica that passes on what it has read. Every member makes one.

    `publish` copies the weights into host memory and returns; threads serve the newest `retain` whole versions to
    every `Subscriber` that asks, while training runs on. A version is served once all members have published it, and
    until it is given up for a newer one: then nobody reads it, and new readers are told so. Memory on the host: see
    `host_bytes`. Use it as a context manager; `publish` is for one thread.
    """

    def __init__(
        self, *, source: Source, rank: int, members: int, store: str, job: str, name: str, holder: str = "trainer",
        transport: str, transport_options: Mapping[str, Any] | None = None, deadlines: Deadlines | None = None,
        policy: Policy | None = None, host: str | None = None, domain: str | None = None,
        secret: Secret | bytes | str | None = None, original: bool = True, retain: int = 1,
    ) -> None:  # fmt: skip
        """`holder` is the name by which subscribers know all members together; `original` says that the versions are
        its own, and not read from another holder. All members `retain` the same number of versions, at least 1.
        """
        if not 0 <= rank < members:
            raise ConfigError(f"Publisher: rank is {rank}, expected 0 to {members - 1}")
        if retain < 1:
            raise ConfigError(f"Publisher: retain is {retain}, expected at least 1 version")
        host = host or host_identity()
        self._source, self._rank, self._members, self._retain = source, rank, members, retain
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
        self._filling = threading.Lock()
        self._readers: list[Readers] = []
        self._counted: deque[int] = deque()
        self._failure: BaseException | None = None
        self._last = -1

    @property
    def host_bytes(self) -> int:
        """Host memory that `open` allocates, and nothing later: `retain + 1` times the source's bytes."""
        return copies_bytes(self._source.layout(), self._retain)

    @property
    def versions(self) -> tuple[int, ...]:
        """All that this member has and serves, the newest first."""
        return tuple(sorted((copy.version for copy in self._copies.copies if copy.version >= 0), reverse=True))

    @property
    def version(self) -> int:
        """The newest version that this member serves; -1 before the first."""
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
        return tuple(sorted({name for readers in self._readers for name in readers.replicas}))

    def open(self) -> None:
        """Allocate, and meet the other members. Collective. Raises `DeadlineError` that names who did not come, and
        `ConfigError` when the host has too little memory.
        """
        deadline = Deadline.after(self._deadlines.rendezvous)
        try:
            self._copies = Copies(self._source, self._retain)
            self._store = self._opened(deadline)
            self._records = JobStore(self._store, self._fleet, self._secret)
            self._directory = Directory(JobStore(self._store, self._job, self._secret))
            address = self._directory.keep(self._copies.layout.encoded)
            self._records.put("layout", f"{self._records.root}/layout/{self._rank}", address)
            self._readers = [self._readers_of(place, copy) for place, copy in enumerate(self._copies.copies)]
            self._newest = self._readers[0]
            first = [
                each.open(JobStore(self._store, each.fleet, self._secret), self._opened(deadline), deadline)
                for each in self._readers
            ]
            holder = msgspec.structs.replace(self._holder, layouts=self._layouts(), facts=self._facts())
            self._listing = Listing(self._directory, holder)
            self._attendants = [
                threading.Thread(target=self._attend, args=(each,), name=f"attendant of {self._name}", daemon=True)
                for each in self._readers
            ]
            self._stack.callback(self._leave)
            for readers, roll in zip(self._readers, first, strict=True):
                readers.take(roll)
            for thread in self._attendants:
                thread.start()
        except BaseException:
            self.close()
            raise

    def _readers_of(self, place: int, copy: Copy) -> Readers:
        fleet = fleet_of(self._job, self._holder.name, place)
        return Readers(copy, fleet, self._rank, self._members, self._deadlines, self._options, self.note)

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
                coming = Coming(self._newest.life, version, self._copies.stay())
                self._records.put("coming", f"{self._newest.root}/coming", coming)
            elif not self._ready(version, deadline or Deadline.after(self._deadlines.begin + self._deadlines.move)):
                return
            self._copies.fill(version)
        if self._store.add(self._filled(version), 1) == self._members:
            self._newest.ring()
        if self._rank == 0:
            self._counted.append(version)
            if len(self._counted) > _KEPT_COUNTS:
                self._store.delete(self._filled(self._counted.popleft()))

    def _ready(self, version: int, limit: Deadline) -> bool:
        """Wait until the next copy may be replaced; False when the version is left out."""
        life = self._newest.life
        coming = self._records.await_record(
            "coming", f"{self._newest.root}/coming", Coming, lambda c: c.life == life and c.version >= version, limit
        )
        if coming is None:
            raise DeadlineError(f"version {version} of the member of rank 0", limit.seconds, ["rank 0"])
        if coming.version > version:
            return False
        if coming.served == self._copies.coming:
            self._copies.turn()
        if coming.served >= self._copies.coming:
            self._copies.newest.await_version(coming.served, limit)
        return True

    def _attend(self, readers: Readers) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._lead(readers) if self._rank == 0 else self._follow(readers)
                except StoreError as error:
                    _LOG.warning("%s serves nobody new until the store is back: %s", self._name, error)
                    self._stopping.wait(_AGAIN_SECONDS)
        except BaseException as error:  # noqa: BLE001  # for the next `publish`
            self._fail(error)

    def _lead(self, readers: Readers) -> None:
        """Take over what is complete, admit who has come, and say what is held."""
        newest = readers is self._newest
        while not self._stopping.is_set():
            if newest:
                self._listing.touch(self._deadlines.begin + self._deadlines.move)
                self._turn()
            readers.admit()
            if newest:
                self._listing.say(self._readers)
            readers.rest()

    def _turn(self) -> None:
        """Take over what all members have published."""
        if self._filling.acquire(blocking=False):  # else it is rung when that is done
            try:
                if self._store.add(self._filled(self._copies.coming), 0) == self._members:
                    self._copies.turn()
            finally:
                self._filling.release()

    def _follow(self, readers: Readers) -> None:
        """Serve what rank 0 serves, and whom it admits."""
        for turn in readers.turns():
            if self._stopping.is_set():
                return
            if turn is not None:
                if readers is self._newest and turn.version == self._copies.coming:
                    self._copies.turn()
                readers.follow(turn.roll)

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

    def note(self, version: int, digest: str, tensors: str) -> None:
        """What the digest of a version is in a replica that has installed it, and of which tensors (`tensors_of`)."""
        try:
            self._listing.note(version, digest, tensors, min(copy.version for copy in self._copies.copies))
        except WeftError as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        if not self._stopping.is_set():
            _LOG.error("%s does not serve any more: %s", self._name, error)
            self._failure = error
            self._vanish()

    def _vanish(self) -> None:
        """Nobody is to be served from now on: those who read now ask another holder."""
        self._stopping.set()
        self._listing.end()
        for readers in self._readers:
            readers.stop()

    def _ring(self) -> None:
        for readers in self._readers:
            readers.ring()

    def _filled(self, version: int) -> str:
        return f"{self._newest.root}/filled/{self._newest.life}/{version}"

    def _opened(self, deadline: Deadline) -> Store:
        store = open_store(self._store_url, deadline)
        self._stack.callback(store.close)
        return store

    def _leave(self) -> None:
        self._vanish()
        if self._rank == 0:
            with suppress(StoreError):  # it looks by itself soon
                self._ring()
        for thread in self._attendants:
            if thread.ident is not None:
                thread.join()
        self._vanish()  # whom the attendants have admitted meanwhile
        for readers in self._readers:
            readers.join()


def published(policy: Policy | None) -> Policy:
    """The policy, with the drive that publishers and subscribers agree on."""
    policy = policy or Policy()
    policy.check_alone()
    return msgspec.structs.replace(policy, drive="published")
