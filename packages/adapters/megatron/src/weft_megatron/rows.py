"""A line of the table of parameters, and what its words mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

LAYER, EXPERT = "{layer}", "{expert}"
"""Stand for global numbers in the names of rows (trap 6)."""
DECODER_LAYER = f"decoder.layers.{LAYER}"


class Spec(StrEnum):
    """Which layer specification the model was built with: they name norms and experts differently."""

    LOCAL = "local"
    """`get_gpt_layer_local_spec`: norms are modules of their own, experts are one module each."""
    TRANSFORMER_ENGINE = "transformer_engine"
    """`get_gpt_layer_with_transformer_engine_spec`: norms are part of the linear layer that follows them."""
    GROUPED = "transformer_engine_grouped"
    """The same with `moe_grouped_gemm`: a linear layer of all local experts has one numbered weight for each."""
    LOCAL_LEGACY = "legacy_grouped"
    """Local norms with `moe_grouped_gemm`, which is legacy there: all local experts are in two transposed weights."""
    LEGACY = "transformer_engine_legacy_grouped"
    """Transformer Engine's norms with the same experts (`moe_use_legacy_grouped_gemm`)."""

    @property
    def fused(self) -> bool:
        """Whether linear layers take in the norms before them."""
        return self not in (Spec.LOCAL, Spec.LOCAL_LEGACY)

    @property
    def legacy(self) -> bool:
        """Whether experts are in the legacy grouped layout."""
        return self in (Spec.LOCAL_LEGACY, Spec.LEGACY)


class Split(StrEnum):
    """How tensor parallelism divides a parameter."""

    REPLICATED = "replicated"
    VOCABULARY = "vocabulary"
    """Rows of the padded vocabulary."""
    ROWS = "rows"
    """Output rows of a column-parallel linear layer."""
    ROTARY_LAST = "rotary_last"
    """Whole on every rank, with the rotary rows of every head behind its others; on disk they come first."""
    GROUPED = "grouped"
    """Rows of q, k and v interleaved per key-value group (trap 5)."""
    GROUPED_GATED = "grouped_gated"
    """The same with gates behind a group's queries; on disk each head's gate follows its query."""
    DELTA_INPUTS = "delta_inputs"
    """Rows of queries, keys, values, gates and both rates of a rank's heads (trap 15); on disk per key head."""
    COMPONENTS = "components"
    """A rank's rows of every component in turn (trap 15); on disk each component is whole."""
    GATED = "gated"
    """Each rank's rows of gate, then the same rows of up (trap 4); `partition_stride` does not tell for experts."""
    COLUMNS = "columns"
    """Input columns of a row-parallel linear layer."""
    STACKED_GATED = "stacked_gated"
    """As `GATED`, of one expert, from a transposed stack of all whose columns are gate, up, gate, up (trap 72)."""
    STACKED_COLUMNS = "stacked_columns"
    """As `COLUMNS`, of one expert, from a transposed stack of all."""
    LEGACY_GATED = "legacy_gated"
    """As `GATED`, transposed, of every local expert in turn; the shape of the parameter hides that."""
    LEGACY_COLUMNS = "legacy_columns"
    """As `COLUMNS`, transposed, of every local expert in turn."""


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. Names are templates: `{layer}` and `{expert}` stand for global numbers (trap 6)."""

    local: str
    logical: tuple[str, ...]
    """In the order in which the parameter holds them."""
    shapes: tuple[tuple[int, ...], ...]
    """Of the logical tensors."""
    split: Split
    components: tuple[int, ...] = ()
    """Rows of each component on disk, where it is split by components."""
    expert: bool = False
    """Whether it is one expert's: divided among the expert groups instead of the tensor-parallel group."""

    @property
    def gathers_experts(self) -> bool:
        """Whether one parameter holds all of a rank's experts; logical names and shapes are those of one of them."""
        return self.expert and EXPERT not in self.local


def layer_row(local: str, logical: Sequence[str], kind: str, shapes: Sequence[tuple[int, ...]], split: Split) -> Row:
    """Of a decoder layer; names are those below the layer, `kind` is what follows the logical ones."""
    names = tuple(f"model.layers.{LAYER}.{name}.{kind}" for name in logical)
    return Row(f"{DECODER_LAYER}.{local}", names, tuple(shapes), split)
