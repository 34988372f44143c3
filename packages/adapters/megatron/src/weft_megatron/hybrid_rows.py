"""Lines of the table for hybrids of Mamba, attention, MLPs and experts: one of these in every layer, behind a norm.

From Megatron-Core 0.16: `models/mamba/mamba_layer_specs.py` and `ssm/mamba_block.py` (names), `ssm/mamba_mixer.py`
(rows of `in_proj` and channels of `conv1d`: its `sharded_state_dict`). On disk as `modeling_nemotron_h.py` of
transformers, under the names of its checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from weft_megatron.family import ATTENTION, EXPERTS, MAMBA, MLP, DecoderModel, Experts, Hybrid
from weft_megatron.mlp_rows import EXPERT_BIAS
from weft_megatron.rows import DECODER_LAYER, EXPERT, LAYER, Row, Spec, Split


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
    if kind == EXPERTS and model.experts:
        # Nothing but a linear layer can take in a norm, and a mixture of experts begins with its router.
        before, own = "pre_mlp_layernorm.weight", _expert_rows(model, model.experts, spec)
    else:
        first, norm, rows = _KINDS[kind]
        before = f"{first}.layer_norm_weight" if spec.fused else f"{norm}.weight"
        own = rows(model, hybrid)
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
    return _plain_rows(model, "mlp.{linear}.weight", "mixer", model.intermediate)


def _plain_rows(model: DecoderModel, local: str, logical: str, wide: int) -> list[Row]:
    """An MLP without a gate; `local` is a template of its weights' names by linear layer."""
    up, down = ([f"{logical}.{name}_proj.weight"] for name in ("up", "down"))
    return [
        _row(local.format(linear="linear_fc1"), up, [(wide, model.hidden)], Split.ROWS),
        _row(local.format(linear="linear_fc2"), down, [(model.hidden, wide)], Split.COLUMNS),
    ]


def _expert_rows(model: DecoderModel, experts: Experts, spec: Spec) -> list[Row]:
    """As `mlp_rows.expert_rows`, without gates."""
    grouped, single = "mlp.experts.{linear}.weight{{expert}}", "mlp.experts.local_experts.{{expert}}.{linear}.weight"
    local = grouped if spec is Spec.GROUPED else single
    bias = "mixer.gate.e_score_correction_bias"
    return [
        _row("mlp.router.weight", ["mixer.gate.weight"], [(experts.count, model.hidden)], Split.REPLICATED),
        _row(f"mlp.{EXPERT_BIAS}", [bias], [(experts.count,)], Split.REPLICATED),
        *_plain_rows(model, "mlp.shared_experts.{linear}.weight", "mixer.shared_experts", experts.shared),
        *(
            replace(row, expert=True)
            for row in _plain_rows(model, local, f"mixer.experts.{EXPERT}", experts.intermediate)
        ),
    ]


_KINDS: Mapping[str, tuple[str, str, Callable[[DecoderModel, Hybrid], list[Row]]]] = {
    MAMBA: ("mixer.in_proj", "norm", _mamba_rows),
    ATTENTION: ("self_attention.linear_qkv", "input_layernorm", _attention_rows),
    MLP: ("mlp.linear_fc1", "pre_mlp_layernorm", _mlp_rows),
}
"""First linear layer, the norm before it where that is a module of its own, and the lines, by the kind of layer."""


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
