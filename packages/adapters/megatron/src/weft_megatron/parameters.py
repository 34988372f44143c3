"""The parameters of one Megatron rank: names, shapes, the logical tensors they hold, and how they are split.

Facts are from Megatron-Core 0.16: `transformer/attention.py` (rows of `linear_qkv`), `transformer/mlp.py` (gate and up
in `linear_fc1`), `tensor_parallel/layers.py` (column, row and vocabulary splits), `models/gpt/gpt_model.py` (which
stage has what).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from weft.errors import ConfigError
from weft.layout import Tie
from weft.names import NameMap, NameRule, Skip
from weft_megatron.family import DenseModel

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


class Spec(StrEnum):
    """Which layer specification the model was built with: they name the norms differently."""

    LOCAL = "local"
    """`get_gpt_layer_local_spec`: norms are modules of their own."""
    TRANSFORMER_ENGINE = "transformer_engine"
    """`get_gpt_layer_with_transformer_engine_spec`: norms are part of the linear layer that follows them."""


class Split(StrEnum):
    """How tensor parallelism divides a parameter."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"
    """Rows of the padded vocabulary."""
    GROUPED = "grouped"
    """Rows of q, k and v interleaved per key-value group (trap 5)."""
    GATED = "gated"
    """Each rank's rows of gate, then the same rows of up (trap 4)."""
    COLUMNS = "columns"
    """Input columns of a row-parallel linear layer."""


@dataclass(frozen=True, slots=True)
class Stage:
    """What one rank is responsible for."""

    tensor_rank: int
    tensor_size: int
    layers: tuple[int, ...]
    """Global numbers of its decoder layers, from 0, of all its virtual pipeline chunks."""
    first: bool
    """Whether it holds the embedding."""
    last: bool
    """Whether it holds the final norm and the output projection."""
    padded_vocabulary: int
    """Rows of the embedding over all tensor-parallel ranks, padding included."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one rank."""

    name: str
    """Megatron's name, with the global layer number (trap 6)."""
    shape: tuple[int, ...]
    """Local shape."""
    logical: tuple[str, ...]
    """The logical tensors it holds parts of, ties resolved."""
    logical_shapes: tuple[tuple[int, ...], ...]
    split: Split
    group: str
    """The group it moves in: `embedding`, `layers.N` or `output`."""


@dataclass(frozen=True, slots=True)
class _Row:
    """A line of the family's table: names on both sides, logical shapes and the split."""

    local: str
    logical: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    split: Split


def name_map(model: DenseModel, spec: Spec = Spec.LOCAL) -> NameMap:
    """Megatron's names, with global layer numbers, and the checkpoint's."""
    rows = [*_embedding_rows(model), *_layer_rows(model, spec), *_output_rows(model)]
    return NameMap(
        [NameRule((row.local,), row.logical) for row in rows],
        ties=[Tie(HEAD, EMBEDDING)] if model.tied else [],
        skips=[Skip("*_extra_state", "Transformer Engine's quantization state, not a weight")],
    )


def parameters(model: DenseModel, stage: Stage, spec: Spec = Spec.LOCAL) -> tuple[Parameter, ...]:
    """Every parameter of one rank, in the order in which groups move: embedding, layers, output.

    Raises `ConfigError` with every size that the tensor-parallel size does not divide; Megatron refuses them too.
    """
    _check_divisible(model, stage)
    names = name_map(model, spec)
    return tuple(
        Parameter(
            name,
            _local_shape(model, stage, row),
            names.logical(name),
            row.shapes,
            row.split,
            group,
        )
        for name, row, group in _instances(model, stage, spec)
    )


def _instances(model: DenseModel, stage: Stage, spec: Spec) -> Iterator[tuple[str, _Row, str]]:
    if stage.first:
        yield from ((row.local, row, "embedding") for row in _embedding_rows(model))
    for layer in stage.layers:
        for row in _layer_rows(model, spec):
            yield row.local.replace("{layer}", str(layer)), row, f"layers.{layer}"
    if stage.last:
        for row in _output_rows(model):
            # A stage that has both ends of a tied model keeps no second copy of the embedding.
            if not (row.logical == (HEAD,) and model.tied and stage.first):
                yield row.local, row, "output"


def _embedding_rows(model: DenseModel) -> list[_Row]:
    shape = (model.vocabulary, model.hidden)
    return [_Row("embedding.word_embeddings.weight", (EMBEDDING,), (shape,), Split.VOCABULARY)]


