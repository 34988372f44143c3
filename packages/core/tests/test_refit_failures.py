"""What goes wrong in a refit is said, by name, to everybody whom it concerns, and nothing else is touched."""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import pytest

from weft.contracts import Bucket, Message
from weft.deadline import Deadline, Deadlines
from weft.errors import DeadlineError, PeerLostError, RefitAbortedError, RendezvousError, WeftError
from weft.member import Tag
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.testing.faults import FaultyTransport, Script
from weft.testing.job import BRISK, Job, Part
from weft.testing.members import Hook, Log, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

pytestmark = pytest.mark.usefixtures("faulty")
JOBS = count()
TINY = Tiny()
PACKED = Policy(direct_run_bytes=1 << 40, staging_bytes=65_536, bucket_bytes=4096)
SHORT = Deadlines(rendezvous=30, offer=3, begin=1.5, move=1.5, vote=1.5, commit=1.5)


class Crew:
    """Two sources and replicas of two targets that go through versions 1, 2, … whatever becomes of each."""

    def __init__(
        self, url: str, *, versions: int = 2, replicas: int = 1, before: dict[str, Hook] | None = None,
        scripts: dict[str, Script] | None = None, deadlines: Deadlines = BRISK, policy: Policy | None = None,
        scratch_slots: int = 0, replicas_wanted: str = "all",
        linger_seconds: float = 0.0,
    ) -> None:  # fmt: skip
        self.log = Log()
        self._versions, self._wanted = versions, replicas_wanted
        self._linger_seconds = linger_seconds
        self._before, self._scripts = before or {}, scripts or {}
        self.sources = [
            MemorySource(f"trainer/{r}", TINY.source(r, 2), log=self.log, before=self._before.get(f"trainer/{r}"))
            for r in range(2)
        ]
        self.targets = {
            f"rollout{replica}/{rank}": MemoryTarget(
                f"rollout{replica}/{rank}", TINY.target(rank, 2, scratch_slots=scratch_slots),
                log=self.log, before=self._before.get(f"rollout{replica}/{rank}"),
            )
            for replica in range(replicas) for rank in range(2)
        }  # fmt: skip
        self.job = Job(
            url, Expect(2, replicas), policy=policy or Policy(), deadlines=deadlines, name=f"failure{next(JOBS)}"
        )

    def run(self) -> dict[str, list[Any]]:
        """By member and version: the report or the error."""
        parts = [Part(s.name, self._train(s), source=s, script=self._scripts.get(s.name)) for s in self.sources]
        for name, target in self.targets.items():
            script = self._scripts.get(name)
            act, replica = self._serve(target), name.partition("/")[0]
            parts.append(Part(name, act, target=target, replica=replica, replica_size=2, script=script))
        return self.job.run(parts)

    def _train(self, source: MemorySource) -> Callable[[Refit], list[Any]]:
        def refit_to(refit: Refit, version: int) -> Any:
            source.load(TINY.tensors(version))
            offer = refit.offer(version)
            offer.released()
            return offer.committed(self._wanted)

        return lambda refit: self._attempts(refit_to, refit)

    def _serve(self, target: MemoryTarget) -> Callable[[Refit], list[Any]]:
        def refit_to(refit: Refit, version: int) -> Any:
            target.poison()
            return refit.receive(version)

        return lambda refit: self._attempts(refit_to, refit)

    def _attempts(self, refit_to: Callable[[Refit, int], Any], refit: Refit) -> list[Any]:
        """All versions. Survivors that close at once would look lost, too: they may linger."""
        results = [attempt(refit_to, refit, version) for version in range(1, self._versions + 1)]
        time.sleep(self._linger_seconds)
        return results

    def holds(self, name: str, version: int) -> bool:
        """Whether a target holds exactly the weights of a version, and says so."""
        wanted = TINY.expected(int(name[-1]), 2, TINY.tensors(version))
        return not mismatches(self.targets[name].contents(), wanted) and self.targets[name].version == version


def attempt(refit_to: Callable[[Refit, int], Any], refit: Refit, version: int) -> Any:
    try:
        return refit_to(refit, version)
    except WeftError as error:
        return error


def failing(what: str, argument: object, times: int = 1) -> Hook:
    """Raises when a member is about to do that, the first `times`."""
    left = [times]

    def before(doing: str, with_argument: object) -> None:
        if (doing, with_argument) == (what, argument) and left[0]:
            left[0] -= 1
            raise RuntimeError("the engine's own words")

    return before


def assert_aborted(error: object, *words: str) -> None:
    assert isinstance(error, RefitAbortedError), error
    assert all(word in str(error) for word in words), error


