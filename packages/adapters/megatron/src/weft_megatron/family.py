"""What a Hugging Face config says about a decoder that Megatron-Core trains: sizes, biases, norms, ties, experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError, NotSupportedError

FAMILIES = ("llama", "qwen2", "qwen3", "qwen3_moe")
"""Values of `model_type` that are mapped."""
SPARSE_FAMILIES = ("qwen3_moe",)
"""Those whose layers may have experts."""


@dataclass(frozen=True, slots=True)
class Experts:
    """The mixture of experts in the sparse layers of a decoder."""

    count: int
    """Experts of one layer."""
    chosen: int
    """Experts that one token goes to."""
    intermediate: int
    """Width of one expert's gated MLP."""
    normalized: bool
    """Whether the chosen experts' weights add up to one (`norm_topk_prob`)."""
    layers: frozenset[int]
    """The layers that have experts instead of one MLP, from 0."""


@dataclass(frozen=True, slots=True)
class DecoderModel:
    """A decoder of grouped-query attention and gated MLPs or experts, in the words of its Hugging Face config."""

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
    """Width of the MLP of a layer without experts."""
    vocabulary: int
    """Rows of the embedding on disk, without Megatron's padding."""
    tied: bool
    """Whether the output projection is the embedding."""
    qkv_bias: bool
    linear_bias: bool
    """Whether o, gate, up and down projections and routers have biases (Megatron's `add_bias_linear`)."""
    qk_norm: bool
    experts: Experts | None = None

    @property
    def queries(self) -> int:
        """Query heads per group."""
        return self.heads // self.groups

    @property
    def group_rows(self) -> int:
        """Rows of Megatron's `linear_qkv` per group: its query heads, its key head, its value head."""
        return (self.queries + 2) * self.head

    @property
    def sparse_layers(self) -> frozenset[int]:
        """The layers that have experts."""
        return self.experts.layers if self.experts else frozenset()

    @property
    def has_dense_layers(self) -> bool:
        """Whether some layer has one MLP and no experts."""
        return len(self.sparse_layers) < self.layers

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DecoderModel:
        """Read a Hugging Face config given as a mapping (`config.json`, or `PretrainedConfig.to_dict()`).

        Defaults are those of transformers' configuration classes. Raises `NotSupportedError` for a family or a bias
        combination that weft does not map, and `ConfigError` with every missing or contradictory size.
        """
        family = str(config.get("model_type", ""))
        if family not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise NotSupportedError(f"weft-megatron does not map model_type {family!r}; it maps {known}")
        _check_sizes(config, family)
        heads = int(config["num_attention_heads"])
        groups = int(config.get("num_key_value_heads") or heads)
        head = int(config.get("head_dim") or (128 if family == "qwen3" else int(config["hidden_size"]) // heads))
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
            hidden=int(config["hidden_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            groups=groups,
            head=head,
            intermediate=int(config["intermediate_size"]),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or attention_bias,
            linear_bias=mlp_bias,
            qk_norm=family in ("qwen3", "qwen3_moe"),
            experts=_experts(config) if family in SPARSE_FAMILIES else None,
        )


def _check_sizes(config: Mapping[str, Any], family: str) -> None:
    required = ["hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"]
    found = {key: config.get(key) for key in required}
    if family in SPARSE_FAMILIES:
        found |= {key: config.get(key) for key in ("num_experts_per_tok", "moe_intermediate_size")}
        found["num_experts"] = _expert_count(config)
    missing = [f"{key} is {value!r}" for key, value in found.items() if not (isinstance(value, int) and value > 0)]
    if missing:
        raise ConfigError(f"config of {family}, expected positive integers: {', '.join(missing)}")


def _experts(config: Mapping[str, Any]) -> Experts | None:
    """The rule of `Qwen3MoeDecoderLayer` in transformers. None when no layer is left for experts."""
    if config.get("shared_expert_intermediate_size"):
        raise NotSupportedError(f"{config.get('model_type')} with shared experts is not mapped yet")
    step, without = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
    layers = [n for n in range(int(config["num_hidden_layers"])) if n not in without and (n + 1) % step == 0]
    if not layers:
        return None
    return Experts(
        count=int(_expert_count(config)),
        chosen=int(config["num_experts_per_tok"]),
        intermediate=int(config["moe_intermediate_size"]),
        normalized=bool(config.get("norm_topk_prob", False)),
        layers=frozenset(layers),
    )


def _expert_count(config: Mapping[str, Any]) -> Any:
    """Files say `num_experts`; transformers 5 has also called it `num_local_experts`."""
    return config.get("num_experts", config.get("num_local_experts"))
