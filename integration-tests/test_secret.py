"""Refits of a job with a secret over real transports: everything that members say is recognized as theirs."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

import weft
from weft.policy import Policy
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

VERSIONS = 4
STAGED = Policy(direct_run_bytes=1 << 40, bucket_bytes=4096, staging_bytes=65_536)
"""Many buckets, and credits for each of them."""


@pytest.mark.parametrize("transport", ["gloo", "nixl", {"name": "nccl", "backend": "gloo"}], ids=str)
def test_every_version_arrives_and_nothing_is_taken_for_forged(
    transport: Any, caplog: pytest.LogCaptureFixture
) -> None:
    tiny = Tiny()
    weights = [tiny.tensors(seed) for seed in range(VERSIONS)]
    errors: list[Exception] = []
    options = {"host": "127.0.0.1"} if transport != "nixl" else {}
    tagged = {**({"name": transport} if isinstance(transport, str) else transport), **options}
    with weft.serve_store() as server:

        def member(name: str, act: Any, **ends: Any) -> None:
            given = {
                "store": server.url, "job": "guarded", "name": name, "transport": tagged, "policy": STAGED,
                "expect": weft.Expect(1, 1), "secret": "correct horse battery staple",
            }  # fmt: skip
            config = weft.load_config(given, environment={})
            try:
                with weft.Refit(**{**config.arguments(), **ends}) as refit:
                    act(refit)
            except Exception as error:  # noqa: BLE001  # the test asks for it
                errors.append(error)

        def trains(refit: weft.Refit) -> None:
            for version, tensors in enumerate(weights, 1):
                source.load(tensors)
                offer = refit.offer(version)
                offer.released()
                source.load({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
                offer.committed()

        def serves(target: MemoryTarget, rank: int) -> Any:
            def act(refit: weft.Refit) -> None:
                for version, tensors in enumerate(weights, 1):
                    target.poison()
                    refit.receive(version)
                    assert not mismatches(target.contents(), tiny.expected(rank, 2, tensors))

            return act

        source = MemorySource("trainer/0", tiny.source(0, 1))
        threads = [threading.Thread(target=member, args=("trainer/0", trains), kwargs={"source": source})]
        for rank in range(2):
            target = MemoryTarget(f"r/{rank}", tiny.target(rank, 2))
            ends = {"target": target, "replica": "r", "replica_size": 2}
            threads.append(threading.Thread(target=member, args=(f"r/{rank}", serves(target, rank)), kwargs=ends))
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert not errors, errors
    assert "is not from it" not in caplog.text
