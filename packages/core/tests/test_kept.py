"""What a failure leaves behind once its member has closed: nothing that only a garbage collector would find."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest

from weft.contracts import Message
from weft.deadline import Deadlines
from weft.errors import WeftError
from weft.refit import Refit
from weft.roster import Expect
from weft.testing.faults import FaultyTransport, Script
from weft.testing.job import Job, Part
from weft.testing.members import MemoryControl, MemorySource, MemoryTarget
from weft.testing.tiny import Tiny

TINY = Tiny()
JOBS = count()


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Flip(Script):
    """Changes a byte of every bucket that arrives."""

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message.bucket is not None:
                endpoint.flip(message.bucket)
        return messages


@pytest.mark.trap(28)
@pytest.mark.usefixtures("faulty", "no_collector")
@pytest.mark.parametrize("way", ["a changed byte", "a version withdrawn", "a lost peer"])
def test_memory_of_a_member_that_failed_goes_when_it_closes(store_url: str, way: str) -> None:
    kept: list[Any] = []

    def train(refit: Refit) -> None:
        kept.append(weakref.ref(refit.loop))
        source.load(TINY.tensors(1))
        if way != "a lost peer":
            offer = refit.offer(1)
        if way == "a changed byte":
            offer.committed()

    def serve(refit: Refit) -> None:
        kept.append(weakref.ref(refit.loop))
        while True:
            refit.receive()

    source, target = MemorySource("trainer/0", TINY.source(0, 1)), MemoryTarget("rollout/0", TINY.target(0, 1))
    deadlines = Deadlines(rendezvous=60, offer=60, begin=60, move=60, vote=60, commit=60)
    job = Job(store_url, Expect(1, 1), name=f"kept{next(JOBS)}", deadlines=deadlines)
    parts = [
        Part("trainer/0", train, source=source),
        Part(
            "rollout/0", serve, target=target, control=MemoryControl("control"), replica="rollout",
            script=Flip() if way == "a changed byte" else None,
        ),
    ]  # fmt: skip
    results = job.run(parts)
    assert isinstance(results.pop("rollout/0"), WeftError)
    results.clear()  # errors hold the frames that raised them
    assert [each() for each in kept] == [None, None]
