"""What each rank of a Megatron-Core model must hold, cut from a Hugging Face state dict by plain torch and nothing of
weft.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

State = Mapping[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Cut:
    """Which part of the model: tensor-parallel rank `rank` of `ranks`, in a pipeline stage that starts at
    `first_layer`.
    """

    config: Mapping[str, Any]
    """Hugging Face's, of a dense Llama, Qwen2 or Qwen3."""
    rank: int
    ranks: int
    first_layer: int
    padded_vocabulary: int
    padding: float
    """What rows beyond the vocabulary hold."""

    def parameter(self, name: str, state: State) -> torch.Tensor:
        """The values of the parameter that Megatron calls `name`. Raises `KeyError` for a name it does not know."""
        if not name.startswith("decoder.layers."):
            return self._outside(name, state)
        number, _, rest = name.removeprefix("decoder.layers.").partition(".")
        layer = f"model.layers.{self.first_layer + int(number)}"
        kind = rest.rpartition(".")[2]
        match rest:
            case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
                return self._grouped(f"{layer}.self_attn", kind, state)
            case "self_attention.linear_proj.weight":
                return self._part(state[f"{layer}.self_attn.o_proj.weight"], 1)
            case "mlp.linear_fc1.weight":
                return torch.cat([self._part(state[f"{layer}.mlp.{half}_proj.weight"], 0) for half in ("gate", "up")])
            case "mlp.linear_fc2.weight":
                return self._part(state[f"{layer}.mlp.down_proj.weight"], 1)
        whole = {
            "input_layernorm.weight": "input_layernorm.weight",
            "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
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

    def _part(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        size, remainder = divmod(tensor.shape[axis], self.ranks)
        if remainder:
            raise ValueError(f"an axis of {tensor.shape[axis]} does not divide among {self.ranks} ranks")
        return tensor.narrow(axis, self.rank * size, size)
