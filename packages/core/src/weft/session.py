"""Sessions: one member's part in one refit. They are stepped and never wait.

The machines are `weft.protocol.source` and `weft.protocol.target`; here they get notices, losses and what buckets do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from weft.contracts import Lease, Target
from weft.digest import Digest
from weft.errors import RefitAbortedError, WeftError
from weft.leaders import ReplicaLeader, SourceLeader
from weft.protocol import source, target
from weft.protocol.events import Event, heard, tell
from weft.protocol.target import Stage
from weft.relaying import Relaying
from weft.replay import Clock, Receiver, Sender
from weft.wire import Wire


class SourceSession:
    """A source's part: send what the replicas ask for, keep the lease until nothing reads it any more."""

    def __init__(
        self, wire: Wire, version: int, senders: Mapping[str, Callable[[], Sender]], leader_name: str,
        leader: SourceLeader | None, clock: Clock, own_replica: str | None,
    ) -> None:  # fmt: skip
        """`own_replica` is the replica of this very member, where it copies from these weights by itself."""
        self.version, self.clock, self.leader = version, clock, leader
        self.events: list[tuple[float, str]] = []
        """(seconds of `time.monotonic`, what happened), in order."""
        self._wire, self._leader_name = wire, leader_name
        self._state = source.Source(leader_name, tuple(map(source.Serving, senders)), own_replica)
        self._lease: Lease | None = None
        self._make = dict(senders)
        self._sending: dict[str, Sender] = {}
        self._credit: dict[str, tuple[int, ...]] = {}

    def offer(self, lease: Lease) -> None:
        """Say that this source holds its weights; the lease is released when nothing reads them any more."""
        self._lease = lease
        self._feed(Event("held"))

    @property
    def outcomes(self) -> dict[str, str | None]:
        """Per replica that has ended: None when it committed, else why it did not."""
        return {known.replica: known.reason for known in self._state.replicas if known.ended}

    @property
    def digest(self) -> str:
        """Of the version: 32 hexadecimal digits, once a replica has installed it; zeros without digests."""
        return Digest(self._state.digest).hex() if None in self.outcomes.values() else ""

    @property
    def released(self) -> bool:
        """Whether no replica needs this source's bytes any more."""
        return self._state.released

    @property
    def nbytes(self) -> int:
        """Bytes posted so far."""
        return sum(sender.nbytes for sender in self._sending.values())

    @property
    def done(self) -> bool:
        """Whether every replica's outcome is known here, and by everybody this member leads."""
        return self._state.done and (self.leader is None or self.leader.done)

    @property
    def replicas(self) -> int:
        """How many replicas there are."""
        return len(self._make)

    def waiting_for(self) -> list[str]:
        """Whom this source is waiting for: receivers that still take bytes, else replicas without an outcome."""
        busy = sorted({peer for sender in self._sending.values() for peer in sender.waiting_for()})
        return busy or sorted(f"replica {replica}" for replica in self._make if replica not in self.outcomes)

    def step(self) -> None:
        """Do what can be done now; failures of one replica do not touch the others."""
        self.hear()
        for known in self._state.replicas:
            if known.stage is source.Stage.SENDING and not known.ended:
                self._advance(known.replica, self._sending[known.replica])
        self._let_go()
        if not self.done:
            self._wire.check(lambda: [self._leader_name])

    def hear(self) -> None:
        """Take in what has been said, and send nothing."""
        if self.leader is not None:
            self.leader.step()
        for peer, notice in self._wire.take(self.version, "credit"):
            self._credit[peer] = notice.numbers  # may come before "go", from one that lands what nothing comes for
            for sending in self._sending.values():
                sending.take_credit(peer, *notice.numbers)
        for kind in ("go", "outcome"):
            for peer, notice in self._wire.take(self.version, kind):
                self._event(f"{kind} {notice.replica}")
                self._feed(heard(peer, notice))
        self._let_go()

    def _let_go(self) -> None:
        if self.released and self._lease is not None:
            self._lease.release()

    def _advance(self, replica: str, sender: Sender) -> None:
        try:
            sender.step()
            self._wire.check(sender.waiting_for)
        except WeftError as error:
            self._feed(Event("error", replica=replica, text=str(error)))
            return
        if sender.done:
            self._event(f"sent {replica}")
            self._feed(Event("sent", replica=replica))

    def give_up(self, reason: str) -> None:
        """Withdraw from every replica without an outcome, and release the lease."""
        self._feed(Event("give-up", text=reason))
        if self._lease is not None:
            self._lease.release()
        if self.leader is not None:
            self.leader.give_up(reason)

    def _feed(self, event: Event) -> None:
        self._state, actions = source.step(self._state, event)
        for action in tell(self._wire, self.version, actions):
            if action.what == "send":
                self._sending[action.about] = self._make[action.about]()
                for peer, numbers in self._credit.items():
                    self._sending[action.about].take_credit(peer, *numbers)
            elif action.about in self._sending:
                self._sending[action.about].cancel()

    def _event(self, what: str) -> None:
        self.events.append((time.monotonic(), what))


