"""What every parameter of a vLLM rank must hold, cut from a Hugging Face state by hand and without weft."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

FLOAT32 = ("mlp.gate.e_score_correction_bias", "linear_attn.A_log")
"""Kept in float32 whatever the engine's dtype."""
ENGINE_NAMES = {"gpt_oss": {"embed_tokens": "embedding", "self_attn": "attn"}}
"""Parts of module paths that vLLM calls otherwise than the checkpoint."""


@dataclass(frozen=True)
class Position:
    """A rank of an engine."""

    rank: int = 0
    ranks: int = 1
    expert_parallel: bool = False
    stage: int = 0
    stages: int = 1
    engine: int = 0
    engines: int = 1
    """Data-parallel ones that share experts: all ranks of all of them cut these."""

    def among_experts(self) -> Position:
        """The rank among those that share experts."""
        return Position(self.engine * self.ranks + self.rank, self.engines * self.ranks)

    def holds(self, name: str, layers: int) -> bool:
        """Whether this stage has a parameter, of stages that divide the layers."""
        if ".layers." in name:
            return int(name.split(".")[2]) * self.stages // layers == self.stage
        return self.stage == (0 if "embed_tokens" in name else self.stages - 1)


def expected_parameters(
    state: dict[str, torch.Tensor], config: dict[str, Any], at: Position, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Every parameter of the rank as loaded, and what its attention makes of them after that."""
    head = "model.embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    out = {
        "model.embed_tokens.weight": _vocabulary(state["model.embed_tokens.weight"], at),
        "lm_head.weight": _vocabulary(state[head], at),
        "model.norm.weight": state["model.norm.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        of = {
            name.removeprefix(f"{prefix}."): tensor for name, tensor in state.items() if name.startswith(f"{prefix}.")
        }
        if "linear_attn.A_log" in of:
            attention = _gated_delta(of, config, at)
        elif "self_attn.kv_b_proj.weight" in of:
            attention = _latent(of, config, at)
        else:
            attention = _grouped_query(of, config, at)
        parameters = {**attention, **_feed_forward(of, at)}
        parameters |= {name: tensor for name, tensor in of.items() if "norm" in name}
        out |= {f"{prefix}.{name}": tensor for name, tensor in parameters.items()}
    names = ENGINE_NAMES.get(config["model_type"], {})
    return {
        ".".join(names.get(part, part) for part in name.split(".")): tensor.to(
            torch.float32 if name.endswith(FLOAT32) else dtype
        ).contiguous()
        for name, tensor in out.items()
        if at.holds(name, config["num_hidden_layers"])
    }


def _vocabulary(tensor: torch.Tensor, at: Position) -> torch.Tensor:
    padded = -(-tensor.shape[0] // 64) * 64
    whole = torch.zeros(padded, tensor.shape[1], dtype=tensor.dtype)
    whole[: tensor.shape[0]] = tensor
    return whole.chunk(at.ranks)[at.rank]


def _mine(tensor: torch.Tensor, at: Position, axis: int = 0) -> torch.Tensor:
    return tensor.chunk(at.ranks, axis)[at.rank]


def _grouped_query(of: dict[str, torch.Tensor], config: dict[str, Any], at: Position) -> dict[str, torch.Tensor]:
    kv_heads, size = config["num_key_value_heads"], config["head_dim"]
    first, count = at.rank * kv_heads // at.ranks * size, max(1, kv_heads // at.ranks) * size
    out = {"self_attn.o_proj.weight": _mine(of["self_attn.o_proj.weight"], at, 1)}
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" in of:
            q, k, v = (of[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
            out[f"self_attn.qkv_proj.{kind}"] = torch.cat([_mine(q, at), *(t[first : first + count] for t in (k, v))])
    if "self_attn.o_proj.bias" in of:
        out["self_attn.o_proj.bias"] = of["self_attn.o_proj.bias"]
    if "self_attn.sinks" in of:
        out["self_attn.sinks"] = _mine(of["self_attn.sinks"], at)
    return out


def _gated_delta(of: dict[str, torch.Tensor], config: dict[str, Any], at: Position) -> dict[str, torch.Tensor]:
    """Rows of both projections stand together by key head; those of the convolution are all of q, then k, then v."""
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    q, k, v = of["linear_attn.conv1d.weight"].tensor_split([keys, 2 * keys])
    cut = ("dt_bias", "A_log", "in_proj_qkvz.weight", "in_proj_ba.weight")
    return {
        "linear_attn.conv1d.weight": torch.cat([_mine(part, at) for part in (q, k, v)]),
        "linear_attn.out_proj.weight": _mine(of["linear_attn.out_proj.weight"], at, 1),
        **{f"linear_attn.{name}": _mine(of[f"linear_attn.{name}"], at) for name in cut},
    }


def _latent(of: dict[str, torch.Tensor], config: dict[str, Any], at: Position) -> dict[str, torch.Tensor]:
    narrow = torch.cat([of["self_attn.q_a_proj.weight"], of["self_attn.kv_a_proj_with_mqa.weight"]])
    wide = _mine(of["self_attn.kv_b_proj.weight"], at)
    keys = config["qk_nope_head_dim"]
    heads = wide.view(-1, keys + config["v_head_dim"], config["kv_lora_rank"])
    return {
        "self_attn.fused_qkv_a_proj.weight": narrow,
        "self_attn.q_b_proj.weight": _mine(of["self_attn.q_b_proj.weight"], at),
        "self_attn.kv_b_proj.weight": wide,
        "self_attn.o_proj.weight": _mine(of["self_attn.o_proj.weight"], at, 1),
        "self_attn.mla_attn.mla_attn.W_UK_T": heads[:, :keys],
        "self_attn.mla_attn.mla_attn.W_UV": heads[:, keys:].transpose(1, 2),
    }


def _feed_forward(of: dict[str, torch.Tensor], at: Position) -> dict[str, torch.Tensor]:
    if "mlp.router.weight" in of:
        return _alternating(of, at)
    if "mlp.gate.weight" not in of:
        gate_up, down = _gated(of, "mlp", at)
        return {"mlp.gate_up_proj.weight": gate_up, "mlp.down_proj.weight": down}
    out = {name: tensor for name, tensor in of.items() if name.startswith("mlp.gate.")}
    out |= {name: tensor for name, tensor in of.items() if name == "mlp.shared_expert_gate.weight"}
    for shared in ("mlp.shared_experts", "mlp.shared_expert"):
        if f"{shared}.gate_proj.weight" in of:
            gate_up, down = _gated(of, shared, at)
            out |= {f"{shared}.gate_up_proj.weight": gate_up, f"{shared}.down_proj.weight": down}
    experts, cut = range(len(of["mlp.gate.weight"])), at.among_experts()
    if at.expert_parallel:
        here = len(experts) // cut.ranks
        experts, cut = experts[cut.rank * here : (cut.rank + 1) * here], Position()
    halves = [_gated(of, f"mlp.experts.{expert}", cut) for expert in experts]
    for number, name in enumerate(("w13_weight", "w2_weight")):
        out[f"mlp.experts.routed_experts.{name}"] = torch.stack([half[number] for half in halves])
    return out


def _gated(of: dict[str, torch.Tensor], name: str, at: Position) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate over up, and down."""
    gate, up, down = (of[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return torch.cat([_mine(gate, at), _mine(up, at)]), _mine(down, at, 1)


def _alternating(of: dict[str, torch.Tensor], at: Position) -> dict[str, torch.Tensor]:
    """Experts as gpt-oss has them, all in one tensor."""
    bias = of["mlp.experts.down_proj_bias"]
    return {
        "mlp.router.weight": of["mlp.router.weight"],
        "mlp.router.bias": of["mlp.router.bias"],
        "mlp.experts.routed_experts.w13_weight": _mine(of["mlp.experts.gate_up_proj"], at, 2).transpose(1, 2),
        "mlp.experts.routed_experts.w13_bias": _mine(of["mlp.experts.gate_up_proj_bias"], at, 1),
        "mlp.experts.routed_experts.w2_weight": _mine(of["mlp.experts.down_proj"], at, 1).transpose(1, 2),
        "mlp.experts.routed_experts.w2_bias": bias if at.rank == 0 else torch.zeros_like(bias),
    }
