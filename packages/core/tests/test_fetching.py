"""Published versions that land in shadow memory: fetched while their replica serves, installed when that suits it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import count
from typing import Any

import pytest
import torch

from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError
from weft.installation import Installation
from weft.local import LocalHub
from weft.policy import Policy
from weft.publication import Publisher, Subscriber
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

JOBS = count()
TINY = Tiny()
SECONDS = 60.0
PATIENT = Deadlines(**dict.fromkeys(("rendezvous", "offer", "begin", "move", "vote", "commit"), SECONDS))
HASTY = Deadlines(rendezvous=SECONDS, offer=SECONDS, begin=SECONDS, move=0.2, vote=0.2, commit=0.2)


class Job:
    """A trainer of one rank and replicas that all land beside."""

    def __init__(self, url: str, stack: ExitStack) -> None:
        self._stack = stack
        self._common: dict[str, Any] = {
            "store": url, "job": f"fetching{next(JOBS)}", "transport": "local",
            "transport_options": {"hub": LocalHub()}, "policy": Policy(landing="shadow"), "host": "here",
        }  # fmt: skip
        self._source = MemorySource("trainer/0", TINY.source(0, 1))
        self._trainer = stack.enter_context(
            Publisher(source=self._source, rank=0, members=1, name="trainer/0", deadlines=HASTY, **self._common)
        )

    def publish(self, version: int) -> None:
        self._source.load(TINY.tensors(version))
        self._trainer.publish(version)
        self._source.load(TINY.tensors(0))

    def replica(self, name: str, size: int, stack: ExitStack | None = None, relay: bool = False) -> list[Subscriber]:
        made = [
            Subscriber(
                target=MemoryTarget(f"{name}/{rank}", TINY.target(rank, size)), replica=name, rank=rank,
                replica_size=size, name=f"{name}/{rank}", relay=relay, deadlines=PATIENT, **self._common,
            )
            for rank in range(size)
        ]  # fmt: skip
        together([member.open for member in made])
        (stack or self._stack).callback(lambda: together([member.close for member in made]))
        return made


@pytest.fixture
def job(store_url: str) -> Iterator[Job]:
    with ExitStack() as stack:
        yield Job(store_url, stack)


def together(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """All at once, each in a thread; raises what the first one raised."""
    results: dict[int, Any] = {}
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            results[number] = calls[number]()
        except BaseException as error:  # noqa: BLE001  # raised by whoever waits
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
        assert not thread.is_alive(), "a member does not end"
    if errors:
        raise errors[0]
    return [results[number] for number in range(len(calls))]


def bytes_of(member: Subscriber) -> list[torch.Tensor]:
    return [memory.view(torch.uint8).clone() for memory in member._target.memory().values()]


def fetch(replica: list[Subscriber], go_on: Callable[[int], None] = lambda version: None) -> list[Installation]:
    """A version beside poisoned weights, which stay as they are."""
    for member in replica:
        member._target.poison()
    before = [bytes_of(member) for member in replica]
    assert together([lambda m=member: m.offered(Deadline.after(SECONDS)) for member in replica[:1]]) == [True]
    found: list[Installation] = together([lambda m=member: m.fetch(go_on) for member in replica])
    for poison, member in zip(before, replica, strict=True):
        assert all(map(torch.equal, poison, bytes_of(member))), "weights that are served have changed"
    return found


def install(replica: list[Subscriber], fetched: list[Installation]) -> int:
    """What was fetched; returns its version."""

    def act(member: Subscriber, installation: Installation) -> int:
        installation.update()
        report = installation.commit()
        member.installed(report)
        return report.version

    pairs = zip(replica, fetched, strict=True)
    (version,) = set(together([lambda m=member, i=installation: act(m, i) for member, installation in pairs]))
    for rank, member in enumerate(replica):
        wanted = TINY.expected(rank, len(replica), TINY.tensors(version))
        assert not mismatches(member._target.contents(), wanted)
    return int(version)


@pytest.mark.trap(51)
def test_what_was_fetched_stays_until_it_is_installed_however_long_that_takes(job: Job) -> None:
    """Longer than trainers wait for replicas that are paused, while this one publishes on."""
    replica = job.replica("replica", 2)
    assert together([lambda m=each: m.offered(Deadline.after(0.05)) for each in replica]) == [False, False]
    job.publish(1)
    fetched = fetch(replica)
    job.publish(2)
    late = Deadline.after(3 * (HASTY.move + HASTY.vote + HASTY.commit))
    while not late.expired():
        for installation in fetched:
            installation.tend()
        time.sleep(0.01)
    assert install(replica, fetched) == 1
    assert install(replica, fetch(replica)) == 2


@pytest.mark.trap(51)
def test_a_holder_that_leaves_while_a_version_is_fetched_is_replaced_by_another(job: Job) -> None:
    job.publish(1)
    readers, gone, seen = job.replica("reader", 2), threading.Event(), set[int]()
    with ExitStack() as leaving:
        relay = job.replica("relay", 1, leaving, relay=True)
        install(relay, fetch(relay))

        def strike(version: int) -> None:
            seen.add(version)
            if not gone.is_set():
                gone.set()
                assert readers[0].holder == "relay"
                leaving.close()

        fetched = fetch(readers, strike)
    assert readers[0].holder == "trainer"
    assert seen == {-1, 1}
    assert install(readers, fetched) == 1


def test_what_ends_fetching_gives_the_version_up_and_it_is_fetched_again(job: Job) -> None:
    job.publish(1)
    replica = job.replica("replica", 2)

    def leave(version: int) -> None:
        raise ConfigError("the engine leaves")

    with pytest.raises(ConfigError, match="the engine leaves"):
        fetch(replica, leave)
    fetched = fetch(replica)
    fetched[1].abort(ConfigError("not now"))
    assert install(replica, fetch(replica)) == 1
