"""Ranks stand where Megatron-Core's own generator of rank groups puts them, in every order, or both refuse."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations

import pytest
from megatron.core.parallel_state import RankGenerator

from weft.errors import ConfigError
from weft_megatron.mesh import Mesh

SIZES = [
    {"tp": 2, "cp": 1, "dp": 4, "pp": 2, "ep": 2, "etp": 2},
    {"tp": 4, "cp": 1, "dp": 2, "pp": 2, "ep": 2, "etp": 1},
    {"tp": 1, "cp": 2, "dp": 4, "pp": 1, "ep": 4, "etp": 2},
    {"tp": 2, "cp": 2, "dp": 3, "pp": 2, "ep": 3, "etp": 2},
    {"tp": 2, "cp": 1, "dp": 2, "pp": 3, "ep": 1, "etp": 1},
]


def megatron_places(sizes: Mapping[str, int], order: str) -> list[dict[str, int]] | None:
    """Every rank's place on every axis, or None where `initialize_model_parallel` refuses the order."""
    world = sizes["tp"] * sizes["cp"] * sizes["dp"] * sizes["pp"]
    expert_dp = world // (sizes["etp"] * sizes["ep"] * sizes["pp"])
    rest = RankGenerator(sizes["tp"], 1, sizes["dp"], sizes["pp"], sizes["cp"], order)
    experts = RankGenerator(sizes["etp"], sizes["ep"], expert_dp, sizes["pp"], 1, order)
    if not order.endswith("pp") and sizes["pp"] > 1 and expert_dp != sizes["dp"]:
        return None
    if rest.get_ranks("pp") != experts.get_ranks("pp"):
        return None
    places: list[dict[str, int]] = [{} for _ in range(world)]
    axes = [(axis, rest, axis) for axis in ("tp", "cp", "dp", "pp")] + [("ep", experts, "ep"), ("etp", experts, "tp")]
    for axis, generator, token in axes:
        for group in generator.get_ranks(token):
            for place, rank in enumerate(group):
                places[rank][axis] = place
    return places


@pytest.mark.trap(2, 17)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_rank_order_is_megatrons(sizes: dict[str, int]) -> None:
    refused = 0
    for axes in permutations(("tp", "cp", "ep", "dp", "pp")):
        order = "-".join(axes)
        expected = megatron_places(sizes, order)
        if expected is None:
            refused += 1
            with pytest.raises(ConfigError, match="put pp last"):
                Mesh.from_sizes(sizes, order)
            continue
        mesh = Mesh.from_sizes(sizes, order)
        found = [mesh.coordinates(rank) for rank in range(mesh.world)]
        assert [{axis: getattr(place, axis) for axis in sizes} for place in found] == expected, order
    assert (refused > 0) is (sizes["pp"] > 1)
