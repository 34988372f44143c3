"""Lines of the table for hybrids of Mamba, attention and MLPs: one of them, and a norm before it, in every layer.

From Megatron-Core 0.16: `models/mamba/mamba_layer_specs.py` and `ssm/mamba_block.py` (names), `ssm/mamba_mixer.py`
(rows of `in_proj` and channels of `conv1d`: its `sharded_state_dict`). On disk as `modeling_nemotron_h.py` of
transformers, under the names of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence

from weft_megatron.family import ATTENTION, MAMBA, MLP, DecoderModel, Hybrid
from weft_megatron.rows import DECODER_LAYER, LAYER, Row, Spec, Split


def hybrid_embedding_rows(model: DecoderModel) -> list[Row]:
    """What the first pipeline stage holds besides layers."""
    shape = (model.vocabulary, model.hidden)
    return [Row("embedding.word_embeddings.weight", ("backbone.embeddings.weight",), (shape,), Split.VOCABULARY)]


def hybrid_output_rows(model: DecoderModel) -> list[Row]:
    """What the last one holds besides layers."""
    shape = (model.vocabulary, model.hidden)
    return [
        Row("decoder.final_norm.weight", ("backbone.norm_f.weight",), ((model.hidden,),), Split.REPLICATED),
        Row("output_layer.weight", ("lm_head.weight",), (shape,), Split.VOCABULARY),
    ]


def hybrid_rows(model: DecoderModel, hybrid: Hybrid, spec: Spec, layer: int) -> list[Row]:
    """One layer."""
    kind = hybrid.pattern[layer]
    first, norm = {
        MAMBA: ("mixer.in_proj", "norm"),
        ATTENTION: ("self_attention.linear_qkv", "input_layernorm"),
        MLP: ("mlp.linear_fc1", "pre_mlp_layernorm"),
    }[kind]
    before = f"{first}.layer_norm_weight" if spec.fused else f"{norm}.weight"
    own = {MAMBA: _mamba_rows, ATTENTION: _attention_rows, MLP: _mlp_rows}[kind](model, hybrid)
    return [_row(before, ["norm.weight"], [(model.hidden,)], Split.REPLICATED), *own]


def _mamba_rows(model: DecoderModel, hybrid: Hybrid) -> list[Row]:
    """A gate, what goes in, what writes to the state and what reads it, and a rate per head."""
    inner, shared, per_head = hybrid.heads * hybrid.head, hybrid.groups * hybrid.state, (hybrid.heads,)
    inputs, channels = (inner, inner, shared, shared, hybrid.heads), (inner, shared, shared)
    return [
        _row("mixer.in_proj.weight", ["mixer.in_proj.weight"], [(sum(inputs), model.hidden)], Split.COMPONENTS, inputs),
        _row(
            "mixer.conv1d.weight",
            ["mixer.conv1d.weight"],
            [(sum(channels), 1, hybrid.kernel)],
            Split.COMPONENTS,
            channels,
        ),
        _row("mixer.conv1d.bias", ["mixer.conv1d.bias"], [(sum(channels),)], Split.COMPONENTS, channels),
        *(_row(f"mixer.{name}", [f"mixer.{name}"], [per_head], Split.ROWS) for name in ("dt_bias", "A_log", "D")),
        _row("mixer.norm.weight", ["mixer.norm.weight"], [(inner,)], Split.ROWS),
        _row("mixer.out_proj.weight", ["mixer.out_proj.weight"], [(model.hidden, inner)], Split.COLUMNS),
    ]


def _attention_rows(model: DecoderModel, hybrid: Hybrid) -> list[Row]:
    query, key = model.heads * model.head, model.groups * model.head
    shapes = [(query, model.hidden), (key, model.hidden), (key, model.hidden)]
    qkv = [f"mixer.{part}_proj.weight" for part in "qkv"]
    return [
        _row("self_attention.linear_qkv.weight", qkv, shapes, Split.GROUPED),
        _row("self_attention.linear_proj.weight", ["mixer.o_proj.weight"], [(model.hidden, query)], Split.COLUMNS),
    ]


def _mlp_rows(model: DecoderModel, hybrid: Hybrid) -> list[Row]:
    """Without a gate."""
    wide, hidden = model.intermediate, model.hidden
    return [
        _row("mlp.linear_fc1.weight", ["mixer.up_proj.weight"], [(wide, hidden)], Split.ROWS),
        _row("mlp.linear_fc2.weight", ["mixer.down_proj.weight"], [(hidden, wide)], Split.COLUMNS),
    ]


def _row(
    local: str,
    logical: Sequence[str],
    shapes: Sequence[tuple[int, ...]],
    split: Split,
    components: tuple[int, ...] = (),
) -> Row:
    """Of a layer; names are those below it."""
    names = tuple(f"backbone.layers.{LAYER}.{name}" for name in logical)
    return Row(f"{DECODER_LAYER}.{local}", names, tuple(shapes), split, components)
