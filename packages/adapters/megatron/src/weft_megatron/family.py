"""What a Hugging Face config says about a dense decoder that Megatron-Core trains: sizes, biases, norms, ties."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError, NotSupportedError

DENSE_FAMILIES = ("llama", "qwen2", "qwen3")
"""Values of `model_type` that are mapped."""


@dataclass(frozen=True, slots=True)
class DenseModel:
    """A decoder of grouped-query attention and gated MLPs, in the words of its Hugging Face config."""

    family: str
    """`model_type` of the config."""
    hidden: int
    layers: int
    heads: int
    """Query heads."""
    groups: int
    """Key-value heads; each is a group with `heads / groups` query heads."""
    head: int
    """Elements of one head."""
    intermediate: int
    vocabulary: int
    """Rows of the embedding on disk, without Megatron's padding."""
    tied: bool
    """Whether the output projection is the embedding."""
    qkv_bias: bool
    linear_bias: bool
    """Whether o, gate, up and down projections have biases (Megatron's `add_bias_linear`)."""
    qk_norm: bool

    @property
    def queries(self) -> int:
        """Query heads per group."""
        return self.heads // self.groups

    @property
    def group_rows(self) -> int:
        """Rows of Megatron's `linear_qkv` per group: its query heads, its key head, its value head."""
        return (self.queries + 2) * self.head

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DenseModel:
        """Read a Hugging Face config given as a mapping (`config.json`, or `PretrainedConfig.to_dict()`).

        Defaults are those of transformers' configuration classes. Raises `NotSupportedError` for a family or a bias
        combination that weft does not map, and `ConfigError` with every missing or contradictory size.
        """
        family = str(config.get("model_type", ""))
        if family not in DENSE_FAMILIES:
            known = ", ".join(DENSE_FAMILIES)
            raise NotSupportedError(f"weft-megatron does not map model_type {family!r}; it maps {known}")
        required = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
        missing = [f"{key} is {config.get(key)!r}" for key in required if not _is_size(config.get(key))]
        if missing:
            raise ConfigError(f"config of {family}, expected positive integers: {', '.join(missing)}")
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or (128 if family == "qwen3" else hidden // heads))
        if heads % groups:
            raise ConfigError(f"config of {family}: {heads} query heads do not divide into {groups} key-value heads")
        attention_bias, mlp_bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
        if attention_bias != mlp_bias:
            raise NotSupportedError(
                f"{family} with attention_bias={attention_bias} and mlp_bias={mlp_bias}: Megatron's add_bias_linear "
                "gives both or neither, so only equal values are mapped"
            )
        return cls(
            family=family,
            hidden=hidden,
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            groups=groups,
            head=head,
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            linear_bias=mlp_bias,
            qk_norm=family == "qwen3",
        )


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value > 0
