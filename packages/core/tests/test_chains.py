"""Chains: what several replicas want leaves the sources once, and each replica passes it on to the next."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import fields, replace
from itertools import count
from random import Random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.contracts import Message
from weft.copies import Routes
from weft.deadline import Deadlines
from weft.errors import ConfigError, PlanError, RefitAbortedError
from weft.fleet import Fleet, FleetMember
from weft.gates import gates
from weft.member import Member
from weft.naive import expected_memory, poisoned_memory
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.publication import Publisher
from weft.refit import Refit
from weft.roles import roles_of
from weft.roster import Expect
from weft.slices import prove, slice_of
from weft.testing.faults import FaultyTransport, Script
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.lowered import lowered
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.models import Case, Rank, random_case
from weft.testing.tiny import Tiny
from weft.views import execute, torch_dtype

from .acts import serves, trains
from .test_relays import Negating

JOBS = count()
TINY = Tiny()
NAMES = ("alpha", "beta", "gamma")


def policies(random: Random) -> Policy:
    packed = {"direct_run_bytes": 1 << 40} if random.random() < 0.5 else {}
    return Policy(chain="always", relay=random.choice(("never", "host", "domain")), **packed)


def spread(case: Case, random: Random) -> Case:
    """Hosts and domains as they come; some targets beside sources, or members of both sides."""

    def moved(rank: Rank, side: str) -> Rank:
        host = random.choice(("train", "a", "b", "c", "d"))
        host = host if side == "target" or random.random() < 0.3 else "train"
        domain = {"train": "0", "a": "0", "b": "1"}.get(host, "2")
        return replace(rank, member=msgspec.structs.replace(rank.member, host=host, domain=domain))

    sources, targets = [
        [moved(r, side) for r in ranks] for side, ranks in (("source", case.sources), ("target", case.targets))
    ]
    for n in range(min(len(sources), len(targets))):
        if random.random() < 0.2:
            one, other = sources[n].member, targets[n].member
            both = msgspec.structs.replace(other, source_layout=one.source_layout)
            sources[n], targets[n] = replace(sources[n], member=both), replace(targets[n], member=both)
    return replace(case, sources=tuple(sources), targets=tuple(targets))


def planned(case: Case, policy: Policy) -> Plan:
    return plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
@pytest.mark.trap(1, 3, 42)
def test_all_targets_hold_every_byte_and_every_member_can_prove_its_part(seed: int) -> None:
    random = Random(seed)
    case = spread(random_case(random), random)
    made, direct = planned(case, policies(random)), planned(case, Policy())
    values = case.values(seed)
    memory = {r.member.name: poisoned_memory(r.layout) for r in case.targets}
    held = {r.member.name: expected_memory(values, r.layout) for r in case.sources}

    def tensors(rank: Rank, bits: Any) -> dict[str, torch.Tensor]:
        dtypes = {buffer.name: torch_dtype(buffer.dtype) for buffer in rank.layout.buffers}
        return {name: torch.from_numpy(each.view(np.uint8)).view(dtypes[name]) for name, each in bits.items()}

    execute(
        made, case.layouts, {r.member.name: tensors(r, held[r.member.name]) for r in case.sources},
        {r.member.name: tensors(r, memory[r.member.name]) for r in case.targets},
    )  # fmt: skip
    for rank in case.targets:
        for name, bits in expected_memory(values, rank.layout).items():
            assert memory[rank.member.name][name].tobytes() == bits.tobytes(), (rank.member.name, name)
    assert made.statistics.bytes == direct.statistics.bytes
    assert made.statistics.ingress_bytes == direct.statistics.ingress_bytes
    for member in made.members:
        layouts = [case.layouts[a] if a is not None else None for a in (member.source_layout, member.target_layout)]
        prove(slice_of(made, member.name), *layouts)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_nobody_waits_in_a_ring(seed: int) -> None:
    """Buckets that may go, go: in the end all have gone, and none read what had not come."""
    random = Random(seed)
    case = spread(random_case(random), random)
    made = planned(case, policies(random))
    programs = {m.name: lowered(made, m.name) for m in made.members}
    roles = roles_of(made.members)
    waits = {m.name: gates(programs[m.name], roles.mates(m.replica)) for m in made.members if not m.is_source}
    left = {(name, bucket.index): bucket for name, program in programs.items() for bucket in program.sends}
    taken: dict[str, set[int]] = {name: set() for name in programs}
    while left:
        able = [key for key in left if key[0] not in waits or waits[key[0]][key[1]] <= taken[key[0]]]
        assert able, f"{sorted(left)} wait for each other"
        for name, index in able:
            taken[left.pop((name, index)).peer].add(index)
    for name, needed in waits.items():
        came = {bucket.index: bucket for bucket in programs[name].receives}
        for bucket in programs[name].sends:
            assert elements(bucket.copies, "source") <= set().union(
                *(elements(came[n].copies, "target") for n in needed[bucket.index])
            )
            assert all(came[n].group == bucket.group for n in needed[bucket.index])


def elements(copies: Any, end: str) -> set[tuple[int, int]]:
    """(buffer, element) of all that these copies touch at one end."""
    found: set[tuple[int, int]] = set()
    buffer, offset, strides = (getattr(copies, f"{end}_{what}") for what in ("buffer", "offset", "strides"))
    for n in range(len(copies)):
        index = np.array([offset[n]])
        for size, stride in zip(copies.sizes[n].tolist(), strides[n].tolist(), strict=True):
            index = (index[:, None] + np.arange(size) * stride).ravel()
        found |= {(int(buffer[n]), int(element)) for element in index}
    return found


def far_apart(members: int = 2, replicas: int = 3) -> tuple[list[Member], list[Member], dict[str, Any]]:
    """One trainer, and replicas of `members` equal members, each replica on a host of its own."""
    layouts = {layout.address: layout for layout in (TINY.source(0, 1), TINY.target(0, 1))}
    source = Member("trainer/0", TINY.source(0, 1).address, None, None, 0, "train", "train", "cpu")
    wanted = TINY.target(0, 1).address
    targets = [
        Member(f"{name}/{n}", None, wanted, name, members, name, name, "cpu")
        for name in [f"replica{r}" for r in range(replicas)]
        for n in range(members)
    ]
    return [source], targets, layouts


def test_a_chain_has_every_link_once() -> None:
    """Three replicas of two on hosts of their own: the trainer feeds the first, and each member one of the next."""
    sources, targets, layouts = far_apart()
    made = plan(sources, targets, layouts, Policy(chain="always"))
    pairs = {
        (made.members[s].name, made.members[t].name)
        for s, t in zip(made.routes.source, made.routes.target, strict=True)
    }
    assert pairs == {("trainer/0", "replica0/0"), ("trainer/0", "replica0/1")} | {
        (f"replica{n}/{m}", f"replica{n + 1}/{m}") for n in (0, 1) for m in (0, 1)
    }
    statistics = made.statistics
    once = statistics.ingress_bytes["replica0/0"]
    assert statistics.egress_bytes == {"trainer/0": 2 * once}
    assert statistics.relayed_bytes == {f"replica{n}/{m}": once for n in (0, 1) for m in (0, 1)}
    assert statistics.cross_domain_bytes == 6 * once
    both = plan(sources, targets, layouts, Policy(chain="always", relay="host")).statistics
    assert both.egress_bytes == {"trainer/0": once}
    assert both.cross_domain_bytes == 3 * once


def test_a_replica_takes_from_its_neighbours_first() -> None:
    """Replicas of two domains in turn: each domain is entered once."""
    sources, targets, layouts = far_apart(1, 4)
    turned = [
        msgspec.structs.replace(target, domain="even" if n % 2 == 0 else "odd") for n, target in enumerate(targets)
    ]
    made = plan(sources, turned, layouts, Policy(chain="always"))
    senders = {
        made.members[t].name: made.members[s].name for s, t in zip(made.routes.source, made.routes.target, strict=True)
    }
    assert senders == {
        "replica0/0": "trainer/0", "replica1/0": "replica0/0", "replica2/0": "replica0/0", "replica3/0": "replica1/0"
    }  # fmt: skip
    assert made.statistics.cross_domain_bytes == 2 * made.statistics.ingress_bytes["replica0/0"]


def test_chains_are_chosen_where_a_member_has_less_to_do() -> None:
    sources, targets, layouts = far_apart(1, 3)

    def same(one: Policy, other: Policy, targets: list[Member]) -> bool:
        a, b = (plan(sources, targets, layouts, policy).routes for policy in (one, other))
        return all(np.array_equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(Routes))

    auto, always, never = (Policy(chain=chain) for chain in ("auto", "always", "never"))
    assert same(auto, always, targets)
    assert not same(auto, never, targets)
    assert same(auto, never, targets[:1])
    near = [msgspec.structs.replace(target, host="train", domain="train") for target in targets]
    assert same(always, never, near)  # beside the trainer everybody reads from it


@pytest.mark.parametrize("what", ["order", "origin"])
def test_a_member_refuses_a_part_in_a_ring(what: str) -> None:
    sources, targets, layouts = far_apart()
    made = plan(sources, targets, layouts, Policy(chain="always"))
    own = slice_of(made, "replica1/0")
    layout = TINY.target(0, 1)
    prove(own, None, layout)
    if what == "order":
        members = tuple(msgspec.structs.replace(m, replica="a") if m.replica == "replica2" else m for m in own.members)
        wrong, words = replace(own, members=members), "replica2/0: a copy passes on to a replica before this one"
    else:
        keep = np.flatnonzero(own.routes.source == own.me)
        wrong = replace(own, routes=Routes(*(getattr(own.routes, f.name)[keep] for f in fields(Routes))))
        words = "passes on what nobody sends here before"
    with pytest.raises(PlanError, match=words):
        prove(wrong, None, layout)


def job(
    store_url: str, policy: Policy, acts: Mapping[str, Any] | None = None, versions: int = 3,
    scripts: Mapping[str, Script] | None = None, scratch_slots: int = 0, deadlines: Deadlines | None = None,
    kind: type[MemoryTarget] = MemoryTarget, lingers: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Two trainers, and replicas of two members each on hosts of their own; `acts` replaces what members do.
    Members of the replica `lingers` stay for a while when they have failed: else those that see them go say that.
    """
    weights = [TINY.tensors(seed) for seed in range(versions)]
    parts = []
    for rank in range(2):
        source = MemorySource(f"trainer/{rank}", TINY.source(rank, 2))
        act = (acts or {}).get(source.name) or trains(source, weights)
        parts.append(Part(source.name, act, source=source, host="train"))
    for name in NAMES:
        for rank in range(2):
            target = kind(f"{name}/{rank}", TINY.target(rank, 2, scratch_slots=scratch_slots))
            held = [TINY.expected(rank, 2, each) for each in weights]
            if kind is Negating:
                held = [{name: -t if name.endswith("norm") else t for name, t in each.items()} for each in held]
            act = (acts or {}).get(target.name) or serves(target, held)
            act = lingering(act) if name == lingers else act
            script = (scripts or {}).get(target.name)
            parts.append(Part(target.name, act, target=target, replica=name, replica_size=2, host=name, script=script))
    made = Job(store_url, Expect(2, 3), name=f"chain{next(JOBS)}", policy=policy)
    if deadlines is not None:
        made.deadlines = deadlines
    return made.run(parts)


