"""The table of the families: Megatron's parameters, the logical tensors they hold, and how they are split.

Facts are from Megatron-Core 0.16: `transformer/attention.py` (rows of `linear_qkv`), `transformer/mlp.py` (gate and up
in `linear_fc1`), `transformer/moe/experts.py` and `router.py` (experts), `tensor_parallel/layers.py` (column, row and
vocabulary splits), `models/gpt/gpt_layer_specs.py` (names).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from weft.layout import Tie
from weft.names import NameMap, NameRule, Skip
from weft_megatron.family import DecoderModel, Experts

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_EXPERT = "mlp.experts.{expert}"
_LAYER = "{layer}"


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
        ties=[Tie(HEAD, EMBEDDING)] if model.tied else [],
        skips=[Skip("*_extra_state", "Transformer Engine's quantization state, not a weight")],
    )


def embedding_rows(model: DecoderModel) -> list[Row]:
    """What the first pipeline stage holds besides layers."""
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
    """One layer, with the number left open; layers with experts and layers without differ."""
    experts = model.experts if layer in model.sparse_layers else None
    return _rows_of_kind(model, spec, experts)


def _rows_of_kind(model: DecoderModel, spec: Spec, experts: Experts | None) -> list[Row]:
    # Nothing but a linear layer can take in a norm, and a mixture of experts begins with its router.
    before_mlp = "mlp.linear_fc1.layer_norm_weight" if _fused(spec) and not experts else "pre_mlp_layernorm.weight"
    return [
        *_attention_rows(model, spec),
        _row(before_mlp, ["post_attention_layernorm"], "weight", [(model.hidden,)], Split.REPLICATED),
        *(_expert_rows(model, spec, experts) if experts else _dense_rows(model)),
    ]


def _rows_of_all_layers(model: DecoderModel, spec: Spec) -> Iterator[Row]:
    """Every kind of layer once, with the number left open except where two kinds name one tensor differently."""
    sparse = _rows_of_kind(model, spec, model.experts) if model.experts else []
    dense = _rows_of_kind(model, spec, None) if model.has_dense_layers else []
    yield from (row for row in dense if row in sparse)
    dense_layers = frozenset(range(model.layers)) - model.sparse_layers
    for rows, others, layers in ((dense, sparse, dense_layers), (sparse, dense, model.sparse_layers)):
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
    output = ["self_attn.o_proj"]
    rows += [_row("self_attention.linear_proj.weight", output, "weight", [(hidden, query)], Split.COLUMNS)]
    if model.linear_bias:
        rows += [_row("self_attention.linear_proj.bias", output, "bias", [(hidden,)], Split.REPLICATED)]
    return rows


def _dense_rows(model: DecoderModel) -> list[Row]:
    return _gated_rows(model, "mlp", "mlp.{linear}.{kind}", model.intermediate)


def _expert_rows(model: DecoderModel, spec: Spec, experts: Experts) -> list[Row]:
    """The router and, for any expert, its MLP (trap 7: biases too are each expert's own)."""
    router = [_row("mlp.router.weight", ["mlp.gate"], "weight", [(experts.count, model.hidden)], Split.REPLICATED)]
    if model.linear_bias:
        router += [_row("mlp.router.bias", ["mlp.gate"], "bias", [(experts.count,)], Split.REPLICATED)]
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
    return Row(f"decoder.layers.{_LAYER}.{local}", names, tuple(shapes), split)


def _fused(spec: Spec) -> bool:
    return spec is not Spec.LOCAL
