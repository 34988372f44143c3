"""The watcher where versions are published: two members of a replica, each with one, over the transport `local`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import pytest
import torch

from weft.deadline import Deadline, Deadlines
from weft.errors import RefitAbortedError
from weft.local import LocalHub
from weft.policy import Policy
from weft.publication import Publisher, Subscriber
from weft.store_server import serve_store
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches
from weft_vllm.watch import Watcher

TINY = Tiny()
SECONDS = 60.0
DEADLINES = Deadlines(rendezvous=SECONDS, offer=1.0, begin=SECONDS, move=SECONDS, vote=SECONDS, commit=SECONDS)
"""A version that cannot be fetched is tried again for as long as `offer` says."""


class Replica:
    """Two members that watch, and a trainer."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        common: dict[str, Any] = {
            "store": url, "job": "watched", "transport": "local", "transport_options": {"hub": LocalHub()},
            "policy": Policy(landing="shadow"), "deadlines": DEADLINES, "host": "here",
        }  # fmt: skip
        self._pool = stack.enter_context(ThreadPoolExecutor(2))
        self._source = MemorySource("trainer/0", TINY.source(0, 1))
        self._trainer = stack.enter_context(
            Publisher(source=self._source, rank=0, members=1, name="trainer/0", **common)
        )
        self.targets = [MemoryTarget(f"rollout/{rank}", TINY.target(rank, 2)) for rank in range(2)]
        self.members = [
            Subscriber(target=target, replica="rollout", rank=rank, replica_size=2, name=target.name, **common)
            for rank, target in enumerate(self.targets)
        ]
        for member in self.members:
            stack.enter_context(member)
        self.watchers = [Watcher(member, torch.device("cpu")) for member in self.members]
        stack.callback(lambda: self.both(lambda rank: self.watchers[rank].stop(Deadline.after(SECONDS))))
        for watcher in self.watchers:
            watcher.start()

    def both(self, act: Callable[[int], Any]) -> list[Any]:
        """Have both members do it at once."""
        return list(self._pool.map(act, range(2)))

    def publish(self, version: int) -> None:
        self._source.load(TINY.tensors(version))
        self._trainer.publish(version)
        self._source.load(TINY.tensors(0))

    def reach(self, stage: str) -> None:
        def reached(rank: int) -> None:
            watcher = self.watchers[rank]
            Deadline.after(SECONDS).wait(lambda: watcher.state.stage == stage, stage, lambda: [f"{watcher.state}"])

        self.both(reached)

    def install(self) -> set[int]:
        """What both have fetched; its version."""

        def act(rank: int) -> int:
            installation = self.watchers[rank].take(Deadline.after(SECONDS))
            installation.update()
            report = installation.commit()
            self.members[rank].installed(report)
            self.watchers[rank].start()
            assert not mismatches(self.targets[rank].contents(), TINY.expected(rank, 2, TINY.tensors(report.version)))
            return report.version

        return set(self.both(act))


@pytest.fixture
def replica() -> Iterator[Replica]:
    with closing(serve_store(host="127.0.0.1", port=0)) as server, ExitStack() as stack:
        yield Replica(server.url, stack)


@pytest.mark.trap(51)
def test_versions_are_fetched_as_they_are_published_and_installed_only_when_they_are_taken(replica: Replica) -> None:
    for target in replica.targets:
        target.poison()
    replica.publish(1)
    replica.reach("ready")
    replica.publish(2)
    assert [watcher.report() for watcher in replica.watchers] == [{"stage": "ready", "version": 1, "error": None}] * 2
    for target in replica.targets:
        clean = MemoryTarget(target.name, target.layout())
        clean.poison()
        assert all(map(torch.equal, bytes_of(target), bytes_of(clean))), "what was fetched is installed"
    assert replica.install() == {1}
    replica.reach("ready")
    assert replica.install() == {2}


@pytest.mark.trap(51)
def test_what_cannot_be_fetched_is_told_and_fetched_again(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("the shadow is broken")

    def told(rank: int) -> str:
        with pytest.raises(RefitAbortedError) as said:
            replica.watchers[rank].take(Deadline.after(SECONDS))
        return str(said.value)

    with monkeypatch.context() as broken:
        broken.setattr(replica.watchers[1], "_go_on", fail)
        replica.publish(1)
        said = replica.both(told)
    assert all("the shadow is broken" in each for each in said)
    replica.reach("ready")
    assert replica.install() == {1}


def bytes_of(target: MemoryTarget) -> list[torch.Tensor]:
    return [memory.view(torch.uint8).clone() for memory in target.memory().values()]
