"""What a Hugging Face config says of a model, as far as the layouts of vLLM ranks depend on it.

Sources: `vllm/model_executor/models/{llama,qwen2,qwen2_5_vl,qwen3,qwen3_moe,qwen3_next,mixtral,glm4_moe,gpt_oss,
deepseek_v2,nemotron_h}.py` and `vllm/models/deepseek_v32/nvidia/model.py`, for what each family's modules are and what
they read from the config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from weft.errors import ConfigError, NotSupportedError
from weft_vllm.attention import Indexer, Latent
from weft_vllm.feed_forward import Dense, Experts
from weft_vllm.fields import Fields
from weft_vllm.model import Block, Ends, Layer, Model
from weft_vllm.reading import decoder, dense_of, grouped_query, layer_of, refuse, sparse, untied
from weft_vllm.recurrent import GatedDelta, Mamba
from weft_vllm.vision import read_vision


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


def _llama(family: str, fields: Fields) -> Model:
    bias = fields.flag("attention_bias", "bias")
    layer = layer_of(
        grouped_query(fields, qkv_bias=bias, out_bias=bias), dense_of(fields, bias=fields.flag("mlp_bias"))
    )
    return decoder(family, fields, lambda _: layer)


def _qwen2(family: str, fields: Fields) -> Model:
    layer = layer_of(grouped_query(fields, qkv_bias=True), dense_of(fields))
    return decoder(family, fields, lambda _: layer)


def _qwen2_5_vl(family: str, fields: Fields) -> Model:
    """The text model's sizes are in a part of their own, or in older configs beside those of the tower."""
    text = fields.merged("text_config")
    vision = read_vision(fields.part("vision_config"))
    layer = layer_of(grouped_query(text, qkv_bias=True), dense_of(text))
    return decoder(family, text, lambda _: layer, engine_prefix="language_model.", vision=vision)


def _qwen3(family: str, fields: Fields) -> Model:
    attention = grouped_query(fields, 128, qkv_bias=fields.flag("attention_bias"), qk_norm=True)
    layer = layer_of(attention, dense_of(fields))
    return decoder(family, fields, lambda _: layer)


def _qwen3_moe(family: str, fields: Fields) -> Model:
    refuse(family, fields, "shared_expert_intermediate_size")
    attention = grouped_query(fields, qkv_bias=fields.flag("attention_bias"), qk_norm=True)
    # Transformers writes the number of experts under another name than it reads
    experts = Experts(fields.size("num_experts", "num_local_experts"), fields.size("moe_intermediate_size"))
    ends = Ends(ends_everywhere=True, norm_everywhere=True)
    return decoder(family, fields, sparse(fields, lambda _: ("self_attn", attention), experts), ends=ends)


def _qwen3_next(family: str, fields: Fields) -> Model:
    refuse(family, fields, "attention_bias", "qkv_bias", "layer_scale")
    gated = bool(fields.get("attn_output_gate", True))
    attention = grouped_query(fields, 256, qk_norm=True, gated=gated)
    recurrent = GatedDelta(
        key_heads=fields.size("linear_num_key_heads"),
        value_heads=fields.size("linear_num_value_heads"),
        key_head=fields.size("linear_key_head_dim"),
        value_head=fields.size("linear_value_head_dim"),
        kernel=fields.get("linear_conv_kernel_dim", 4),
    )
    shared = Dense(fields.size("shared_expert_intermediate_size"), "width of shared experts", spread_whole=True)
    experts = Experts(
        count=fields.size("num_experts", "num_local_experts"),
        width=fields.size("moe_intermediate_size"),
        shared=shared,
        shared_name="shared_expert",
        shared_gate=True,
    )
    types, interval = fields.get("layer_types", ()), fields.get("full_attention_interval", 4)

    def first(number: int) -> tuple[str, Block]:
        full = types[number] == "full_attention" if types else (number + 1) % interval == 0
        return ("self_attn", attention) if full else ("linear_attn", recurrent)

    return untied(decoder(family, fields, sparse(fields, first, experts), ends=Ends(ends_everywhere=True)))


def _mixtral(family: str, fields: Fields) -> Model:
    width = fields.size("intermediate_size")
    experts = Experts(fields.size("num_local_experts"), width, inner=("w1", "w3"), outer="w2")
    layer = layer_of(grouped_query(fields), experts, "block_sparse_moe")
    return decoder(family, fields, lambda _: layer, ends=Ends(ends_everywhere=True, norm_everywhere=True))


def _gpt_oss(family: str, fields: Fields) -> Model:
    attention = grouped_query(fields, qkv_bias=True, out_bias=True, sinks=True, repeats=False)
    width = fields.size("intermediate_size")
    layer = layer_of(attention, Experts(fields.size("num_local_experts"), width, alternating=True, router="router"))
    names = {"embed_tokens": "embedding", "self_attn": "attn"}
    ends = Ends(ends_everywhere=True, norm_everywhere=True)
    return untied(decoder(family, fields, lambda _: layer, engine_names=names, ends=ends))


def _glm4_moe(family: str, fields: Fields) -> Model:
    attention = grouped_query(fields, qkv_bias=fields.flag("attention_bias"), qk_norm=fields.flag("use_qk_norm"))
    experts, dense = _routed(fields, router_dtype="float32", corrected=True), dense_of(fields)
    first = fields.get("first_k_dense_replace", 0)
    return untied(decoder(family, fields, lambda number: layer_of(attention, dense if number < first else experts)))


