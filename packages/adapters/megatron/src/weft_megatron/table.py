"""The table of the families: Megatron's parameters, the logical tensors they hold, and how they are split.

Facts are from Megatron-Core 0.16: `transformer/attention.py` (rows of `linear_qkv`), `transformer/mlp.py` (gate and up
in `linear_fc1`), `transformer/moe/experts.py`, `router.py` and `shared_experts.py` (experts),
`transformer/multi_latent_attention.py`, `transformer/multi_token_prediction.py`, `tensor_parallel/layers.py` (column,
row and vocabulary splits), `models/gpt/gpt_layer_specs.py` (names).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from weft.layout import Tie
from weft.names import NameMap, NameRule, Skip
from weft_megatron.family import DecoderModel, Experts, LatentAttention

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_EXPERT = "mlp.experts.{expert}"
_LAYER = "{layer}"
_DECODER_LAYER = f"decoder.layers.{_LAYER}"
EXPERT_BIAS = "router.expert_bias"
"""Local name, in its module, of what balances experts; float32 whatever the model is."""


class Spec(StrEnum):
    """Which layer specification the model was built with: they name norms and experts differently."""

    LOCAL = "local"
    """`get_gpt_layer_local_spec`: norms are modules of their own, experts are one module each."""
    TRANSFORMER_ENGINE = "transformer_engine"
    """`get_gpt_layer_with_transformer_engine_spec`: norms are part of the linear layer that follows them."""
    GROUPED = "transformer_engine_grouped"
    """The same with `moe_grouped_gemm`: a linear layer of all local experts has one numbered weight for each."""


class Split(StrEnum):
    """How tensor parallelism divides a parameter."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"
    """Rows of the padded vocabulary."""
    ROWS = "rows"
    """Output rows of a column-parallel linear layer."""
    GROUPED = "grouped"
    """Rows of q, k and v interleaved per key-value group (trap 5)."""
    GATED = "gated"
    """Each rank's rows of gate, then the same rows of up (trap 4); `partition_stride` does not tell for experts."""
    COLUMNS = "columns"
    """Input columns of a row-parallel linear layer."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. Names are templates: `{layer}` and `{expert}` stand for global numbers (trap 6)."""

    local: str
    logical: tuple[str, ...]
    """In the order in which the parameter holds them."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the logical tensors."""
    split: Split
    expert: bool = False
    """Whether it is one expert's: divided among the expert groups instead of the tensor-parallel group."""


def name_map(model: DecoderModel, spec: Spec = Spec.LOCAL) -> NameMap:
    """Megatron's names, with global layer and expert numbers, and the checkpoint's."""
    rows = [*embedding_rows(model), *_rows_of_all_layers(model, spec), *output_rows(model)]
    return NameMap(
        [NameRule((row.local,), row.logical) for row in rows],
        ties=[Tie(*tie) for tie in ties(model).items()],
        skips=[
            Skip("*_extra_state", "Transformer Engine's quantization state, not a weight"),
            Skip("*.router.local_tokens_per_expert", "counts the tokens of one step"),
        ],
    )


def ties(model: DecoderModel) -> dict[str, str]:
    """Names in the checkpoint that stand for another tensor, to that tensor.

    Checkpoints repeat the embedding and the output projection in every prediction layer; Megatron has one of each.
    """
    head = EMBEDDING if model.tied else HEAD
    tied = {HEAD: EMBEDDING} if model.tied else {}
    for layer in range(model.layers, model.layers + model.predictors):
        tied |= {f"model.layers.{layer}.embed_tokens.weight": EMBEDDING}
        tied |= {f"model.layers.{layer}.shared_head.head.weight": head}
    return tied


def embedding_rows(model: DecoderModel) -> list[Row]:
    """What the first pipeline stage holds besides layers, and the stage of prediction layers."""
    shape = (model.vocabulary, model.hidden)
    return [Row("embedding.word_embeddings.weight", (EMBEDDING,), (shape,), Split.VOCABULARY)]


def output_rows(model: DecoderModel) -> list[Row]:
    """What the last pipeline stage holds besides layers."""
    shape = (model.vocabulary, model.hidden)
    return [
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), ((model.hidden,),), Split.REPLICATED),
        Row("output_layer.weight", (HEAD,), (shape,), Split.VOCABULARY),
    ]


