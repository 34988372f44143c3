"""The parameters of one Megatron rank: which lines of the table it holds, under which numbers, in which shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from weft.errors import ConfigError
from weft_megatron.family import DecoderModel
from weft_megatron.rows import Row, Spec, Split
from weft_megatron.table import EMBEDDING, HEAD, embedding_rows, layer_rows, output_rows


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's place in a group that divides something evenly."""

    rank: int = 0
    size: int = 1

    def of(self, count: int) -> range:
        """This rank's share of `count` numbers; the size divides them."""
        share = count // self.size
        return range(self.rank * share, (self.rank + 1) * share)


@dataclass(frozen=True, slots=True)
class Stage:
    """What one rank is responsible for."""

    tensor: Part
    """Its place among the tensor-parallel ranks."""
    layers: tuple[int, ...]
    """Global numbers of its layers, from 0, of all its virtual pipeline chunks; those of prediction layers follow the
    last decoder layer's."""
    first: bool
    """Whether it holds the embedding as the first stage does."""
    last: bool
    """Whether it holds the final norm and the output projection."""
    padded_vocabulary: int
    """Rows of the embedding over all tensor-parallel ranks, padding included."""
    experts: Part = Part()
    """Its place among the expert-parallel ranks: which experts it has."""
    expert_tensor: Part = Part()
    """Its place among the ranks that divide each expert."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of one rank."""

    name: str
    """Megatron's name, with the global layer and expert numbers (trap 6)."""
    shape: tuple[int, ...]
    """Local shape."""
    logical: tuple[str, ...]
    """The logical tensors it holds parts of, ties resolved."""
    logical_shapes: tuple[tuple[int, ...], ...]
    split: Split
    components: tuple[int, ...]
    """Rows of each component on disk, where the split is by components."""
    part: Part
    """Which part of the split it is."""
    expert: int
    """Global number of the expert it belongs to, if it belongs to one; of the first if to several."""
    group: str
    """The group it moves in: `embedding`, `layers.N` or `output`."""


def parameters(model: DecoderModel, stage: Stage, spec: Spec = Spec.LOCAL) -> tuple[Parameter, ...]:
    """Every parameter of one rank, in the order in which groups move: embedding, layers, output.

    Raises `ConfigError` with every size that a parallel size does not divide; Megatron refuses them too.
    """
    _check_divisible(model, stage, spec)
    return tuple(_instances(model, stage, spec))


def _instances(model: DecoderModel, stage: Stage, spec: Spec) -> Iterator[Parameter]:
    # Layers that predict further tokens embed these again.
    if stage.first or any(layer >= model.layers for layer in stage.layers):
        yield from (_instance(model, stage, row, "embedding") for row in embedding_rows(model))
    for layer in stage.layers:
        for row in layer_rows(model, spec, layer):
            held = stage.experts.of(model.experts.count) if row.expert and model.experts else range(1)
            shares = [held] if row.gathers_experts else [range(number, number + 1) for number in held]
            yield from (_instance(model, stage, row, f"layers.{layer}", layer, share) for share in shares)
    if stage.last:
        for row in output_rows(model):
            # A stage that has both ends of a tied model keeps no second copy of the embedding.
            if not (row.logical == (HEAD,) and model.tied and stage.first):
                yield _instance(model, stage, row, "output")


def _instance(
    model: DecoderModel, stage: Stage, row: Row, group: str, layer: int = 0, experts: range = range(1)
) -> Parameter:
    part = stage.expert_tensor if row.expert else stage.tensor
    names = [name.format(layer=layer, expert=expert) for expert in experts for name in row.logical]
    return Parameter(
        name=row.local.format(layer=layer, expert=experts.start),
        shape=_local_shape(model, stage, row, part.size),
        logical=tuple(EMBEDDING if model.tied and name == HEAD else name for name in names),
        logical_shapes=row.shapes * len(experts),
        split=row.split,
        components=row.components,
        part=part,
        expert=experts.start,
        group=group,
    )