def lingering(act: Any) -> Any:
    def acting(refit: Refit) -> Any:
        try:
            return act(refit)
        except RefitAbortedError:
            time.sleep(2)
            raise

    return acting


CHAIN = Policy(chain="always")
TRANSPORTED = {
    "direct": CHAIN,
    "packed": Policy(chain="always", direct_run_bytes=1 << 40),
    "starved": Policy(chain="always", direct_run_bytes=1 << 40, staging_bytes=65_536, bucket_bytes=4096),
    "shadow": Policy(chain="always", landing="shadow"),
    "hosts": Policy(chain="always", relay="host"),
}


@pytest.mark.parametrize("scratch_slots", [0, 1])
@pytest.mark.parametrize("policy", TRANSPORTED.values(), ids=TRANSPORTED.keys())
def test_every_version_arrives_whole_along_the_chain(store_url: str, policy: Policy, scratch_slots: int) -> None:
    results = job(store_url, policy, scratch_slots=scratch_slots)
    all_succeeded(results)
    for version in range(3):
        reports = {name: each[version] for name, each in results.items()}
        assert len({report.digest for report in reports.values()}) == 1
        sent = sum(report.bytes for name, report in reports.items() if name.startswith("trainer"))
        passed = {name: report.relayed_bytes for name, report in reports.items()}
        received = sum(report.bytes for name, report in reports.items() if not name.startswith("trainer"))
        assert sent + sum(passed.values()) == received
        if not scratch_slots:
            last = {"gamma"} if policy.relay == "never" else set()
            assert all(bool(passed[f"{name}/{rank}"]) == (name not in last) for name in NAMES for rank in (0, 1))
            assert sent <= received // 3
    assert all(r.registrations == r.allocations == 0 for reports in results.values() for r in reports)


