"""Whole refits over the nccl transport, with torch's gloo in NCCL's place: two trainers, two ranks of an engine."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import weft
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

SIZE, VERSIONS = 2, 3


@pytest.mark.trap(28, 41)
@pytest.mark.parametrize("policy", [weft.Policy(), weft.Policy(direct_run_bytes=1 << 40, staging_bytes=65_536)])
def test_every_version_arrives_whole_in_poisoned_memory(policy: weft.Policy) -> None:
    tiny, results = Tiny(), dict[str, list[Any]]()
    weights = [tiny.tensors(seed) for seed in range(VERSIONS)]

    def train(refit: weft.Refit, source: MemorySource, _: int) -> None:
        for version, tensors in enumerate(weights, 1):
            source.load(tensors)
            offer = refit.offer(version)
            offer.released()
            source.load({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
            offer.committed()

    def serve(refit: weft.Refit, target: MemoryTarget, rank: int) -> None:
        for version, tensors in enumerate(weights, 1):
            target.poison()
            refit.receive(version)
            results[target.name].append(mismatches(target.contents(), tiny.expected(rank, SIZE, tensors)))

    def take_part(act: Any, member: Any, rank: int, url: str, **side: Any) -> None:
        results[member.name] = []
        with weft.Refit(
            transport="nccl",
            transport_options={"backend": "gloo", "batch_bytes": 4096, "staging_bytes": 1024, "peers_at_once": 1},
            store=url,
            job="refit",
            name=member.name,
            expect=weft.Expect(sources=SIZE, replicas=1),
            policy=policy,
            **side,
        ) as refit:
            act(refit, member, rank)

    with weft.serve_store() as server:
        threads = []
        for rank in range(SIZE):
            source = MemorySource(f"trainer/{rank}", tiny.source(rank, SIZE))
            target = MemoryTarget(f"rollout/{rank}", tiny.target(rank, SIZE))
            of_replica = {"target": target, "replica": "rollout", "replica_size": SIZE}
            threads += [
                threading.Thread(target=take_part, args=(train, source, rank, server.url), kwargs={"source": source}),
                threading.Thread(target=take_part, args=(serve, target, rank, server.url), kwargs=of_replica),
            ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert {name: found for name, found in results.items() if name.startswith("rollout")} == {
        f"rollout/{rank}": [[]] * VERSIONS for rank in range(SIZE)
    }