def _local_shape(model: DecoderModel, stage: Stage, row: Row, size: int) -> tuple[int, ...]:
    shape = row.shapes[0]
    match row.split:
        case Split.REPLICATED | Split.ROTARY_LAST:
            return shape
        case Split.VOCABULARY:
            return (stage.padded_vocabulary // size, *shape[1:])
        case Split.DELTA_INPUTS:
            return ((shape[0] + row.shapes[1][0]) // size, *shape[1:])
        case Split.ROWS | Split.COMPONENTS:
            return (shape[0] // size, *shape[1:])
        case Split.GROUPED | Split.GROUPED_GATED:
            return (model.groups * model.group_rows // size, *shape[1:])
        case Split.GATED:
            return (2 * shape[0] // size, *shape[1:])
        case Split.COLUMNS:
            return (shape[0], shape[1] // size)
        case Split.STACKED_GATED:
            return (shape[-1] // size, *shape[1:-1])
        case Split.STACKED_COLUMNS:
            return (shape[-1], *(wide // size for wide in shape[1:-1]))
        case Split.LEGACY_GATED:
            return (shape[1], _held(model, stage) * 2 * shape[0] // size)
        case Split.LEGACY_COLUMNS:
            return (_held(model, stage) * shape[1] // size, shape[0])


def _held(model: DecoderModel, stage: Stage) -> int:
    """How many experts of a layer this rank has."""
    return len(stage.experts.of(model.experts.count)) if model.experts else 0


def _check_divisible(model: DecoderModel, stage: Stage, spec: Spec) -> None:
    size = stage.tensor.size
    faults = []
    divided = [
        ("attention heads", model.heads, "tp", size),
        ("padded vocabulary", stage.padded_vocabulary, "tp", size),
    ]
    if model.latent is None:
        divided += [("rows of linear_qkv", model.groups * model.group_rows, "tp", size)]
        if model.groups % size and size % model.groups:
            faults.append(f"key-value heads {model.groups} are neither a multiple nor a divisor of tp={size}")
    elif spec is Spec.LOCAL:
        divided += [("kv_lora_rank + qk_rope_head_dim", model.latent.key_rank + model.latent.rotary, "tp", size)]
        divided += [("q_lora_rank", model.latent.query_rank or 0, "tp", size)]
    if model.delta:
        divided += [("key heads of linear attention", model.delta.keys, "tp", size)]
    if model.hybrid:
        divided += [
            ("heads of Mamba", model.hybrid.heads, "tp", size),
            ("groups of Mamba", model.hybrid.groups, "tp", size),
        ]
    if model.predictors:
        divided += [("hidden size", model.hidden, "tp", size)]
    if model.dense_layers:
        divided += [("intermediate size", model.intermediate, "tp", size)]
    if model.experts:
        divided += [
            ("experts", model.experts.count, "ep", stage.experts.size),
            ("shared expert intermediate size", model.experts.shared, "tp", size),
            ("expert intermediate size", model.experts.intermediate, "etp", stage.expert_tensor.size),
        ]
    faults += [
        f"{what} {number} is not a multiple of {axis}={size}" for what, number, axis, size in divided if number % size
    ]
    if stage.padded_vocabulary < model.vocabulary:
        faults.append(f"padded vocabulary {stage.padded_vocabulary} is smaller than the vocabulary {model.vocabulary}")
    if model.linear_bias and model.experts and stage.expert_tensor.size > 1:
        faults.append(f"experts with biases do not divide among etp={stage.expert_tensor.size} ranks")
    if model.experts and spec.legacy and model.linear_bias:
        faults.append("the legacy grouped layout has no biases")
    if model.experts and spec.legacy and model.hybrid:
        faults.append("the legacy grouped layout is not mapped for experts without gates")
    if faults:
        raise ConfigError(f"{model.family}: {'; '.join(faults)}")
