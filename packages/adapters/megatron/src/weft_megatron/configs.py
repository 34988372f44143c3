"""Reading Hugging Face configs: one reader per family, each by the rules of its model in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from weft.errors import ConfigError, NotSupportedError
from weft_megatron.family import (
    ATTENTION,
    EXPERTS,
    MAMBA,
    MLP,
    DecoderModel,
    ExpertNames,
    Experts,
    GatedDelta,
    Hybrid,
    Indexer,
    LatentAttention,
)

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
    family = config["model_type"]
    biased = _biased(config)
    return _decoder(config, qkv_bias=family == "qwen2" or biased, linear_bias=biased, qk_norm=family == "qwen3")


def _qwen3_moe(config: Config) -> DecoderModel:
    """The rule of `Qwen3MoeDecoderLayer`; a dense model when no layer is left for experts."""
    _require(config, (*_SIZES, "num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    if config.get("shared_expert_intermediate_size"):
        raise NotSupportedError(f"{config['model_type']} with shared experts is not mapped")
    layers = _sparse_layers(config)
    biased, experts = _biased(config), None
    if layers:
        experts = _experts(config, layers, normalized=bool(config.get("norm_topk_prob", False)))
    return _decoder(config, qkv_bias=biased, linear_bias=biased, qk_norm=True, experts=experts)


def _qwen3_next(config: Config) -> DecoderModel:
    """`Qwen3NextAttention`, `Qwen3NextGatedDeltaNet` in most layers, `Qwen3NextSparseMoeBlock`."""
    delta = ("num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim")
    names = tuple(f"linear_{name}" for name in delta)
    _require(config, (*_SIZES, *names, "num_experts", "num_experts_per_tok", "moe_intermediate_size"))
    if _biased(config):
        raise NotSupportedError("qwen3_next with attention_bias: no checkpoint has it, and it is not mapped")
    interval, count = int(config.get("full_attention_interval") or 4), int(config["num_hidden_layers"])
    kinds = config.get("layer_types") or [
        "linear_attention" if (layer + 1) % interval else "full_attention" for layer in range(count)
    ]
    shared = int(config.get("shared_expert_intermediate_size") or 0)
    sparse = _sparse_layers(config)
    experts = _experts(
        config,
        sparse,
        normalized=bool(config.get("norm_topk_prob", True)),
        shared=shared,
        shared_gate=shared > 0,
        names=ExpertNames(shared="mlp.shared_expert"),
    )
    keys, values, key_head, value_head, kernel = (int(config[name]) for name in names)
    linear = frozenset(layer for layer, kind in enumerate(kinds) if kind == "linear_attention")
    return _decoder(
        config,
        qk_norm=True,
        experts=experts if sparse else None,
        output_gate=True,
        zero_centered=True,
        delta=GatedDelta(keys, values, key_head, value_head, kernel, linear),
    )


def _mixtral(config: Config) -> DecoderModel:
    """`MixtralSparseMoeBlock`, under the names of its checkpoint, which transformers 5 converts."""
    _require(config, (*_SIZES, "num_local_experts", "num_experts_per_tok"))
    names = ExpertNames("block_sparse_moe.gate", "block_sparse_moe.experts", "w1", "w3", "w2")
    layers = range(int(config["num_hidden_layers"]))
    experts = _experts(config, layers, "intermediate_size", normalized=True, names=names)
    return _decoder(config, experts=experts)


def _glm4_moe(config: Config) -> DecoderModel:
    """GLM-4.5: `Glm4MoeAttention` has biases for q, k and v alone; experts are DeepSeek's."""
    _require(config, (*_SIZES, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
    return _decoder(
        config,
        qkv_bias=bool(config.get("attention_bias")),
        qk_norm=bool(config.get("use_qk_norm")),
        experts=_sigmoid_experts(config),
        predictors=_predictors(config),
    )


def _gpt_oss(config: Config) -> DecoderModel:
    """`GptOssAttention` and `GptOssExperts`, in their bfloat16 form: biases everywhere, sinks, stacked experts."""
    _require(config, (*_SIZES, "num_local_experts", "num_experts_per_tok"))
    if not config.get("attention_bias", True):
        raise NotSupportedError("gpt_oss without attention_bias: Megatron's add_bias_linear is for experts too")
    experts = _experts(
        config,
        range(int(config["num_hidden_layers"])),
        "intermediate_size",
        normalized=True,
        names=ExpertNames(router="mlp.router", gate="gate_up_proj"),
        stacked=True,
    )
    head = int(config.get("head_dim") or 64)
    return _decoder(config, qkv_bias=True, linear_bias=True, experts=experts, sinks=True, head=head)


def _glm_moe_dsa(config: Config) -> DecoderModel:
    """GLM-5: DeepSeek's attention and experts, and `GlmMoeDsaIndexer` in every layer."""
    _require(config, ("q_lora_rank", "index_n_heads", "index_head_dim"))
    if "shared" in (config.get("indexer_types") or ()) or int(config.get("index_topk_freq") or 1) > 1:
        raise NotSupportedError("glm_moe_dsa with layers that share an indexer's choice: Megatron's all have their own")
    kinds = config.get("mlp_layer_types") or ()
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if any(kind != "sparse" for kind in kinds[dense:]):
        raise NotSupportedError("glm_moe_dsa with dense layers behind sparse ones in mlp_layer_types is not mapped")
    first = {"first_k_dense_replace": dense} if kinds else {}
    indexer = Indexer(int(config["index_n_heads"]), int(config["index_head_dim"]))
    return _deepseek({"first_k_dense_replace": 3} | dict(config) | first, indexer)


def _deepseek(config: Config, indexer: Indexer | None = None) -> DecoderModel:
    """DeepSeek-V3 and Kimi-K2: `DeepseekV3Attention`, `DeepseekV3MoE`, and the prediction layers of its checkpoint."""
    latent = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    _require(config, (*_SIZES, *latent, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size"))
    if config.get("attention_bias"):
        raise NotSupportedError(f"{config['model_type']} with attention_bias: Megatron's latent attention has none")
    rank, sizes = config.get("q_lora_rank"), [int(config[name]) for name in latent]
    return _decoder(
        config,
        experts=_sigmoid_experts(config),
        qk_norm=True,
        latent=LatentAttention(int(rank) if rank else None, sizes[0], sizes[1], sizes[2], sizes[3], indexer),
        predictors=_predictors(config),
    )


def _nemotron_h(config: Config) -> DecoderModel:
    """`NemotronHBlock`: one mixer per layer, in older files by the letters of Megatron's pattern."""
    names = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
    kinds = config.get("layers_block_type") or config.get("layer_types") or config.get("hybrid_override_pattern") or ""
    pattern = "".join(_BLOCKS.get(kind, "?") for kind in kinds)
    config = {"num_hidden_layers": len(pattern)} | dict(config)
    _require(config, (*_SIZES, "head_dim", *names))
    needed = {"use_conv_bias": True, "mlp_hidden_act": "relu2", "mamba_hidden_act": "silu"}
    without = ("use_bias", "attention_bias", "mlp_bias", "mamba_proj_bias", "tie_word_embeddings", "moe_latent_size")
    unmapped = [f"{name}={config[name]!r}" for name, value in needed.items() if config.get(name, value) != value]
    unmapped += [f"{name}={config[name]!r}" for name in without if config.get(name)]
    unmapped += [f"a layer of {kind}" for kind in dict.fromkeys(kinds) if kind not in _BLOCKS]
    if unmapped:
        raise NotSupportedError(f"nemotron_h with {', '.join(unmapped)} is not mapped")
    if len(pattern) != config["num_hidden_layers"]:
        count = config["num_hidden_layers"]
        raise ConfigError(f"config of nemotron_h: num_hidden_layers is {count}, and it has the kinds of {len(pattern)}")
    heads, head, groups, state, kernel = (int(config[name]) for name in names)
    sparse = [layer for layer, kind in enumerate(pattern) if kind == EXPERTS]
    experts = None
    if sparse:
        _require(config, ("moe_shared_expert_intermediate_size", "n_routed_experts", "moe_intermediate_size"))
        shared = int(config["moe_shared_expert_intermediate_size"])
        experts = _corrected_experts(config, sparse, shared)
    return _decoder(config, experts=experts, hybrid=Hybrid(pattern, heads, head, groups, state, kernel))


_BLOCKS = {
    **dict.fromkeys(("linear_attention", "mamba", MAMBA), MAMBA),
    **dict.fromkeys(("full_attention", "attention", ATTENTION), ATTENTION),
    **dict.fromkeys(("mlp", MLP), MLP),
    **dict.fromkeys(("moe", EXPERTS), EXPERTS),
}
"""What files of Nemotron-H call kinds of layers."""


def _sigmoid_experts(config: Config) -> Experts | None:
    """`DeepseekV3MoE`: dense layers first, then experts beside a shared one, chosen by corrected sigmoids."""
    first, step = int(config.get("first_k_dense_replace") or 0), int(config.get("moe_layer_freq") or 1)
    count = int(config["num_hidden_layers"]) + _predictors(config)
    layers = [layer for layer in range(first, count) if layer % step == 0]
    shared = int(config.get("n_shared_experts") or 0) * int(config["moe_intermediate_size"])
    return _corrected_experts(config, layers, shared) if layers else None


def _corrected_experts(config: Config, layers: Sequence[int], shared: int) -> Experts:
    """Chosen by sigmoids and a bias that balances, `shared` being the width of the one beside them."""
    groups = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    scale = float(config.get("routed_scaling_factor") or 1.0)
    return _experts(
        config,
        layers,
        normalized=bool(config.get("norm_topk_prob", True)),
        shared=shared,
        sigmoid=True,
        corrected=True,
        scale=None if scale == 1.0 else scale,
        groups=None if groups == (1, 1) else groups,
    )


def _experts(config: Config, layers: Iterable[int], width: str = "moe_intermediate_size", **rest: Any) -> Experts:
    return Experts(
        count=_expert_count(config),
        chosen=int(config["num_experts_per_tok"]),
        intermediate=int(config[width]),
        layers=frozenset(layers),
        **rest,
    )


def _decoder(config: Config, **rest: Any) -> DecoderModel:
    """What all families share; `rest` are the fields of `DecoderModel` that differ."""
    family, heads = str(config["model_type"]), int(config["num_attention_heads"])
    groups = int(config.get("num_key_value_heads") or heads)
    if heads % groups:
        raise ConfigError(f"config of {family}: {heads} query heads do not divide into {groups} key-value heads")
    head = 128 if family == "qwen3" else int(config["hidden_size"]) // heads
    fields: dict[str, Any] = {
        "head": int(config.get("head_dim") or head),
        "qkv_bias": False,
        "linear_bias": False,
        "qk_norm": False,
    }
    return DecoderModel(
        family=family,
        hidden=int(config["hidden_size"]),
        layers=int(config["num_hidden_layers"]),
        heads=heads,
        groups=groups,
        intermediate=int(config["intermediate_size"]),
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        **(fields | rest),
    )


def _sparse_layers(config: Config) -> list[int]:
    """Of Qwen's models."""
    step, without = int(config.get("decoder_sparse_step") or 1), config.get("mlp_only_layers") or ()
    return [n for n in range(int(config["num_hidden_layers"])) if n not in without and (n + 1) % step == 0]


def _biased(config: Config) -> bool:
    """Whether all linear layers have biases."""
    attention, mlp = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if attention != mlp:
        raise NotSupportedError(
            f"{config['model_type']} with attention_bias={attention} and mlp_bias={mlp}: Megatron's add_bias_linear "
            "gives both or neither, so only equal values are mapped"
        )
    return attention


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
    "qwen3_next": _qwen3_next,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "mixtral": _mixtral,
    "glm4_moe": _glm4_moe,
    "glm_moe_dsa": _glm_moe_dsa,
    "gpt_oss": _gpt_oss,
    "nemotron_h": _nemotron_h,
}
"""By `model_type`."""