def layer_rows(model: DecoderModel, spec: Spec, layer: int) -> list[Row]:
    """One layer: a decoder layer with its number left open, or a prediction layer, whose number is past the last.

    Layers with experts and layers without differ.
    """
    rows = _rows_of_kind(model, spec, model.experts if layer in model.sparse_layers else None)
    if layer < model.layers:
        return rows
    local = f"mtp.layers.{layer - model.layers}"
    inner = [replace(row, local=row.local.replace(_DECODER_LAYER, f"{local}.transformer_layer")) for row in rows]
    return [_numbered(row, layer) for row in (*inner, *_predictor_rows(model, local))]


def _predictor_rows(model: DecoderModel, local: str) -> list[Row]:
    """What a prediction layer has around its decoder layer, which sees the next token beside the hidden state."""
    hidden, at = model.hidden, f"model.layers.{_LAYER}"
    norms = {"enorm": "enorm", "hnorm": "hnorm", "final_layernorm": "shared_head.norm"}
    return [
        Row(f"{local}.eh_proj.weight", (f"{at}.eh_proj.weight",), ((hidden, 2 * hidden),), Split.ROWS),
        *(
            Row(f"{local}.{name}.weight", (f"{at}.{logical}.weight",), ((hidden,),), Split.REPLICATED)
            for name, logical in norms.items()
        ),
    ]


def _rows_of_kind(model: DecoderModel, spec: Spec, experts: Experts | None) -> list[Row]:
    # Nothing but a linear layer can take in a norm, and a mixture of experts begins with its router.
    before_mlp = "mlp.linear_fc1.layer_norm_weight" if _fused(spec) and not experts else "pre_mlp_layernorm.weight"
    return [
        *(_latent_rows(model, model.latent, spec) if model.latent else _attention_rows(model, spec)),
        _row(before_mlp, ["post_attention_layernorm"], "weight", [(model.hidden,)], Split.REPLICATED),
        *(_expert_rows(model, spec, experts) if experts else _dense_rows(model)),
    ]


def _rows_of_all_layers(model: DecoderModel, spec: Spec) -> Iterator[Row]:
    """Every kind of layer once, with the number left open except where two kinds name one tensor differently.

    With prediction layers every layer has its number: their names are those of decoder layers in the checkpoint.
    """
    if model.predictors:
        for layer in range(model.layers + model.predictors):
            yield from (_numbered(row, layer) for row in layer_rows(model, spec, layer))
        return
    sparse = _rows_of_kind(model, spec, model.experts) if model.experts else []
    dense = _rows_of_kind(model, spec, None) if model.dense_layers else []
    yield from (row for row in dense if row in sparse)
    for rows, others, layers in ((dense, sparse, model.dense_layers), (sparse, dense, model.sparse_layers)):
        other_names = {row.logical for row in others}
        for row in rows:
            if row.logical not in other_names:
                yield row
            elif row not in others:
                yield from (_numbered(row, layer) for layer in sorted(layers))


def _numbered(row: Row, layer: int) -> Row:
    logical = tuple(name.replace(_LAYER, str(layer)) for name in row.logical)
    return replace(row, local=row.local.replace(_LAYER, str(layer)), logical=logical)


def _attention_rows(model: DecoderModel, spec: Spec) -> list[Row]:
    hidden = model.hidden
    query, key = model.heads * model.head, model.groups * model.head
    before = "self_attention.linear_qkv.layer_norm_weight" if _fused(spec) else "input_layernorm.weight"
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    qkv_shapes = [(query, hidden), (key, hidden), (key, hidden)]
    rows = [
        _row(before, ["input_layernorm"], "weight", [(hidden,)], Split.REPLICATED),
        _row("self_attention.linear_qkv.weight", qkv, "weight", qkv_shapes, Split.GROUPED),
    ]
    if model.qkv_bias:
        rows += [_row("self_attention.linear_qkv.bias", qkv, "bias", [(query,), (key,), (key,)], Split.GROUPED)]
    if model.qk_norm:
        for part in "qk":
            local, logical = f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm"
            rows += [_row(local, [logical], "weight", [(model.head,)], Split.REPLICATED)]
    return [*rows, *_output_rows(model, query)]


def _output_rows(model: DecoderModel, values: int) -> list[Row]:
    """The projection of `values` attended elements."""
    output, shape = ["self_attn.o_proj"], (model.hidden, values)
    rows = [_row("self_attention.linear_proj.weight", output, "weight", [shape], Split.COLUMNS)]
    if model.linear_bias:
        rows += [_row("self_attention.linear_proj.bias", output, "bias", [(model.hidden,)], Split.REPLICATED)]
    return rows


