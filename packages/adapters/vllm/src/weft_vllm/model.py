"""What the layouts of vLLM ranks depend on: a model as a stack of layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from weft_vllm.mesh import Mesh, Place
from weft_vllm.parameters import Parameter
from weft_vllm.vision import Vision


class Block(Protocol):
    """A part of a layer: attention, a recurrence, or what comes after them."""

    def faults(self, mesh: Mesh) -> list[str]:
        """Everything that does not divide, or that vLLM would do otherwise than is mapped."""
        ...

    def parameters(self, name: str, hidden: int, place: Place) -> Iterator[Parameter]:
        """Those of one rank, of a module called `name`, in the order in which vLLM registers them."""
        ...


@dataclass(frozen=True, slots=True)
class Layer:
    """A decoder layer: its modules, then its norms, in the order in which vLLM registers them."""

    blocks: tuple[tuple[str, Block], ...]
    """(module name, what it is)."""
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True)
class Ends:
    """Names of what comes before and after the layers, and which of it every pipeline stage has."""

    root: str = "model"
    embedding: str = "embed_tokens"
    norm: str = "norm"
    ends_everywhere: bool = False
    """Whether every stage has the embedding and the output layer."""
    norm_everywhere: bool = False


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder."""

    family: str
    hidden: int
    vocabulary: int
    tied: bool
    layers: tuple[Layer, ...]
    ends: Ends = field(default_factory=Ends)
    engine_names: Mapping[str, str] = field(default_factory=dict)
    """Parts of module paths that are called otherwise in the engine than in the checkpoint."""
    engine_prefix: str = ""
    """What the engine puts before the checkpoint's module paths of the decoder."""
    vision: Vision | None = None

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All that differ from one another."""
        return tuple(dict.fromkeys(block for layer in self.layers for _, block in layer.blocks))

    def engine_path(self, path: str) -> str:
        """What the engine calls a module or tensor of the checkpoint."""
        return self.engine_prefix + ".".join(self.engine_names.get(part, part) for part in path.split("."))
