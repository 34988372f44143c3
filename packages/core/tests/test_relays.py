"""Relays: what several targets of a replica on one host want comes there once, and all of them hold every byte."""

from __future__ import annotations

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

from weft.builder import LayoutBuilder
from weft.contracts import Group, Message, Stream
from weft.copies import Parts, Routes
from weft.errors import PlanError, RefitAbortedError
from weft.gates import gates
from weft.layout import Layout
from weft.member import Member
from weft.naive import expected_memory, poisoned_memory
from weft.plan import Plan, plan
from weft.policy import Policy
from weft.roster import Expect
from weft.slices import prove, slice_of
from weft.streams import Finished
from weft.testing.faults import FaultyTransport, Script
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.lowered import lowered
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.models import Case, Rank, random_case
from weft.testing.tiny import Tiny
from weft.views import execute, torch_dtype

from .acts import serves, trains

JOBS = count()
ONCE = Policy(relay="host")
PACKED = Policy(relay="host", direct_run_bytes=1 << 40)
STARVED = Policy(relay="host", direct_run_bytes=1 << 40, staging_bytes=65_536, bucket_bytes=4096)


def on_hosts(case: Case, random: Random) -> Case:
    """Targets two or more to a host, and the sources elsewhere, or some of them there, too."""
    per_host, shared, near = random.choice((2, 3, 8)), random.random() < 0.3, random.random() < 0.3

    def moved(rank: Rank, host: str, domain: str) -> Rank:
        return replace(rank, member=msgspec.structs.replace(rank.member, host=host, domain=domain))

    sources = [
        moved(r, f"serve{n}", "serve0") if shared and n < 2 else moved(r, "train", "serve0" if near else "train")
        for n, r in enumerate(case.sources)
    ]
    targets = [moved(r, f"serve{n // per_host}", f"serve{n // per_host // 2}") for n, r in enumerate(case.targets)]
    return replace(case, sources=tuple(sources), targets=tuple(targets))


def planned(case: Case, policy: Policy = ONCE) -> Plan:
    return plan([r.member for r in case.sources], [r.member for r in case.targets], case.layouts, policy)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=150, deadline=None)
@pytest.mark.trap(1, 3, 42)
def test_all_targets_hold_every_byte_and_no_more_crosses_than_must(seed: int) -> None:
    random = Random(seed)
    case = on_hosts(random_case(random), random)
    within = random.choice(("host", "domain"))
    made, direct = planned(case, Policy(relay=within)), planned(case, Policy()).statistics
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
    statistics = made.statistics
    assert statistics.bytes == direct.bytes
    if within == "host":
        assert statistics.once_per_host_bytes <= statistics.cross_host_bytes <= direct.cross_host_bytes
    assert sum(statistics.egress_bytes.values()) + sum(statistics.relayed_bytes.values()) == statistics.bytes
    for member in made.members:
        layouts = [case.layouts[a] if a is not None else None for a in (member.source_layout, member.target_layout)]
        prove(slice_of(made, member.name), *layouts)


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=100, deadline=None)
def test_a_relay_stays_in_its_replica_and_waits_for_what_it_reads(seed: int) -> None:
    """Nothing waits for what is itself passed on, and all that is read has come from sources by then."""
    random = Random(seed)
    case = on_hosts(random_case(random), random)
    made = planned(case, any_policy(random))
    sources = frozenset(m.name for m in made.members if m.is_source)
    for rank in case.targets:
        program = lowered(made, rank.member.name)
        waits = gates(program, frozenset(m.name for m in made.members if m.replica == rank.member.replica))
        read = {bucket.index: bucket for bucket in program.sends}
        taken = {bucket.index: bucket for bucket in program.receives}
        assert waits.keys() == read.keys()
        for index, needed in waits.items():
            peer = made.members[made.index(read[index].peer)]
            place = (lambda m: m.domain) if made.policy.relay == "domain" else (lambda m: m.host)
            assert (peer.replica, place(peer)) == (rank.member.replica, place(rank.member))
            assert all(taken[n].peer in sources and taken[n].group == read[index].group for n in needed)
            written = [elements(taken[n].copies, "target") for n in needed]
            assert elements(read[index].copies, "source") <= set().union(*written)


def any_policy(random: Random) -> Policy:
    return random.choice((ONCE, PACKED, STARVED, Policy(relay="domain")))


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


def test_rings_share_the_work_by_bytes() -> None:
    """Eight equal targets on one host: each passes on about an eighth, and the sources send one copy."""
    tiny = Tiny(layers=16)
    layouts = {layout.address: layout for layout in (tiny.source(0, 1), tiny.target(0, 1))}
    case = crew(tiny, 8)
    made = plan(*case, layouts, ONCE)
    statistics = made.statistics
    once = statistics.bytes // 8
    assert (
        sum(statistics.egress_bytes.values()) == once == statistics.cross_host_bytes == statistics.once_per_host_bytes
    )
    assert sum(statistics.relayed_bytes.values()) == 7 * once
    assert len(statistics.relayed_bytes) == 8
    largest = 2 * tiny.inner * tiny.hidden * 7  # a copy is not divided between those who pass on
    assert max(statistics.relayed_bytes.values()) <= 7 * once / 8 + largest
    assert statistics.egress_over_bound == 1.0
    assert plan(*case, layouts, Policy(relay="never")).statistics.cross_host_bytes == 8 * once


