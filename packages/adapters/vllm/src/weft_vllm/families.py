"""What a Hugging Face config says of a model, as far as the layouts of vLLM ranks depend on it.

Sources: `vllm/model_executor/models/{llama,qwen2,qwen2_5_vl,qwen3,qwen3_moe,mixtral,glm4_moe,gpt_oss,deepseek_v2}.py`,
for what each family's modules are and what they read from the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from weft.errors import ConfigError, NotSupportedError
from weft_vllm.fields import Fields
from weft_vllm.vision import Vision, read_vision


@dataclass(frozen=True, slots=True)
class GroupedQuery:
    """Attention with key and value heads of its own."""

    heads: int
    kv_heads: int
    head: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm: bool = False
    sinks: bool = False
    """Whether every head has a learned attention sink."""
    repeats: bool = True
    """Whether ranks beyond the number of KV heads repeat them."""


@dataclass(frozen=True, slots=True)
class Latent:
    """Multi-latent attention: queries, and keys with values, go through narrow projections that every rank has."""

    heads: int
    query_rank: int | None
    """None when queries are projected at once."""
    value_rank: int
    """Width of what keys and values are made from (`kv_lora_rank`)."""
    plain_head: int
    """Part of a query and key head without positions (`qk_nope_head_dim`)."""
    rotary_head: int
    value_head: int


@dataclass(frozen=True, slots=True)
class Experts:
    """The layers of a mixture."""

    count: int
    width: int
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    alternating: bool = False
    """Whether the checkpoint has the experts of a layer in one tensor, with alternating gate and up columns, and biases
    for them and the router."""
    router: str = "gate"
    router_dtype: str | None = None
    """When it is not the engine's."""
    corrected: bool = False
    """Whether the router has a float32 `e_score_correction_bias`."""
    shared_width: int = 0
    """Of the experts that every token goes through, together; 0 when there are none."""
    shared_whole: bool = False
    """Whether shared experts are whole on every rank where tokens are spread over tensor-parallel ranks."""


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder."""

    family: str
    hidden: int
    layers: int
    vocabulary: int
    tied: bool
    attention: GroupedQuery | Latent
    mlp: str
    """Name of a layer's feed-forward module."""
    inner: int
    """Width of layers without experts."""
    mlp_bias: bool
    experts: Experts | None
    dense_layers: frozenset[int]
    """Layers without experts."""
    ends_everywhere: bool = False
    """Whether every pipeline stage has the embedding, the last norm and the output layer."""
    engine_names: Mapping[str, str] = field(default_factory=dict)
    """Parts of module paths that are called otherwise in the engine than in the checkpoint."""
    engine_prefix: str = ""
    """What the engine puts before the checkpoint's module paths of the decoder."""
    vision: Vision | None = None


def read_model(config: Mapping[str, Any]) -> Model:
    """The model that a config describes. Raises `NotSupportedError` for a family that is not mapped and `ConfigError`
    with everything that the config lacks.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise NotSupportedError(
            f"weft-vllm maps {', '.join(_FAMILIES)} without an engine, not {family!r}; start one and record it"
        )
    fields = Fields(config)
    model = _FAMILIES[family](family, fields)
    if fields.missing:
        raise ConfigError(f"config of {family} lacks {', '.join(fields.missing)}")
    return model


def _decoder(
    family: str, fields: Fields, attention: GroupedQuery | Latent, experts: Experts | None = None,
    dense: Callable[[int], bool] = lambda _: True, **more: Any,
) -> Model:  # fmt: skip
    """What all families have in common; `dense` says whether a layer has no experts."""
    layers = fields.size("num_hidden_layers")
    options = {"mlp": "mlp", "mlp_bias": False, **more}
    return Model(
        family=family,
        hidden=fields.size("hidden_size"),
        layers=layers,
        vocabulary=fields.size("vocab_size"),
        tied=fields.flag("tie_word_embeddings"),
        attention=attention,
        inner=fields.size("intermediate_size"),
        experts=experts,
        dense_layers=frozenset(layer for layer in range(layers) if not experts or dense(layer)),
        **options,
    )


def _grouped_query(fields: Fields, head: int | None = None, **more: bool) -> GroupedQuery:
    heads = fields.size("num_attention_heads")
    return GroupedQuery(
        heads=heads,
        kv_heads=fields.get("num_key_value_heads", heads),
        head=fields.get("head_dim") or head or fields.size("hidden_size") // heads,
        **more,
    )


def _llama(family: str, fields: Fields) -> Model:
    bias = fields.flag("attention_bias", "bias")
    attention = _grouped_query(fields, qkv_bias=bias, out_bias=bias)
    return _decoder(family, fields, attention, mlp_bias=fields.flag("mlp_bias"))


def _qwen2(family: str, fields: Fields) -> Model:
    return _decoder(family, fields, _grouped_query(fields, qkv_bias=True))


def _qwen2_5_vl(family: str, fields: Fields) -> Model:
    """The text model's sizes are in a part of their own, or in older configs beside those of the tower."""
    text = fields.merged("text_config")
    vision = read_vision(fields.part("vision_config"))
    return _decoder(family, text, _grouped_query(text, qkv_bias=True), engine_prefix="language_model.", vision=vision)


