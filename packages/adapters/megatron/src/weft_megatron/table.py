"""The table of the families: Megatron's parameters, the logical tensors they hold, and how they are split.

From Megatron-Core 0.16: `tensor_parallel/layers.py` (column, row and vocabulary splits),
`models/gpt/gpt_layer_specs.py` (names), `transformer/multi_token_prediction.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from weft.layout import Tie
from weft.names import NameMap, NameRule, Skip
from weft_megatron.attention_rows import attention_rows, delta_rows, latent_rows
from weft_megatron.family import DecoderModel, Experts, GatedDelta
from weft_megatron.hybrid_rows import hybrid_embedding_rows, hybrid_output_rows, hybrid_rows
from weft_megatron.mlp_rows import dense_rows, expert_rows
from weft_megatron.rows import DECODER_LAYER, EXPERT, LAYER, Row, Spec, Split, layer_row

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def name_map(model: DecoderModel, spec: Spec = Spec.LOCAL) -> NameMap:
    """Megatron's names, with global layer and expert numbers, and the checkpoint's."""
    rows = [*embedding_rows(model), *_rows_of_all_layers(model, spec), *output_rows(model)]
    return NameMap(
        [_rule(model, row) for row in rows],
        ties=[Tie(*tie) for tie in ties(model).items()],
        skips=[
            Skip("*_extra_state", "Transformer Engine's quantization state, not a weight"),
            Skip("*.router.local_tokens_per_expert", "counts the tokens of one step"),
        ],
    )


def _rule(model: DecoderModel, row: Row) -> NameRule:
    """Of a row. Where only one side has a name for each expert, it has one for every expert."""
    local: tuple[str, ...] = (row.local,)
    logical = row.logical
    if row.expert and model.experts and (EXPERT in row.local) != (EXPERT in row.logical[0]):
        local, logical = (
            tuple(dict.fromkeys(name.replace(EXPERT, str(n)) for n in range(model.experts.count) for name in names))
            for names in (local, logical)
        )
    return NameRule(local, logical)


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
    if model.hybrid:
        return hybrid_embedding_rows(model)
    shape = (model.vocabulary, model.hidden)
    return [Row("embedding.word_embeddings.weight", (EMBEDDING,), (shape,), Split.VOCABULARY)]


def output_rows(model: DecoderModel) -> list[Row]:
    """What the last pipeline stage holds besides layers."""
    if model.hybrid:
        return hybrid_output_rows(model)
    shape = (model.vocabulary, model.hidden)
    return [
        Row("decoder.final_layernorm.weight", ("model.norm.weight",), ((model.hidden,),), Split.REPLICATED),
        Row("output_layer.weight", (HEAD,), (shape,), Split.VOCABULARY),
    ]


def layer_rows(model: DecoderModel, spec: Spec, layer: int) -> list[Row]:
    """One layer: a decoder layer with its number left open, or a prediction layer, whose number is past the last.

    Layers with experts and layers without differ.
    """
    if model.hybrid:
        return hybrid_rows(model, model.hybrid, spec, layer)
    rows = _rows_of_kind(
        model,
        spec,
        experts=model.experts if layer in model.sparse_layers else None,
        delta=model.delta if model.delta and layer in model.delta.layers else None,
    )
    if layer < model.layers:
        return rows
    local = f"mtp.layers.{layer - model.layers}"
    inner = [replace(row, local=row.local.replace(DECODER_LAYER, f"{local}.transformer_layer")) for row in rows]
    return [_numbered(row, layer) for row in (*inner, *_predictor_rows(model, local))]


def _predictor_rows(model: DecoderModel, local: str) -> list[Row]:
    """What a prediction layer has around its decoder layer, which sees the next token beside the hidden state."""
    hidden, at = model.hidden, f"model.layers.{LAYER}"
    norms = {"enorm": "enorm", "hnorm": "hnorm", "final_layernorm": "shared_head.norm"}
    return [
        Row(f"{local}.eh_proj.weight", (f"{at}.eh_proj.weight",), ((hidden, 2 * hidden),), Split.ROWS),
        *(
            Row(f"{local}.{name}.weight", (f"{at}.{logical}.weight",), ((hidden,),), Split.REPLICATED)
            for name, logical in norms.items()
        ),
    ]


def _rows_of_kind(
    model: DecoderModel, spec: Spec, experts: Experts | None, delta: GatedDelta | None = None
) -> list[Row]:
    # Nothing but a linear layer can take in a norm, and a mixture of experts begins with its router.
    before_mlp = "mlp.linear_fc1.layer_norm_weight" if spec.fused and not experts else "pre_mlp_layernorm.weight"
    if delta:
        attention = delta_rows(model, delta, spec)
    else:
        attention = latent_rows(model, model.latent, spec) if model.latent else attention_rows(model, spec)
    return [
        *attention,
        layer_row(before_mlp, ["post_attention_layernorm"], "weight", [(model.hidden,)], Split.REPLICATED),
        *(expert_rows(model, spec, experts) if experts else dense_rows(model)),
    ]


def _rows_of_all_layers(model: DecoderModel, spec: Spec) -> Iterator[Row]:
    """Every kind of layer once, with the number left open except where two kinds name one tensor differently.

    With prediction layers every layer has its number, since the checkpoint names them as decoder layers, and with two
    kinds of attention or of layers, which share the norm before them.
    """
    if model.predictors or model.delta or model.hybrid:
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
    logical = tuple(name.replace(LAYER, str(layer)) for name in row.logical)
    return replace(row, local=row.local.replace(LAYER, str(layer)), logical=logical)
