"""What each rank of a Megatron-Core model must hold, cut from a Hugging Face state dict by plain torch and nothing of
weft.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state

from weft_cli.demo.megatron_on_cpu import expert_count

State = Mapping[str, torch.Tensor]
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.*)")


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of the model: tensor-parallel rank `rank` of `ranks`, in a pipeline stage that starts at
    `first_layer`; of its experts those from `first_expert`, of each part `expert_rank` of `expert_ranks`.
    """

    config: Mapping[str, Any]
    """Hugging Face's, of a Llama, Qwen2, Qwen3 or Qwen3-MoE."""
    rank: int
    ranks: int
    first_layer: int
    padded_vocabulary: int
    padding: float
    """What rows beyond the vocabulary hold."""
    first_expert: int = 0
    expert_rank: int = 0
    expert_ranks: int = 1

    @classmethod
    def here(cls, config: Mapping[str, Any], padded_vocabulary: int, padding: float) -> Cut:
        """This process's part, by the groups that Megatron has made. Layers and experts divide evenly."""
        stage = parallel_state.get_pipeline_model_parallel_rank()
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        experts = expert_count(config) // parallel_state.get_expert_model_parallel_world_size()
        return cls(
            config,
            parallel_state.get_tensor_model_parallel_rank(),
            parallel_state.get_tensor_model_parallel_world_size(),
            stage * config["num_hidden_layers"] // stages,
            padded_vocabulary,
            padding,
            parallel_state.get_expert_model_parallel_rank() * experts,
            parallel_state.get_expert_tensor_parallel_rank(),
            parallel_state.get_expert_tensor_parallel_world_size(),
        )

    def parameter(self, name: str, state: State) -> torch.Tensor:
        """The values of the parameter that Megatron calls `name`. Raises `KeyError` for a name it does not know."""
        if not name.startswith("decoder.layers."):
            return self._outside(name, state)
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer = f"model.layers.{self.first_layer + int(number)}"
        kind = rest.rpartition(".")[2]
        if expert := _EXPERT.fullmatch(rest):
            at = f"{layer}.mlp.experts.{self.first_expert + int(expert[1])}"
            return self._gated(at, expert[2], state, self.expert_rank, self.expert_ranks)
        match rest:
            case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
                return self._grouped(f"{layer}.self_attn", kind, state)
            case "self_attention.linear_proj.weight":
                return self._part(state[f"{layer}.self_attn.o_proj.weight"], 1)
            case "mlp.linear_fc1.weight" | "mlp.linear_fc2.weight":
                return self._gated(f"{layer}.mlp", rest.removeprefix("mlp."), state, self.rank, self.ranks)
        whole = {
            "input_layernorm.weight": "input_layernorm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
            "mlp.router.weight": "mlp.gate.weight",
            "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
            "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        }
        return state[f"{layer}.{whole[rest]}"]

    def _outside(self, name: str, state: State) -> torch.Tensor:
        output = "model.embed_tokens.weight" if self.config["tie_word_embeddings"] else "lm_head.weight"
        theirs = {
            "embedding.word_embeddings.weight": "model.embed_tokens.weight",
            "output_layer.weight": output,
            "decoder.final_layernorm.weight": "model.norm.weight",
        }[name]
        tensor = state[theirs]
        if theirs == "model.norm.weight":
            return tensor
        rows = self.padded_vocabulary - tensor.shape[0]
        return self._part(torch.cat([tensor, tensor.new_full((rows, tensor.shape[1]), self.padding)]), 0)

    def _grouped(self, attention: str, kind: str, state: State) -> torch.Tensor:
        """Rows of `linear_qkv`: per key-value head its query heads, then its key, then its value; cut evenly among the
        ranks, even through a group.
        """
        groups = self.config["num_key_value_heads"]
        parts = [state[f"{attention}.{part}_proj.{kind}"].unflatten(0, (groups, -1)) for part in "qkv"]
        return self._part(torch.cat(parts, dim=1).flatten(0, 1), 0)

    def _gated(self, mlp: str, name: str, state: State, rank: int, ranks: int) -> torch.Tensor:
        """A gated MLP: the same rows of gate and of up, or columns of down."""
        if name == "linear_fc2.weight":
            return _part(state[f"{mlp}.down_proj.weight"], 1, rank, ranks)
        return torch.cat([_part(state[f"{mlp}.{half}_proj.weight"], 0, rank, ranks) for half in ("gate", "up")])

    def _part(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        return _part(tensor, axis, self.rank, self.ranks)


def _part(tensor: torch.Tensor, axis: int, rank: int, ranks: int) -> torch.Tensor:
    size, remainder = divmod(tensor.shape[axis], ranks)
    if remainder:
        raise ValueError(f"an axis of {tensor.shape[axis]} does not divide among {ranks} ranks")
    return tensor.narrow(axis, rank * size, size)
