"""`Refit`: one member's handle on a job, from rendezvous to close."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import msgspec

from weft.authentication import Secret
from weft.board import Board
from weft.connection import Connection, Identity, host_identity, join
from weft.contracts import ReplicaControl, Source, Target, Transport, Trusting
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, RefitAbortedError
from weft.facts import Facts
from weft.installation import Installation
from weft.job_store import JobStore
from weft.loop import Account, Loop
from weft.offer import Offer
from weft.opened import Opened
from weft.plugins import load
from weft.policy import Policy
from weft.rendezvous import Rendezvous
from weft.report import Report
from weft.roles import Roles
from weft.roster import Expect
from weft.serving import NoControl, Serving
from weft.slices import Slice
from weft.stores import CountedStore, open_store
from weft.taking_part import TakingPart


class Refit(Opened):
    """One member of a refit job. Collective: every member of the job makes one, with its own source, target or both.

    Use it as a context manager, or call `open` and `close`. For one thread: everything a member does for others
    (sending, leading) happens inside its own calls, so a source should call `Offer.released` soon after `offer`.

    `transport` is the name of an installed plug-in; `store` a URL such as `tcp://10.0.0.1:29511`; `name` is unique
    in the job and stable over restarts; targets also name their replica and say how many members it has. `host` and
    `domain` override what is found out about this machine. `control` is used by `receive` and `run`. Members of a
    job with a `secret`, at least 16 bytes and the same on all of them, believe nobody else. `served` is the version
    that a target serves already, whole, if it does.
    """

    def __init__(
        self,
        *,
        source: Source | None = None,
        target: Target | None = None,
        control: ReplicaControl | None = None,
        transport: str,
        transport_options: Mapping[str, Any] | None = None,
        store: str,
        job: str,
        name: str,
        replica: str | None = None,
        replica_size: int = 1,
        expect: Expect,
        deadlines: Deadlines | None = None,
        policy: Policy | None = None,
        host: str | None = None,
        domain: str | None = None,
        secret: Secret | bytes | str | None = None,
        served: int | None = None,
    ) -> None:
        faults = []
        if source is None and target is None:
            faults.append("give a source, a target or both")
        if target is not None and replica is None:
            faults.append("a target names its replica: replica=…")
        if control is not None and target is None:
            faults.append("a control belongs to a replica: give a target as well")
        if faults:
            raise ConfigError("Refit: " + "; ".join(faults))
        self._secret = secret if isinstance(secret, Secret | None) else Secret(secret)
        self._source, self._target, self._control = source, target, control
        self._transport_name, self._transport_options = transport, dict(transport_options or {})
        self._store_url, self._job, self._expect = store, job, expect
        self._policy = policy or Policy()
        self._deadlines = deadlines or Deadlines()
        if self._policy.chain != "never":  # a replica votes once the next one has begun, and taken what is for it
            self._deadlines = replace(self._deadlines, vote=self._deadlines.vote + self._deadlines.begin)
        host = host or host_identity()
        self._identity = Identity(name, replica, replica_size, host, domain or host)
        self._transport: Transport | None = None
        self._store: CountedStore | None = None
        self._board: Board | None = None
        self._rendezvous: Rendezvous | None = None
        self._joined: tuple[Connection, Loop] | None = None
        self._offer: Offer | None = None
        self._installation: Installation | None = None
        self._last_version = -1
        self._connect_seconds = math.inf
        """How long others may keep this member waiting who have said how to be reached, and died since."""
        self._serving = Serving(control or NoControl(), self._deadlines.begin, self._policy.shadow, served)

    @property
    def name(self) -> str:
        """This member's name."""
        return self._identity.name

    @property
    def slice(self) -> Slice:
        """This member's part of the plan that refits replay. Raises `ConfigError` before `open`."""
        return self._connection[0].slice

    @property
    def registrations(self) -> int:
        """Regions registered since `open`: one per allocation; refits add none."""
        return self._connection[0].registrations

    @property
    def join_seconds(self) -> Mapping[str, float]:
        """What `allocate` (staging) and `register` took in `open`: refits do neither. Raises `ConfigError` before."""
        return self._connection[0].seconds

    @property
    def staging_bytes(self) -> int:
        """Staging memory that `open` allocated here, in both directions. Raises `ConfigError` before it."""
        return self._connection[0].endpoint.staging_bytes

    @property
    def roles(self) -> Roles:
        """Who takes part. Raises `ConfigError` before `open`."""
        return self._connection[0].roles

    @property
    def served(self) -> int | None:
        """The version that `receive` knows this target to serve, whole; None when it is none."""
        return self._serving.version

    @property
    def facts(self) -> Mapping[str, Facts]:
        """What every member runs on, by name: versions, GPU. Raises `ConfigError` before `open`."""
        return self._connection[0].facts

    @property
    def loop(self) -> Loop:
        """Where this member waits. Raises `ConfigError` before `open`."""
        return self._connection[1]

    @property
    def lost(self) -> tuple[str, ...]:
        """Members that are known to be gone, by name. Raises `ConfigError` before `open`."""
        roles = self.roles
        members = {*roles.sources, *(name for names in roles.replicas.values() for name in names)}
        return tuple(error.peer for error in self.loop.wire.lost(members))

    @property
    def store_operations(self) -> int:
        """Operations on the store so far. Raises `ConfigError` before `open`."""
        store, board = self._counted
        return store.operations + board.operations

    @property
    def _connection(self) -> tuple[Connection, Loop]:
        if self._joined is None:
            raise ConfigError(f"{self.name} is not open: use `with Refit(...) as refit`, or call open() first")
        return self._joined

    def open(self) -> None:
        """Meet the others, plan, register and connect. Collective; blocks until everybody expected is ready.

        Raises `RendezvousError`, `PlanError`, `TransportError`, `DeadlineError` and the like: on every member, with
        nothing half-done.
        """
        self._policy.check()
        deadline = Deadline.after(self._deadlines.rendezvous)
        transport: Transport = load("weft.transports", self._transport_name)(self._transport_options)
        try:
            self._transport = transport
            if self._secret is not None and isinstance(transport, Trusting):
                transport.trust(self._secret.key(self._job).derived(b"connections"))
            store = open_store(self._store_url, deadline)
            self._store = CountedStore(store)
            self._board = Board(JobStore(store, self._job, self._secret), f"weft/{self._job}/refit")
            self._rendezvous = Rendezvous(self._store, self._job, self._expect, deadline, self._secret, self._announced)
            connection = join(
                self._rendezvous,
                transport,
                self._identity,
                self._source,
                self._target,
                self._shaped(transport),
                deadline,
                self._connect_seconds,
            )
            self._joined = (connection, Loop(connection.wire))
        except BaseException:
            self.close()
            raise

    def _announced(self) -> None:
        """Called in `open` as soon as the others can find this member."""

    def _shaped(self, transport: Transport) -> Policy:
        """The policy, with what the transport decides filled in."""
        capabilities = transport.capabilities
        return msgspec.structs.replace(
            self._policy,
            max_segments=min(self._policy.max_segments, capabilities.max_segments),
            direct_run_bytes=self._policy.direct_run_bytes or capabilities.direct_run_bytes,
        )

    def close(self) -> None:
        """Give up what has not ended, leave the job and let go of everything, whatever of it fails. Idempotent."""
        with ExitStack() as stack:
            if self._store is not None:
                stack.callback(self._store.close)
            if self._board is not None:
                stack.callback(self._board.close)
            if self._transport is not None:
                stack.callback(self._transport.close)
            if self._rendezvous is not None and self._joined is not None:
                stack.callback(self._rendezvous.leave)
            if self._offer is not None:
                stack.callback(self._offer.withdraw, f"{self.name} has closed")
            if self._installation is not None:
                stack.callback(self._installation.abort, ConfigError(f"{self.name} has closed before its commit"))
            self._offer = self._installation = self._rendezvous = None
            self._joined = self._transport = self._store = self._board = None

    def offer(self, version: int) -> Offer:
        """Offer this source's weights as `version`; returns at once. Versions grow; all sources offer the same ones.

        The weights must not change before `Offer.released` has returned. A former offer that has not ended is
        withdrawn.
        """
        connection, loop = self._connection
        if self._source is None:
            raise ConfigError(f"{self.name} has no source: only sources offer")
        self._check_version(version)
        if self._offer is not None:
            self._offer.withdraw(f"version {version} is offered instead")
        loop.wire.finish(version - 1)
        account = self._account()
        session = self._part.offering(version)
        try:
            session.offer(self._source.hold(version))
        except BaseException as error:
            session.give_up(f"{type(error).__name__}: {error}")
            raise
        self._offer = Offer(loop, session, self._deadlines, account, len(connection.sends), connection.segments)
        self._last_version = version
        return self._offer

    def begin(self, version: int | None = None) -> Installation:
        """Wait for the sources' offer and say that this target may be written: its replica must be paused by now.

        Without a version it takes the newest one offered. Raises `DeadlineError` when nothing is offered in time.
        """
        connection, loop = self._connection
        if self._target is None or connection.target is None:
            raise ConfigError(f"{self.name} has no target: only targets begin")
        account, found = self._account(), self._await(version)
        loop.wire.take(found, self._announcement(connection)[0])
        loop.wire.finish(found - 1)
        session = self._part.installing(self._target, found)
        buckets = len(connection.receives) + len(connection.passed_on)
        installation = Installation(loop, session, self._deadlines, account, buckets, connection.segments)
        self._installation = installation
        self._last_version = max(found, self._last_version)
        try:
            session.begin()
        except BaseException as error:
            raise installation.failed(error) from error
        return installation

    def offered(self) -> int | None:
        """The newest version that `begin` would take without waiting, or None. Takes in what has arrived, and returns.

        Raises `PeerLostError` when whoever would say so is gone.
        """
        connection, loop = self._connection
        if self._target is None:
            raise ConfigError(f"{self.name} has no target: only targets begin")
        kind, sender = self._announcement(connection)
        loop.wire.pump()
        loop.wire.check(lambda: [sender])
        return loop.wire.newest(kind)

    def _announcement(self, connection: Connection) -> tuple[str, str]:
        """The notice that lets this target begin, and who sends it."""
        leader_name = connection.roles.replica_leaders[self._identity.replica or ""]
        return ("offer", connection.roles.source_leader) if leader_name == self.name else ("begin", leader_name)

    def _await(self, version: int | None) -> int:
        """The version to begin, as soon as the notice of it is here; it stays there for `begin` to take."""
        connection, loop = self._connection
        wire, found = loop.wire, -1
        kind, sender = self._announcement(connection)

        def step() -> None:
            nonlocal found
            if version is not None:
                for _, notice in wire.take(version, "withdraw", "abort"):
                    raise RefitAbortedError(version, notice.text.splitlines())
            wire.check(lambda: [sender])
            newest = wire.newest(kind)
            if newest is None:
                return
            if version is not None and newest > version:
                raise ConfigError(f"{self.name} is to begin version {version}, but {newest} is offered already")
            if version is None or newest == version:
                found = newest

        what = "an offer" if version is None else f"the offer of version {version}"
        limit = Deadline.after(self._deadlines.offer)
        try:
            loop.until(lambda: found >= 0, step, limit, what, lambda: [sender])
        except RefitAbortedError as error:
            self._part.decline(error.version, error.reasons)
            raise
        return found

    def receive(self, version: int | None = None) -> Report:
        """The whole of a target's part: pause (with a control), begin, update, commit, resume.

        With a shadow the replica is paused only once all of it has every byte. Raises `RefitAbortedError` and the like
        after a failure; the control has then been told to refuse, unless the old version is untouched: then it serves
        on.
        """
        if self._control is not None:
            self._await(version)  # what is served need not stand still for so long
        return self._serving.receive(lambda: self.begin(version))

    def run(self, version: int) -> Report:
        """One version in lock-step, whatever this member is: offer, receive, and wait for the others. Collective.

        A member that is both returns the target's report.
        """
        offer = self.offer(version) if self._source is not None else None
        received = self.receive(version) if self._target is not None else None
        if offer is None:
            assert received is not None, "a member is a source, a target or both"
            return received
        offer.released()
        sent = offer.committed()
        return received or sent

    @property
    def _counted(self) -> tuple[CountedStore, Board]:
        if self._store is None or self._board is None:
            raise ConfigError(f"{self.name} is not open")
        return self._store, self._board

    @property
    def _part(self) -> TakingPart:
        return TakingPart(self._connection[0], self._counted[1], self._deadlines, self._policy)

    def _account(self) -> Account:
        store, board = self._counted
        return Account(lambda: store.operations + board.operations, self._connection[0].digested_by)

    def _check_version(self, version: int) -> None:
        if version <= self._last_version:
            raise ConfigError(f"version {version} is offered after {self._last_version}: versions must grow")
