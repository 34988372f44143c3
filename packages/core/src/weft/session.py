"""Sessions: one member's part in one refit, as machines that are stepped and never wait.

A target goes begun → verified → prepared → committed, or aborts; a source goes offered → sent, and learns every
replica's outcome.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from weft.contracts import Lease, Target
from weft.digest import Digest
from weft.errors import RefitAbortedError, WeftError
from weft.leaders import ReplicaLeader, SourceLeader
from weft.replay import Clock, Receiver, Sender
from weft.wire import Notice, Wire


class SourceSession:
    """A source's part: send what the replicas ask for, keep the lease until nothing reads it any more."""

    def __init__(
        self, wire: Wire, version: int, senders: Mapping[str, Callable[[], Sender]], leader_name: str,
        leader: SourceLeader | None, clock: Clock, own_replica: str | None,
    ) -> None:  # fmt: skip
        """`own_replica` is the replica of this very member, where it copies from these weights by itself."""
        self.version, self.clock, self.leader = version, clock, leader
        self.outcomes: dict[str, str | None] = {}
        """Per replica: None when it committed, else why it did not."""
        self.digest = ""
        self.events: list[tuple[float, str]] = []
        """(seconds of `time.monotonic`, what happened), in order."""
        self._wire, self._leader_name = wire, leader_name
        self._lease: Lease | None = None
        self._make, self._own_replica = dict(senders), own_replica
        self._sending: dict[str, Sender] = {}
        self._sent: set[str] = set()
        self._credit: dict[str, tuple[int, ...]] = {}

    def offer(self, lease: Lease) -> None:
        """Say that this source holds its weights; the lease is released when nothing reads them any more."""
        self._lease = lease
        self._tell("source-offered")

    @property
    def released(self) -> bool:
        """Whether no replica needs this source's bytes any more."""
        sent = self._sent - {self._own_replica}
        return all(replica in sent or replica in self.outcomes for replica in self._make)

    @property
    def nbytes(self) -> int:
        """Bytes posted so far."""
        return sum(sender.nbytes for sender in self._sending.values())

    @property
    def done(self) -> bool:
        """Whether every replica's outcome is known here, and by everybody this member leads."""
        return len(self.outcomes) == len(self._make) and (self.leader is None or self.leader.done)

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
        if self.leader is not None:
            self.leader.step()
        for peer, notice in self._wire.take(self.version, "credit"):
            self._credit[peer] = notice.numbers  # may come before "go", from one that lands what nothing comes for
            for sending in self._sending.values():
                sending.take_credit(peer, *notice.numbers)
        for _, notice in self._wire.take(self.version, "go"):
            self._event(f"go {notice.replica}")
            self._sending[notice.replica] = self._make[notice.replica]()
            for peer, numbers in self._credit.items():
                self._sending[notice.replica].take_credit(peer, *numbers)
        for _, notice in self._wire.take(self.version, "outcome"):
            self.outcomes[notice.replica] = None if notice.numbers[0] else notice.text
            if notice.numbers[0]:
                self.digest = Digest((notice.numbers[1], notice.numbers[2])).hex()
            self._event(f"outcome {notice.replica}")
            if sender := self._sending.get(notice.replica):
                sender.cancel()
        for replica, sender in self._sending.items():
            if replica not in self._sent and replica not in self.outcomes:
                self._advance(replica, sender)
        if self.released and self._lease is not None:
            self._lease.release()
        if not self.done:
            self._wire.check(lambda: [self._leader_name])

    def _advance(self, replica: str, sender: Sender) -> None:
        try:
            sender.step()
            self._wire.check(sender.waiting_for)
        except WeftError as error:
            sender.cancel()
            self._sent.add(replica)
            self._tell("source-failed", replica, str(error))
            return
        if sender.done:
            self._sent.add(replica)
            self._event(f"sent {replica}")

    def give_up(self, reason: str) -> None:
        """Withdraw from every replica without an outcome, and release the lease."""
        for replica in self._make:
            if replica in self._sending:
                self._sending[replica].cancel()
            if replica not in self.outcomes:
                self._tell("source-failed", replica, reason)
                self.outcomes[replica] = reason
        if self._lease is not None:
            self._lease.release()
        if self.leader is not None:
            self.leader.give_up(reason)

    def _tell(self, kind: str, replica: str = "", text: str = "") -> None:
        self._wire.tell(self._leader_name, self.version, Notice(kind, replica, text))

    def _event(self, what: str) -> None:
        self.events.append((time.monotonic(), what))