def _qwen3(family: str, fields: Fields) -> Model:
    return _decoder(family, fields, _grouped_query(fields, 128, qkv_bias=fields.flag("attention_bias"), qk_norm=True))


def _qwen3_moe(family: str, fields: Fields) -> Model:
    if fields.flag("shared_expert_intermediate_size"):
        raise NotSupportedError(f"{family} with shared experts is not mapped yet; start an engine and record it")
    # Transformers writes the number of experts under another name than it reads
    experts = Experts(fields.size("num_experts", "num_local_experts"), fields.size("moe_intermediate_size"))
    step, plain = fields.get("decoder_sparse_step", 1), fields.get("mlp_only_layers", ())
    attention = _grouped_query(fields, qkv_bias=fields.flag("attention_bias"), qk_norm=True)
    return _decoder(
        family, fields, attention, experts, lambda layer: layer in plain or bool((layer + 1) % step),
        ends_everywhere=True,
    )  # fmt: skip


def _mixtral(family: str, fields: Fields) -> Model:
    experts = Experts(
        fields.size("num_local_experts"), fields.size("intermediate_size"), projections=("w1", "w3", "w2")
    )
    options = {"mlp": "block_sparse_moe", "ends_everywhere": True}
    return _decoder(family, fields, _grouped_query(fields), experts, lambda _: False, **options)


def _gpt_oss(family: str, fields: Fields) -> Model:
    attention = _grouped_query(fields, qkv_bias=True, out_bias=True, sinks=True, repeats=False)
    width = fields.size("intermediate_size")
    experts = Experts(fields.size("num_local_experts"), width, alternating=True, router="router")
    names = {"embed_tokens": "embedding", "self_attn": "attn"}
    return _untied(
        _decoder(family, fields, attention, experts, lambda _: False, engine_names=names, ends_everywhere=True)
    )


def _glm4_moe(family: str, fields: Fields) -> Model:
    attention = _grouped_query(fields, qkv_bias=fields.flag("attention_bias"), qk_norm=fields.flag("use_qk_norm"))
    experts = _routed(fields, router_dtype="float32", corrected=True)
    first = fields.get("first_k_dense_replace", 0)
    return _untied(_decoder(family, fields, attention, experts, lambda layer: layer < first))


def _deepseek(family: str, fields: Fields) -> Model:
    attention = Latent(
        heads=fields.size("num_attention_heads"),
        query_rank=fields.get("q_lora_rank"),
        value_rank=fields.size("kv_lora_rank"),
        plain_head=fields.size("qk_nope_head_dim"),
        rotary_head=fields.size("qk_rope_head_dim"),
        value_head=fields.size("v_head_dim"),
    )
    experts = _routed(fields, shared_whole=True, corrected=fields.get("topk_method") == "noaux_tc")
    first, step = fields.get("first_k_dense_replace", 0), fields.get("moe_layer_freq", 1)
    return _untied(_decoder(family, fields, attention, experts, lambda layer: layer < first or bool(layer % step)))


def _untied(model: Model) -> Model:
    """A model of a family whose output layer vLLM never ties to the embedding."""
    if model.tied:
        raise NotSupportedError(f"{model.family} with tie_word_embeddings: vLLM has an output layer of its own for it")
    return model


def _routed(fields: Fields, **more: Any) -> Experts:
    """Experts as DeepSeek's configs name them."""
    width = fields.size("moe_intermediate_size")
    return Experts(
        count=fields.size("n_routed_experts"),
        width=width,
        shared_width=width * int(fields.get("n_shared_experts", 0)),
        **more,
    )


_FAMILIES: Mapping[str, Callable[[str, Fields], Model]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
}