class Late(Script):
    """Hears nothing for a moment each time that something comes."""

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        if messages:
            time.sleep(0.02)
        return messages


@pytest.mark.parametrize("policy", [CHAIN, TRANSPORTED["packed"]], ids=["direct", "packed"])
def test_what_landing_changes_in_place_has_been_passed_on_before(store_url: str, faulty: None, policy: Policy) -> None:
    late = {f"{name}/{rank}": Late() for name in ("beta", "gamma") for rank in (0, 1)}
    all_succeeded(job(store_url, policy, kind=Negating, scripts=late))


@pytest.mark.trap(48)
def test_a_replica_that_begins_late_keeps_nobody_from_committing(store_url: str) -> None:
    """Within `begin`: those before it wait with their votes, longer than the other deadlines together."""

    def late(refit: Refit) -> None:
        time.sleep(5)
        refit.receive(1)

    d = Deadlines(rendezvous=30, offer=30, begin=30, move=1.5, vote=1, commit=1)
    all_succeeded(job(store_url, CHAIN, versions=1, acts={"beta/0": late}, deadlines=d))


def committed(results: Mapping[str, Any], name: str) -> bool:
    return all(not isinstance(results[f"{name}/{rank}"], Exception) for rank in range(2))


class Silent(Script):
    """Takes no bucket, and so gives no slot back: a frozen process."""

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        return [message for message in messages if message.bucket is None]


