"""What members of a tested job do, version after version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from weft.refit import Refit
from weft.report import Report
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import mismatches


def trains(source: MemorySource, weights: Sequence[Mapping[str, torch.Tensor]]) -> Any:
    """A source that offers each of these weights as the next version, and changes its memory in between."""

    def act(refit: Refit) -> list[Report]:
        reports = []
        for version, tensors in enumerate(weights, 1):
            source.load(tensors)
            offer = refit.offer(version)
            offer.released()
            source.load({name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
            reports.append(offer.committed())
        return reports

    return act


def serves(target: MemoryTarget, expected: Sequence[Mapping[str, torch.Tensor]]) -> Any:
    """A target that must hold exactly these buffers after each version, and nothing of before."""

    def act(refit: Refit) -> list[Report]:
        reports = []
        for version, wanted in enumerate(expected, 1):
            target.poison()
            reports.append(refit.receive(version))
            assert not mismatches(target.contents(), wanted)
            assert target.version == version
        return reports

    return act
