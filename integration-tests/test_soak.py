"""The short form of the soak: random faults while two replicas answer all the time. `nox -s soak` is the long one.

`WEFT_SOAK_SEED` chooses the faults; every failure names the seed that it had.
"""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from support.holding import Holding
from support.soak import Settings, Soak

SEED = int(os.environ.get("WEFT_SOAK_SEED", "1"))


@pytest.mark.trap(28)
def test_a_process_that_holds_more_and_more_is_named() -> None:
    soak = Soak(Settings(SEED, "nixl", "in_place", refits=40))
    first, mib = Holding(allocated_bytes=150 << 20, objects=600_000, descriptors=29, resident_bytes=300 << 20), 1 << 20
    soak.held["steady/0#1"] = [(12, first), (40, replace(first, resident_bytes=400 * mib, objects=600_500))]
    soak.held["struck/0#7"] = [(3, replace(first, allocated_bytes=90 * mib)), (40, first)]
    assert not soak.grown(), "the first refits fill caches, and what is resident is the allocator's affair"
    soak.held["steady/0#1"].append((60, replace(first, allocated_bytes=182 * mib, descriptors=40)))
    assert [words.partition(" [")[0] for words in soak.grown()] == [
        "steady/0#1: allocated_bytes", "steady/0#1: descriptors",
    ]  # fmt: skip


@pytest.mark.trap(43, 44, 46, 47, 48, 51, 64)
@pytest.mark.parametrize(("transport", "landing"), [("nixl", "in_place"), ("gloo", "shadow")])
def test_every_answer_is_of_one_version_whatever_happens(transport: str, landing: str) -> None:
    settings = Settings(SEED, transport, landing, refits=40, between=0.3, checkpoint=20)
    with Soak(settings) as soak:
        figures = soak.run()
    print(settings, figures)
    assert sum(figures["faults"].values()) > 0
    kills = figures["faults"].get("kill a target", 0)
    for replica, lost in (("steady", 0), ("struck", kills)):
        counted = figures["replicas"][replica]
        assert counted["reads"] > 0
        assert counted["lost"] <= lost, "a pause waits for answers that are on their way"