def _output_rows(model: DenseModel) -> list[_Row]:
    shape = (model.vocabulary, model.hidden)
    return [
        _Row("decoder.final_layernorm.weight", ("model.norm.weight",), ((model.hidden,),), Split.REPLICATED),
        _Row("output_layer.weight", (HEAD,), (shape,), Split.VOCABULARY),
    ]


def _layer_rows(model: DenseModel, spec: Spec) -> list[_Row]:
    hidden, wide = model.hidden, model.intermediate
    query, key = model.heads * model.head, model.groups * model.head
    fused = spec is Spec.TRANSFORMER_ENGINE
    before_attention = "self_attention.linear_qkv.layer_norm_weight" if fused else "input_layernorm.weight"
    before_mlp = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    qkv = tuple(f"self_attn.{part}_proj" for part in "qkv")
    gated = ("mlp.gate_proj", "mlp.up_proj")

    def row(local: str, logical: Sequence[str], kind: str, shapes: Sequence[tuple[int, ...]], split: Split) -> _Row:
        names = tuple(f"model.layers.{{layer}}.{name}.{kind}" for name in logical)
        return _Row(f"decoder.layers.{{layer}}.{local}", names, tuple(shapes), split)

    qkv_shapes = [(query, hidden), (key, hidden), (key, hidden)]
    rows = [
        row(before_attention, ["input_layernorm"], "weight", [(hidden,)], Split.REPLICATED),
        row("self_attention.linear_qkv.weight", qkv, "weight", qkv_shapes, Split.GROUPED),
    ]
    if model.qkv_bias:
        rows += [row("self_attention.linear_qkv.bias", qkv, "bias", [(query,), (key,), (key,)], Split.GROUPED)]
    if model.qk_norm:
        for part in "qk":
            local, logical = f"self_attention.{part}_layernorm.weight", f"self_attn.{part}_norm"
            rows += [row(local, [logical], "weight", [(model.head,)], Split.REPLICATED)]
    rows += [row("self_attention.linear_proj.weight", ["self_attn.o_proj"], "weight", [(hidden, query)], Split.COLUMNS)]
    if model.linear_bias:
        rows += [row("self_attention.linear_proj.bias", ["self_attn.o_proj"], "bias", [(hidden,)], Split.REPLICATED)]
    rows += [
        row(before_mlp, ["post_attention_layernorm"], "weight", [(hidden,)], Split.REPLICATED),
        row("mlp.linear_fc1.weight", gated, "weight", [(wide, hidden), (wide, hidden)], Split.GATED),
    ]
    if model.linear_bias:
        rows += [row("mlp.linear_fc1.bias", gated, "bias", [(wide,), (wide,)], Split.GATED)]
    rows += [row("mlp.linear_fc2.weight", ["mlp.down_proj"], "weight", [(hidden, wide)], Split.COLUMNS)]
    if model.linear_bias:
        rows += [row("mlp.linear_fc2.bias", ["mlp.down_proj"], "bias", [(hidden,)], Split.REPLICATED)]
    return rows


def _local_shape(model: DenseModel, stage: Stage, row: _Row) -> tuple[int, ...]:
    shape, size = row.shapes[0], stage.tensor_size
    match row.split:
        case Split.REPLICATED:
            return shape
        case Split.VOCABULARY:
            return (stage.padded_vocabulary // size, *shape[1:])
        case Split.GROUPED:
            return (model.groups * model.group_rows // size, *shape[1:])
        case Split.GATED:
            return (2 * shape[0] // size, *shape[1:])
        case Split.COLUMNS:
            return (shape[0], shape[1] // size)


def _check_divisible(model: DenseModel, stage: Stage) -> None:
    size = stage.tensor_size
    faults = [
        f"{what} {number} is not a multiple of tp={size}"
        for what, number in (
            ("attention heads", model.heads),
            ("intermediate size", model.intermediate),
            ("padded vocabulary", stage.padded_vocabulary),
            ("rows of linear_qkv", model.groups * model.group_rows),
        )
        if number % size
    ]
    if model.groups % size and size % model.groups:
        faults.append(f"key-value heads {model.groups} are neither a multiple nor a divisor of tp={size}")
    if stage.padded_vocabulary < model.vocabulary:
        faults.append(f"padded vocabulary {stage.padded_vocabulary} is smaller than the vocabulary {model.vocabulary}")
    if faults:
        raise ConfigError(f"{model.family} at tp={size}: {'; '.join(faults)}")
