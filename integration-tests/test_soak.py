"""The short form of the soak: random faults while two replicas answer all the time. `nox -s soak` is the long one.

`WEFT_SOAK_SEED` chooses the faults; every failure names the seed that it had.
"""

from __future__ import annotations

import os

import pytest
from support.soak import Settings, Soak

SEED = int(os.environ.get("WEFT_SOAK_SEED", "1"))


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
