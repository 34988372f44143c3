"""Layers are dealt out to pipeline stages as Megatron's flags say."""

from __future__ import annotations

import pytest

from weft.errors import ConfigError
from weft_megatron import MegatronAdapter, adapter
from weft_megatron.stages import Pipeline

from .test_layouts import make_config, make_latent


def layers(pipeline: Pipeline, count: int) -> list[tuple[int, ...]]:
    return [share.layers for share in pipeline.deal(count)]


@pytest.mark.trap(3)
@pytest.mark.parametrize(
    ("pipeline", "count", "expected"),
    [
        (Pipeline(1), 3, [(0, 1, 2)]),
        (Pipeline(2), 4, [(0, 1), (2, 3)]),
        (Pipeline(2, chunks=2), 8, [(0, 1, 4, 5), (2, 3, 6, 7)]),
        (Pipeline(3), 8, [(0, 1, 2), (3, 4, 5), (6, 7)]),
        (Pipeline(3, first=1), 7, [(0,), (1, 2, 3), (4, 5, 6)]),
        (Pipeline(3, last=1), 7, [(0, 1, 2), (3, 4, 5), (6,)]),
        (Pipeline(3, first=1, last=2), 6, [(0,), (1, 2, 3), (4, 5)]),
        (Pipeline(2, first=1, last=3), 4, [(0,), (1, 2, 3)]),
        (Pipeline(2, chunks=2, first=2, last=4), 6, [(0, 3), (1, 2, 4, 5)]),
        (Pipeline(2, counts_embedding=True, counts_loss=True), 4, [(0, 1), (2, 3)]),
        (Pipeline(2, counts_embedding=True), 3, [(0,), (1, 2)]),
        (Pipeline(2, chunks=2, counts_embedding=True, counts_loss=True), 6, [(0, 3, 4), (1, 2, 5)]),
        (Pipeline(2, layout="E|tt,ttL"), 4, [(), (0, 1, 2, 3)]),
        (Pipeline(2, chunks=2, layout="Et|(t|)*2L"), 3, [(0, 2), (1,)]),
    ],
)
def test_layers_are_dealt_out_by_flags(pipeline: Pipeline, count: int, expected: list[tuple[int, ...]]) -> None:
    assert layers(pipeline, count) == expected


def test_61_layers_on_16_stages_leave_one_for_the_last() -> None:
    default = layers(Pipeline(16), 61)
    assert [len(mine) for mine in default] == [4] * 15 + [1]
    assert default == layers(Pipeline(16, last=1), 61)


def test_a_layout_places_prediction_layers() -> None:
    shares = Pipeline(16, chunks=2, layout="Et*3|(tt|)*29m|L").deal(61, predictors=1)
    assert [share.predictors for share in shares] == [stage == 14 for stage in range(16)]
    assert [share.last for share in shares] == [stage == 15 for stage in range(16)]
    assert shares[0].layers == (0, 1, 2, 33, 34)
    assert shares[14].layers == (29, 30)


@pytest.mark.trap(3)
@pytest.mark.parametrize(
    ("pipeline", "count", "words"),
    [
        (Pipeline(4), 5, ["5 layers do not divide into pp=4"]),
        (Pipeline(4), 6, ["6 layers do not divide into pp=4"]),
        (Pipeline(3, first=2), 5, ["first=2"]),
        (Pipeline(1, first=1, last=1), 2, ["pp=1", "first=1 and last=1"]),
        (Pipeline(2, chunks=2), 6, ["stage 0 has 3 layers", "vpp=2"]),
        (Pipeline(1, chunks=2), 4, ["vpp=2 needs more than one stage"]),
        (Pipeline(2, first=1, counts_loss=True), 3, ["do not go with"]),
        (Pipeline(4, counts_embedding=True), 4, ["4 layers do not divide"]),
        (Pipeline(2, layout="Et|tt|L"), 4, ["3 chunks, expected pp=2 x vpp=1", "1 E, 3 t, 1 L", "expected 1 E, 4 t"]),
        (Pipeline(2, layout="Ex|L", last=1), 0, ["1 x", "says all by itself"]),
    ],
)
def test_flags_that_do_not_fit_are_an_error_that_names_them(pipeline: Pipeline, count: int, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        pipeline.deal(count)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.trap(6)
def test_virtual_stages_and_uneven_ones_are_sizes_of_a_job() -> None:
    config = make_config(num_hidden_layers=6)
    groups = [layout.groups for layout in adapter.layouts(config, {"pp": 2, "vpp": 2, "first": 2}, "float32")]
    assert groups == [
        ("embedding", "layers.0", "layers.3"),
        ("layers.1", "layers.2", "layers.4", "layers.5", "output"),
    ]


@pytest.mark.trap(13)
def test_the_stage_of_prediction_layers_has_the_embedding_once_more() -> None:
    megatron = MegatronAdapter(pipeline_layout="Ett|mL")
    first, last = megatron.layouts(make_latent(), {"pp": 2, "mtp": 1}, "bfloat16")
    assert first.groups == ("embedding", "layers.0", "layers.1")
    assert last.groups == ("embedding", "layers.2", "output")
    held = {piece.tensor for piece in last}
    assert {"model.embed_tokens.weight", "model.layers.2.eh_proj.weight", "lm_head.weight"} < held
    assert [(tie.alias, tie.name) for tie in last.ties] == [
        ("model.layers.2.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.2.shared_head.head.weight", "lm_head.weight"),
    ]


@pytest.mark.trap(11, 13)
def test_the_bias_that_balances_experts_is_float32() -> None:
    (layout,) = adapter.layouts(make_latent(), {}, "bfloat16")
    dtypes = {tensor.name: tensor.dtype for tensor in layout.tensors}
    assert dtypes["model.layers.1.mlp.gate.e_score_correction_bias"] == "float32"
    assert {dtype for name, dtype in dtypes.items() if not name.endswith("_bias")} == {"bfloat16"}


@pytest.mark.trap(13)
def test_prediction_layers_are_there_when_megatron_is_told_and_the_config_has_them() -> None:
    told, untold = (adapter.layouts(make_latent(), sizes, "bfloat16")[0] for sizes in ({"mtp": 1}, {}))
    assert {tensor.name for tensor in told.tensors} > {tensor.name for tensor in untold.tensors}
    assert not any(tensor.name.startswith("model.layers.2.") for tensor in untold.tensors)
    assert untold.ties == ()
    with pytest.raises(ConfigError, match="mtp=2, the config has 1 prediction layers"):
        adapter.layouts(make_latent(), {"mtp": 2}, "bfloat16")
