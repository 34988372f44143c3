"""What a member is refused before it meets anybody, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch

import weft
from weft.builder import LayoutBuilder
from weft.connection import register
from weft.deadline import Deadline
from weft.errors import ConfigError
from weft.local import LocalHub
from weft.member import Region, regions_of
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


def test_every_region_that_a_transport_refuses_is_named_after_what_is_in_it() -> None:
    shared = torch.zeros(64)
    tensors = {"norm": torch.zeros(4), "empty": torch.zeros(0), "qkv": shared[:32], "up": shared[32:]}
    asked: list[str] = []

    def refuse(region: Region, deadline: Deadline) -> None:
        asked.append(region.name)
        if region.nbytes > 16:
            raise ConfigError(f"region {region.name!r} is refused")

    regions = regions_of([*tensors.items(), ("bias", torch.zeros(8))])
    with pytest.raises(ConfigError) as caught:
        register(SimpleNamespace(register=refuse), regions, Deadline.after(5))
    assert asked == ["norm", "qkv and 1 more", "bias"]
    assert str(caught.value) == "region 'qkv and 1 more' is refused; region 'bias' is refused"
    assert regions[1].memory.data_ptr() == shared.data_ptr()
    assert regions[1].nbytes == 256