@pytest.mark.trap(48)
def test_who_takes_nothing_is_given_up_and_those_before_it_commit(store_url: str, faulty: None) -> None:
    """The last replica takes nothing: it alone goes without the version, though the one before cannot land so long."""
    d = Deadlines(rendezvous=30, offer=30, begin=20, move=12, vote=20, commit=20)
    results = job(store_url, TRANSPORTED["starved"], versions=1, scripts={"gamma/0": Silent()}, deadlines=d)
    assert committed(results, "alpha"), results
    assert committed(results, "beta"), results
    for rank in range(2):
        assert isinstance(results[f"gamma/{rank}"], RefitAbortedError)
    assert "relay beta/0" in str(results["trainer/0"])
    assert "nothing was taken: not within 6.0 s; late: gamma/0" in str(results["trainer/0"])


@pytest.mark.trap(48)
def test_a_replica_that_does_not_begin_takes_those_behind_it_along_by_name(store_url: str) -> None:
    """One of the first replica gives the version up; the others hear of it long before a deadline."""

    def declines(refit: Refit) -> None:
        installation = refit.begin(1)
        installation.abort(RuntimeError("no memory left for it"))
        raise RefitAbortedError(1, ["no memory left for it"])

    results = job(store_url, CHAIN, versions=1, acts={"alpha/0": declines}, lingers="alpha")
    for name in ("beta/0", "gamma/1"):
        assert isinstance(results[name], RefitAbortedError)
        assert "no memory left for it" in str(results[name])
    assert "no memory left for it" in str(results["trainer/0"])


class Flip(Script):
    """Changes the first bucket that another replica passes on here."""

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message.bucket is not None and message.peer.startswith("alpha"):
                endpoint.flip(message.bucket)
        return messages


@pytest.mark.trap(48)
def test_a_byte_that_changes_between_replicas_is_found_and_the_first_one_commits(store_url: str, faulty: None) -> None:
    results = job(store_url, CHAIN, versions=1, scripts={"beta/1": Flip()}, lingers="beta")
    assert committed(results, "alpha"), results
    for name in ("beta/0", "beta/1"):
        assert isinstance(results[name], RefitAbortedError), results
        assert "from alpha/1" in str(results[name])
        assert "arrived changed" in str(results[name])
    assert isinstance(results["gamma/0"], RefitAbortedError)
    assert "relay beta/" in str(results["gamma/0"])
    assert "arrived changed" in str(results["gamma/0"])


def test_drives_that_plan_each_replica_apart_refuse_chains(store_url: str) -> None:
    common: dict[str, Any] = {"transport": "local", "store": store_url, "job": "j", "name": "m", "policy": CHAIN}
    source, target = MemorySource("m", TINY.source(0, 1)), MemoryTarget("m", TINY.target(0, 1))
    for make in (
        lambda: Fleet(source=source, rank=0, sources=1, **common),
        lambda: FleetMember(target=target, replica="r", replica_size=1, sources=1, **common),
        lambda: Publisher(source=source, rank=0, members=1, **common),
    ):
        with pytest.raises(ConfigError, match="chain"):
            make()
