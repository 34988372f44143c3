"""The parameters of one vLLM rank, in the order in which vLLM registers them.

Sources: `vllm/model_executor/layers/vocab_parallel_embedding.py` (rows padded to a multiple of 64, padding filled with
0); those of layers are said where their blocks are: `weft_vllm.attention`, `weft_vllm.recurrent`,
`weft_vllm.feed_forward`.
"""

from __future__ import annotations

from dataclasses import replace

from weft.builder import LayoutBuilder
from weft.layout import Layout
from weft_vllm.feed_forward import Experts
from weft_vllm.mesh import Mesh, Place
from weft_vllm.model import Model
from weft_vllm.parameters import Parameter, Writer, cut, vector
from weft_vllm.vision import last_norm, tower

_VOCABULARY_MULTIPLE = 64
_SCRATCH_SLOTS = 2
"""As `weft_vllm.engine.WeftInitInfo.scratch_slots`."""


def faults_of(model: Model, mesh: Mesh) -> list[str]:
    """Every size that does not divide, and what vLLM would do that is not mapped."""
    faults = [fault for block in model.blocks for fault in block.faults(mesh)]
    if _padded(model.vocabulary) % mesh.tp:
        faults.append(f"padded vocabulary {_padded(model.vocabulary)} over tp {mesh.tp}")
    if model.vision is not None:
        faults += model.vision.faults(mesh.tp)
        faults += [f"pp {mesh.pp} of a model with a vision tower, which is not mapped"] if mesh.pp > 1 else []
    if mesh.pp > len(model.layers):
        faults.append(f"layers {len(model.layers)} over pp {mesh.pp}")
    if mesh.ep > 1 and not any(isinstance(block, Experts) for block in model.blocks):
        faults.append(f"ep {mesh.ep} of a model without experts")
    return list(dict.fromkeys(faults))


def build_layout(model: Model, place: Place, writer: Writer) -> Layout:
    """The layout of one rank. Sizes are known to divide."""
    builder, ends = LayoutBuilder(scratch_slots=_SCRATCH_SLOTS), model.ends

    def put(group: str, parameter: Parameter) -> None:
        writer.put(builder, group, replace(parameter, name=model.engine_path(parameter.name)))

    table = f"{ends.root}.{ends.embedding}.weight"
    last = place.is_last or ends.ends_everywhere
    if model.vision is not None:
        for group, parameter in tower(model.vision, place):
            writer.put(builder, group, parameter)
    elif place.is_first or ends.ends_everywhere or (last and model.tied):
        put("pre", _vocabulary(table, model, place))
    for number in place.layers(len(model.layers)):
        layer, path = model.layers[number], f"{ends.root}.layers.{number}"
        for name, block in layer.blocks:
            for parameter in block.parameters(f"{path}.{name}", model.hidden, place):
                put(model.engine_path(path), parameter)
        for norm in layer.norms:
            put(model.engine_path(path), vector(f"{path}.{norm}.weight", model.hidden))
    if model.vision is not None:  # its groups come before the embedding, which so lands last
        writer.put(builder, "post", last_norm(model.vision))
        put("post", _vocabulary(table, model, place))
    if place.is_last or ends.norm_everywhere:
        put("post", vector(f"{ends.root}.{ends.norm}.weight", model.hidden))
    if last and not model.tied:
        put("post", _vocabulary("lm_head.weight", model, place))
    elif last and not model.engine_prefix:  # ties are recorded where the engine's names are those of the checkpoint
        builder.tie("lm_head.weight", table)
    return builder.build()


def _vocabulary(name: str, model: Model, place: Place) -> Parameter:
    """Rows of the padded vocabulary; what the last ranks have beyond its end is filled with 0."""
    here = _padded(model.vocabulary) // place.mesh.tp
    first = min(place.tp_rank * here, model.vocabulary)
    rows = min(here, model.vocabulary - first)
    parts = [cut(name, (model.vocabulary, model.hidden), 0, first, rows)] if rows else []
    return Parameter(name, parts, here * model.hidden)


def _padded(vocabulary: int) -> int:
    """Rows of the whole embedding, padding included."""
    return -(-vocabulary // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
