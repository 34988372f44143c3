"""A fleet in real processes over real NIXL and gloo: who is killed or frozen takes nobody along, and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from support.fleet import SOURCES, Company

from weft.protocol.events import Step
from weft.store_server import serve_store

JOBS = count()
STRUCK = ("struck/0", "struck/1")


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = serve_store()
    yield server.url
    server.close()


def opened(company: Company) -> None:
    """Two sources, a steady replica of one member and another of two, which all have version 1."""
    company.start(*SOURCES, "steady/0")
    for name in SOURCES:
        company.until(name, "open")
    company.start(*STRUCK, size=2)
    while "struck" not in company.ended(company.offer()):
        pass
    for name in ("steady/0", *STRUCK):
        assert company.until(name, "serves", company.version)[2] == []


@pytest.mark.trap(40, 48, 64)
@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_a_replica_whose_member_is_killed_comes_back(store: str, transport: str) -> None:
    with Company(store, f"fleet{next(JOBS)}", transport) as company:
        opened(company)
        for step, victim in ((Step.BEGIN, "struck/1"), (Step.COMMIT, "struck/0")):
            survivor = next(name for name in STRUCK if name != victim)
            company.tell("struck/1", step.value, company.version + 1)
            version = company.offer()
            company.until("struck/1", "at", step.value, version)
            company.kill(victim)
            if victim != "struck/1":
                company.tell("struck/1", "go on")
            outcomes = company.ended(version)
            assert outcomes["steady"] is None
            assert "struck" in str(outcomes["struck"])
            assert company.until("steady/0", "serves", version)[2] == []
            *_, served, refused = company.until(survivor, "failed")
            assert served is None
            assert refused
            company.start(victim, size=2)
            while company.ended(company.offer()).get("struck", "absent") is not None:
                assert company.until("steady/0", "serves", company.version)[2] == []
            for name in STRUCK:
                assert company.until(name, "serves", company.version)[2] == []


@pytest.mark.trap(40, 50, 65)
def test_a_frozen_replica_does_not_hold_the_others_for_long(store: str) -> None:
    with Company(store, f"fleet{next(JOBS)}", "nixl", landing="shadow") as company:
        opened(company)
        company.tell("struck/1", Step.VERIFY.value, company.version + 1)
        version = company.offer()
        company.until("struck/1", "at", Step.VERIFY.value, version)
        company.freeze("struck/1")
        outcomes = company.ended(version)
        assert outcomes["steady"] is None
        assert outcomes["struck"] is not None
        *_, served, refused = company.until("struck/0", "failed")
        assert served == version - 1, "a shadow leaves the old version served"
        assert not refused
        while "struck" in company.ended(company.offer()):
            pass
        company.thaw("struck/1")
        company.tell("struck/1", "go on")
        while company.ended(company.offer()).get("struck", "absent") is not None:
            pass
        for name in STRUCK:
            assert company.until(name, "serves", company.version)[2] == []


@pytest.mark.trap(64)
def test_a_trainer_that_is_killed_and_restarted_goes_on(store: str) -> None:
    with Company(store, f"fleet{next(JOBS)}", "nixl") as company:
        opened(company)
        version = company.offer(Step.MOVE, "trainer/1")
        company.until("trainer/1", "at", Step.MOVE.value, version)
        for name in SOURCES:
            company.kill(name)
        company.start(*SOURCES)
        for name in SOURCES:
            company.until(name, "open")
        while {"steady", "struck"} - company.ended(company.offer()).keys():
            pass
        for name in ("steady/0", *STRUCK):
            assert company.until(name, "serves", company.version)[2] == []
