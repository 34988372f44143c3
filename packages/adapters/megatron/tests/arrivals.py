"""Plans from one Megatron mesh to another, executed in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from weft import Layout, Member, execute, plan
from weft_megatron import MegatronAdapter, Spec
from weft_megatron.mesh import padded_vocabulary

from .holdings import holdings, logical_state
from .reference import State, places

EXPERTS = 4
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
EXPERT_SIZES: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": 8,
    "head_dim": 4,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "intermediate_size": 16,
    "vocab_size": 20,
}


def shards(
    config: dict[str, Any], state: State, sizes: dict[str, int], divisor: int, spec: Spec = Spec.LOCAL
) -> list[State]:
    """What every rank holds, in Megatron's default rank order."""
    padded = padded_vocabulary(config["vocab_size"], divisor, sizes["tp"])
    return [holdings(config, state, place, padded, spec) for place in places(sizes)]


def flat(ranks: Sequence[State]) -> list[State]:
    return [{name: tensor.reshape(-1).clone() for name, tensor in rank.items()} for rank in ranks]


def check_arrival(
    config: dict[str, Any],
    source_sizes: dict[str, int],
    target_sizes: dict[str, int],
    divisor: int,
    other: int,
    specs: tuple[Spec, Spec] = (Spec.LOCAL, Spec.LOCAL),
) -> None:
    """Assert that weights planned from one mesh to another arrive in poisoned memory.

    `divisor` and `other` are those of the two vocabularies, `specs` their layer specifications.
    """
    state = logical_state(config)
    source, target = specs
    held = MegatronAdapter(make_vocab_size_divisible_by=divisor, spec=source).layouts(config, source_sizes, "float32")
    wanted = MegatronAdapter(make_vocab_size_divisible_by=other, spec=target).layouts(config, target_sizes, "float32")
    sources, targets = members(held, wanted)
    layouts = {layout.address: layout for layout in (*held, *wanted)}
    planned = plan(sources, targets, layouts)
    source_memory = flat(shards(config, state, source_sizes, divisor, source))
    expected = flat(shards(config, state, target_sizes, other, target))
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


def members(held: Sequence[Layout], wanted: Sequence[Layout]) -> tuple[list[Member], list[Member]]:
    """Sources and targets, one for each layout."""
    return (
        [member(f"trainer/{rank}", layout, None) for rank, layout in enumerate(held)],
        [member(f"rollout/{rank}", None, layout) for rank, layout in enumerate(wanted)],
    )


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
