"""Lines of the table for gated MLPs and mixtures of experts.

From Megatron-Core 0.16: `transformer/mlp.py` (gate and up in `linear_fc1`), `transformer/moe/experts.py`, `router.py`
and `shared_experts.py`.
"""

from __future__ import annotations

from dataclasses import replace

from weft_megatron.family import DecoderModel, ExpertNames, Experts
from weft_megatron.rows import DECODER_LAYER, EXPERT, LAYER, Row, Spec, Split, layer_row

EXPERT_BIAS = "router.expert_bias"
"""Local name, in its module, of what balances experts; float32 whatever the model is."""


def dense_rows(model: DecoderModel) -> list[Row]:
    """The MLP of a layer without experts."""
    return _gated_rows(model, "mlp", "mlp.{linear}.{kind}", model.intermediate, ExpertNames())


def expert_rows(model: DecoderModel, spec: Spec, experts: Experts) -> list[Row]:
    """The router and, for any expert, its MLP (trap 7: biases too are each expert's own)."""
    names, router = experts.names, [experts.names.router]
    rows = [layer_row("mlp.router.weight", router, "weight", [(experts.count, model.hidden)], Split.REPLICATED)]
    if model.linear_bias:
        rows += [layer_row("mlp.router.bias", router, "bias", [(experts.count,)], Split.REPLICATED)]
    if experts.corrected:
        name = "e_score_correction_bias"
        rows += [layer_row(f"mlp.{EXPERT_BIAS}", router, name, [(experts.count,)], Split.REPLICATED)]
    if experts.shared:
        local = "mlp.shared_experts.{linear}.{kind}"
        rows += _gated_rows(model, names.shared, local, experts.shared, names)
    if experts.shared_gate:
        gate = ["mlp.shared_expert_gate"]
        rows += [layer_row("mlp.shared_experts.gate_weight", gate, "weight", [(1, model.hidden)], Split.REPLICATED)]
    grouped, single = "mlp.experts.{linear}.{kind}{{expert}}", "mlp.experts.local_experts.{{expert}}.{linear}.{kind}"
    local = grouped if spec is Spec.GROUPED else single
    if spec.legacy:
        return [*rows, *_legacy_rows(model, experts)]
    if experts.stacked:
        return [*rows, *_stacked_rows(model, experts, local)]
    own = _gated_rows(model, f"{names.experts}.{EXPERT}", local, experts.intermediate, names)
    return [*rows, *(replace(row, expert=True) for row in own)]


def _legacy_rows(model: DecoderModel, experts: Experts) -> list[Row]:
    """`GroupedMLP`, which has no biases."""
    names, wide = experts.names, experts.intermediate
    gated, down = (
        [f"{names.experts}.{EXPERT}.{name}" for name in group] for group in ((names.gate, names.up), (names.down,))
    )
    rows = [
        layer_row("mlp.experts.weight1", gated, "weight", [(wide, model.hidden)] * 2, Split.LEGACY_GATED),
        layer_row("mlp.experts.weight2", down, "weight", [(model.hidden, wide)], Split.LEGACY_COLUMNS),
    ]
    return [replace(row, expert=True) for row in rows]


def _stacked_rows(model: DecoderModel, experts: Experts, local: str) -> list[Row]:
    """Experts that the checkpoint stacks, transposed: one parameter holds one expert's part of the stack."""
    names, count, wide = experts.names, experts.count, experts.intermediate
    shapes = {
        ("linear_fc1", "weight"): (names.gate, (count, model.hidden, 2 * wide), Split.STACKED_GATED),
        ("linear_fc2", "weight"): (names.down, (count, wide, model.hidden), Split.STACKED_COLUMNS),
        ("linear_fc1", "bias"): (f"{names.gate}_bias", (count, 2 * wide), Split.STACKED_GATED),
        ("linear_fc2", "bias"): (f"{names.down}_bias", (count, model.hidden), Split.STACKED_COLUMNS),
    }
    return [
        Row(
            f"{DECODER_LAYER}.{local.format(linear=linear, kind=kind)}",
            (f"model.layers.{LAYER}.{names.experts}.{name}",),
            (shape,),
            split,
            expert=True,
        )
        for (linear, kind), (name, shape, split) in shapes.items()
        if kind == "weight" or model.linear_bias
    ]


def _gated_rows(model: DecoderModel, logical: str, local: str, wide: int, names: ExpertNames) -> list[Row]:
    """An MLP of width `wide`; `local` is a template of its parameters' names by linear layer and kind."""
    gated, down = [f"{logical}.{names.gate}", f"{logical}.{names.up}"], [f"{logical}.{names.down}"]
    first, second = (
        {kind: local.format(linear=f"linear_fc{n}", kind=kind) for kind in ("weight", "bias")} for n in (1, 2)
    )
    rows = [
        layer_row(first["weight"], gated, "weight", [(wide, model.hidden)] * 2, Split.GATED),
        layer_row(second["weight"], down, "weight", [(model.hidden, wide)], Split.COLUMNS),
    ]
    if model.linear_bias:
        rows += [
            layer_row(first["bias"], gated, "bias", [(wide,)] * 2, Split.GATED),
            layer_row(second["bias"], down, "bias", [(model.hidden,)], Split.REPLICATED),
        ]
    return rows
