"""What recording says that loading wrote, and where."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from weft.box import Affine


@dataclass(frozen=True, slots=True)
class Read:
    """Elements of a checkpoint tensor: an affine view of it, flattened."""

    tensor: str
    view: Affine


@dataclass(frozen=True, slots=True)
class Write:
    """One write into a parameter, in the order of loading."""

    region: Affine
    """Elements of the parameter's memory, from its first element."""
    value: Read | float
    """What is written there: elements of a checkpoint tensor (same index space), or one constant."""


@dataclass(slots=True)
class SlotRecord:
    """What loading wrote into one parameter or buffer."""

    writes: list[Write] = field(default_factory=list)
    inputs: set[str] = field(default_factory=set)
    """Checkpoint tensors that went into it by any way."""
    derived: list[str] = field(default_factory=list)
    """Why it is more than copies; empty when every write is one."""


def dense_numel(sizes: Sequence[int], strides: Sequence[int]) -> int | None:
    """Elements of a tensor whose memory has neither holes nor repeats, in whatever order of axes; None when it has."""
    step = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, sizes, strict=True) if size != 1):
        if stride != step:
            return None
        step *= size
    return step if math.prod(sizes) == step else None
