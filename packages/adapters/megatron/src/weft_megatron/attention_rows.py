"""Attention's lines of the table.

From Megatron-Core 0.16: `transformer/attention.py` (rows of `linear_qkv`), `transformer/multi_latent_attention.py`,
`transformer/dot_product_attention.py` (sinks), `transformer/experimental_attention_variant/dsa.py`,
`ssm/gated_delta_net.py`.
"""

from __future__ import annotations

from weft_megatron.family import DecoderModel, GatedDelta, Indexer, LatentAttention
from weft_megatron.rows import DECODER_LAYER, LAYER, Row, Spec, Split, layer_row


def attention_rows(model: DecoderModel, spec: Spec) -> list[Row]:
    """Attention of grouped queries, and the norm before it."""
    hidden = model.hidden
    query, key = model.heads * model.head, model.groups * model.head
    before = "self_attention.linear_qkv.layer_norm_weight" if spec.fused else "input_layernorm.weight"
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    gated = 2 if model.output_gate else 1
    split = Split.GROUPED_GATED if model.output_gate else Split.GROUPED
    qkv_shapes = [(gated * query, hidden), (key, hidden), (key, hidden)]
    rows = [
        layer_row(before, ["input_layernorm"], "weight", [(hidden,)], Split.REPLICATED),
        layer_row("self_attention.linear_qkv.weight", qkv, "weight", qkv_shapes, split),
    ]
    if model.qkv_bias:
        rows += [layer_row("self_attention.linear_qkv.bias", qkv, "bias", [(query,), (key,), (key,)], Split.GROUPED)]
    if model.qk_norm:
        for part in "qk":
            local, logical = f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm"
            rows += [layer_row(local, [logical], "weight", [(model.head,)], Split.REPLICATED)]
    if model.sinks:
        name = f"model.layers.{LAYER}.self_attn.sinks"
        local = f"{DECODER_LAYER}.self_attention.core_attention.softmax_offset"
        rows += [Row(local, (name,), ((model.heads,),), Split.ROWS)]
    return [*rows, *_output_rows(model, query)]


def _output_rows(model: DecoderModel, values: int) -> list[Row]:
    """The projection of `values` attended elements."""
    output, shape = ["self_attn.o_proj"], (model.hidden, values)
    rows = [layer_row("self_attention.linear_proj.weight", output, "weight", [shape], Split.COLUMNS)]
    if model.linear_bias:
        rows += [layer_row("self_attention.linear_proj.bias", output, "bias", [(model.hidden,)], Split.REPLICATED)]
    return rows


def delta_rows(model: DecoderModel, delta: GatedDelta, spec: Spec) -> list[Row]:
    """Linear attention by the gated delta rule, and the norm before it."""
    hidden, keys, values = model.hidden, delta.keys * delta.key_head, delta.values * delta.value_head
    before = "self_attention.in_proj.layer_norm_weight" if spec.fused else "input_layernorm.weight"
    inputs = [f"linear_attn.in_proj_{part}" for part in ("qkvz", "ba")]
    input_shapes = [(2 * keys + 2 * values, hidden), (2 * delta.values, hidden)]
    channels = keys, keys, values
    at, on_disk = f"{DECODER_LAYER}.self_attention", f"model.layers.{LAYER}.linear_attn"
    return [
        layer_row(before, ["input_layernorm"], "weight", [(hidden,)], Split.REPLICATED),
        layer_row("self_attention.in_proj.weight", inputs, "weight", input_shapes, Split.DELTA_INPUTS),
        Row(
            f"{at}.conv1d.weight",
            (f"{on_disk}.conv1d.weight",),
            ((sum(channels), 1, delta.kernel),),
            Split.COMPONENTS,
            channels,
        ),
        *(Row(f"{at}.{name}", (f"{on_disk}.{name}",), ((delta.values,),), Split.ROWS) for name in ("dt_bias", "A_log")),
        layer_row(
            "self_attention.out_norm.weight", ["linear_attn.norm"], "weight", [(delta.value_head,)], Split.REPLICATED
        ),
        layer_row(
            "self_attention.out_proj.weight", ["linear_attn.out_proj"], "weight", [(hidden, values)], Split.COLUMNS
        ),
    ]


def latent_rows(model: DecoderModel, latent: LatentAttention, spec: Spec) -> list[Row]:
    """Multi-latent attention, and the norm before it.

    In the parameters as on disk rows of one head stay together, and rotary elements are interleaved.
    Transformer Engine's specification keeps the input's norm apart, since two layers read it, takes those of the short
    vectors into the layers that follow, and gives every rank the whole of the projections down.
    """
    hidden, keys = model.hidden, latent.key_rank
    down = Split.REPLICATED if spec.fused else Split.ROWS

    def linear(local: str, logical: str, shape: tuple[int, int], split: Split) -> Row:
        return layer_row(
            f"self_attention.linear_{local}_proj.weight", [f"self_attn.{logical}"], "weight", [shape], split
        )

    def norm(part: str, logical: str, size: int) -> Row:
        fused, own = f"linear_{part}_up_proj.layer_norm_weight", f"{part}_layernorm.weight"
        local = f"self_attention.{fused if spec.fused else own}"
        return layer_row(local, [f"self_attn.{logical}"], "weight", [(size,)], Split.REPLICATED)

    rows = [layer_row("input_layernorm.weight", ["input_layernorm"], "weight", [(hidden,)], Split.REPLICATED)]
    queries = model.heads * (latent.plain + latent.rotary)
    if latent.query_rank is None:
        rows += [linear("q", "q_proj", (queries, hidden), Split.ROWS)]
    else:
        rows += [
            linear("q_down", "q_a_proj", (latent.query_rank, hidden), down),
            norm("q", "q_a_layernorm", latent.query_rank),
            linear("q_up", "q_b_proj", (queries, latent.query_rank), Split.ROWS),
        ]
    if latent.indexer:
        rows += _indexer_rows(model, latent, latent.indexer)
    return [
        *rows,
        linear("kv_down", "kv_a_proj_with_mqa", (keys + latent.rotary, hidden), down),
        norm("kv", "kv_a_layernorm", keys),
        linear("kv_up", "kv_b_proj", (model.heads * (latent.plain + latent.value), keys), Split.ROWS),
        *_output_rows(model, model.heads * latent.value),
    ]


def _indexer_rows(model: DecoderModel, latent: LatentAttention, indexer: Indexer) -> list[Row]:
    """`DSAIndexer` rotates the end of a head, `GlmMoeDsaIndexer` its beginning; both interleave."""
    queries = (indexer.heads * indexer.head, latent.query_rank or model.hidden)
    lines: list[tuple[str, str, str, tuple[int, ...], Split]] = [
        ("linear_wq_b", "wq_b", "weight", queries, Split.ROTARY_LAST),
        ("linear_wk", "wk", "weight", (indexer.head, model.hidden), Split.ROTARY_LAST),
        ("k_norm", "k_norm", "weight", (indexer.head,), Split.ROTARY_LAST),
        ("k_norm", "k_norm", "bias", (indexer.head,), Split.ROTARY_LAST),
        ("linear_weights_proj", "weights_proj", "weight", (indexer.heads, model.hidden), Split.REPLICATED),
    ]
    return [
        layer_row(
            f"self_attention.core_attention.indexer.{local}.{kind}",
            [f"self_attn.indexer.{logical}"],
            kind,
            [shape],
            split,
        )
        for local, logical, kind, shape, split in lines
    ]
