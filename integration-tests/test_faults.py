"""Members in real processes over real transports: whatever is wrong, everybody who is left says what, in time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from support.members import Cast, Role

from weft.store_server import serve_store

NAMES = ("trainer/0", "trainer/1", "rollout0/0", "rollout0/1")
TRANSPORTS = pytest.mark.parametrize("transport", ["gloo", "nixl"])
JOBS = count()


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = serve_store()
    yield server.url
    server.close()


def cast(store: str, transport: str, names: tuple[str, ...] = NAMES, **more: Any) -> list[Role]:
    """Roles of a job; `more` may hold a dict per name, for what is special about it."""
    special = {name: more.pop(name, {}) for name in NAMES}
    job = f"faults{next(JOBS)}"
    return [Role(name, store, job, transport, **{**more, **special[name]}) for name in names]


@TRANSPORTS
def test_two_versions_arrive(store: str, transport: str) -> None:
    with Cast(cast(store, transport, limits=30.0)) as crew:
        said = crew.ends(*NAMES)
    for name in NAMES:
        reports = [entry for entry in said[name] if entry[0] == "report"]
        assert [(version, wrong) for _, version, _, wrong, *_ in reports] == [(1, []), (2, [])], said[name]
    assert len({entry[2] for entries in said.values() for entry in entries if entry[:2] == ("report", 2)}) == 1


@TRANSPORTS
def test_what_both_targets_want_leaves_the_trainers_once(store: str, transport: str) -> None:
    with Cast(cast(store, transport, relay=True, large=True, limits=30.0)) as crew:
        said = crew.ends(*NAMES)
    for version in (1, 2):
        reports = {n: entry for n in NAMES for entry in said[n] if entry[:2] == ("report", version)}
        assert all(reports[name][3] == [] for name in NAMES), said
        assert len({entry[2] for entry in reports.values()}) == 1
        (first, second), passed_on = ([reports[n][4] for n in NAMES[2:]], [reports[n][5] for n in NAMES[2:]])
        assert reports["trainer/0"][4] + reports["trainer/1"][4] == first == second == sum(passed_on)
        assert min(passed_on) > first // 3


@TRANSPORTS
def test_what_all_replicas_want_goes_from_one_to_the_next(store: str, transport: str) -> None:
    with Cast(cast(store, transport, chain=True, large=True, limits=30.0)) as crew:
        said = crew.ends(*NAMES)
    for version in (1, 2):
        reports = {n: entry for n in NAMES for entry in said[n] if entry[:2] == ("report", version)}
        assert all(reports[name][3] == [] for name in NAMES), said
        assert len({entry[2] for entry in reports.values()}) == 1
        sent = reports["trainer/0"][4] + reports["trainer/1"][4]
        assert sent == reports["rollout0/0"][4] == reports["rollout0/1"][4] == reports["rollout0/0"][5]
        assert reports["rollout0/1"][5] == 0


@pytest.mark.trap(40, 41, 48)
@TRANSPORTS
def test_the_last_of_a_chain_dies_alone(store: str, transport: str) -> None:
    last = "rollout0/1"
    with Cast(cast(store, transport, chain=True, large=True, limits=20.0, **{last: {"freeze": "land"}})) as crew:
        crew.until(last, "frozen")
        crew.kill(last)
        said = crew.ends("rollout0/0")["rollout0/0"]
        reports = [entry for entry in said if entry[0] == "report"]
        assert [(version, wrong) for _, version, _, wrong, *_ in reports[:1]] == [(1, [])], said
        for error in crew.errors("trainer/0", "trainer/1").values():
            assert f"lost {last}" in error[2], error


@pytest.mark.trap(40, 41, 48)
@TRANSPORTS
def test_the_first_of_a_chain_takes_those_behind_it_along_by_name(store: str, transport: str) -> None:
    first = "rollout0/0"
    with Cast(cast(store, transport, chain=True, large=True, limits=20.0, **{first: {"freeze": "begin"}})) as crew:
        crew.until(first, "frozen")
        crew.kill(first)
        for error in crew.errors("rollout0/1", "trainer/0").values():
            assert f"lost {first}" in error[2], error


@pytest.mark.trap(28, 75)
@pytest.mark.timeout(700)
@TRANSPORTS
def test_a_thousand_refits_hold_no_more_than_a_hundred(store: str, transport: str) -> None:
    """With relays; nothing is made again, and nothing is kept."""
    with Cast(cast(store, transport, relay=True, versions=1050, limits=60.0)) as crew:
        said = crew.ends(*NAMES, seconds=600.0)
    for name in NAMES:
        assert [entry for entry in said[name] if entry[0] == "report" and entry[3]] == []
        counts = [entry[1:] for entry in said[name] if entry[0] == "resources"]
        assert [version for version, *_ in counts] == list(range(100, 1001, 100)), said[name]
        assert {made for _, made, *_ in counts} == {0}
        assert {operations for _, _, operations, *_ in counts} <= {0, 1, 2}
        resident, descriptors = [c[3] for c in counts], [c[4] for c in counts]
        assert descriptors[-1] <= descriptors[0], (name, descriptors)
        assert resident[-1] - resident[0] < 8 << 20, (name, resident)


@pytest.mark.trap(40, 41, 48)
@TRANSPORTS
def test_a_target_that_dies_while_it_passes_on(store: str, transport: str) -> None:
    roles = cast(store, transport, relay=True, large=True, **{"rollout0/1": {"freeze": "land"}})
    with Cast(roles) as crew:
        crew.until("rollout0/1", "frozen")
        crew.kill("rollout0/1")
        survivors_name(crew, "rollout0/1")


@pytest.mark.trap(19)
def test_missing_and_surplus_members_are_counted(store: str) -> None:
    with Cast(cast(store, "nixl", NAMES[:3], rendezvous=4.0)) as crew:
        for error in crew.errors(*NAMES[:3]).values():
            assert error[1] == "RendezvousError"
            assert "replica rollout0 has 1 of 2 members (rollout0/0)" in error[2]
    # One comes late, so that the surplus shows before the others are complete: afterwards only the surplus is refused.
    surplus: dict[str, dict[str, Any]] = {name: {"sources": 1} for name in NAMES}
    surplus["rollout0/1"] |= {"freeze": "join", "freeze_seconds": 12.0}
    with Cast(cast(store, "nixl", rendezvous=40.0, **surplus)) as crew:
        for error in crew.errors(*NAMES).values():
            assert "expected 1, found 2 (trainer/0, trainer/1)" in error[2] or "too many members" in error[2]


@pytest.mark.trap(11, 12)
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("missing", ("1.norm",)),
        ("extra", ("stranger",)),
        ("shape", ("1.norm", "[33]", "[32]")),
        ("dtype", ("1.norm", "float32", "bfloat16")),
    ],
)
def test_models_that_do_not_match_are_refused_by_everybody(store: str, fault: str, words: tuple[str, ...]) -> None:
    names = ("trainer/0", "rollout0/0")
    with Cast(cast(store, "nixl", names, sources=1, targets=1, **{"trainer/0": {"fault": fault}})) as crew:
        for error in crew.errors(*names).values():
            assert error[1] in ("PlanError", "RendezvousError")
            assert all(word in error[2] for word in words), error


def test_a_transport_that_is_not_installed(store: str) -> None:
    with Cast(cast(store, "nope", NAMES[:1])) as crew:
        (error,) = crew.errors("trainer/0").values()
    assert error[1] == "PluginError"
    assert "'nope'" in error[2]


@pytest.mark.trap(40)
def test_a_store_that_nobody_serves() -> None:
    with Cast(cast("tcp://127.0.0.1:9", "nixl", NAMES[:1], rendezvous=3.0)) as crew:
        (error,) = crew.errors("trainer/0").values()
    assert error[1] == "StoreError"
    assert "tcp://127.0.0.1:9" in error[2]


@pytest.mark.trap(19, 40)
@TRANSPORTS
def test_a_member_that_dies_before_it_connects(store: str, transport: str) -> None:
    with Cast(cast(store, transport, rendezvous=6.0, **{"rollout0/1": {"freeze": "join"}})) as crew:
        crew.until("rollout0/1", "frozen")
        crew.kill("rollout0/1")
        for error in crew.errors(*NAMES[:3]).values():
            assert "replica rollout0 has 1 of 2 members (rollout0/0)" in error[2]


def survivors_name(crew: Cast, culprit: str) -> None:
    begin = time.monotonic()
    errors = crew.errors(*(name for name in NAMES if name != culprit))
    assert time.monotonic() - begin < 150
    for name, (_, kind, text, safe, version) in errors.items():
        assert kind in ("RefitAbortedError", "PeerLostError", "DeadlineError"), (name, kind, text)
        assert culprit in text, f"{name}: {text}"
        assert version == -1
        assert safe, f"{name} would go on serving a mixture: {text}"


@pytest.mark.trap(10, 40, 47, 48)
@TRANSPORTS
@pytest.mark.parametrize("culprit", ["trainer/1", "rollout0/1"])
def test_a_member_that_dies_between_joining_and_its_first_byte(store: str, transport: str, culprit: str) -> None:
    freeze = {"freeze": "hold" if culprit.startswith("trainer") else "begin"}
    with Cast(cast(store, transport, **{culprit: freeze})) as crew:
        crew.until(culprit, "frozen")
        crew.kill(culprit)
        survivors_name(crew, culprit)


@pytest.mark.trap(34, 40, 41, 48)
@TRANSPORTS
@pytest.mark.parametrize("way", ["kill", "freeze"])
@pytest.mark.parametrize("culprit", ["trainer/1", "rollout0/1"])
def test_a_member_that_dies_or_hangs_while_bytes_move(store: str, transport: str, way: str, culprit: str) -> None:
    # A target that lands its first of 24 layers gives back no more slots, so its senders still have bytes to move.
    role = {"freeze": "land", "freeze_seconds": 2.0 if culprit == "trainer/1" else 600.0}
    # Only who hangs is found by a deadline; a slow machine may take its time until then.
    limits = 20.0 if way == "kill" else 6.0
    with Cast(cast(store, transport, large=True, limits=limits, **{"rollout0/1": role})) as crew:
        crew.until("rollout0/1", "frozen")
        getattr(crew, way)(culprit)
        survivors_name(crew, culprit)