def _deepseek(family: str, fields: Fields) -> Model:
    attention, dense = _latent(fields), dense_of(fields)
    mlp = _deepseek_mlp(fields, dense)
    return untied(decoder(family, fields, lambda number: layer_of(attention, mlp(number))))


def _glm_moe_dsa(family: str, fields: Fields) -> Model:
    """GLM-5: on GPUs of NVIDIA, layers without experts are whole where tokens are spread over ranks."""
    indexer = Indexer(fields.size("index_n_heads"), fields.size("index_head_dim"))
    fields.size("q_lora_rank")
    plain, indexed = _latent(fields), _latent(fields, indexer)
    mlp = _deepseek_mlp(fields, dense_of(fields, spread_whole=True, stages_cut=True))
    pattern, step = fields.get("index_topk_pattern"), fields.get("index_topk_freq", 1)
    offset = fields.get("index_skip_topk_offset", 2)

    def layer(number: int) -> Layer:
        if pattern is None:
            skips = max(number - offset + 1, 0) % step != 0
        else:
            skips = number < len(pattern) and pattern[number] == "S"
        return layer_of(plain if skips else indexed, mlp(number))

    return untied(decoder(family, fields, layer))


def _latent(fields: Fields, indexer: Indexer | None = None) -> Latent:
    return Latent(
        heads=fields.size("num_attention_heads"),
        query_rank=fields.get("q_lora_rank"),
        value_rank=fields.size("kv_lora_rank"),
        plain_head=fields.size("qk_nope_head_dim"),
        rotary_head=fields.size("qk_rope_head_dim"),
        value_head=fields.size("v_head_dim"),
        indexer=indexer,
    )


def _deepseek_mlp(fields: Fields, dense: Dense) -> Callable[[int], Dense | Experts]:
    """Which layers of DeepSeek's models have experts."""
    experts = _routed(fields, spread_whole=True, corrected=fields.get("topk_method") == "noaux_tc")
    first, step = fields.get("first_k_dense_replace", 0), fields.get("moe_layer_freq", 1)
    return lambda number: dense if number < first or number % step else experts


def _routed(fields: Fields, *, spread_whole: bool = False, **more: Any) -> Experts:
    """Experts as DeepSeek's configs name them."""
    width = fields.size("moe_intermediate_size")
    shared = width * int(fields.get("n_shared_experts", 0))
    together = Dense(shared, "width of shared experts", spread_whole=spread_whole) if shared else None
    return Experts(count=fields.size("n_routed_experts"), width=width, shared=together, **more)


def _nemotron_h(family: str, fields: Fields) -> Model:
    """Every layer is one module: Mamba, attention, experts, or a feed-forward layer without a gate."""
    refuse(family, fields, "attention_bias", "use_bias", "moe_latent_size")
    if not fields.get("use_conv_bias", True):
        raise NotSupportedError(f"{family} without use_conv_bias is not mapped; start an engine and record it")
    kinds = _nemotron_kinds(fields)
    blocks: dict[str, Block] = {kind: read(fields) for kind, read in _NEMOTRON_BLOCKS.items() if kind in kinds}
    unknown = sorted(set(kinds) - blocks.keys())
    if unknown:
        raise NotSupportedError(f"{family} has layers {', '.join(unknown)}; mapped are {', '.join(_NEMOTRON_BLOCKS)}")
    return untied(
        Model(
            family=family,
            hidden=fields.size("hidden_size"),
            vocabulary=fields.size("vocab_size"),
            tied=fields.flag("tie_word_embeddings"),
            layers=tuple(Layer((("mixer", blocks[kind]),), ("norm",)) for kind in kinds),
            ends=Ends("backbone", "embeddings", "norm_f", ends_everywhere=True, norm_everywhere=True),
            engine_names={"backbone": "model", "embeddings": "embed_tokens"},
        )
    )


def _nemotron_kinds(fields: Fields) -> Sequence[str]:
    """What every layer is, as letters or as the words that Transformers writes."""
    words = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E", "mlp": "-"}
    types = fields.get("layers_block_type") or fields.get("hybrid_override_pattern")
    if types is None:
        fields.missing.append("layers_block_type")
        return ()
    return [words.get(kind, kind) for kind in types]


def _nemotron_experts(fields: Fields) -> Experts:
    width = fields.size("moe_shared_expert_intermediate_size") * int(fields.get("n_shared_experts", 0))
    shared = Dense(width, "width of shared experts", gated=False, spread_whole=True)
    return Experts(
        count=fields.size("n_routed_experts"),
        width=fields.size("moe_intermediate_size"),
        inner=("up_proj",),
        router_dtype="float32",
        corrected=True,
        shared=shared if width else None,
    )


def _mamba(fields: Fields) -> Mamba:
    return Mamba(
        heads=fields.size("mamba_num_heads"),
        head=fields.size("mamba_head_dim"),
        groups=fields.size("n_groups"),
        state=fields.size("ssm_state_size"),
        kernel=fields.size("conv_kernel"),
    )


_NEMOTRON_BLOCKS: Mapping[str, Callable[[Fields], Block]] = {
    "M": _mamba,
    "*": grouped_query,
    "E": _nemotron_experts,
    "-": lambda fields: dense_of(fields, gated=False, bias=fields.flag("mlp_bias")),
}


_FAMILIES: Mapping[str, Callable[[str, Fields], Model]] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
    "qwen3_next": _qwen3_next,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
    "deepseek_v3": _deepseek,
    "kimi_k2": _deepseek,
    "glm_moe_dsa": _glm_moe_dsa,
    "nemotron_h": _nemotron_h,
}