def _latent_rows(model: DecoderModel, latent: LatentAttention, spec: Spec) -> list[Row]:
    """Rows of one head stay together in both; rotary elements are interleaved in both.

    Transformer Engine's specification keeps the input's norm apart, since two layers read it, takes those of the short
    vectors into the layers that follow, and gives every rank the whole of the projections down.
    """
    hidden, keys = model.hidden, latent.key_rank
    down = Split.REPLICATED if _fused(spec) else Split.ROWS

    def linear(local: str, logical: str, shape: tuple[int, int], split: Split) -> Row:
        return _row(f"self_attention.linear_{local}_proj.weight", [f"self_attn.{logical}"], "weight", [shape], split)

    def norm(part: str, logical: str, size: int) -> Row:
        fused, own = f"linear_{part}_up_proj.layer_norm_weight", f"{part}_layernorm.weight"
        local = f"self_attention.{fused if _fused(spec) else own}"
        return _row(local, [f"self_attn.{logical}"], "weight", [(size,)], Split.REPLICATED)

    rows = [_row("input_layernorm.weight", ["input_layernorm"], "weight", [(hidden,)], Split.REPLICATED)]
    queries = model.heads * (latent.plain + latent.rotary)
    if latent.query_rank is None:
        rows += [linear("q", "q_proj", (queries, hidden), Split.ROWS)]
    else:
        rows += [
            linear("q_down", "q_a_proj", (latent.query_rank, hidden), down),
            norm("q", "q_a_layernorm", latent.query_rank),
            linear("q_up", "q_b_proj", (queries, latent.query_rank), Split.ROWS),
        ]
    return [
        *rows,
        linear("kv_down", "kv_a_proj_with_mqa", (keys + latent.rotary, hidden), down),
        norm("kv", "kv_a_layernorm", keys),
        linear("kv_up", "kv_b_proj", (model.heads * (latent.plain + latent.value), keys), Split.ROWS),
        *_output_rows(model, model.heads * latent.value),
    ]


def _dense_rows(model: DecoderModel) -> list[Row]:
    return _gated_rows(model, "mlp", "mlp.{linear}.{kind}", model.intermediate)


def _expert_rows(model: DecoderModel, spec: Spec, experts: Experts) -> list[Row]:
    """The router and, for any expert, its MLP (trap 7: biases too are each expert's own)."""
    router = [_row("mlp.router.weight", ["mlp.gate"], "weight", [(experts.count, model.hidden)], Split.REPLICATED)]
    if model.linear_bias:
        router += [_row("mlp.router.bias", ["mlp.gate"], "bias", [(experts.count,)], Split.REPLICATED)]
    if experts.corrected:
        name = f"model.layers.{_LAYER}.mlp.gate.e_score_correction_bias"
        router += [Row(f"{_DECODER_LAYER}.mlp.{EXPERT_BIAS}", (name,), ((experts.count,),), Split.REPLICATED)]
    if experts.shared:
        router += _gated_rows(model, "mlp.shared_experts", "mlp.shared_experts.{linear}.{kind}", experts.shared)
    grouped, single = "mlp.experts.{linear}.{kind}{{expert}}", "mlp.experts.local_experts.{{expert}}.{linear}.{kind}"
    local = grouped if spec is Spec.GROUPED else single
    rows = _gated_rows(model, _EXPERT, local, experts.intermediate)
    return [*router, *(replace(row, expert=True) for row in rows)]


def _gated_rows(model: DecoderModel, logical: str, local: str, wide: int) -> list[Row]:
    """An MLP of width `wide`; `local` is a template of its parameters' names by linear layer and kind."""
    gated, down = [f"{logical}.gate_proj", f"{logical}.up_proj"], [f"{logical}.down_proj"]
    first, second = (
        {kind: local.format(linear=f"linear_fc{n}", kind=kind) for kind in ("weight", "bias")} for n in (1, 2)
    )
    rows = [
        _row(first["weight"], gated, "weight", [(wide, model.hidden)] * 2, Split.GATED),
        _row(second["weight"], down, "weight", [(model.hidden, wide)], Split.COLUMNS),
    ]
    if model.linear_bias:
        rows += [
            _row(first["bias"], gated, "bias", [(wide,)] * 2, Split.GATED),
            _row(second["bias"], down, "bias", [(model.hidden,)], Split.REPLICATED),
        ]
    return rows


def _row(local: str, logical: Sequence[str], kind: str, shapes: Sequence[tuple[int, ...]], split: Split) -> Row:
    names = tuple(f"model.layers.{_LAYER}.{name}.{kind}" for name in logical)
    return Row(f"{_DECODER_LAYER}.{local}", names, tuple(shapes), split)


def _fused(spec: Spec) -> bool:
    return spec is not Spec.LOCAL
