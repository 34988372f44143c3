"""Weights planned from one Megatron mesh to another arrive byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import plan
from weft.errors import WeftError
from weft_megatron import MegatronAdapter, Spec

from .arrivals import EXPERT_SIZES, EXPERTS, MODEL, check_arrival, members
from .holdings import logical_state

DENSE = ("llama", "qwen2", "qwen3")
HEAD = 2


@st.composite
def sizes_of(draw: st.DrawFn) -> dict[str, int]:
    """Of a mesh, with expert axes; `etp` 1 where there would be more parts than rows."""
    sizes = {"tp": draw(st.sampled_from([1, 2, 4])), "pp": draw(st.integers(1, 2)), "dp": draw(st.integers(1, 2))}
    ranks = sizes["tp"] * sizes["dp"]
    etp = draw(st.sampled_from([n for n in (1, 2, 4) if ranks % n == 0]))
    return sizes | {"etp": etp, "ep": draw(st.sampled_from([n for n in (1, 2, 4) if ranks // etp % n == 0]))}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A model that fits every one of `sizes_of`."""
    family = draw(st.sampled_from([*DENSE, "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"]))
    return {
        "model_type": family,
        "hidden_size": draw(st.integers(1, 5)),
        "num_hidden_layers": 2,
        "num_attention_heads": 4 * draw(st.integers(1, 2)),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": HEAD,
        "intermediate_size": 4 * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 30)),
        "tie_word_embeddings": draw(st.booleans()),
        "num_experts": EXPERTS,
        "num_local_experts": EXPERTS,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "attention_bias": family == "gpt_oss",
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 4 * draw(st.integers(1, 2)),
        "mlp_only_layers": draw(st.lists(st.integers(0, 1), max_size=1)),
    }


@st.composite
def latent_configs(draw: st.DrawFn) -> dict[str, Any]:
    """The same with latent attention, sparse or not, and prediction layers."""
    return draw(configs()) | {
        "model_type": draw(st.sampled_from(["deepseek_v3", "glm_moe_dsa"])),
        "hidden_size": 4 * draw(st.integers(1, 2)),
        "q_lora_rank": 8,
        "kv_lora_rank": 6,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": draw(st.integers(1, 3)),
        "index_n_heads": 3,
        "index_head_dim": 5,
        "num_nextn_predict_layers": 1,
        "attention_bias": False,
    }


@st.composite
def delta_configs(draw: st.DrawFn) -> dict[str, Any]:
    """The same with linear attention, whose key heads tensor parallelism divides, and gates."""
    return draw(configs()) | {
        "model_type": "qwen3_next",
        "layer_types": draw(st.permutations(["linear_attention", "full_attention"])),
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 4 * draw(st.integers(1, 2)),
        "linear_key_head_dim": draw(st.integers(1, 3)),
        "linear_value_head_dim": draw(st.integers(1, 3)),
        "linear_conv_kernel_dim": draw(st.integers(1, 3)),
        "shared_expert_intermediate_size": draw(st.sampled_from([0, 4, 8])),
        "attention_bias": False,
    }


@st.composite
def hybrid_configs(draw: st.DrawFn) -> dict[str, Any]:
    """The same with layers of one kind each."""
    return draw(configs()) | {
        "model_type": "nemotron_h",
        "layers_block_type": draw(st.permutations(["linear_attention", "full_attention", "moe", "mlp"])),
        "moe_shared_expert_intermediate_size": 4,
        "num_hidden_layers": 4,
        "mamba_num_heads": 4 * draw(st.integers(1, 2)),
        "mamba_head_dim": draw(st.integers(1, 3)),
        "n_groups": 4,
        "ssm_state_size": draw(st.integers(1, 3)),
        "conv_kernel": draw(st.integers(1, 3)),
        "attention_bias": False,
        "tie_word_embeddings": False,
    }


