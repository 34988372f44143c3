"""The reason of an abort: who fails takes others down with it, and the one who knows why has the last word."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from weft.board import Board
from weft.deadline import Deadline, Deadlines
from weft.errors import RecordError, StoreError
from weft.job_store import JobStore
from weft.leaders import OfferRecord, SourceLeader
from weft.local import LocalHub, factory
from weft.member import Member
from weft.replay import Clock
from weft.session import SourceSession
from weft.stores import open_store
from weft.testing.members import MemoryLease
from weft.wire import Notice, Wire

NAME = "trainer/0"


@pytest.fixture
def records(store_url: str) -> Iterator[JobStore]:
    store = open_store(store_url, Deadline.after(60.0))
    yield JobStore(store, "job")
    store.close()


class Case:
    """A leader of sources that leads the replica `rollout`, too, so that every notice comes back here."""

    def __init__(self, records: JobStore, begin_seconds: float = 60.0) -> None:
        self.board = Board(records, "p")
        self.wire = Wire(factory({"hub": LocalHub()}), Member(NAME, None, None, None, 0, "h", "h", "cpu"), [])
        deadlines = Deadlines(begin=begin_seconds)
        self.leader = SourceLeader(self.wire, self.board, [NAME], {"rollout": NAME}, deadlines, 1)

    def says(self, kind: str, text: str) -> None:
        self.wire.tell(NAME, 1, Notice(kind, "rollout", text, (0,)))

    def step(self) -> tuple[list[str], list[str]]:
        """What the replica's leader and the sources were told."""
        self.leader.step()
        return tuple([n.text for _, n in self.wire.take(1, kind)] for kind in ("withdraw", "outcome"))


@pytest.mark.trap(48)
def test_the_outcome_of_a_replica_goes_before_what_its_end_did_to_a_source(records: JobStore) -> None:
    case = Case(records)
    case.says("source-failed", "lost rollout/2")
    case.says("replica-outcome", "rollout/1: bytes arrived changed")
    assert case.step() == ([], ["rollout/1: bytes arrived changed"])
    assert case.leader.done


@pytest.mark.trap(48)
def test_a_replica_is_asked_for_the_reason(records: JobStore) -> None:
    case = Case(records)
    case.says("source-failed", "lost rollout/2")
    assert case.step() == (["source trainer/0: lost rollout/2"], [])
    case.says("replica-begun", "")
    assert not case.wire.take(1, "go")
    case.says("replica-outcome", "rollout/1: bytes arrived changed; source trainer/0: lost rollout/2")
    assert case.step() == ([], ["rollout/1: bytes arrived changed; source trainer/0: lost rollout/2"])


@pytest.mark.trap(40)
def test_a_replica_that_does_not_answer_ends_with_what_is_known(records: JobStore) -> None:
    case = Case(records, begin_seconds=0.05)
    case.says("source-failed", "lost rollout/2")
    limit = time.monotonic() + 60
    told: list[str] = []
    while not told and time.monotonic() < limit:
        told = case.step()[1]
    assert told == ["source trainer/0: lost rollout/2"]


def test_what_leaders_write_is_in_the_store_afterwards(records: JobStore) -> None:
    case = Case(records)
    case.says("source-offered", "")
    case.leader.step()
    case.board.close()
    assert records.find("offer", "p/offer/1", OfferRecord) == OfferRecord(1)
    assert case.board.operations == 2


@pytest.mark.trap(40)
def test_no_version_waits_for_a_store(
    records: JobStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers = threading.Event()

    def hang(*_: object) -> None:
        assert answers.wait(60)
        raise StoreError("gone")

    monkeypatch.setattr(records, "put", hang)
    case = Case(records)
    case.says("source-offered", "")
    case.leader.step()
    assert [(peer, notice.replica) for peer, notice in case.wire.take(1, "offer")] == [(NAME, "rollout")]
    answers.set()
    case.board.close()
    assert "the offer of version 1 is not in the store for people to look at: gone" in caplog.text


def test_a_source_that_only_hears_the_end_of_a_version_lets_its_weights_go(records: JobStore) -> None:
    """As one does that was frozen until its deadlines had passed."""
    case, lease = Case(records), MemoryLease(1)
    session = SourceSession(case.wire, 1, {"rollout": pytest.fail}, NAME, None, Clock(), None)
    session.offer(lease)
    case.says("outcome", "rollout/1: lost")
    session.hear()
    assert session.done
    assert not lease.held


@pytest.mark.parametrize(("kind", "numbers"), [("commit", (1,)), ("credit", ()), ("outcome", (1, 2)), ("roll", (1, 2))])
def test_a_notice_that_lacks_numbers_is_refused(kind: str, numbers: tuple[int, ...]) -> None:
    hub = LocalHub()
    ends = [factory({"hub": hub}) for _ in range(2)]
    members = [Member(name, None, None, None, 0, "h", "h", "cpu") for name in ("a", "b")]
    for end, member in zip(ends, members, strict=True):
        end.open(member)
    for end, member, peer in zip(ends, members[::-1], ends[::-1], strict=True):
        end.connect(member, peer.address(), Deadline.after(60))
    wires = [Wire(end, member, members) for end, member in zip(ends, members, strict=True)]
    wires[0].tell("b", 1, Notice(kind, numbers=numbers))
    with pytest.raises(RecordError, match=f"'{kind}' with {len(numbers)} numbers"):
        wires[1].pump()
