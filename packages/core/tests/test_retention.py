"""Old versions: how many a holder keeps, who reads them, and what is told to whom when one is given up."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, suppress
from typing import Any

import pytest
import torch

import weft.publication.copies
import weft.publication.keeper
from weft.deadline import Deadline
from weft.errors import ConfigError, DeadlineError, RefitAbortedError
from weft.job_store import JobStore
from weft.policy import Policy
from weft.publication import Keeper, Publisher, Subscriber
from weft.publication.copies import Copies, copies_bytes
from weft.publication.holders import Chosen, Directory, Holder
from weft.publication.keeper import whole
from weft.report import Report
from weft.stores import open_store
from weft.testing.members import MemoryControl, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

from .test_publication import TINY, Stage, publish, together


@pytest.fixture
def stage(store_url: str) -> Stage:
    return Stage(store_url)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def keeping(stage: Stage, stack: ExitStack, retain: int, size: int = 2) -> tuple[list[MemorySource], list[Publisher]]:
    """The members of a trainer that keeps so many versions."""
    sources = [MemorySource(f"trainer/{rank}", TINY.source(rank, size)) for rank in range(size)]
    made = [
        Publisher(source=source, rank=rank, members=size, retain=retain, **stage.options(source.name))
        for rank, source in enumerate(sources)
    ]
    together([publisher.open for publisher in made])
    stack.callback(lambda: together([publisher.close for publisher in made]))
    return sources, made


def publish_all(sources: list[MemorySource], publishers: list[Publisher], *versions: int) -> None:
    """One after the other, each once the one before is served everywhere."""
    for version in versions:
        publish(sources, publishers, version)
        await_versions(publishers, version)


def await_versions(publishers: list[Publisher], version: int) -> None:
    Deadline.after(60).wait(lambda: all(p.version == version for p in publishers), f"version {version}", list)


def receive(subscribers: list[Subscriber], version: int | None = None) -> Report:
    """One version, whole, at every member, of poisoned memory before."""
    for subscriber in subscribers:
        subscriber._target.poison()
    reports: list[Report] = together([lambda s=each: s.receive(version=version) for each in subscribers])
    assert len({(report.version, report.digest) for report in reports}) == 1
    assert version in (None, reports[0].version)
    for rank, subscriber in enumerate(subscribers):
        wanted = TINY.expected(rank, len(subscribers), TINY.tensors(reports[0].version))
        assert not mismatches(subscriber._target.contents(), wanted)
    return reports[0]


def listed(stage: Stage) -> dict[str, list[int]]:
    """What the store says that each holder has."""
    with closing(open_store(stage.url, Deadline.after(60))) as store:
        return {
            h.name: [each.version for each in h.versions()] for h in Directory(JobStore(store, stage.job)).holders()
        }


def test_a_replica_goes_back_stays_and_goes_on_while_the_newest_versions_are_kept(
    stage: Stage, stack: ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    sources, publishers = keeping(stage, stack, 3)
    publish_all(sources, publishers, 1, 2, 3, 4, 5)
    assert [each.versions for each in publishers] == [(5, 4, 3)] * 2
    control = MemoryControl("wide")
    wide = stage.subscribers(stack, "wide", 2)
    wide[0]._control = control
    newest = receive(wide)
    assert listed(stage) == {"trainer": [5, 4, 3]}
    assert [receive(wide, version).version for version in (3, 3, 4)] == [3, 3, 4]
    assert (control.served, wide[0].version) == (4, 4)
    publish_all(sources, publishers, 6)
    assert receive(wide, 4).version == 4  # pinned: 6 does not move it
    assert receive(wide).version == 6
    assert receive(wide, 5).digest == newest.digest
    assert [each.versions for each in publishers] == [(6, 5, 4)] * 2
    assert "from another holder" not in caplog.text


def test_a_version_that_nobody_has_any_more_says_who_has_which(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = keeping(stage, stack, 2)
    publish_all(sources, publishers, 1)
    relay, wide = stage.subscribers(stack, "relay", relay=True), stage.subscribers(stack, "wide", 2)
    receive(relay)
    publish_all(sources, publishers, 2, 3)
    errors: list[str] = []

    def ask(subscriber: Subscriber, version: int) -> None:
        with pytest.raises(RefitAbortedError) as raised:
            subscriber.receive(version=version)
        errors.append(str(raised.value))

    Deadline.after(60).wait(lambda: listed(stage) == {"relay": [1], "trainer": [3, 2]}, "what is listed", list)
    together([lambda s=each: ask(s, 0) for each in wide])
    assert len(errors) == 2
    for each in errors:
        for part in (
            "version 0 was not installed",
            "there is nobody to read it from",
            "relay has 1",
            "trainer has 3, 2",
        ):
            assert part in each
    assert receive(wide, 1).version == 1
    assert wide[0].holder == "relay"
    with pytest.raises(DeadlineError, match=r"version 4: not within 0.5 s; late: relay has 1, trainer has 3, 2"):
        stage.subscribers(stack, "late")[0].receive(Deadline.after(0.5), version=4)
    lives = tuple(each._life for each in wide)
    wide[0]._directory.choose("wide", Chosen(99, wide[0]._directory.holders()[0], True, lives, 1))
    with pytest.raises(ConfigError, match="wide/1 asks for 3, but the member of rank 0 of replica wide for the newest"):
        wide[1].receive(version=3)


def test_one_that_is_to_come_is_waited_for(stage: Stage, stack: ExitStack) -> None:
    sources, publishers = keeping(stage, stack, 2)
    publish_all(sources, publishers, 1)
    replica = stage.subscribers(stack, "replica")
    waiting = threading.Timer(0.2, lambda: publish_all(sources, publishers, 2, 3))
    waiting.start()
    assert receive(replica, 2).version == 2
    waiting.join(60)


def test_an_old_copy_that_is_read_stays_and_its_reader_is_told_once_it_is_gone(
    stage: Stage, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, publishers = keeping(stage, stack, 2)
    publish_all(sources, publishers, 1, 2)
    slow, late = stage.subscribers(stack, "slow", 2), stage.subscribers(stack, "late")
    reached, go_on = threading.Event(), threading.Event()

    def wait(what: str, argument: object) -> None:
        if what == "begin":
            reached.set()
            assert go_on.wait(60)

    slow[1]._target._before = wait
    reading = threading.Thread(target=together, args=([lambda: receive(slow, 1)],), daemon=True)
    reading.start()
    assert reached.wait(60)
    stale = late[0]._directory.holders()
    publish(sources, publishers, 3)  # would take the place of what `slow` reads
    Deadline.after(60).wait(lambda: publishers[0]._copies.newest.leaving, "the next version", list)
    assert [each.versions for each in publishers] == [(2, 1)] * 2

    def exactly(directory: Directory, version: int, *arguments: Any) -> list[Holder]:
        monkeypatch.undo()
        return [each for holder in stale for each in holder.versions() if each.version == version]

    monkeypatch.setattr(Directory, "exactly", exactly)
    threading.Timer(1.0, go_on.set).start()  # `late` asks while the copy is leaving, or when it is gone
    with pytest.raises(RefitAbortedError, match=r"(?s)version 1 was not installed.*trainer has 3, 2"):
        receive(late, 1)
    reading.join(60)
    assert slow[0].version == slow[1].version == 1
    await_versions(publishers, 3)
    assert receive(late).version == 3
    assert receive(slow, 2).version == 2


def test_relays_keep_old_versions_which_outlive_their_trainer(stage: Stage, stack: ExitStack) -> None:
    with ExitStack() as trainer:
        sources, publishers = stage.publishers(trainer)
        relay = stage.subscribers(stack, "relay", 2, relay=True, retain=2)
        digests = []
        for version in (1, 2, 3):
            publish(sources, publishers, version)
            digests.append(receive(relay).digest)
    Deadline.after(60).wait(lambda: listed(stage) == {"relay": [3, 2]}, "what the relay has", list)
    late = stage.subscribers(stack, "late")
    assert receive(late, 2).digest == digests[1]
    assert receive(late).digest == digests[2]
    assert late[0].holder == "relay"


def test_equal_versions_with_other_digests_are_refused_by_name(stage: Stage, stack: ExitStack) -> None:
    """A trainer that comes back from a checkpoint counts on, and gets other weights."""
    with ExitStack() as life:
        sources, publishers = stage.publishers(life)
        publish(sources, publishers, 1)
        relay = stage.subscribers(stack, "relay", relay=True)
        receive(relay)
    sources, publishers = stage.publishers(stack)
    for source in sources:
        source.load(TINY.tensors(7))
    together([lambda p=each: p.publish(1) for each in publishers])
    await_versions(publishers, 1)
    first = stage.subscribers(stack, "first", prefer=lambda holders: max(holders, key=lambda h: h.original))
    first[0].receive()
    assert first[0].holder == "trainer"
    second = stage.subscribers(stack, "second")
    Deadline.after(60).wait(
        lambda: all(h.digest for h in second[0]._directory.holders()), "digests of both", lambda: ["the holders"]
    )
    second[0].receive(version=1)  # though the relay is nearer
    assert second[0].holder == "trainer"
    assert not mismatches(second[0]._target.contents(), TINY.expected(0, 1, TINY.tensors(7)))


def test_of_two_that_differ_without_the_trainer_neither_is_read(stage: Stage, stack: ExitStack) -> None:
    for name, seed in (("one", 1), ("two", 2)):
        source = MemorySource(f"{name}/0", TINY.source(0, 1))
        source.load(TINY.tensors(seed))
        options = stage.options(f"{name}/0")
        relay = stack.enter_context(Publisher(source=source, rank=0, members=1, holder=name, original=False, **options))
        relay.note(5, f"{seed:032x}", "the same")
        relay.publish(5)
    replica = stage.subscribers(stack, "replica")
    replica[0]._directory._records.put("news", replica[0]._directory._news, 5)
    Deadline.after(60).wait(lambda: listed(stage) == {"one": [5], "two": [5]}, "both", list)
    with pytest.raises(RefitAbortedError, match=rf"one has 5, which does not fit: its digest is {1:032x}, but that of"):
        replica[0].receive(version=5)
    with pytest.raises(DeadlineError, match=rf"two has 5, which does not fit: its digest is {2:032x}, but that of one"):
        replica[0].receive(Deadline.after(2))


def test_replicas_of_other_dtypes_have_other_digests_of_the_same_version(store_url: str, stack: ExitStack) -> None:
    stage = Stage(store_url, policy=Policy(casts=(("float32", "bfloat16"),)))
    wider = Tiny(norm_dtype="float32")
    source = MemorySource("trainer/0", wider.source(0, 1))
    publisher = stack.enter_context(Publisher(source=source, rank=0, members=1, **stage.options("trainer/0")))
    source.load(wider.tensors(1))
    publisher.publish(1)
    digests = []
    for name, layout in (("bf16", TINY.target(0, 1)), ("fp32", wider.source(0, 1))):
        target = MemoryTarget(f"{name}/0", layout)
        subscriber = stack.enter_context(Subscriber(target=target, replica=name, **stage.options(f"{name}/0")))
        digests.append(subscriber.receive().digest)
    assert digests[0] != digests[1]
    assert publisher.failure is None


def test_memory_is_known_before_anything_is_allocated(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    source = MemorySource("trainer/0", TINY.source(0, 1))
    made = Publisher(source=source, rank=0, members=1, retain=3, **stage.options("trainer/0"))
    assert made.host_bytes == copies_bytes(source.layout(), 3) == 4 * copies_bytes(source.layout(), 0)
    with made:
        arenas = {
            memory.untyped_storage().data_ptr(): memory.untyped_storage().nbytes()
            for copies in [*(copy.memory() for copy in made._copies.copies), made._copies._next]
            for memory in copies.values()
        }
        assert sum(arenas.values()) == made.host_bytes
    monkeypatch.setattr(weft.publication.copies, "available_bytes", lambda device: made.host_bytes - 1)
    monkeypatch.setattr(weft.publication.copies, "beside", lambda *_, **__: pytest.fail("allocates"))
    with pytest.raises(
        ConfigError, match=rf"retain=3.*need {made.host_bytes} bytes of host memory, and {made.host_bytes - 1}"
    ):
        made.open()
    with pytest.raises(ConfigError, match="retain is 0, expected at least 1 version"):
        Publisher(source=source, rank=0, members=1, retain=0, **stage.options("trainer/0"))


@pytest.mark.parametrize("retain", [1, 2, 4])
def test_no_copy_changes_while_it_is_read(retain: int) -> None:
    """Threads that read whatever is there while versions come: every byte of what they see is of that version."""
    tiny = Tiny(layers=1, hidden=64, inner=64)
    source = MemorySource("trainer/0", tiny.source(0, 1))
    copies, versions, torn = Copies(source, retain), 30, list[str]()
    seen: list[set[int]] = [set() for _ in range(3)]
    done = threading.Event()

    def read(number: int) -> None:
        choose = random.Random(number)
        while not done.is_set():
            copy = choose.choice(copies.copies)
            version = copy.version
            with copy.reading(version) as there:
                if there and version >= 0:
                    for _ in range(2):
                        torn.extend(
                            f"{name} of {version}" for name, held in copy.memory().items()
                            if not bool((held.view(torch.uint8) == version).all())
                        )  # fmt: skip
                    seen[number].add(version)

    def train() -> None:
        for version in range(versions):
            for memory in source.memory().values():
                memory.view(torch.uint8).fill_(version)
            copies.fill(version)
            copies.turn()
            copies.newest.await_version(version, Deadline.after(60))
            Deadline.after(60).wait(lambda v=version: v in seen[v % 3], f"a reader of {version}", list)
            held = sorted(copy.version for copy in copies.copies)
            assert held == [*[-1] * (retain - version - 1), *range(max(0, version - retain + 1), version + 1)]
        done.set()

    together([train, *(lambda n=n: read(n) for n in range(3))])
    assert not torn


def test_whoever_reads_old_and_new_versions_reads_them_whole_while_others_are_published(
    stage: Stage, stack: ExitStack
) -> None:
    sources, publishers = keeping(stage, stack, 3)
    replicas = [stage.subscribers(stack, "one"), stage.subscribers(stack, "two", 2, relay=True, retain=2)]
    publish_all(sources, publishers, 1)
    last = 8

    def train() -> None:
        for version in range(2, last + 1):
            publish(sources, publishers, version)

    def serve(n: int) -> None:
        choose = random.Random(n)
        while receive(replicas[n]).version < last:
            with suppress(RefitAbortedError):  # it was given up, or left out
                receive(replicas[n], max(1, replicas[n][0].version - choose.randint(0, 2)))

    together([train, lambda: serve(0), lambda: serve(1)])
    for version in publishers[0].versions:
        assert [receive(replica, version).version for replica in replicas] == [version] * 2


def test_a_keeper_has_no_model_and_outlives_trainers_however_they_cut_theirs(stage: Stage, stack: ExitStack) -> None:
    options = {key: value for key, value in stage.options("keeper/0").items() if key != "name"}
    with ExitStack() as trainer:
        sources, publishers = keeping(stage, trainer, 1, size=2)
        publish_all(sources, publishers, 1)
        keeper = stack.enter_context(Keeper(retain=2, **options))
        assert keeper.keep(Deadline.after(60)).version == 1
        publish_all(sources, publishers, 2)
        assert keeper.keep(Deadline.after(60)).version == 2
        assert keeper.holder == "trainer"
    with pytest.raises(DeadlineError, match="a version newer than 2"):
        keeper.keep(Deadline.after(0.2))
    Deadline.after(60).wait(lambda: listed(stage) == {"keeper": [2, 1]}, "what is kept", list)
    wide = stage.subscribers(stack, "wide", 2)
    assert [receive(wide, 1).version, receive(wide).version] == [1, 2]
    assert wide[0].holder == "keeper"
    sources, publishers = keeping(stage, stack, 1, size=3)
    publish_all(sources, publishers, 3)
    assert keeper.keep(Deadline.after(60)).version == 3
    Deadline.after(60).wait(lambda: keeper.versions == (3, 2), "what is kept", list)


def test_what_a_keeper_needs_is_known_before_it_is_allocated(
    stage: Stage, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources, publishers = keeping(stage, stack, 1, size=1)
    publish_all(sources, publishers, 1)
    layout = whole([TINY.source(rank, 2) for rank in range(2)])
    assert layout.nbytes == TINY.source(0, 1).nbytes
    needed = copies_bytes(layout, 4)
    monkeypatch.setattr(weft.publication.keeper, "available_bytes", lambda device: needed - 1)
    options = {key: value for key, value in stage.options("keeper/0").items() if key != "name"}
    with pytest.raises(ConfigError, match=rf"keeping 3 versions, .*needs {needed} bytes .*and {needed - 1} are"):
        Keeper(retain=3, **options).open()
