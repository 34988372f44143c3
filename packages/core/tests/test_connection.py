"""What a member is refused before it meets anybody, by name."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import weft
from weft.builder import LayoutBuilder
from weft.local import LocalHub
from weft.testing.members import MemorySource


class Elsewhere(MemorySource):
    """Its memory is on a device that the processor cannot read."""

    def memory(self) -> Mapping[str, torch.Tensor]:  # type: ignore[override]
        return {name: torch.empty_like(tensor, device="meta") for name, tensor in super().memory().items()}


def test_digests_of_memory_that_the_processor_cannot_read_are_refused(store_url: str) -> None:
    builder = LayoutBuilder()
    builder.tensor("w", (4,), "bfloat16")
    builder.buffer("w", "bfloat16", 4, group="g")
    builder.shard("w", "w")
    refit = weft.Refit(
        source=Elsewhere("trainer/0", builder.build()),
        transport="local",
        transport_options={"hub": LocalHub()},
        store=store_url,
        job="devices",
        name="trainer/0",
        expect=weft.Expect(1, 1),
    )
    with pytest.raises(weft.NotSupportedError, match=r"digests of memory on meta .* Policy\(digests=False\)"):
        refit.open()
