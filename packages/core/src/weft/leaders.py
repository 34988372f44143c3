"""Leaders: one per group of sources and one per replica. They count what members report and decide; they move no bytes.

Kinds of notices, by who sends them to whom:

* source → source leader: `source-offered`, `source-failed`
* source leader → replica leaders: `offer`, `withdraw`; → sources: `go`, `outcome` (numbers: 1 and the digest, or 0)
* replica leader → source leader: `replica-begun`, `replica-outcome`; → members: `begin`, `prepare`, `commit`, `abort`
* member → replica leader: `begun`, `verified`, `prepared`, `committed`, `failed`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from weft.deadline import Deadline, Deadlines
from weft.digest import Digest
from weft.job_store import JobStore
from weft.wire import Notice, Wire

KEPT_VERSIONS = 8
"""Records of so many versions stay in the store for people to look at."""
_ANSWER_SECONDS = 10.0
"""A replica's leader may take so long to say why its replica does not install a version that is withdrawn."""


class OfferRecord(msgspec.Struct, array_like=True):
    """What the sources offer. New fields go to the end, with defaults."""

    version: int


class OutcomeRecord(msgspec.Struct, array_like=True):
    """How a version ended in one replica. New fields go to the end, with defaults."""

    version: int
    replica: str
    committed: bool
    reasons: str = ""


class SourceLeader:
    """Offers a version once every source holds it, sends the sources to work replica by replica, and collects
    outcomes.
    """

    def __init__(
        self, wire: Wire, records: JobStore, prefix: str, sources: Sequence[str], leaders: Mapping[str, str],
        deadlines: Deadlines, version: int,
    ) -> None:  # fmt: skip
        self._wire, self._records, self._prefix, self._version = wire, records, prefix, version
        self._sources, self._leaders, self._deadlines = sources, leaders, deadlines
        self._offered: set[str] = set()
        self._limit = {replica: Deadline.after(deadlines.begin) for replica in leaders}
        self._begun: set[str] = set()
        self._withdrawn: dict[str, str] = {}
        self._ended: set[str] = set()

    @property
    def done(self) -> bool:
        """Whether every replica has an outcome."""
        return len(self._ended) == len(self._leaders)

    def step(self) -> None:
        """Handle what has been reported."""
        version, wire = self._version, self._wire
        for peer, _ in wire.take(version, "source-offered"):
            self._offered.add(peer)
            if len(self._offered) == len(self._sources):
                self._offer()
        for _, notice in wire.take(version, "replica-outcome"):
            self._end(notice)
        for peer, notice in wire.take(version, "source-failed"):
            self._withdraw(notice.replica, f"source {peer}: {notice.text}")
        for _, notice in wire.take(version, "replica-begun"):
            if notice.replica not in self._ended | self._begun | self._withdrawn.keys():
                self._begun.add(notice.replica)
                rest = self._deadlines.move + self._deadlines.vote + self._deadlines.commit
                self._limit[notice.replica] = Deadline.after(rest)
                self._tell_sources(Notice("go", notice.replica))
        for replica, leader in self._leaders.items():
            if lost := self._wire.lost(set(self._sources) - self._offered):
                self._withdraw(replica, "; ".join(map(str, lost)))
            if lost := self._wire.lost([leader]):
                self._abort(replica, self._withdrawn.get(replica, str(lost[0])))
            elif self._limit[replica].expired():
                self._expire(replica)

    def _expire(self, replica: str) -> None:
        if replica in self._withdrawn:
            self._abort(replica, self._withdrawn[replica])
        else:
            self._withdraw(replica, self._lateness(replica, self._limit[replica]))

    def _withdraw(self, replica: str, text: str) -> None:
        """Give a replica up, and go by the answer of its leader, who may know why; without one, by what is known here.

        Who fails takes others down with it: what a source sees first may be one of those.
        """
        if replica in self._ended or replica in self._withdrawn:
            return
        self._withdrawn[replica] = text
        self._limit[replica] = Deadline.after(min(_ANSWER_SECONDS, self._deadlines.begin / 2))
        self._wire.tell(self._leaders[replica], self._version, Notice("withdraw", replica, text))

    def _lateness(self, replica: str, limit: Deadline) -> str:
        missing = sorted(set(self._sources) - self._offered)
        if missing:
            return f"not offered by {', '.join(missing)} within {limit.seconds:.1f} s"
        stage = "no outcome" if replica in self._begun else "not begun"
        return f"replica {replica} (leader {self._leaders[replica]}): {stage} within {limit.seconds:.1f} s"

    def _offer(self) -> None:
        """Tell every replica that has not been given up meanwhile."""
        self._records.put("offer", f"{self._prefix}/offer/{self._version}", OfferRecord(self._version))
        self._records.store.delete(f"{self._prefix}/offer/{self._version - KEPT_VERSIONS}")
        for replica, leader in self._leaders.items():
            if replica not in self._ended | self._withdrawn.keys():
                self._limit[replica] = Deadline.after(self._deadlines.begin)
                self._wire.tell(leader, self._version, Notice("offer", replica))

    def give_up(self, text: str) -> None:
        """Withdraw from every replica without an outcome, and wait for nobody."""
        for _, notice in self._wire.take(self._version, "replica-outcome"):
            self._end(notice)
        text = f"source {self._wire.me.name}: {text}"
        for replica in self._leaders:
            self._withdraw(replica, text)
            self._abort(replica, text)

    def _abort(self, replica: str, text: str) -> None:
        self._end(Notice("outcome", replica, text, (0,)))

    def _end(self, outcome: Notice) -> None:
        if outcome.replica not in self._ended:
            self._ended.add(outcome.replica)
            self._tell_sources(Notice("outcome", outcome.replica, outcome.text, outcome.numbers))

    def _tell_sources(self, notice: Notice) -> None:
        for source in self._sources:
            self._wire.tell(source, self._version, notice)


