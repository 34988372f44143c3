"""Reading Hugging Face configs: one reader per family, each by the rules of its model in transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from weft.errors import ConfigError, NotSupportedError
from weft_megatron.family import DecoderModel, Experts, LatentAttention

Config = Mapping[str, Any]
_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


def read_config(config: Config) -> DecoderModel:
    """Read a Hugging Face config given as a mapping (`config.json`, or `PretrainedConfig.to_dict()`).

    Defaults are those of transformers' configuration classes, but layers that predict further tokens must be named
    (`num_nextn_predict_layers`). Raises `NotSupportedError` for a family or a bias combination that weft does not map,
    and `ConfigError` with every missing or contradictory size.
    """
    family = str(config.get("model_type", ""))
    if family not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise NotSupportedError(f"weft-megatron does not map model_type {family!r}; it maps {known}")
    return FAMILIES[family](config)


def _dense(config: Config) -> DecoderModel:
    _require(config, _SIZES)
    return _decoder(config)


def _qwen3_moe(config: Config) -> DecoderModel:
    """The rule of `Qwen3MoeDecoderLayer`; a dense model when no layer is left for experts."""
    _require(config, (*_SIZES, "num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    if config.get("shared_expert_intermediate_size"):
        raise NotSupportedError(f"{config['model_type']} with shared experts is not mapped")
    step, without = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
    layers = [n for n in range(int(config["num_hidden_layers"])) if n not in without and (n + 1) % step == 0]
    normalized = bool(config.get("norm_topk_prob", False))
    return _decoder(config, experts=_experts(config, normalized, layers) if layers else None)


def _deepseek(config: Config) -> DecoderModel:
    """DeepSeek-V3 and Kimi-K2: `DeepseekV3Attention`, `DeepseekV3MoE`, and the prediction layers of its checkpoint."""
    latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    _require(config, (*_SIZES, *latent, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
    if config.get("attention_bias"):
        raise NotSupportedError(f"{config['model_type']} with attention_bias: Megatron's latent attention has none")
    rank = config.get("q_lora_rank")
    return _decoder(
        config,
        experts=_sigmoid_experts(config),
        qk_norm=True,
        latent=LatentAttention(int(rank) if rank else None, *(int(config[name]) for name in latent)),
        predictors=_predictors(config),
    )


def _sigmoid_experts(config: Config) -> Experts | None:
    """`DeepseekV3MoE`: dense layers first, then experts beside a shared one, chosen by corrected sigmoids."""
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("moe_layer_freq") or 1)
    count = int(config["num_hidden_layers"]) + _predictors(config)
    layers = [layer for layer in range(first, count) if layer % step == 0]
    groups = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    scale = float(config.get("routed_scaling_factor") or 1.0)
    if not layers:
        return None
    return _experts(
        config,
        bool(config.get("norm_topk_prob", True)),
        layers,
        shared=int(config.get("n_shared_experts") or 0) * int(config["moe_intermediate_size"]),
        sigmoid=True,
        corrected=True,
        scale=None if scale == 1.0 else scale,
        groups=None if groups == (1, 1) else groups,
    )


def _experts(config: Config, normalized: bool, layers: list[int], **rest: Any) -> Experts:
    return Experts(
        count=_expert_count(config),
        chosen=int(config["num_experts_per_tok"]),
        intermediate=int(config["moe_intermediate_size"]),
        normalized=normalized,
        layers=frozenset(layers),
        **rest,
    )


def _decoder(config: Config, **rest: Any) -> DecoderModel:
    """What all families share; `rest` are fields of `DecoderModel` that differ."""
    family, heads = str(config["model_type"]), int(config["num_attention_heads"])
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
    fields = {
        "qkv_bias": family == "qwen2" or attention_bias,
        "linear_bias": mlp_bias,
        "qk_norm": family in ("qwen3", "qwen3_moe"),
    }
    return DecoderModel(
        family=family,
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        groups=groups,
        head=head,
        intermediate=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        **(fields | rest),
    )


def _require(config: Config, names: tuple[str, ...]) -> None:
    found = {name: _expert_count(config) if name in _COUNTS else config.get(name) for name in names}
    missing = [f"{name} is {value!r}" for name, value in found.items() if not (isinstance(value, int) and value > 0)]
    if missing:
        family = config["model_type"]
        raise ConfigError(f"config of {family}, expected positive integers: {', '.join(missing)}")


_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
"""Names of the number of experts: files of one family say one, and transformers 5 has also written the last."""


def _expert_count(config: Config) -> Any:
    return next((config[name] for name in _COUNTS if config.get(name) is not None), None)


def _predictors(config: Config) -> int:
    """Files say `num_nextn_predict_layers`; transformers 5 has also called it `num_mtp_layers`."""
    return int(config.get("num_nextn_predict_layers", config.get("num_mtp_layers")) or 0)


FAMILIES: Mapping[str, Callable[[Config], DecoderModel]] = {
    "llama": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
    "qwen3_moe": _qwen3_moe,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
}
"""By `model_type`."""
