"""Experts in Megatron's legacy grouped layout are where its own checkpoint code finds them."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe.experts import GroupedMLP

from weft.testing.memory import box_of
from weft.views import piece_view
from weft_megatron import MegatronAdapter, Spec

HIDDEN, WIDE, COUNT, EP, ETP = 6, 8, 4, 2, 2
CONFIG: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "hidden_size": HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "intermediate_size": 8,
    "vocab_size": 8,
    "num_experts": COUNT,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDE,
}
WEIGHTS = {"linear_fc1.weight_w": "gate_proj", "linear_fc1.weight_v": "up_proj", "linear_fc2.weight": "down_proj"}


@dataclass
class Group:
    """A process group to those who only ask for a place in it."""

    place: int
    members: int

    def rank(self) -> int:
        return self.place

    def size(self) -> int:
        return self.members


def grouped_mlp(weights: dict[str, torch.Tensor], ep: Group, etp: Group) -> GroupedMLP:
    """Without its constructor, which asks for the package grouped_gemm."""
    experts = GroupedMLP.__new__(GroupedMLP)
    torch.nn.Module.__init__(experts)
    experts.config = SimpleNamespace(hidden_size=HIDDEN, gated_linear_unit=True)
    experts.num_local_experts = COUNT // EP
    experts.ep_group, experts.tp_group, experts.dp_group = ep, etp, Group(0, 1)
    for name, weight in weights.items():
        setattr(experts, name, torch.nn.Parameter(weight))
    return experts


def saved_shards(experts: GroupedMLP) -> dict[str, Any]:
    """Megatron's own description of every expert's part, by the name that the checkpoint has."""
    state = experts.sharded_state_dict(prefix="", metadata={"singleton_local_shards": True})
    found = {}
    for name in ("weight1", "weight2"):
        data = state[name].build()["data"]
        for shard in [*data["w"], *data["v"]] if isinstance(data, dict) else data:
            number, kind = shard.key.removeprefix("experts.").split(".", 1)
            found[f"model.layers.0.mlp.experts.{number}.{WEIGHTS[kind]}.weight"] = shard
    return found


@pytest.mark.trap(4, 6)
@pytest.mark.parametrize("rank", range(EP * ETP))
def test_legacy_grouped_experts_are_where_megatrons_checkpoint_code_finds_them(rank: int) -> None:
    adapter = MegatronAdapter(spec=Spec.LOCAL_LEGACY)
    layout = adapter.layouts(CONFIG, {"dp": EP * ETP, "ep": EP, "etp": ETP}, "float32")[rank]
    memory = {
        buffer.name: torch.arange(buffer.numel, dtype=torch.float32)
        for buffer in layout.buffers
        if ".experts.weight" in buffer.name
    }
    shapes = {"weight1": (HIDDEN, -1), "weight2": (-1, HIDDEN)}
    weights = {name: memory[f"decoder.layers.0.mlp.experts.{name}"].view(shape) for name, shape in shapes.items()}
    shards = saved_shards(grouped_mlp(weights, Group(rank // ETP, EP), Group(rank % ETP, ETP)))
    pieces = [piece for piece in layout if piece.buffer in memory]
    assert sorted(piece.tensor for piece in pieces) == sorted(shards)
    for piece in pieces:
        shard = shards[piece.tensor]
        assert piece.box.lo == shard.global_offset
        assert piece.box.factors == shard.global_shape
        assert torch.equal(piece_view(piece, memory), shard.data)
        whole = torch.full(shard.global_shape, float("nan"))
        box_of(whole, piece.box).copy_(shard.data)
        assert int(whole.isnan().sum()) == whole.numel() - shard.data.numel()
