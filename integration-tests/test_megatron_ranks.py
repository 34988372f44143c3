"""Ranks stand where Megatron-Core's own generator of rank groups puts them, and hold the layers that it gives them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import permutations, product
from types import SimpleNamespace

import pytest
from megatron.core import parallel_state
from megatron.core.parallel_state import RankGenerator
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from weft.errors import ConfigError
from weft_megatron.mesh import Mesh
from weft_megatron.stages import Pipeline

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


def megatron_layers(pipeline: Pipeline, layers: int) -> list[tuple[int, ...]]:
    """Every stage's layers. Raises `AssertionError` or divides by zero where Megatron refuses the flags."""
    config = SimpleNamespace(
        num_layers=layers,
        pipeline_model_parallel_size=pipeline.stages,
        virtual_pipeline_model_parallel_size=pipeline.chunks if pipeline.chunks > 1 else None,
        num_layers_in_first_pipeline_stage=pipeline.first,
        num_layers_in_last_pipeline_stage=pipeline.last,
        account_for_embedding_in_pipeline_split=pipeline.counts_embedding,
        account_for_loss_in_pipeline_split=pipeline.counts_loss,
        pipeline_model_parallel_layout=None,
    )
    found = []
    for stage in range(pipeline.stages):
        mine: list[int] = []
        for chunk in range(pipeline.chunks) if pipeline.chunks > 1 else [None]:
            start = get_transformer_layer_offset(config, vp_stage=chunk, pp_rank=stage)
            mine += range(start, start + get_num_layers_to_build(config, vp_stage=chunk, pp_rank=stage))
        found.append(tuple(mine))
    return found


@pytest.mark.trap(3)
def test_stages_have_the_layers_that_megatron_gives_them() -> None:
    agreed = 0
    for stages, chunks, layers in product((2, 3, 4), (1, 2), range(2, 17)):
        flags = [Pipeline(stages, chunks, first, last) for first in (None, 2, 4) for last in (None, 2, 4)]
        ends = product((False, True), repeat=2)
        flags += [Pipeline(stages, chunks, counts_embedding=one, counts_loss=other) for one, other in ends]
        for pipeline in flags:
            try:
                expected = megatron_layers(pipeline, layers)
            except (AssertionError, ZeroDivisionError):
                continue
            if sorted(sum(expected, ())) == list(range(layers)):
                assert [share.layers for share in pipeline.deal(layers)] == expected, (pipeline, layers)
                agreed += 1
    assert agreed > 200


@pytest.mark.trap(3, 13)
@pytest.mark.parametrize(
    ("text", "stages", "layers"),
    [("Et*3|(tt|)*29m|L", 16, 61), ("Ettt|tt,mL", 2, 5), ("E|t|(tt|)*2,tmL", 5, 6), ("E|t|t|tL", 2, 3)],
)
def test_a_layout_is_read_as_megatron_reads_it(
    text: str, stages: int, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = PipelineParallelLayerLayout(text, stages)
    chunked = len(upstream.layout[0]) if len(upstream.layout[0]) > 1 else None
    monkeypatch.setattr(parallel_state, "_VIRTUAL_PIPELINE_MODEL_PARALLEL_WORLD_SIZE", chunked)
    predictors = upstream.flatten_layout.count(LayerType.mtp)
    upstream.validate_layer_layout(layers, predictors or None)
    shares = Pipeline(stages, len(upstream.layout[0]), layout=text).deal(layers, predictors)
    for stage, share in enumerate(shares):
        chunks = upstream.layout[stage]
        held = [
            layer
            for chunk in range(len(chunks))
            for layer in upstream.get_layer_id_list(LayerType.decoder, vp_stage=chunk, pp_rank=stage)
        ]
        assert list(share.layers) == held
        kinds = {kind for chunk in chunks for kind in chunk}
        assert (share.first, share.last) == (LayerType.embedding in kinds, LayerType.loss in kinds)
        assert share.predictors is (LayerType.mtp in kinds)
