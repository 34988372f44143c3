"""Ranks stand where Megatron's rank order puts them."""

from __future__ import annotations

from itertools import permutations

import pytest

from weft.errors import ConfigError
from weft_megatron import MegatronAdapter, adapter
from weft_megatron.mesh import Mesh, padded_vocabulary

SIZES = {"tp": 2, "cp": 3, "dp": 2, "pp": 2}


@pytest.mark.trap(2)
def test_the_default_order_counts_tp_first_and_pp_last() -> None:
    mesh = Mesh.from_sizes(SIZES)
    places = [(c.pp, c.dp, c.cp, c.tp) for c in (mesh.coordinates(rank) for rank in range(mesh.world))]
    assert places == [(pp, dp, cp, tp) for pp in range(2) for dp in range(2) for cp in range(3) for tp in range(2)]


@pytest.mark.trap(2)
@pytest.mark.parametrize("order", ["-".join(order) for order in permutations(("tp", "cp", "dp", "pp"))])
def test_any_order_numbers_every_place_once_and_its_first_axis_fastest(order: str) -> None:
    # Megatron refuses context parallelism with another axis than pp last, since experts know none.
    sizes = SIZES if order.endswith("pp") else SIZES | {"cp": 1}
    mesh = Mesh.from_sizes(sizes, order)
    places = [mesh.coordinates(rank) for rank in range(mesh.world)]
    assert len(set(places)) == mesh.world
    fastest = order.split("-")[0]
    assert [getattr(place, fastest) for place in places[: sizes[fastest]]] == list(range(sizes[fastest]))
    slowest = order.split("-")[-1]
    assert [getattr(place, slowest) for place in places] == sorted(getattr(place, slowest) for place in places)


@pytest.mark.trap(17)
def test_sizes_that_do_not_factor_are_an_error_that_names_them() -> None:
    with pytest.raises(ConfigError, match=r"6 ranks .* do not divide into etp 2 x ep 2 x pp 1 = 4"):
        adapter.world_size({"tp": 2, "dp": 3, "ep": 2})


@pytest.mark.trap(2)
def test_experts_are_counted_in_the_same_order_without_context_parallelism() -> None:
    mesh = Mesh.from_sizes({"tp": 2, "cp": 2, "dp": 2, "ep": 2, "etp": 1})
    places = [(place.tp, place.ep, place.etp) for place in (mesh.coordinates(rank) for rank in range(mesh.world))]
    assert places == [(rank % 2, rank % 2, 0) for rank in range(8)]


@pytest.mark.trap(17)
@pytest.mark.parametrize(
    ("sizes", "order"),
    [({"tp": 2, "dp": 2, "pp": 2, "cp": 2}, "tp-pp-cp-dp"), ({"tp": 2, "dp": 2, "pp": 2, "etp": 1}, "tp-pp-dp-ep")],
)
def test_an_order_in_which_experts_have_other_stages_is_refused(sizes: dict[str, int], order: str) -> None:
    with pytest.raises(ConfigError, match="put pp last"):
        Mesh.from_sizes(sizes, order)


def test_expert_axes_divide_the_world_and_do_not_multiply_it() -> None:
    assert adapter.world_size({"tp": 4, "pp": 2, "dp": 2, "cp": 2, "ep": 4, "etp": 2}) == 32


def test_every_wrong_size_is_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter.world_size({"tp": 0, "pp": -1, "sp": 2})
    for word in ("tp=0", "pp=-1", "unknown axis 'sp'"):
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("order", "fault"),
    [
        ("tp-dp", "axis pp is missing"),
        ("tp-pp-dp", "axis ep is missing"),
        ("tp-tp-pp-dp", "axis tp comes twice"),
        ("xp-tp-pp-dp", "'xp'"),
    ],
)
def test_a_wrong_order_is_an_error(order: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        MegatronAdapter(order=order).world_size({"tp": 2, "pp": 2, "dp": 2, "ep": 2})


def test_data_parallel_ranks_of_a_job_are_one_replica() -> None:
    assert adapter.replicas({"tp": 2, "dp": 4}) == 1


@pytest.mark.trap(14)
@pytest.mark.parametrize(
    ("vocabulary", "divisor", "tp", "padded"),
    [(128, 128, 1, 128), (129, 128, 1, 256), (129, 128, 2, 256), (50257, 128, 8, 51200)],
)
def test_the_vocabulary_is_padded_as_megatron_pads_it(vocabulary: int, divisor: int, tp: int, padded: int) -> None:
    assert padded_vocabulary(vocabulary, divisor, tp) == padded


@pytest.mark.trap(17)
@pytest.mark.parametrize(
    ("order", "sizes"), [("cp-ep-dp-pp", {"dp": 2, "etp": 2}), ("tp-ep-pp", {"tp": 4, "ep": 2, "etp": 1})]
)
def test_an_axis_that_only_experts_have_must_be_in_the_order(order: str, sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="is missing from order"):
        Mesh.from_sizes(sizes, order)