def meshed(config: dict[str, Any], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes without expert axes for a model that has no experts."""
    if config["model_type"] in DENSE:
        return {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    more = {"mtp": config["num_nextn_predict_layers"]} if "num_nextn_predict_layers" in config else {}
    # Experts with biases are not divided.
    return sizes | more | ({"etp": 1} if config["model_type"] == "gpt_oss" else {})


@pytest.mark.trap(4, 5, 6, 8, 13, 14, 15)
@settings(max_examples=100, deadline=None)
@given(
    configs() | latent_configs() | delta_configs() | hybrid_configs(),
    sizes_of(),
    sizes_of(),
    st.sampled_from([1, 3, 8]),
    st.sampled_from([1, 3, 8]),
)
def test_any_mesh_feeds_any_other(
    config: dict[str, Any], source_sizes: dict[str, int], target_sizes: dict[str, int], divisor: int, other: int
) -> None:
    check_arrival(config, meshed(config, source_sizes), meshed(config, target_sizes), divisor, other)


@pytest.mark.trap(4, 6)
@settings(max_examples=40, deadline=None)
@given(st.sampled_from(Spec), st.sampled_from(Spec), sizes_of(), sizes_of())
def test_any_specification_feeds_any_other_under_a_change_of_expert_parallelism(
    source: Spec, target: Spec, source_sizes: dict[str, int], target_sizes: dict[str, int]
) -> None:
    config = MODEL | EXPERT_SIZES | {"num_attention_heads": 4, "num_key_value_heads": 2}
    check_arrival(config, source_sizes, target_sizes, 1, 1, (source, target))


@pytest.mark.trap(4)
@pytest.mark.parametrize("spec", [Spec.LOCAL, Spec.GROUPED, Spec.LEGACY])
@pytest.mark.parametrize(("source", "target"), [(1, 4), (4, 1), (2, 4)])
def test_row_parallel_weights_of_experts_follow_a_change_of_expert_tensor_parallelism(
    spec: Spec, source: int, target: int
) -> None:
    config, sizes = MODEL | EXPERT_SIZES, {"tp": 1, "pp": 1, "dp": 4, "ep": 1}
    check_arrival(config, sizes | {"etp": source}, sizes | {"etp": target}, 1, 1, (spec, spec))


@pytest.mark.trap(7)
@pytest.mark.parametrize(("source", "target"), [({"dp": 4, "ep": 2}, {"dp": 4, "ep": 4}), ({"dp": 2, "ep": 2}, {})])
def test_every_expert_gets_its_own_small_tensors(source: dict[str, int], target: dict[str, int]) -> None:
    config = MODEL | EXPERT_SIZES | {"attention_bias": True, "mlp_bias": True}
    biases = [name for name in logical_state(config) if ".experts." in name and name.endswith("down_proj.bias")]
    assert len(biases) == EXPERTS * config["num_hidden_layers"]
    check_arrival(config, {"tp": 1, "pp": 1, "dp": 1} | source, {"tp": 1, "pp": 1, "dp": 1} | target, 1, 1)


@pytest.mark.trap(6, 12)
def test_ranks_that_disagree_about_their_experts_are_an_error() -> None:
    adapter, config = MegatronAdapter(), MODEL | EXPERT_SIZES
    first, second = adapter.layouts(config, {"dp": 2, "ep": 2}, "float32")
    for held in ([first, first], [second, second]):
        sources, targets = members(held, [first, second])
        with pytest.raises(WeftError) as caught:
            plan(sources, targets, {layout.address: layout for layout in (first, second)})
        missing = 2 if held[0] is first else 0
        assert f"model.layers.0.mlp.experts.{missing}.gate_proj.weight" in str(caught.value)


def test_a_mixture_of_18867_tensors_plans_to_full_coverage() -> None:
    config = MODEL | EXPERT_SIZES | {"num_hidden_layers": 48, "num_experts": 128, "tie_word_embeddings": False}
    adapter = MegatronAdapter()
    held = adapter.layouts(config, {"tp": 2, "pp": 2, "dp": 4, "ep": 4, "etp": 1}, "bfloat16")
    wanted = adapter.layouts(config, {"dp": 4, "ep": 4}, "bfloat16")
    assert len({tensor.name for layout in wanted for tensor in layout.tensors}) == 18_867
    planned = plan(*members(held, wanted), {layout.address: layout for layout in (*held, *wanted)})
    padding = sum(fill.sizes[0] * fill.sizes[1] * 2 for layout in wanted for fill in layout.fills)
    assert planned.statistics.bytes == sum(layout.nbytes for layout in wanted) - padding


@pytest.mark.trap(5, 20)
def test_a_change_of_tensor_parallel_size_needs_few_copies() -> None:
    adapter = MegatronAdapter()
    held, wanted = (adapter.layouts(MODEL, {"tp": tp}, "bfloat16") for tp in (2, 4))
    planned = plan(*members(held, wanted), {layout.address: layout for layout in (*held, *wanted)})
    # A target rank lies inside one source rank, so a piece is one copy; vocabulary shards may straddle.
    assert len(planned.copies) <= sum(len(layout.pieces) for layout in wanted) + 4


@pytest.mark.trap(8, 10)
def test_data_parallel_replicas_share_the_sending() -> None:
    adapter = MegatronAdapter()
    held, wanted = adapter.layouts(MODEL, {"tp": 2, "dp": 2}, "bfloat16"), adapter.layouts(MODEL, {"tp": 2}, "bfloat16")
    planned = plan(*members(held, wanted), {layout.address: layout for layout in (*held, *wanted)})
    statistics = planned.statistics
    assert statistics.egress_max_over_mean < 1.1
    padding = sum(fill.sizes[0] * fill.sizes[1] * 2 for layout in wanted for fill in layout.fills)
    assert statistics.bytes == sum(layout.nbytes for layout in wanted) - padding


@pytest.mark.trap(8, 10)
def test_context_parallel_ranks_are_more_holders_of_the_same() -> None:
    adapter = MegatronAdapter()
    held = adapter.layouts(MODEL, {"tp": 2, "cp": 2, "dp": 2}, "bfloat16")
    wanted = adapter.layouts(MODEL, {"tp": 2}, "bfloat16")
    assert [layout.address for layout in held] == [layout.address for layout in wanted] * 4
    planned = plan(*members(held, wanted), {layout.address: layout for layout in held})
    assert len(planned.statistics.egress_bytes) == 8
    assert all(planned.statistics.egress_bytes.values())


@pytest.mark.trap(5, 20, 72)
def test_stacked_experts_with_alternating_columns_are_two_boxes_each() -> None:
    config = {
        "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
        "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128,
        "num_experts_per_tok": 4, "vocab_size": 201088, "attention_bias": True,
    }  # fmt: skip
    layouts = MegatronAdapter().layouts(config, {"tp": 1, "dp": 8, "ep": 8, "etp": 1}, "bfloat16")
    pieces = [piece for piece in layouts[3] if piece.tensor.endswith("gate_up_proj")]
    assert len(pieces) == 36 * 16 * 2
    assert {piece.box.factors for piece in pieces} == {(128, 2880, 2880, 2)}
    assert {piece.box.lo[0] for piece in pieces} == set(range(48, 64))
    assert sum(len(layout.pieces) for layout in layouts) < 50_000
