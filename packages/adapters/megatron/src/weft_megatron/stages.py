"""How Megatron deals out layers to pipeline stages.

From `get_num_layers_to_build` in `transformer/transformer_block.py`, `get_transformer_layer_offset` in
`transformer/transformer_layer.py`, and `transformer/pipeline_parallel_layer_layout.py`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass

from weft.errors import ConfigError

# "(tt|)*3" is "tt|tt|tt|", then "t*3" is "ttt".
_REPEATS = (re.compile(r"\(([^)]+)\)\*(\d+)"), re.compile(r"(.)\*(\d+)"))


@dataclass(frozen=True, slots=True)
class Share:
    """What one pipeline stage holds, of all its chunks."""

    layers: tuple[int, ...]
    """Global numbers, from 0, in the order of its chunks."""
    first: bool
    """Whether it holds the embedding."""
    last: bool
    """Whether it holds the final norm and the output projection."""
    predictors: bool
    """Whether it holds the layers that predict further tokens; Megatron keeps them together."""


@dataclass(frozen=True, slots=True)
class Pipeline:
    """The flags that decide which stage has which layers. Each stage has `chunks` runs of consecutive layers."""

    stages: int
    chunks: int = 1
    """`virtual_pipeline_model_parallel_size`."""
    first: int | None = None
    """`num_layers_in_first_pipeline_stage`."""
    last: int | None = None
    """`num_layers_in_last_pipeline_stage`."""
    counts_embedding: bool = False
    """`account_for_embedding_in_pipeline_split`: the embedding counts as a layer of the first stage."""
    counts_loss: bool = False
    """`account_for_loss_in_pipeline_split`: the output projection counts as one of the last."""
    layout: str | None = None
    """`pipeline_model_parallel_layout`, such as `Et*3|(tt|)*29,m|L`; it says all by itself."""

    def deal(self, layers: int, predictors: int = 0) -> tuple[Share, ...]:
        """The share of every stage of `layers` layers, and `predictors` more that predict further tokens.

        Where the stages do not divide the layers and no flag says how, Megatron refuses; here the last stage has what
        equal blocks, rounded up, leave over, as `num_layers_in_last_pipeline_stage` would: 61 layers on 16 stages are
        15 times 4 and 1. Raises `ConfigError` when flags contradict each other or the number of layers (trap 3).
        """
        chunks = self._parsed(layers, predictors) if self.layout else self._counted(layers, predictors)
        dealt: list[list[int]] = [[] for _ in range(self.stages)]
        start = 0
        for number, chunk in enumerate(chunks):
            count = chunk.count("t")
            dealt[number % self.stages] += range(start, start + count)
            start += count
        held = ["".join(chunks[stage :: self.stages]) for stage in range(self.stages)]
        return tuple(
            Share(tuple(mine), first="E" in kinds, last="L" in kinds, predictors="m" in kinds)
            for mine, kinds in zip(dealt, held, strict=True)
        )

    def _counted(self, layers: int, predictors: int) -> list[str]:
        """What every chunk holds, in the order of layers, in the letters of Megatron's layouts."""
        counts = [count // self.chunks for count in self._stage_counts(layers)] * self.chunks
        counts[0] -= self.counts_embedding
        counts[-1] -= self.counts_loss
        chunks = ["t" * count for count in counts]
        chunks[0] = "E" + chunks[0]
        chunks[-1] += "m" * predictors + "L"
        return chunks

    def _stage_counts(self, layers: int) -> list[int]:
        """How many layers each stage has, an embedding and an output projection that count included."""
        first, last, counted = self.first, self.last, layers + self.counts_embedding + self.counts_loss
        faults = []
        if self.chunks > 1 and self.stages == 1:
            faults.append(f"vpp={self.chunks} needs more than one stage")
        if (self.counts_embedding or self.counts_loss) and not (first is last is None):
            faults.append("first and last do not go with an embedding or a loss that counts as a layer")
        if first is last is None and counted == layers and layers % self.stages:
            last = layers - math.ceil(layers / self.stages) * (self.stages - 1)
        before, after = ([] if end is None else [end] for end in (first, last))
        middle, rest = self.stages - len(before + after), counted - sum(before + after)
        block = rest // max(middle, 1)
        counts = [*before, *[block] * middle, *after]
        if len(counts) != self.stages or sum(counts) != counted or min(counts) < 0 or last == 0:
            faults.append(
                f"{layers} layers do not divide into pp={self.stages} stages with first={self.first} and "
                f"last={self.last}; give first, last or a layout that fits"
            )
        faults += [
            f"stage {stage} has {count} layers, which do not divide into vpp={self.chunks} chunks"
            for stage, count in enumerate(counts)
            if count % self.chunks
        ]
        spare = counts[0] // self.chunks - self.counts_embedding, counts[-1] // self.chunks - self.counts_loss
        if min(spare) < 0 <= min(counts):
            faults.append(f"{layers} layers leave no place for an embedding or a loss that counts as one")
        if faults:
            raise ConfigError(f"pipeline: {'; '.join(faults)}")
        return counts

    def _parsed(self, layers: int, predictors: int) -> list[str]:
        """The same from a layout, by Megatron's own rules."""
        text = (self.layout or "").replace(",", "")
        for repeat in _REPEATS:
            text = repeat.sub(lambda found: found[1] * int(found[2]), text)
        chunks, flat = text.split("|"), text.replace("|", "")
        faults = []
        if len(chunks) != self.stages * self.chunks:
            faults.append(f"{len(chunks)} chunks, expected pp={self.stages} x vpp={self.chunks}")
        if flat != "E" + "t" * layers + "m" * predictors + "L":
            found = ", ".join(f"{count} {letter}" for letter, count in Counter(flat).items())
            faults.append(f"found {found}; expected 1 E, {layers} t, {predictors} m and 1 L, in this order")
        if sum("m" in chunk for chunk in chunks) > 1:
            faults.append("all m must be in one chunk")
        if not (self.first is self.last is None) or self.counts_embedding or self.counts_loss:
            faults.append("it says all by itself: give no first, no last, and no embedding or loss that counts")
        if faults:
            raise ConfigError(f"pipeline layout {self.layout!r}: {'; '.join(faults)}")
        return chunks
