"""Weights planned from one Megatron mesh to another arrive byte for byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft import Layout, Member, execute, plan
from weft_megatron import MegatronAdapter
from weft_megatron.mesh import padded_vocabulary

from .reference import State, logical_state, megatron_shard

SIZES = st.fixed_dictionaries({"tp": st.sampled_from([1, 2, 4]), "pp": st.integers(1, 2), "dp": st.integers(1, 2)})
HEAD = 2
MODEL: dict[str, Any] = {
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "vocab_size": 2000,
    "tie_word_embeddings": True,
}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """A model that fits every one of `SIZES`."""
    return {
        "model_type": draw(st.sampled_from(["llama", "qwen2", "qwen3"])),
        "hidden_size": draw(st.integers(1, 5)),
        "num_hidden_layers": 2,
        "num_attention_heads": 4 * draw(st.integers(1, 2)),
        "num_key_value_heads": draw(st.sampled_from([1, 2, 4])),
        "head_dim": HEAD,
        "intermediate_size": 4 * draw(st.integers(1, 3)),
        "vocab_size": draw(st.integers(1, 30)),
        "tie_word_embeddings": draw(st.booleans()),
    }


def member(name: str, source: Layout | None, target: Layout | None) -> Member:
    return Member(
        name=name,
        source_layout=source.address if source else None,
        target_layout=target.address if target else None,
        replica="rollout" if target else None,
        replica_size=0,
        host="here",
        domain="here",
        device="cpu",
    )


def shards(config: dict[str, Any], state: State, sizes: dict[str, int], divisor: int) -> list[State]:
    """What every rank holds, in Megatron's default rank order."""
    padded = padded_vocabulary(config["vocab_size"], divisor, sizes["tp"])
    return [
        megatron_shard(config, state, tp, sizes["tp"], pp, sizes["pp"], padded)
        for pp in range(sizes["pp"])
        for _ in range(sizes["dp"])
        for tp in range(sizes["tp"])
    ]


def flat(ranks: Sequence[State]) -> list[State]:
    return [{name: tensor.reshape(-1).clone() for name, tensor in rank.items()} for rank in ranks]


@pytest.mark.trap(4, 5, 8, 13, 14)
@settings(max_examples=40, deadline=None)
@given(configs(), SIZES, SIZES, st.sampled_from([1, 3, 8]), st.sampled_from([1, 3, 8]))
def test_any_mesh_feeds_any_other(
    config: dict[str, Any], source_sizes: dict[str, int], target_sizes: dict[str, int], divisor: int, other: int
) -> None:
    state = logical_state(config)
    held = MegatronAdapter(make_vocab_size_divisible_by=divisor).layouts(config, source_sizes, "float32")
    wanted = MegatronAdapter(make_vocab_size_divisible_by=other).layouts(config, target_sizes, "float32")
    sources = [member(f"trainer/{rank}", layout, None) for rank, layout in enumerate(held)]
    targets = [member(f"rollout/{rank}", None, layout) for rank, layout in enumerate(wanted)]
    layouts = {layout.address: layout for layout in (*held, *wanted)}
    planned = plan(sources, targets, layouts)
    source_memory = flat(shards(config, state, source_sizes, divisor))
    expected = flat(shards(config, state, target_sizes, other))
    memory = [{name: torch.full_like(part, float("nan")) for name, part in rank.items()} for rank in expected]
    execute(
        planned,
        layouts,
        {m.name: rank for m, rank in zip(sources, source_memory, strict=True)},
        {m.name: rank for m, rank in zip(targets, memory, strict=True)},
    )
    for found, rank in zip(memory, expected, strict=True):
        for name, part in rank.items():
            assert torch.equal(found[name].view(torch.int32), part.view(torch.int32)), name


@pytest.mark.trap(5, 20)
def test_a_change_of_tensor_parallel_size_needs_few_copies() -> None:
    adapter = MegatronAdapter()
    held, wanted = (adapter.layouts(MODEL, {"tp": tp}, "bfloat16") for tp in (2, 4))
    planned = plan(
        [member(f"trainer/{rank}", layout, None) for rank, layout in enumerate(held)],
        [member(f"rollout/{rank}", None, layout) for rank, layout in enumerate(wanted)],
        {layout.address: layout for layout in (*held, *wanted)},
    )
    # A target rank lies inside one source rank, so a piece is one copy; vocabulary shards may straddle.
    assert len(planned.copies) <= sum(len(layout.pieces) for layout in wanted) + 4


@pytest.mark.trap(8, 10)
def test_data_parallel_replicas_share_the_sending() -> None:
    adapter = MegatronAdapter()
    held, wanted = adapter.layouts(MODEL, {"tp": 2, "dp": 2}, "bfloat16"), adapter.layouts(MODEL, {"tp": 2}, "bfloat16")
    planned = plan(
        [member(f"trainer/{rank}", layout, None) for rank, layout in enumerate(held)],
        [member(f"rollout/{rank}", None, layout) for rank, layout in enumerate(wanted)],
        {layout.address: layout for layout in (*held, *wanted)},
    )
    statistics = planned.statistics
    assert statistics.egress_max_over_mean < 1.1
    padding = sum(fill.sizes[0] * fill.sizes[1] * 2 for layout in wanted for fill in layout.fills)
    assert statistics.bytes == sum(layout.nbytes for layout in wanted) - padding