class TargetSession:
    """A target's part in one version."""

    def __init__(
        self, wire: Wire, version: int, target: Target, receiver: Receiver, relay: Sender, leader_name: str,
        leader: ReplicaLeader | None, clock: Clock,
    ) -> None:  # fmt: skip
        """`relay` passes on what the receiver has taken; most have nothing to pass on."""
        self.version, self.receiver, self.relay, self.leader, self.clock = version, receiver, relay, leader, clock
        self.state = "offered"
        self.digest = ""
        self.events: list[tuple[float, str]] = []
        """(seconds of `time.monotonic`, what happened), in order."""
        self._wire, self._target, self._leader_name = wire, target, leader_name

    def begin(self) -> None:
        """Get the target ready and say so: bytes may come from now on."""
        self._target.begin(self.version)
        self._reach("begun")

    def waiting_for(self) -> list[str]:
        """Whom this member is waiting for."""
        if self.leader is not None and (missing := self.leader.missing(self.state)):
            return missing
        if self.state != "begun":
            return [self._leader_name]
        return self.receiver.waiting_for() or self.relay.waiting_for()

    def step(self) -> None:
        """Do what can be done now. Raises `RefitAbortedError` when the replica gives the version up."""
        if self.leader is not None:
            self.leader.step()
        for _, notice in self._wire.take(self.version, "abort"):
            raise RefitAbortedError(self.version, notice.text.splitlines())
        self._wire.check(lambda: [self._leader_name])
        if self.state == "begun":
            self.receiver.take()
            if not self.relay.done:  # else credits are for this member's source
                for peer, notice in self._wire.take(self.version, "credit"):
                    self.relay.take_credit(peer, *notice.numbers)
                self.relay.step()
            self.receiver.land(self.relay.reads)
            if self.receiver.done and self.relay.done:
                self._reach("verified", self.receiver.digest.lanes)
        elif self.state == "verified" and self._wire.take(self.version, "prepare"):
            with self.clock.phase("commit"):
                self._target.prepare_commit(self.version)
            self._reach("prepared")
        elif self.state == "prepared":
            for _, notice in self._wire.take(self.version, "commit"):
                self.state = "decided"
                self.digest = Digest((notice.numbers[0], notice.numbers[1])).hex()

    def commit(self) -> None:
        """Install the version here."""
        with self.clock.phase("commit"):
            self._target.commit(self.version)
        self._reach("committed")

    def abort(self, error: BaseException) -> None:
        """Give the version up here, and tell the leader unless it was the leader who said so."""
        if self.state in ("aborted", "committed"):
            return
        self.state = "aborted"
        self.relay.cancel()
        if not isinstance(error, RefitAbortedError):
            self._tell("failed", text=f"{type(error).__name__}: {error}")
            if self.leader is not None:
                self.leader.step()
        self._target.abort(self.version, error)

    def _reach(self, state: str, numbers: Sequence[int] = ()) -> None:
        self.state = state
        self.events.append((time.monotonic(), state))
        self._tell(state, numbers=numbers)

    def _tell(self, kind: str, text: str = "", numbers: Sequence[int] = ()) -> None:
        self._wire.tell(self._leader_name, self.version, Notice(kind, "", text, tuple(numbers)))
