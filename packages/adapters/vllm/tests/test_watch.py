"""The watcher: two members of a replica in threads, each with one, over the transport `local`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from weft.deadline import Deadline
from weft.errors import DeadlineError, RefitAbortedError
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.store_server import serve_store
from weft.testing.job import BRISK, Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches
from weft_vllm.watch import Watcher

TINY = Tiny()
WEIGHTS = [TINY.tensors(version) for version in range(3)]
SECONDS = 60.0


class Watched:
    """A replica of two members that watch, and one source."""

    def __init__(self, url: str) -> None:
        self.source = MemorySource("trainer/0", TINY.source(0, 1))
        self.targets = [MemoryTarget(f"rollout/{rank}", TINY.target(rank, 2)) for rank in range(2)]
        self.served = threading.Barrier(3)
        """Passed by all members between the parts of a test."""
        self._job = Job(url, Expect(1, 1), policy=Policy(landing="shadow"), name="watched", deadlines=BRISK)

    def run(self, train: Callable[[Refit], Any], serve: Callable[[Refit, Watcher, int], Any]) -> None:
        def member(rank: int) -> Callable[[Refit], Any]:
            def act(refit: Refit) -> None:
                watcher = Watcher(refit, torch.device("cpu"))
                watcher.start()
                serve(refit, watcher, rank)
                assert watcher.stop(Deadline.after(SECONDS)) is None

            return act

        parts = [Part("trainer/0", train, source=self.source)]
        for rank, target in enumerate(self.targets):
            parts.append(Part(target.name, member(rank), target=target, replica="rollout", replica_size=2))
        all_succeeded(self._job.run(parts))

    def offer(self, refit: Refit, version: int) -> Any:
        self.source.load(WEIGHTS[version])
        offer = refit.offer(version)
        offer.released()
        return offer

    def holds(self, rank: int, version: int) -> bool:
        return not mismatches(self.targets[rank].contents(), TINY.expected(rank, 2, WEIGHTS[version]))

    def wait(self) -> None:
        self.served.wait(SECONDS)


@pytest.fixture
def watched() -> Iterator[Watched]:
    server = serve_store(host="127.0.0.1", port=0)
    yield Watched(server.url)
    server.close()


def bytes_of(target: MemoryTarget) -> list[torch.Tensor]:
    return [tensor.view(torch.uint8).clone() for tensor in target.memory().values()]


def install(watcher: Watcher) -> None:
    installation = watcher.take(Deadline.after(SECONDS))
    installation.update()
    installation.commit()
    watcher.start()


@pytest.mark.trap(51)
def test_versions_are_fetched_without_being_asked_for_and_installed_only_when_they_are(watched: Watched) -> None:
    def train(refit: Refit) -> None:
        for version in (1, 2):
            watched.offer(refit, version).committed()

    def serve(refit: Refit, watcher: Watcher, rank: int) -> None:
        for version in (1, 2):
            before = bytes_of(watched.targets[rank])
            Deadline.after(SECONDS).wait(lambda: watcher.state.stage == "ready", "ready", list)
            assert watcher.report() == {"stage": "ready", "version": version, "error": None}
            assert all(map(torch.equal, before, bytes_of(watched.targets[rank])))
            install(watcher)
            assert watched.holds(rank, version)

    watched.run(train, serve)


@pytest.mark.trap(51)
def test_a_version_that_is_withdrawn_when_it_is_ready_is_no_longer_offered_to_be_taken(watched: Watched) -> None:
    def train(refit: Refit) -> None:
        offer = watched.offer(refit, 1)
        watched.wait()
        offer.withdraw("thought better of it")
        watched.wait()
        watched.offer(refit, 2).committed()

    def serve(refit: Refit, watcher: Watcher, rank: int) -> None:
        before = bytes_of(watched.targets[rank])
        Deadline.after(SECONDS).wait(lambda: watcher.state.stage == "ready", "ready", list)
        watched.wait()
        Deadline.after(SECONDS).wait(lambda: watcher.state.stage == "failed", "failed", list)
        assert "thought better of it" in watcher.report()["error"]
        with pytest.raises(RefitAbortedError, match="thought better of it"):
            watcher.take(Deadline.after(SECONDS))
        assert watcher.report()["error"] is None, "it is told once"
        assert all(map(torch.equal, before, bytes_of(watched.targets[rank])))
        watched.wait()
        install(watcher)
        assert watched.holds(rank, 2)

    watched.run(train, serve)


def test_a_member_that_cannot_fetch_fails_all_and_the_next_version_is_fetched(watched: Watched) -> None:
    def train(refit: Refit) -> None:
        watched.wait()
        with pytest.raises(RefitAbortedError, match="the shadow is broken"):
            watched.offer(refit, 1).committed()
        watched.wait()
        watched.offer(refit, 2).committed()

    def fail() -> None:
        raise RuntimeError("the shadow is broken")

    def serve(refit: Refit, watcher: Watcher, rank: int) -> None:
        if rank == 1:
            watcher._go_on = fail  # type: ignore[method-assign]
        watched.wait()
        with pytest.raises(RefitAbortedError, match="the shadow is broken"):
            watcher.take(Deadline.after(SECONDS))
        if rank == 1:
            del watcher._go_on
        watched.wait()
        install(watcher)
        assert watched.holds(rank, 2)

    watched.run(train, serve)


@pytest.mark.trap(40)
def test_without_an_offer_nothing_is_taken_and_the_thread_ends_when_asked(watched: Watched) -> None:
    def serve(refit: Refit, watcher: Watcher, rank: int) -> None:
        with pytest.raises(DeadlineError, match="is waiting"):
            watcher.take(Deadline.after(0.05))
        watched.wait()

    watched.run(lambda refit: watched.wait(), serve)


def test_a_failure_that_is_acknowledged_is_neither_reported_nor_raised(watched: Watched) -> None:
    def train(refit: Refit) -> None:
        offer = watched.offer(refit, 1)
        watched.wait()
        offer.withdraw("thought better of it")
        watched.wait()

    def serve(refit: Refit, watcher: Watcher, rank: int) -> None:
        Deadline.after(SECONDS).wait(lambda: watcher.state.stage == "ready", "ready", list)
        watched.wait()
        Deadline.after(SECONDS).wait(lambda: watcher.state.stage == "failed", "failed", list)
        watcher.acknowledge()
        assert watcher.report() == {"stage": "waiting", "version": None, "error": None}
        with pytest.raises(DeadlineError):
            watcher.take(Deadline.after(0.05))
        watched.wait()

    watched.run(train, serve)


class StuckRefit:
    """A `Refit` whose only version is ready; what the watcher then does of it ends when `released`, by a failure."""

    name = "rollout/0"
    version = 1

    def __init__(self) -> None:
        self.tended, self.released = threading.Event(), threading.Event()

    def offered(self) -> int | None:
        return None if self.released.is_set() else self.version

    def begin(self) -> Any:
        return self

    def fetch(self, go_on: Callable[[], None]) -> None:
        pass

    def tend(self) -> None:
        self.tended.set()
        assert self.released.wait(SECONDS)
        raise RuntimeError("gone meanwhile")


@pytest.fixture
def stuck() -> Iterator[tuple[StuckRefit, Watcher]]:
    refit: Any = StuckRefit()
    watcher = Watcher(refit, torch.device("cpu"))
    watcher.start()
    assert refit.tended.wait(SECONDS)
    yield refit, watcher
    refit.released.set()
    watcher.stop(Deadline.after(SECONDS))


@pytest.mark.trap(40)
def test_a_thread_that_does_not_end_keeps_the_refit_however_often_it_is_asked(
    stuck: tuple[StuckRefit, Watcher],
) -> None:
    refit, watcher = stuck
    for _ in range(2):
        with pytest.raises(DeadlineError, match="the end of the watcher"):
            watcher.stop(Deadline.after(0.05))
    refit.released.set()
    assert watcher.stop(Deadline.after(SECONDS)) is None
    assert watcher.state.stage == "failed"


@pytest.mark.trap(40)
def test_a_watcher_that_ended_late_with_a_failure_goes_on_when_that_is_told(
    stuck: tuple[StuckRefit, Watcher],
) -> None:
    refit, watcher = stuck
    with pytest.raises(DeadlineError, match="the end of the watcher"):
        watcher.take(Deadline.after(0.05))
    refit.released.set()
    Deadline.after(SECONDS).wait(lambda: watcher.state.stage == "failed", "failed", list)
    with pytest.raises(RefitAbortedError, match="gone meanwhile"):
        watcher.take(Deadline.after(SECONDS))
    assert watcher.state.stage == "waiting"
    assert watcher._thread is not None
    assert watcher._thread.is_alive()