@pytest.mark.trap(47, 48)
@pytest.mark.parametrize(
    ("what", "argument"), [("begin", 1), ("land", "layer1"), ("prepare_commit", 1)], ids=["begin", "land", "prepare"]
)
@pytest.mark.parametrize("culprit", ["rollout0/0", "rollout0/1"], ids=["leader", "member"])
def test_a_failure_of_one_target_is_everybodys(store_url: str, what: str, argument: object, culprit: str) -> None:
    crew = Crew(store_url, before={culprit: failing(what, argument)})
    for first, second in crew.run().values():
        assert_aborted(first, culprit, "RuntimeError: the engine's own words")
        assert second.version == 2
    for name, target in crew.targets.items():
        assert crew.holds(name, 2)
        assert ("commit", 1) not in [entry[1:] for entry in crew.log.entries() if entry[0] == target.name]
        begun = (name, "begin", 1) in crew.log.entries()
        assert ((name, "abort", 1) in crew.log.entries()) == (begun or name == culprit)
    assert not any(lease.held for source in crew.sources for lease in source.leases)


@pytest.mark.trap(47)
@pytest.mark.parametrize("culprit", ["trainer/0", "trainer/1"], ids=["leader", "member"])
def test_a_source_that_cannot_hold_its_weights_is_named_everywhere(store_url: str, culprit: str) -> None:
    def before(what: str, version: object) -> None:
        if version == 1:
            raise WeftError("the optimizer is busy")

    for name, (first, second) in Crew(store_url, before={culprit: before}).run().items():
        assert "the optimizer is busy" in str(first), f"{name}: {first!r}"
        assert second.version == 2


@pytest.mark.trap(65, 68)
def test_a_replica_that_fails_does_not_hold_up_another(store_url: str) -> None:
    crew = Crew(store_url, replicas=2, before={"rollout1/0": failing("prepare_commit", 1)}, replicas_wanted="any")
    results = crew.run()
    for source in crew.sources:
        first, second = results[source.name]
        assert (first.version, second.version) == (1, 2)
        assert first.outcomes["rollout0"] is None
    for rank in range(2):
        assert results[f"rollout0/{rank}"][0].version == 1
        assert_aborted(results[f"rollout1/{rank}"][0])


@pytest.mark.trap(47)
def test_all_replicas_means_all(store_url: str) -> None:
    crew = Crew(store_url, replicas=2, before={"rollout1/1": failing("land", "layer0")})
    results = crew.run()
    for source in crew.sources:
        assert_aborted(results[source.name][0], "replica rollout1", "rollout1/1", "the engine's own words")
        assert set(results[source.name][1].outcomes.items()) == {("rollout0", None), ("rollout1", None)}
    assert all(crew.holds(name, 2) for name in crew.targets)


class Recorder(Script):
    """Notes every post."""

    def __init__(self, log: Log) -> None:
        self._log = log

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        self._log.add(tag.sender, "post", (tag.version, bucket.peer))


@pytest.mark.trap(43, 44, 45)
@pytest.mark.parametrize("seed", range(8))
def test_no_byte_is_posted_before_every_member_of_the_replica_has_begun(store_url: str, seed: int) -> None:
    random = Random(seed)
    late = f"rollout{random.randrange(2)}/{random.randrange(2)}"

    def before(what: str, argument: object) -> None:
        if what == "begin":
            time.sleep(random.uniform(0.0, 0.2))

    crew = Crew(store_url, replicas=2, before={late: before})
    crew._scripts = {source.name: Recorder(crew.log) for source in crew.sources}
    results = crew.run()
    assert all(report.version for reports in results.values() for report in reports)
    entries = crew.log.entries("begin", "post")
    for version in (1, 2):
        for replica in ("rollout0", "rollout1"):
            begun = [
                n for n, (who, what, v) in enumerate(entries) if (what, v) == ("begin", version) and replica in who
            ]
            posted = [
                n for n, (_, what, to) in enumerate(entries) if what == "post" and to[0] == version and replica in to[1]
            ]  # type: ignore[index]
            assert len(begun) == 2
            assert posted
            assert max(begun) < min(posted)


class Disorder(Script):
    """Delivers buckets of one sender in another order, one a poll: transports deliver in the order of completion."""

    def __init__(self, seed: int) -> None:
        self._random, self._kept = Random(seed), list[Message]()

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        self._kept += [message for message in messages if message.bucket is not None]
        signals = [message for message in messages if message.bucket is None]
        if len(self._kept) > 1 or self._random.random() < 0.1:
            self._random.shuffle(self._kept)
            signals += [self._kept.pop()] if self._kept else []
        return signals


@pytest.mark.trap(67)
@pytest.mark.parametrize("scratch_slots", [0, 1, 2])
def test_slots_are_not_overwritten_when_buckets_complete_out_of_turn(store_url: str, scratch_slots: int) -> None:
    scripts: dict[str, Script] = {f"rollout0/{rank}": Disorder(rank) for rank in range(2)}
    crew = Crew(store_url, versions=3, scripts=scripts, policy=PACKED, scratch_slots=scratch_slots)
    for name, reports in crew.run().items():
        assert [getattr(report, "version", report) for report in reports] == [1, 2, 3], name
    assert all(crew.holds(name, 3) for name in crew.targets)