def crew(tiny: Tiny, targets: int) -> tuple[list[Any], list[Any]]:
    source = Member("trainer/0", tiny.source(0, 1).address, None, None, 0, "train", "train", "cpu")
    wanted = tiny.target(0, 1).address
    return [source], [
        Member(f"rollout/{n}", None, wanted, "rollout", targets, "serve", "serve", "cpu") for n in range(targets)
    ]


class Negating(MemoryTarget):
    """Landing changes live memory in place, as some engines' kernels want it: norms change their signs."""

    def land(self, group: Group, stream: Stream) -> Finished:
        for name in group.buffers:
            if name.endswith("norm"):
                self.memory()[name].neg_()
        return super().land(group, stream)


def refit(
    store_url: str,
    policy: Policy,
    *,
    shares: int,
    each: int,
    scratch_slots: int = 0,
    scripts: dict[str, Script] | None = None,
    kind: type[MemoryTarget] = MemoryTarget,
) -> dict[str, Any]:
    """Two trainers and a replica of `shares` x `each` targets on one other host, three versions; results by member."""
    tiny, versions = Tiny(), 3
    weights = [tiny.tensors(seed) for seed in range(versions)]
    members = shares * each

    def expected(share: int) -> list[dict[str, torch.Tensor]]:
        held = [tiny.expected(share, shares, tensors) for tensors in weights]
        if kind is Negating:
            held = [{name: -t if name.endswith("norm") else t for name, t in each.items()} for each in held]
        return held

    parts = []
    for rank in range(2):
        source = MemorySource(f"trainer/{rank}", tiny.source(rank, 2))
        parts.append(Part(source.name, trains(source, weights), source=source, host="train"))
    for rank in range(members):
        target = kind(f"rollout/{rank}", tiny.target(rank % shares, shares, scratch_slots=scratch_slots))
        script = (scripts or {}).get(target.name)
        parts.append(
            Part(
                target.name,
                serves(target, expected(rank % shares)),
                target=target,
                replica="rollout",
                replica_size=members,
                host="serve",
                script=script,
            )
        )
    return Job(store_url, Expect(2, 1), name=f"relay{next(JOBS)}", policy=policy).run(parts)


@pytest.mark.parametrize("scratch_slots", [0, 1])
@pytest.mark.parametrize("policy", [ONCE, PACKED, STARVED], ids=["direct", "packed", "starved"])
@pytest.mark.parametrize(("shares", "each"), [(1, 4), (2, 2)])
def test_every_version_arrives_whole_through_relays(
    store_url: str, policy: Policy, shares: int, each: int, scratch_slots: int
) -> None:
    results = refit(store_url, policy, shares=shares, each=each, scratch_slots=scratch_slots)
    all_succeeded(results)
    for version in range(3):
        reports = {name: reports[version] for name, reports in results.items()}
        assert len({report.digest for report in reports.values()}) == 1
        sent = sum(report.bytes for name, report in reports.items() if name.startswith("trainer"))
        passed_on = sum(report.relayed_bytes for report in reports.values())
        assert passed_on > 0
        received = sum(report.bytes for name, report in reports.items() if name.startswith("rollout"))
        assert sent + passed_on == received
        if not scratch_slots:
            norms = 2 * 32 * 3  # every member wants them, whatever its share
            assert sent == received // each - norms * (shares - 1)
    assert all(r.registrations == r.allocations == 0 for reports in results.values() for r in reports)


@pytest.mark.parametrize("policy", [ONCE, PACKED, STARVED], ids=["direct", "packed", "starved"])
def test_what_landing_changes_in_place_has_been_passed_on_before(store_url: str, policy: Policy) -> None:
    results = refit(store_url, policy, shares=1, each=3, kind=Negating)
    all_succeeded(results)
    assert all(reports[0].relayed_bytes for name, reports in results.items() if name.startswith("rollout"))


def test_a_box_that_members_hold_twice_comes_once_but_for_the_giver() -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (16, 16), "float32")
    for name in ("first", "second"):
        builder.buffer(name, "float32", 256, group="g")
        builder.shard("w", name)
    wanted = builder.build()
    source = LayoutBuilder()
    source.tensor("w", (16, 16), "float32")
    source.buffer("w", "float32", 256, group="g")
    source.shard("w", "w")
    own = source.build()
    layouts = {layout.address: layout for layout in (own, wanted)}
    trainer = Member("trainer/0", own.address, None, None, 0, "train", "train", "cpu")
    targets = [Member(f"rollout/{n}", None, wanted.address, "r", 4, "serve", "serve", "cpu") for n in range(4)]
    statistics = plan([trainer], targets, layouts, ONCE).statistics
    assert statistics.bytes == 8 * own.nbytes
    assert statistics.cross_host_bytes == 2 * own.nbytes


