"""Whole refits over the `local` transport and the embedded store: every byte, every version, every digest."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from itertools import count
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.contracts import Bucket
from weft.digest import Digest, digest_array
from weft.errors import ConfigError, PlanError
from weft.member import Tag
from weft.naive import Bits
from weft.policy import Policy
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.testing.faults import Script
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.models import random_case
from weft.testing.tiny import Tiny, mismatches

from .acts import serves, trains

JOBS = count()
PACKED = Policy(direct_run_bytes=1 << 40)
"""Everything passes through staging."""
STARVED = Policy(direct_run_bytes=1 << 40, staging_bytes=65_536, bucket_bytes=4096)
"""Slots of 4 KiB: many buckets of each pair take turns."""


def job(store_url: str, sources: int, replicas: int = 1, **more: Any) -> Job:
    return Job(store_url, Expect(sources, replicas), name=f"refit{next(JOBS)}", **more)


def whole_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    total = Digest()
    for name, tensor in tensors.items():
        total += digest_array(name, tensor.contiguous().view(torch.uint8).numpy())
    return total.hex()


def raw(values: Bits) -> torch.Tensor:
    """The bytes of a dense array."""
    return torch.from_numpy(np.ascontiguousarray(values).reshape(-1).view(np.uint8).copy())


def raised(results: Mapping[str, Any]) -> dict[str, Exception]:
    return {name: result for name, result in results.items() if isinstance(result, Exception)}


def refit_tiny(
    job: Job, tiny: Tiny, sources: int, targets: int, *, versions: int = 2, replicas: int = 1, scratch_slots: int = 0
) -> tuple[dict[str, Any], list[dict[str, torch.Tensor]]]:
    """Train and serve a tiny model through some versions; results by member, and the weights of each version."""
    weights = [tiny.tensors(seed) for seed in range(versions)]
    parts = []
    for rank in range(sources):
        source = MemorySource(f"trainer/{rank}", tiny.source(rank, sources))
        parts.append(Part(source.name, trains(source, weights), source=source))
    for replica in range(replicas):
        for rank in range(targets):
            layout = tiny.target(rank, targets, scratch_slots=scratch_slots)
            target = MemoryTarget(f"rollout{replica}/{rank}", layout)
            expected = [tiny.expected(rank, targets, tensors) for tensors in weights]
            act = serves(target, expected)
            parts.append(Part(target.name, act, target=target, replica=f"rollout{replica}", replica_size=targets))
    results = job.run(parts)
    all_succeeded(results)
    return results, weights


@pytest.mark.trap(28, 41)
@pytest.mark.parametrize("policy", [Policy(), PACKED, STARVED], ids=["direct", "packed", "starved"])
@pytest.mark.parametrize(("sources", "targets", "replicas"), [(1, 1, 1), (2, 3, 1), (3, 2, 2)])
def test_every_version_arrives_whole_in_poisoned_memory(
    store_url: str, policy: Policy, sources: int, targets: int, replicas: int
) -> None:
    tiny = Tiny()
    results, weights = refit_tiny(
        job(store_url, sources, replicas, policy=policy), tiny, sources, targets, replicas=replicas
    )
    for version, tensors in enumerate(weights, 1):
        reports = [reports[version - 1] for reports in results.values()]
        assert {report.digest for report in reports} == {whole_digest(tensors)}
        assert {report.version for report in reports} == {version}
        sent = sum(r.bytes for name, rs in results.items() if name.startswith("trainer") for r in [rs[version - 1]])
        layouts = [tiny.target(rank, targets) for rank in range(targets)]
        pad = 2 * tiny.hidden * tiny.layers
        assert sent == replicas * sum(layout.nbytes - pad for layout in layouts)
        assert sent == sum(r.bytes for n, rs in results.items() if n.startswith("rollout") for r in [rs[version - 1]])


@pytest.mark.trap(19)
def test_all_members_know_what_they_prepared_by_the_same_key(store_url: str) -> None:
    everybody = threading.Barrier(4)

    def key_of(refit: Refit) -> Any:
        everybody.wait(30)  # nobody leaves before all have come
        return refit._connection[0].prepared.program.key

    tiny = Tiny()
    parts = [
        Part(source.name, key_of, source=source)
        for source in (MemorySource(f"trainer/{rank}", tiny.source(rank, 2)) for rank in range(2))
    ]
    for rank in range(2):
        target = MemoryTarget(f"rollout0/{rank}", tiny.target(rank, 2))
        parts.append(Part(target.name, key_of, target=target, replica="rollout0", replica_size=2))
    keys = job(store_url, 2).run(parts)
    assert len(keys) == 4
    assert len(set(keys.values())) == 1


@pytest.mark.trap(29, 75)
def test_warm_refits_register_and_allocate_nothing_and_hardly_use_the_store(store_url: str) -> None:
    results, _ = refit_tiny(job(store_url, 3, 2, policy=PACKED), Tiny(), 3, 2, replicas=2, versions=4)
    for reports in results.values():
        assert all((report.registrations, report.allocations) == (0, 0) for report in reports)
    for version in range(4):
        operations = {name: reports[version].store_operations for name, reports in results.items()}
        leaders = {name: used for name, used in operations.items() if used}
        assert set(leaders) <= {"trainer/0", "rollout0/0", "rollout1/0"}
        assert max(leaders.values()) <= 2


@pytest.mark.trap(28, 67)
@pytest.mark.parametrize("scratch_slots", [1, 2])
@pytest.mark.parametrize("policy", [Policy(), STARVED], ids=["direct", "starved"])
def test_scratch_is_not_overwritten_before_its_group_has_landed(
    store_url: str, scratch_slots: int, policy: Policy
) -> None:
    tiny = Tiny(layers=6)
    refit_tiny(job(store_url, 2, policy=policy), tiny, 2, 2, scratch_slots=scratch_slots, versions=3)


@pytest.mark.trap(42, 67)
def test_tensors_larger_than_a_slot_take_turns_in_it(store_url: str) -> None:
    results, _ = refit_tiny(job(store_url, 2, policy=STARVED), Tiny(layers=2, hidden=128, inner=192), 2, 2)
    assert all(report.buckets > 20 for reports in results.values() for report in reports)


@pytest.mark.trap(11)
def test_declared_casts_round_to_nearest_even(store_url: str) -> None:
    tiny = Tiny(norm_dtype="float32")
    weights = tiny.tensors(0)
    halfway = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 2**-133, 3.3895314e38, 1e-45, -0.0, 65504.0])
    weights["0.norm"][:8] = halfway
    source = MemorySource("trainer/0", tiny.source(0, 1))
    target = MemoryTarget("rollout0/0", tiny.target(0, 1))
    made = job(store_url, 1, policy=Policy(casts=(("float32", "bfloat16"),)))
    results = made.run([
        Part(source.name, trains(source, [weights]), source=source),
        Part(target.name, serves(target, [tiny.expected(0, 1, weights)]), target=target, replica="rollout0"),
    ])  # fmt: skip
    assert not raised(results)
    assert target.contents()["layer0.norm"][:3].tolist() == [1.0, 1 + 2**-6, -1.0]
    arrived = {name: tensor.bfloat16() for name, tensor in weights.items()}
    assert results["rollout0/0"][0].digest == results["trainer/0"][0].digest == whole_digest(arrived)


@pytest.mark.trap(11, 47)
def test_an_undeclared_cast_is_refused_on_every_member(store_url: str) -> None:
    tiny = Tiny(norm_dtype="float32")
    made = job(store_url, 1)
    sources = [MemorySource("trainer/0", tiny.source(0, 1))]
    targets = [MemoryTarget(f"rollout0/{rank}", tiny.target(rank, 2)) for rank in range(2)]
    results = made.run([
        *(Part(s.name, lambda _: "joined", source=s) for s in sources),
        *(Part(t.name, lambda _: "joined", target=t, replica="rollout0", replica_size=2) for t in targets),
    ])  # fmt: skip
    assert set(raised(results)) == {"trainer/0", "rollout0/0", "rollout0/1"}
    assert any(isinstance(result, PlanError) for result in results.values())
    for result in results.values():
        assert all(word in str(result) for word in ("0.norm", "1.norm", "2.norm", "float32", "bfloat16"))


@pytest.mark.parametrize("policy", [Policy(), PACKED], ids=["direct", "packed"])
def test_one_member_may_be_source_and_target(store_url: str, policy: Policy) -> None:
    tiny = Tiny(norm_dtype="float32")
    policy = Policy(casts=(("float32", "bfloat16"),), direct_run_bytes=policy.direct_run_bytes)
    weights = [tiny.tensors(seed) for seed in range(2)]
    made = job(store_url, 2, policy=policy)

    def part(rank: int) -> Part:
        source = MemorySource(f"both/{rank}", tiny.source(rank, 2))
        target = MemoryTarget(f"both/{rank}", tiny.target(rank, 2))

        def act(refit: Refit) -> list[Report]:
            reports = []
            for version, tensors in enumerate(weights, 1):
                source.load(tensors)
                target.poison()
                reports.append(refit.run(version))
                assert not mismatches(target.contents(), tiny.expected(rank, 2, tensors))
            return reports

        return Part(source.name, act, source=source, target=target, replica="both", replica_size=2)

    results = made.run([part(0), part(1)])
    assert not raised(results)
    for version, tensors in enumerate(weights):
        arrived = {name: tensor.bfloat16() for name, tensor in tensors.items()}
        assert {reports[version].digest for reports in results.values()} == {whole_digest(arrived)}


class Slow(Script):
    """Posts late."""

    def posting(self, bucket: Bucket, tag: Tag) -> None:
        time.sleep(0.05)


@pytest.mark.usefixtures("faulty")
def test_a_collocated_source_holds_its_weights_until_its_own_copies_are_made(store_url: str) -> None:
    tiny = Tiny()
    weights = tiny.tensors(0)

    def part(rank: int) -> Part:
        source = MemorySource(f"both/{rank}", tiny.source(rank, 2))

        def before(what: str, argument: object) -> None:
            if what == "land":
                assert source.leases[-1].held, f"{argument} is copied from weights that may change"

        layout = tiny.target(rank, 2) if rank else tiny.target(0, 1)  # the first takes the whole model
        target = MemoryTarget(f"both/{rank}", layout, before=before)

        def act(refit: Refit) -> None:
            source.load(weights)
            refit.run(1)
            assert not source.leases[-1].held
            assert not mismatches(target.contents(), tiny.expected(rank, 1 + rank, weights))

        script = Slow() if rank else Script()
        return Part(source.name, act, source=source, target=target, replica="both", replica_size=2, script=script)

    assert not raised(job(store_url, 2).run([part(0), part(1)]))


def test_versions_grow(store_url: str) -> None:
    tiny = Tiny()
    source, target = MemorySource("trainer/0", tiny.source(0, 1)), MemoryTarget("rollout0/0", tiny.target(0, 1))
    source.load(tiny.tensors(0))

    def act(refit: Refit) -> None:
        refit.run(5)
        for version in (5, 4, -1):
            with pytest.raises(ConfigError, match=f"version {version} is offered after 5"):
                refit.offer(version)
        refit.run(7)

    results = job(store_url, 1).run([
        Part(source.name, act, source=source),
        Part(target.name, lambda refit: [refit.receive().version for _ in range(2)], target=target, replica="rollout0"),
    ])  # fmt: skip
    assert not raised(results)
    assert results["rollout0/0"] == [5, 7]


@settings(max_examples=12, suppress_health_check=list(HealthCheck), deadline=None)
@given(st.randoms(use_true_random=False), st.sampled_from([Policy(), PACKED, STARVED]))
def test_random_models_on_random_meshes_arrive_whole(store_url: str, random: Random, policy: Policy) -> None:
    case = random_case(random)
    values = case.values(seed=1)
    replicas = {rank.member.replica for rank in case.targets}
    made = job(store_url, len(case.sources), len(replicas), policy=policy)
    parts = []
    for rank in case.sources:
        source = MemorySource(rank.member.name, rank.layout)
        held = rank.assigned(values)
        for name, memory in source.memory().items():
            memory.view(torch.uint8).copy_(raw(held[name]))
        parts.append(Part(source.name, lambda refit: refit.run(1), source=source))
    targets = {rank.member.name: MemoryTarget(rank.member.name, rank.layout) for rank in case.targets}
    for rank in case.targets:
        replica, size = rank.member.replica, rank.member.replica_size
        target = targets[rank.member.name]
        parts.append(Part(target.name, lambda refit: refit.run(1), target=target, replica=replica, replica_size=size))
    results = made.run(parts)
    if (faults := raised(results)) and all("no copies" in str(fault) for fault in faults.values()):
        return
    assert not faults
    assert len({report.digest for report in results.values()}) == 1
    for rank in case.targets:
        expected = rank.assigned(values)
        for fill in rank.layout.fills:
            memory = targets[rank.member.name].memory()[fill.buffer]
            padding = memory.as_strided(fill.sizes, fill.strides, memory.storage_offset() + fill.offset)
            assert (padding.float() == fill.value).all()
            poisoned = raw(expected[fill.buffer]).view(memory.dtype)
            padding.copy_(poisoned.as_strided(fill.sizes, fill.strides, fill.offset))
        for name, wanted in expected.items():
            found = targets[rank.member.name].memory()[name].view(torch.uint8)
            assert torch.equal(found, raw(wanted)), f"{rank.member.name} {name}"


def test_a_slot_that_is_free_before_the_sources_start_is_not_forgotten(store_url: str) -> None:
    """Groups for which nothing comes land at once, and their credit is there before a source has been told to go."""
    tiny, weights = Tiny(), Tiny().tensors(1)
    parts = []
    for rank in range(2):
        source = MemorySource(f"trainer/{rank}", tiny.source(rank, 2))
        parts.append(Part(source.name, trains(source, [weights]), source=source))
    target = MemoryTarget("rollout0/0", tiny.target(0, 1, scratch_slots=1))
    parts.append(Part(target.name, lambda refit: refit.receive(1), target=target, replica="rollout0", replica_size=1))
    results = job(store_url, 2, policy=Policy(only=("2.*",))).run(parts)
    assert not raised(results), results
    landed, wanted = target.contents(), tiny.expected(0, 1, weights)
    assert not mismatches(
        {n: t for n, t in landed.items() if n.startswith("layer2")},
        {n: t for n, t in wanted.items() if n.startswith("layer2")},
    )