class Flip(Script):
    """Changes a byte of the first bucket of a version."""

    def __init__(self, version: int) -> None:
        self._version = version

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message.bucket is not None and message.tag.version == self._version:
                endpoint.flip(message.bucket)
                self._version = -1
        return messages


@pytest.mark.trap(48)
@pytest.mark.parametrize("policy", [Policy(), PACKED], ids=["direct", "packed"])
def test_a_byte_that_changes_on_the_way_is_found_and_its_sender_named(store_url: str, policy: Policy) -> None:
    crew = Crew(store_url, scripts={"rollout0/1": Flip(1)}, policy=policy)
    for first, second in crew.run().values():
        assert_aborted(first, "rollout0/1", "trainer/", "layer", "arrived changed", "digest")
        assert second.version == 2
    assert all(crew.holds(name, 2) for name in crew.targets)


class FlipAlways(Script):
    """Changes a byte of one bucket, the first that comes in the first version, in every version."""

    def __init__(self) -> None:
        self._bucket: int | None = None

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message.bucket is not None and self._bucket in (None, message.bucket):
                self._bucket = message.bucket
                endpoint.flip(message.bucket)
        return messages


def test_sampled_digests_find_what_changes_always_and_say_nothing_of_the_whole(store_url: str) -> None:
    policy = Policy(digest_every=3)
    crew = Crew(store_url, scripts={"rollout0/1": FlipAlways()}, policy=policy, versions=3)
    ends = {name: [isinstance(result, RefitAbortedError) for result in results] for name, results in crew.run().items()}
    assert all(sum(end) == 1 for end in ends.values()), "every bucket is digested in one of three versions"
    assert len({tuple(end) for end in ends.values()}) == 1
    whole = Crew(store_url, policy=policy, versions=3)
    for results in whole.run().values():
        assert {result.digest for result in results} == {"0" * 32}
    assert all(whole.holds(name, 3) for name in whole.targets)


class Echo(Script):
    """Delivers everything of the first version once more during the second, also as another incarnation's."""

    def __init__(self) -> None:
        self._old: list[Message] = []
        self.echoed = 0

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        forged: list[Message] = []
        for message in messages:
            if message.tag.version == 1:
                self._old.append(message)
            else:
                tag = message.tag
                for life in (Tag(2, tag.sender, tag.incarnation + 1, 0), Tag(2, tag.sender, tag.incarnation, 1)):
                    forged.append(Message(message.peer, life, message.bucket, message.note))
                forged.append(Message(message.peer, Tag(2, "a stranger", 1, 0), message.bucket, message.note))
                forged += self._old
        self.echoed += len(forged)
        return [*forged, *messages]


@pytest.mark.trap(35, 46, 64)
def test_messages_of_old_versions_and_other_lives_are_dropped(store_url: str) -> None:
    names = ["trainer/0", "trainer/1", "rollout0/0", "rollout0/1"]
    echoes = {name: Echo() for name in names}
    crew = Crew(store_url, scripts=dict(echoes), policy=PACKED)
    for reports in crew.run().values():
        assert [getattr(report, "version", report) for report in reports] == [1, 2]
    assert all(crew.holds(name, 2) for name in crew.targets)
    assert all(echo.echoed for echo in echoes.values())


class Silent(Script):
    """A member whose process hangs: from its n-th post (or signal of a kind) on it does nothing for a while."""

    def __init__(self, seconds: float, posts: int | None = None, kind: bytes | None = None) -> None:
        self._seconds, self._posts, self._kind = seconds, posts, kind

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        if self._posts is not None:
            self._posts -= 1
            if self._posts == 0:
                time.sleep(self._seconds)

    def signalling(self, peer: str, tag: Tag, note: bytes) -> bool:
        if self._kind is not None and self._kind in note:
            time.sleep(self._seconds)
            self._kind = None
        return True


@pytest.mark.trap(40, 48)
def test_a_source_that_hangs_while_bytes_move_is_named_in_time(store_url: str) -> None:
    crew = Crew(store_url, versions=1, deadlines=SHORT, policy=PACKED, scripts={"trainer/1": Silent(8, posts=2)})
    results = crew.run()
    for name in ("trainer/0", "rollout0/0", "rollout0/1"):
        (error,) = results[name]
        assert_aborted(error, "trainer/1")
    assert all(target.refused for target in crew.targets.values())
    assert all(target.version == -1 for target in crew.targets.values())


