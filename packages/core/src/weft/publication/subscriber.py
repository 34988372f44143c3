"""One member of a replica that reads versions in its own time, from whoever holds them."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, TypeVar

from weft.agreement import agree
from weft.authentication import Secret
from weft.connection import host_identity
from weft.contracts import ReplicaControl, Target
from weft.deadline import Deadline, Deadlines
from weft.errors import (
    ConfigError,
    DeadlineError,
    PeerLostError,
    RefitAbortedError,
    RendezvousError,
    TransportError,
    WeftError,
)
from weft.fleet.member import FleetMember
from weft.installation import Installation
from weft.job_store import JobStore
from weft.live import LiveSource
from weft.opened import Opened
from weft.policy import Policy
from weft.publication.holders import Chosen, Directory, Holder, Prefer, nearest, tensors_of
from weft.publication.publisher import Publisher, published
from weft.report import Report
from weft.stores import open_store
from weft.wire import Notice

_LOG = logging.getLogger(__name__)
T = TypeVar("T")
_LIFE_BYTES = 8
_LOOK_SECONDS = 1.0
"""Between questions whether to go on, while there is nothing to fetch."""
_PASS_ON_SECONDS = 5.0
"""An engine waits so long for slow readers of what it has passed on before; they keep that one."""
_LOST = (PeerLostError, RendezvousError, TransportError, DeadlineError)


class Subscriber(Opened):
    """One member of a replica of a job whose versions are published. Every member makes one, with its rank.

    `receive` reads the newest version from whoever holds it: the trainer, or with `relay` on their side other
    replicas. A holder that dies in the middle is replaced by another. With `relay` this replica serves what it has
    installed to others, from a copy in host memory (see `Publisher`). Use it as a context manager; for one thread.
    """

    def __init__(
        self, *, target: Target, control: ReplicaControl | None = None, replica: str, rank: int = 0,
        replica_size: int = 1, relay: bool = False, retain: int = 1, prefer: Prefer | None = None, store: str,
        job: str, name: str, transport: str, transport_options: Mapping[str, Any] | None = None,
        deadlines: Deadlines | None = None, policy: Policy | None = None, host: str | None = None,
        domain: str | None = None, secret: Secret | bytes | str | None = None,
    ) -> None:  # fmt: skip
        """`prefer` chooses among those that hold the version, at the member of rank 0; without it the nearest is taken.
        A relay keeps the newest `retain` versions that it has installed.
        """
        if not 0 <= rank < replica_size:
            raise ConfigError(f"Subscriber: rank is {rank}, expected 0 to {replica_size - 1}")
        host = host or host_identity()
        self._target, self._control, self._replica, self._rank = target, control, replica, rank
        self._prefer = prefer or nearest(host, domain or host)
        self._size, self._store_url, self._job, self._name = replica_size, store, job, name
        self._relay, self._retain = relay, retain
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        d = self._deadlines = deadlines or Deadlines()
        self._policy = published(policy)
        self._options: dict[str, Any] = {
            "store": store, "name": name, "transport": transport, "transport_options": transport_options,
            "policy": self._policy, "host": host, "domain": domain, "secret": self._secret,
        }  # fmt: skip
        # Who is chosen holds a newer version already: it admits and offers at once, or when others have read.
        self._reading = replace(d, rendezvous=d.begin, offer=d.begin + d.move)
        self._stack = ExitStack()
        self._publisher: Publisher | None = None
        self._member: FleetMember | None = None
        self._installation: Installation | None = None
        self._holder: Holder | None = None
        self._judged: dict[tuple[str, tuple[str, ...]], tuple[str, ...]] = {}
        self._served: int | None = None
        self._number, self._version = 0, -1
        self._exact = -1
        """The version that is asked for now; -1 for the newest."""
        self._tensors = ""
        self._life = os.urandom(_LIFE_BYTES)
        self._sure = False
        """Whether the last version went well here: then the next choice is for those who have that one."""

    @property
    def name(self) -> str:
        """This member's name."""
        return self._name

    @property
    def version(self) -> int:
        """The version that was installed last; -1 before the first."""
        return self._version

    @property
    def holder(self) -> str:
        """The name of whom this replica reads from; empty when it is nobody."""
        return self._holder.name if self._holder is not None else ""

    @property
    def versions(self) -> tuple[int, ...]:
        """What this replica passes on, the newest first; nothing without `relay`."""
        return () if self._publisher is None else self._publisher.versions

    @property
    def _have(self) -> int:
        """The version that is to be replaced by a newer one; -1 when weights may be mixed: any whole one will do."""
        return -1 if self._served is None else self._served

    def open(self) -> None:
        """With `relay`, meet the other members of this replica. Raises `DeadlineError` that names who did not come."""
        try:
            store = open_store(self._store_url, Deadline.after(self._deadlines.rendezvous))
            self._stack.callback(store.close)
            self._directory = Directory(JobStore(store, self._job, self._secret))
            self._directory.want(self._replica, self._rank, self._target.layout(), self._life)
            self._stack.callback(self._detach)
            if self._relay:
                self._publisher = self._stack.enter_context(self._relaying())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Leave whom this replica reads from, and serve nobody any more. Idempotent."""
        self._stack.close()

    def receive(self, deadline: Deadline | None = None, *, version: int | None = None) -> Report:
        """Install the newest version as soon as somebody holds one newer than that of this replica, or exactly
        `version`, be it older: to go back, or to stay with one. Collective: all members ask for the same.

        Pauses and resumes as `Refit.receive` does. When a holder is lost, or gives the version up, another is asked
        until the deadline (`Deadlines.offer` without one), then the last error is raised. Raises `DeadlineError` when
        nobody has anything newer, and `RefitAbortedError` that lists who holds which versions when nobody holds that
        one any more; one that is still to come is waited for.
        """
        report = self._from_somebody(self._received, deadline, (*_LOST, RefitAbortedError), version=version)
        self.installed(report)
        return report

    def begin(self, deadline: Deadline | None = None, *, version: int | None = None) -> Installation:
        """The first part of `receive`, for those who pause and resume their engine themselves: wait for a newer
        version, or for that one, and say that this target may be written. Hand the report of its commit to
        `installed`. Raises as `receive` does, and `RefitAbortedError` at once: the other members may have begun.
        """
        self._installation = self._from_somebody(lambda member: member.begin(version), deadline, _LOST, version=version)
        return self._installation

    def offered(self, deadline: Deadline) -> bool:
        """Whether there is a version for this member to `fetch`, as soon as there is or the deadline has passed."""
        try:
            if self._rank == 0:
                self._directory.newer(self._have, lambda holder: self._faults(holder, deadline), deadline)
            else:
                self._directory.await_choice(self._replica, self._meant, deadline)
        except DeadlineError:
            return False
        return True

    def fetch(self, go_on: Callable[[int], None], deadline: Deadline | None = None) -> Installation:
        """The first part of `receive` where versions land in shadow memory: as `begin`, and then every byte of the
        version beside what is served, verified and voted for. The replica serves on until `Installation.update`.

        When a holder is lost, another is asked, as in `receive`. `go_on` is called again and again while bytes come,
        with their version, and while nobody has any, with -1; what it raises ends this. Raises as `receive` does.
        """
        limit = deadline or Deadline.after(self._deadlines.offer)

        def fetched(member: FleetMember) -> Installation:
            installation = member.begin()
            installation.fetch(lambda: go_on(installation.version))
            return installation

        def look() -> None:
            go_on(-1)
            while not self.offered(limit.earlier(_LOOK_SECONDS)) and not limit.expired():
                go_on(-1)

        self._installation = self._from_somebody(fetched, limit, (*_LOST, RefitAbortedError), look)
        return self._installation

    def installed(self, report: Report) -> None:
        """This replica has a version whole: it is passed on, with `relay`. Collective; after `begin` or `fetch`."""
        self._version = self._served = report.version
        self._installation, self._sure = None, True
        if self._publisher is not None and report.version > self._publisher.coming:
            self._pass_on(self._publisher, report)

    def _from_somebody(
        self, what: Callable[[FleetMember], T], deadline: Deadline | None, lost: tuple[type[WeftError], ...],
        again: Callable[[], None] = lambda: None, version: int | None = None,
    ) -> T:  # fmt: skip
        """Do it with one holder after the other until it succeeds; `lost` are errors after which another may do, and
        `again` is called before it.
        """
        limit = deadline or Deadline.after(self._deadlines.offer)
        self._exact = -1 if version is None else version
        failed = self._gave_up()
        while True:
            chosen = self._choose(failed, limit) if self._rank == 0 else self._hear(limit)
            try:
                return self._do(what, chosen)
            except WeftError as error:
                self._sure = False
                self._detach()
                if limit.expired() or not isinstance(error, lost):
                    raise
                again()
                failed.add(chosen.holder.name)
                _LOG.warning("%s reads from another holder than %s: %s", self._name, chosen.holder.name, error)

    def _gave_up(self) -> set[str]:
        """From whom a version was begun that was not installed; its cell is left."""
        installation, self._installation = self._installation, None
        if installation is None:
            return set()
        self._sure = False
        if installation.touched:
            self._served = None
        failed = {self.holder} - {""}
        self._detach()
        return failed

    def _choose(self, failed: set[str], limit: Deadline) -> Chosen:
        """Choose for all members, and tell them. Raises what `Directory.newer` and `exactly` do."""
        if not self._number and (last := self._directory.chosen(self._replica)) is not None:
            self._number = last.number

        def faults(holder: Holder) -> tuple[str, ...]:
            return self._faults(holder, limit)

        try:
            able = (
                self._directory.newer(self._have, faults, limit)
                if self._exact < 0
                else self._directory.exactly(self._exact, faults, limit)
            )
        except RefitAbortedError as error:
            self._tell(Holder("", "", 0, -1), limit, gone=error.reasons)
            raise
        able = [each for each in able if each.name not in failed] or able
        newest = max(each.version for each in able)
        return self._tell(self._prefer([each for each in able if each.version == newest]), limit)

    def _tell(self, holder: Holder, limit: Deadline, gone: tuple[str, ...] = ()) -> Chosen:
        """Have all members read from this holder, or none where the version is gone."""
        anew = self._member is None or self._holder is None or self._holder.job != holder.job or self._exact >= 0
        self._number += 1
        lives = (
            () if self._size == 1 else (each.life for each in self._directory.wanted(self._replica, self._size, limit))
        )
        chosen = Chosen(self._number, holder, anew, tuple(lives), self._version, self._exact, gone)
        if self._size > 1:
            self._directory.choose(self._replica, chosen)
        return chosen

    def _faults(self, holder: Holder, limit: Deadline) -> tuple[str, ...]:
        """Why a holder's versions are not for this replica; empty when they are."""
        if holder.name == self._replica:
            return ("it is this replica",)
        if self._holder is not None and (holder.job, holder.layouts) == (self._holder.job, self._holder.layouts):
            return ()
        wanted = tuple(each.layout for each in self._directory.wanted(self._replica, self._size, limit))
        if (holder.layouts, wanted) not in self._judged:
            held, wants = self._directory.held(holder), self._directory.layouts(wanted)
            faults = self._judged[holder.layouts, wanted] = agree(held, wants, self._policy).faults
            if faults:
                _LOG.warning("%s does not read from %s: %s", self._name, holder.name, "; ".join(faults))
        return self._judged[holder.layouts, wanted]

    def _hear(self, limit: Deadline) -> Chosen:
        """What rank 0 chooses. Raises `RefitAbortedError` as it does."""
        chosen = self._directory.await_choice(self._replica, self._meant, limit)
        self._number = chosen.number
        if chosen.exact != self._exact:
            asked = [f"{'the newest version' if each < 0 else each}" for each in (chosen.exact, self._exact)]
            raise ConfigError(
                f"{self._name} asks for {asked[1]}, but the member of rank 0 of replica {self._replica} for "
                f"{asked[0]}: all members ask for the same"
            )
        if chosen.gone:
            raise RefitAbortedError(chosen.exact, chosen.gone)
        return chosen

    def _meant(self, chosen: Chosen) -> bool:
        """Whether it is for this life of this member, and for who has what it has."""
        current = chosen.lives[self._rank : self._rank + 1] == (self._life,)
        return chosen.number > self._number and current and (not self._sure or chosen.installed == self._version)

    def _do(self, what: Callable[[FleetMember], T], chosen: Chosen) -> T:
        if chosen.anew or self._member is None:
            self._detach()
            self._attach(chosen.holder)
        member = self._member
        assert member is not None, "attached"
        if self._rank == 0:
            have, exact = (self._have, ()) if self._exact < 0 else (self._exact - 1, (self._exact,))
            want = Notice("want", text=self._tensors, numbers=(have, *exact))
            member.loop.wire.tell(member.roles.source_leader, have + 1, want)
        return what(member)

    def _received(self, member: FleetMember) -> Report:
        try:
            return member.receive(None if self._exact < 0 else self._exact)
        finally:
            self._served = member.served

    def _attach(self, holder: Holder) -> None:
        if self._rank == 0:
            wanted = self._directory.wanted(self._replica, self._size, Deadline.after(self._deadlines.begin))
            self._tensors = tensors_of(self._directory.layouts([each.layout for each in wanted]).values())
        member = FleetMember(
            target=self._target, control=self._control, replica=self._replica, replica_size=self._size,
            sources=holder.members, job=holder.job, served=self._served, deadlines=self._reading,
            **self._options,
        )  # fmt: skip
        member.open()
        self._member, self._holder = member, holder
        if (leader := member.roles.replica_leaders[self._replica]) == self._name and self._rank != 0:
            raise ConfigError(f"the member of rank 0 must be the first by name, but that is {leader}")

    def _detach(self) -> None:
        member, self._member, self._holder = self._member, None, None
        if member is not None:
            member.close()

    def _relaying(self) -> Publisher:
        source = LiveSource(self._target.layout(), self._target.memory(), lambda: None)
        return Publisher(
            source=source, rank=self._rank, members=self._size, job=self._job, holder=self._replica, original=False,
            deadlines=self._deadlines, retain=self._retain, **self._options,
        )  # fmt: skip

    def _pass_on(self, publisher: Publisher, report: Report) -> None:
        """What goes wrong here is no reason not to serve the version."""
        try:
            publisher.note(report.version, report.digest, self._tensors)
            publisher.publish(report.version, Deadline.after(_PASS_ON_SECONDS))
        except Exception as error:  # noqa: BLE001  # whatever it is
            _LOG.warning("%s does not pass version %d on: %s", self._name, report.version, error)
        if publisher.failure is not None:
            self._publisher = None
            publisher.close()