def test_relays_are_chosen_where_they_save_a_quarter_between_hosts() -> None:
    tiny = Tiny()
    layouts = {layout.address: layout for layout in (tiny.source(0, 1), tiny.target(0, 1))}

    def routes(sources: list[Member], targets: list[Member], relay: str) -> list[list[int]]:
        made = plan(sources, targets, layouts, Policy(relay=relay))
        return [getattr(made.routes, field.name).tolist() for field in fields(Routes)]

    sources, targets = crew(tiny, 3)
    assert routes(sources, targets, "auto") == routes(sources, targets, "host") != routes(sources, targets, "never")
    one_host = [msgspec.structs.replace(target, host="train", domain="train") for target in targets]
    assert routes(sources, one_host, "auto") == routes(sources, one_host, "never")
    # Five copies cross, four of them to hosts of their own: one in five is saved.
    far = [msgspec.structs.replace(crew(tiny, 5)[1][n], host=host, domain=host) for n, host in enumerate("aabcd")]
    assert routes(sources, far, "auto") == routes(sources, far, "never") != routes(sources, far, "host")


class Flip(Script):
    """Changes the first bucket that another target passes on here."""

    def arriving(self, endpoint: FaultyTransport, messages: list[Message]) -> list[Message]:
        for message in messages:
            if message.bucket is not None and message.peer.startswith("rollout"):
                endpoint.flip(message.bucket)
        return messages


@pytest.mark.trap(48)
def test_a_byte_that_changes_between_targets_is_found_and_its_sender_named(store_url: str, faulty: None) -> None:
    results = refit(store_url, ONCE, shares=1, each=3, scripts={"rollout/1": Flip()})
    assert all(isinstance(results[f"rollout/{n}"], RefitAbortedError) for n in range(3))
    for name in ("rollout/0", "rollout/1", "trainer/0", "trainer/1"):  # the leader, the one that saw it, those told
        assert isinstance(results[name], RefitAbortedError)
        assert "from rollout/" in str(results[name])
        assert "arrived changed" in str(results[name])


def slices_of(tiny: Tiny) -> tuple[Plan, Layout]:
    layouts = {layout.address: layout for layout in (tiny.source(0, 1), tiny.target(0, 1))}
    return plan(*crew(tiny, 3), layouts, ONCE), tiny.target(0, 1)


@pytest.mark.parametrize("what", ["place", "ring", "replica"])
def test_a_member_refuses_to_pass_on_what_it_does_not_have(what: str) -> None:
    made, layout = slices_of(Tiny())
    own = slice_of(made, "rollout/0")
    mine = np.flatnonzero(own.routes.source == own.me)
    prove(own, None, layout)
    if what == "place":
        offset = own.parts.source_offset.copy()
        offset[own.routes.part[mine[0]]] += 1
        columns = {f.name: getattr(own.parts, f.name) for f in fields(Parts)} | {"source_offset": offset}
        wrong, words = replace(own, parts=Parts(**columns)), "passes on what this target does not have there"
    elif what == "replica":
        members = tuple(
            msgspec.structs.replace(member, replica="before") if member.name == "rollout/1" else member
            for member in own.members
        )
        wrong, words = replace(own, members=members), "rollout/1: a copy passes on to a replica before this one"
    else:  # what it passes on is to come from the very member that waits for it
        sender = own.routes.source.copy()
        box = own.parts.tensor[own.routes.part[mine[0]]]
        sender[(own.routes.target == own.me) & (own.parts.tensor[own.routes.part] == box)] = own.routes.target[mine[0]]
        columns = {f.name: getattr(own.routes, f.name) for f in fields(Routes)} | {"source": sender}
        wrong, words = replace(own, routes=Routes(**columns)), "passes on what nobody sends here before"
    with pytest.raises(PlanError, match=words):
        prove(wrong, None, layout)


@pytest.mark.trap(10)
def test_what_was_cast_on_the_way_is_passed_on_as_it_is() -> None:
    tiny = Tiny(norm_dtype="float32")
    layouts = {layout.address: layout for layout in (tiny.source(0, 1), tiny.target(0, 1))}
    policy = Policy(relay="host", casts=(("float32", "bfloat16"),))
    made = plan(*crew(tiny, 3), layouts, policy)
    packed = {"trainer/0": 0, "rollout": 0}
    for member in made.members:
        for bucket in lowered(made, member.name).sends:
            packed[member.name if member.is_source else "rollout"] += bucket.slot is not None
    assert packed["trainer/0"] > 0
    assert packed["rollout"] == 0
