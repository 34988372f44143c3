"""Layouts with which others have given wrong answers: each test shows the wrong one, and that a plan gives the right
one, an independent slice, in poisoned memory.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from weft import plan
from weft.errors import WeftError
from weft_megatron import MegatronAdapter, Spec

from .arrivals import EXPERT_SIZES, MODEL, check_arrival, members, shards
from .holdings import logical_state
from .reference import State

EXPERTS = MODEL | EXPERT_SIZES
NEXT = EXPERTS | {
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 2,
    "linear_value_head_dim": 3,
    "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 8,
}
HYBRID = MODEL | {
    "model_type": "nemotron_h",
    "hidden_size": 8,
    "layers_block_type": ["linear_attention", "full_attention", "mlp"],
    "num_hidden_layers": 3,
    "tie_word_embeddings": False,
    "mamba_num_heads": 8,
    "mamba_head_dim": 3,
    "n_groups": 4,
    "ssm_state_size": 5,
    "conv_kernel": 4,
}


def held(config: dict[str, Any], sizes: dict[str, int], spec: Spec = Spec.LOCAL) -> list[State]:
    """What the ranks of a mesh hold, by independent slices."""
    return shards(config, logical_state(config), {"tp": 1, "pp": 1, "dp": 1} | sizes, 1, spec)


def check(
    config: dict[str, Any],
    source: dict[str, int],
    target: dict[str, int],
    *,
    divisors: tuple[int, int] = (1, 1),
    spec: Spec = Spec.LOCAL,
) -> None:
    """That a plan gives every target rank what it should hold."""
    one = {"tp": 1, "pp": 1, "dp": 1}
    check_arrival(config, one | source, one | target, *divisors, (spec, spec))


def gathered(ranks: list[State], name: str, size: int) -> list[torch.Tensor]:
    """The wrong answer: all ranks' shards in a row, cut anew in equal parts."""
    return list(torch.cat([rank[name] for rank in ranks]).chunk(size))


def differs(wrong: list[torch.Tensor], ranks: list[State], name: str) -> bool:
    """Whether an answer is not what the ranks should hold."""
    return any(not torch.equal(one, rank[name]) for one, rank in zip(wrong, ranks, strict=True))


@pytest.mark.trap(4)
@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("spec", [Spec.LOCAL, Spec.GROUPED, Spec.LOCAL_LEGACY])
def test_gated_experts_under_a_change_of_expert_tensor_parallelism(spec: Spec, source: int, target: int) -> None:
    name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    one, other = (held(EXPERTS, {"dp": 4, "etp": etp})[:etp] for etp in (source, target))
    assert differs(gathered(one, name, target), other, name)
    check(EXPERTS, {"dp": 4, "etp": source}, {"dp": 4, "etp": target}, spec=spec)


@pytest.mark.trap(6)
def test_sequential_experts_under_a_change_of_expert_parallelism() -> None:
    """By the numbers that ranks give their own experts, the first expert of a rank would go to the same rank's."""
    one, other = (held(EXPERTS, {"dp": 4, "ep": ep}) for ep in (2, 4))
    first = [next(name for name in rank if "local_experts" in name) for rank in other]
    local = [next(name for name in rank if "local_experts" in name) for rank in one]
    assert first != local
    check(EXPERTS, {"dp": 4, "ep": 2}, {"dp": 4, "ep": 4})
    check(EXPERTS, {"dp": 4, "ep": 4}, {"dp": 4, "ep": 2})


@pytest.mark.trap(15)
@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 2), (4, 2)])
def test_projections_of_the_gated_delta_rule_under_a_change_of_tensor_parallelism(source: int, target: int) -> None:
    one, other = held(NEXT, {"tp": source}), held(NEXT, {"tp": target})
    for name in ("in_proj.weight", "conv1d.weight"):
        name = f"decoder.layers.0.self_attention.{name}"
        assert differs(gathered(one, name, target), other, name)
    check(NEXT, {"tp": source}, {"tp": target})


@pytest.mark.trap(15)
@pytest.mark.parametrize(("source", "target"), [(2, 1), (1, 2), (4, 2)])
def test_projections_of_mamba_under_a_change_of_tensor_parallelism(source: int, target: int) -> None:
    one, other = held(HYBRID, {"tp": source}), held(HYBRID, {"tp": target})
    for name in ("in_proj.weight", "conv1d.weight", "conv1d.bias"):
        name = f"decoder.layers.0.mixer.{name}"
        assert differs(gathered(one, name, target), other, name)
    check(HYBRID, {"tp": source}, {"tp": target})


@pytest.mark.trap(5, 15)
def test_gates_of_attention_are_not_taken_for_queries() -> None:
    """On disk a head's gate follows it; in Megatron the gates of a group follow its queries."""
    state, tensor = logical_state(NEXT), "model.layers.1.self_attn.q_proj.weight"
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    rows = NEXT["num_attention_heads"] // NEXT["num_key_value_heads"] * 2 * NEXT["head_dim"]
    assert not torch.equal(held(NEXT, {})[0][name][:rows], state[tensor][:rows])
    check(NEXT, {"tp": 4}, {"tp": 1})
    check(NEXT | {"num_key_value_heads": 2}, {"tp": 1}, {"tp": 4})


@pytest.mark.trap(8, 10)
def test_all_eight_data_parallel_ranks_of_an_undivided_model_send() -> None:
    adapter, config = MegatronAdapter(), MODEL | {"num_hidden_layers": 12}
    sources, targets = (adapter.layouts(config, sizes, "bfloat16") for sizes in ({"dp": 8}, {"tp": 2}))
    planned = plan(*members(sources, targets), {layout.address: layout for layout in (*sources, *targets)})
    sent = planned.statistics.egress_bytes
    assert len(sent) == 8
    assert min(sent.values()) > 0.95 * sum(sent.values()) / 8
    assert planned.statistics.egress_max_over_mean <= 1.05


@pytest.mark.trap(1, 3, 14)
@pytest.mark.parametrize("divisors", [(1, 8), (8, 1), (16, 3)])
def test_vocabularies_that_are_padded_differently(divisors: tuple[int, int]) -> None:
    """The last rank's real rows are fewer than the others', and its padding is nobody's."""
    config = EXPERTS | {"vocab_size": 21, "tie_word_embeddings": False}
    check(config, {"tp": 2}, {"tp": 4}, divisors=divisors)
    check(config, {"tp": 4}, {"tp": 1}, divisors=divisors)


@pytest.mark.trap(11)
@pytest.mark.parametrize(("source", "target"), [("float32", None), (None, "float32")])
def test_differences_of_dtype_are_reported(source: str | None, target: str | None) -> None:
    one, other = (MegatronAdapter(norm_dtype=dtype).layouts(EXPERTS, {}, "bfloat16") for dtype in (source, target))
    with pytest.raises(WeftError) as caught:
        plan(*members(one, other), {layout.address: layout for layout in (*one, *other)})
    for words in ("model.layers.1.input_layernorm.weight", "float32", "bfloat16"):
        assert words in str(caught.value)
