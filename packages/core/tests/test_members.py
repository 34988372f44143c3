"""The members that ship with `weft.testing` keep the contract themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count

import pytest
import torch

from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.sources import SourceSuite, Trainer
from weft.testing.targets import Engine, TargetSuite
from weft.testing.tiny import Tiny

TINY = Tiny()


class TestMemorySource(SourceSuite):
    @pytest.fixture
    def make(self) -> Callable[[], Trainer]:
        def trainer() -> Trainer:
            source, seeds, held = MemorySource("s", TINY.source(0, 1)), count(), {}

            def step() -> None:
                for lease in source.leases:
                    lease.release()
                held.update(TINY.tensors(next(seeds)))
                source.load(held)

            step()
            return Trainer(source, lambda: held, step)

        return trainer


class TestMemoryTarget(TargetSuite):
    @pytest.fixture(params=[0, 1, 2])
    def make(self, request: pytest.FixtureRequest) -> Callable[[], Engine]:
        def engine() -> Engine:
            target = MemoryTarget("t", TINY.target(0, 1, scratch_slots=request.param))
            return Engine(target, lambda: tensors(target.contents()), dict)

        return engine


def tensors(contents: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole tensors in an unsharded target's buffers, by slicing."""
    found = {}
    for layer in range(TINY.layers):
        fused = contents[f"layer{layer}.gate_up"].view(-1, TINY.hidden)
        found[f"{layer}.gate"], found[f"{layer}.up"] = fused[: TINY.inner], fused[TINY.inner : 2 * TINY.inner]
        found[f"{layer}.down"] = contents[f"layer{layer}.down"].view(TINY.hidden, TINY.inner)
        found[f"{layer}.norm"] = contents[f"layer{layer}.norm"]
    return found