class TargetSession:
    """A target's part in one version."""

    def __init__(
        self, wire: Wire, version: int, side: Target, receiver: Receiver, relay: Relaying, replica: str,
        leader_name: str, leader: ReplicaLeader | None, clock: Clock,
    ) -> None:  # fmt: skip
        """`relay` passes on what the receiver has taken; most have nothing to pass on."""
        self.version, self.receiver, self.relay, self.leader, self.clock = version, receiver, relay, leader, clock
        self.events: list[tuple[float, str]] = []
        """(seconds of `time.monotonic`, what happened), in order."""
        self._wire, self._target, self._leader_name = wire, side, leader_name
        self._state = target.Target(leader_name, replica, receiver.shadow)

    @property
    def stage(self) -> Stage:
        """How far this member is."""
        return self._state.stage

    @property
    def digest(self) -> str:
        """Of the version: 32 hexadecimal digits, once it is decided; zeros without digests."""
        return Digest(self._state.digest).hex()

    @property
    def touched(self) -> bool:
        """Whether the replica must refuse to serve if it gives the version up now."""
        return self._state.touched

    @property
    def shadow(self) -> bool:
        """Whether bytes land beside the weights that are served."""
        return self._state.shadow

    def begin(self) -> None:
        """Say that bytes may come from now on; where they land in weights that are served, get the target ready."""
        if not self.shadow:
            self._target.begin(self.version)
        self._feed(Event("ready"))

    def pause(self) -> None:
        """Say that these weights are served no more. Only with a shadow, after the vote."""
        self._feed(Event("paused"))

    def waiting_for(self) -> Sequence[str]:
        """Whom this member is waiting for."""
        if self.leader is not None and (missing := self.leader.missing(self.stage)):
            return missing
        if self.stage is not Stage.BEGUN:
            return [self._leader_name]
        return self.receiver.waiting_for() or self.relay.waiting_for()

    def step(self) -> None:
        """Do what can be done now. Raises `RefitAbortedError` when the replica gives the version up."""
        if self.leader is not None:
            self.leader.step()
        for _, notice in self._wire.take(self.version, "abort"):
            raise RefitAbortedError(self.version, notice.text.splitlines())
        for kind in ("pause", "prepare", "commit", "installed"):
            for peer, notice in self._wire.take(self.version, kind):
                self._feed(heard(peer, notice))
        if self.stage is not Stage.INSTALLED:
            self._wire.check(lambda: [self._leader_name])
        if self.stage is Stage.BEGUN:
            self._move()

    def _move(self) -> None:
        self.receiver.take()
        self.relay.step()
        self.receiver.land(self.relay.reads)
        if self.receiver.done and self.relay.done:
            self._feed(Event("arrived", numbers=self.receiver.digest.lanes))

    def prepare(self) -> None:
        """Do what may still fail, once all members have voted for it."""
        if self.shadow:
            self._target.begin(self.version)
            self.receiver.flip()
        with self.clock.phase("commit"):
            self._target.prepare_commit(self.version)
        self._feed(Event("prepared"))

    def commit(self) -> None:
        """Install the version here."""
        with self.clock.phase("commit"):
            self._target.commit(self.version)
        self._feed(Event("committed"))

    def abort(self, error: BaseException) -> None:
        """Give the version up here, and tell the leader unless it was the leader who said so."""
        if self.stage in (Stage.ABORTED, Stage.INSTALLED):
            return
        self.relay.give_up(f"{self._wire.me.name} gives the version up: {type(error).__name__}: {error}")
        by_leader = isinstance(error, RefitAbortedError)
        self._feed(Event("abort" if by_leader else "error", text=f"{type(error).__name__}: {error}"), error)
        if self.leader is not None and not by_leader:
            self.leader.step()

    def _feed(self, event: Event, error: BaseException | None = None) -> None:
        before = self.stage
        self._state, actions = target.step(self._state, event)
        if self.stage is not before:
            self.events.append((time.monotonic(), self.stage.value))
        for _ in tell(self._wire, self.version, actions):
            assert error is not None, "only errors and the leader's word abort"
            self._target.abort(self.version, error)