class ReplicaLeader:
    """Counts the members of one replica through begun, verified, prepared and committed; any failure aborts all of
    them.
    """

    def __init__(
        self,
        wire: Wire,
        records: JobStore,
        prefix: str,
        replica: str,
        members: Sequence[str],
        source_leader: str,
        version: int,
    ) -> None:
        self._wire, self._records, self._prefix, self._version = wire, records, prefix, version
        self._replica, self._members, self._source_leader = replica, members, source_leader
        self._reached: dict[str, set[str]] = {stage: set() for stage in ("begun", "verified", "prepared", "committed")}
        self._digest = Digest()
        self.reasons: list[str] = []
        """Why the replica does not install the version."""
        self.ended = False
        """Whether the replica has committed or aborted."""
        self.committed = False
        """Whether every member has committed."""
        self._decided = False

    def step(self) -> None:
        """Handle what has been reported."""
        for peer, notice in self._wire.take(self._version, "failed", "withdraw", *self._reached):
            if notice.kind == "withdraw":
                self._withdraw(notice.text)
                continue
            if notice.kind == "failed":
                self.reasons.append(f"{peer}: {notice.text}")
                continue
            self._reached[notice.kind].add(peer)
            if notice.kind == "verified" and len(notice.numbers) == 2:
                self._digest += Digest((notice.numbers[0], notice.numbers[1]))
            if len(self._reached[notice.kind]) == len(self._members):
                self._all_reached(notice.kind)
        if not self.ended:
            self._look_for_lost()
        if self.reasons and not self.ended:
            self._end(False, "; ".join(self.reasons))

    def missing(self, stage: str) -> list[str]:
        """Members that have not reported a stage."""
        return sorted(set(self._members) - self._reached[stage])

    def _withdraw(self, text: str) -> None:
        """The sources give up; too late once members have been told to commit, since some may have."""
        missing = self.missing("begun")
        if not self._decided:
            self.reasons.append(f"{text}; not begun: {', '.join(missing)}" if missing else text)

    def _look_for_lost(self) -> None:
        """Members are needed to the end, the sources' leader until every byte is here."""
        needed = set(self.missing("committed"))
        if self.missing("verified"):
            needed.add(self._source_leader)
        self.reasons += [str(error) for error in self._wire.lost(needed)]

    def _all_reached(self, stage: str) -> None:
        if self.ended or self.reasons:
            return
        if stage == "begun":
            self._wire.tell(self._source_leader, self._version, Notice("replica-begun", self._replica))
        elif stage == "verified":
            self._tell_members(Notice("prepare", self._replica))
        elif stage == "prepared":
            self._decided = True
            self._tell_members(Notice("commit", self._replica, numbers=self._digest.lanes))
        else:
            self._end(True, "")

    def _end(self, committed: bool, text: str) -> None:
        self.ended, self.committed = True, committed
        numbers = (1, *self._digest.lanes) if committed else (0,)
        outcome = Notice("replica-outcome", self._replica, text, numbers)
        self._wire.tell(self._source_leader, self._version, outcome)
        if not committed:
            self._tell_members(Notice("abort", self._replica, "\n".join(self.reasons)))
        # The store last: it is for people to look at, and nobody waits for it.
        record = OutcomeRecord(self._version, self._replica, committed, text)
        self._records.put("outcome", f"{self._prefix}/outcome/{self._version}/{self._replica}", record)
        self._records.store.delete(f"{self._prefix}/outcome/{self._version - KEPT_VERSIONS}/{self._replica}")

    def _tell_members(self, notice: Notice) -> None:
        for member in self._members:
            self._wire.tell(member, self._version, notice)