@pytest.mark.trap(40, 68)
@pytest.mark.parametrize("kind", [b"begun", b"verified", b"prepared"])
def test_a_target_that_hangs_is_named_in_time(store_url: str, kind: bytes) -> None:
    crew = Crew(store_url, versions=1, deadlines=SHORT, scripts={"rollout0/1": Silent(10, kind=kind)})
    results = crew.run()
    for name in ("trainer/0", "trainer/1", "rollout0/0"):
        (error,) = results[name]
        assert isinstance(error, WeftError)
        assert "rollout0/1" in str(error), f"{name}: {error}"
    assert crew.targets["rollout0/0"].refused


@pytest.mark.trap(40, 48)
@pytest.mark.parametrize("culprit", ["trainer/0", "trainer/1", "rollout0/0", "rollout0/1"])
def test_a_member_that_ends_while_bytes_move_is_named_at_once(store_url: str, culprit: str) -> None:
    class Death(Exception):
        """Not an error that weft knows: the thread ends and its transport closes."""

    def die(what: str, argument: object) -> None:
        if what == "land":
            raise Death

    class Dying(Script):
        def posting(self, bucket: Bucket, tag: Tag) -> None:
            raise Death

    targets = {culprit: die} if culprit.startswith("rollout") else {}
    scripts: dict[str, Script] = {} if targets else {culprit: Dying()}
    crew = Crew(store_url, versions=1, before=targets, scripts=scripts, linger_seconds=1.0)
    results = crew.run()
    for name, result in results.items():
        if name != culprit:
            assert_aborted(result[0], culprit)
    for name, target in crew.targets.items():
        assert target.version == -1
        assert target.refused or name == culprit


def test_closing_between_begin_and_commit_aborts_the_whole_replica(store_url: str) -> None:
    crew = Crew(store_url, versions=1)
    parts = [Part(s.name, crew._train(s), source=s) for s in crew.sources]
    leaver, stayer = crew.targets.values()

    def begin(refit: Refit) -> int:
        version = refit.begin(1).version
        Deadline.after(10).wait(lambda: len(crew.log.entries("begin")) == 2, "both have begun", list)
        return version

    parts.append(Part(leaver.name, begin, target=leaver, replica="rollout0", replica_size=2))
    parts.append(Part(stayer.name, crew._serve(stayer), target=stayer, replica="rollout0", replica_size=2))
    results = crew.job.run(parts)
    assert results[leaver.name] == 1
    for name in ("trainer/0", "trainer/1", stayer.name):
        assert_aborted(results[name][0], leaver.name)
    assert leaver.refused
    assert stayer.refused


@pytest.mark.trap(19, 45)
def test_nobody_waits_for_an_offer_without_end(store_url: str) -> None:
    crew = Crew(store_url, deadlines=SHORT)
    parts = [Part(s.name, lambda _: time.sleep(5), source=s) for s in crew.sources]
    for target in crew.targets.values():
        parts.append(Part(target.name, lambda r: r.receive(1), target=target, replica="rollout0", replica_size=2))
    results = crew.job.run(parts)
    assert isinstance(results["rollout0/0"], (DeadlineError, PeerLostError))
    assert "trainer/0" in str(results["rollout0/0"])
    assert isinstance(results["rollout0/1"], (DeadlineError, PeerLostError))


def test_a_layout_that_cannot_be_made_is_told_to_the_others(store_url: str) -> None:
    class Broken(MemorySource):
        def memory(self) -> Any:
            raise RuntimeError("parameters have no storage")

    crew = Crew(store_url)
    crew.sources[1] = Broken("trainer/1", TINY.source(1, 2))
    results = crew.run()
    assert isinstance(results.pop("trainer/1"), RuntimeError)
    for result in results.values():
        assert isinstance(result, RendezvousError)
        assert "trainer/1" in str(result)
        assert "parameters have no storage" in str(result)


def test_a_deadline_given_to_released_ends_it(store_url: str) -> None:
    crew = Crew(store_url)

    def withdraws(refit: Refit) -> Any:
        return attempt(lambda r, v: r.offer(v).released(Deadline.after(0.3)), refit, 1)

    def waits(refit: Refit) -> Any:
        return attempt(lambda r, v: r.offer(v).committed(), refit, 1)

    parts = [Part(s.name, act, source=s) for s, act in zip(crew.sources, (withdraws, waits), strict=True)]
    for target in crew.targets.values():

        def serve(refit: Refit) -> Any:
            time.sleep(1.0)
            return attempt(lambda r, v: r.receive(v), refit, 1)

        parts.append(Part(target.name, serve, target=target, replica="rollout0", replica_size=2))
    results = crew.job.run(parts)
    assert isinstance(results["trainer/0"], DeadlineError)
    assert results["trainer/0"].late == ("replica rollout0",)
    for name in ("trainer/1", *crew.targets):
        assert_aborted(results[name], "trainer/0", "release of version 1")
