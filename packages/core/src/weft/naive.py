"""The naive planner: what every copy must amount to, element by element, in plain index arithmetic.

The fast planner is tested against this page. It holds one Python object per element: use it on tensors of a few
thousand elements. Values are bit patterns (unsigned integers of the dtype's size), so that NaN and bfloat16 compare
like anything else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from weft.layout import ITEM_BYTES, Fill, Int64s, Layout, LogicalTensor, Piece

Bits = npt.NDArray[np.unsignedinteger]
POISON_BYTE = 0xA5
"""What memory holds before anything is written to it."""


def bits_dtype(dtype: str) -> np.dtype[np.unsignedinteger]:
    """The unsigned integer that is as wide as one element of `dtype`."""
    return np.dtype(f"<u{ITEM_BYTES[dtype]}")


def elements_of(piece: Piece) -> tuple[Int64s, Int64s]:
    """(flat logical index, buffer element) of every element of a piece, in the same order."""
    box = piece.box
    whole = np.arange(np.prod(box.factors, dtype=np.int64)).reshape(box.factors)
    logical = whole[tuple(slice(low, high) for low, high in zip(box.lo, box.hi, strict=True))]
    return logical.ravel(), _strided(piece.offset, logical.shape, piece.strides)


def fill_elements(fill: Fill) -> Int64s:
    """Every buffer element of a fill."""
    return _strided(fill.offset, fill.sizes, fill.strides)


def _strided(offset: int, sizes: Sequence[int], strides: Sequence[int]) -> Int64s:
    steps = np.array(strides, dtype=np.int64).reshape(-1, *[1] * len(sizes))
    return np.asarray(offset + (np.indices(sizes, dtype=np.int64) * steps).sum(axis=0), dtype=np.int64).ravel()


def all_ties(*sides: Mapping[str, Layout]) -> dict[str, str]:
    """alias → the name whose values it has, over all members."""
    return {tie.alias: tie.name for side in sides for layout in side.values() for tie in layout.ties}


def naive_copies(sources: Mapping[str, Layout], targets: Mapping[str, Layout]) -> dict[tuple[str, str, int], list[str]]:
    """(target member, its tensor, flat logical index) → sorted names of every source member that holds that element."""
    ties = all_ties(sources, targets)
    holders: dict[tuple[str, int], set[str]] = defaultdict(set)
    for member, layout in sources.items():
        for piece in layout:
            for index in elements_of(piece)[0].tolist():
                holders[ties.get(piece.tensor, piece.tensor), index].add(member)
    return {
        (member, piece.tensor, index): sorted(holders[ties.get(piece.tensor, piece.tensor), index])
        for member, layout in targets.items()
        for piece in layout
        for index in elements_of(piece)[0].tolist()
    }


def naive_faults(
    sources: Mapping[str, Layout], targets: Mapping[str, Layout], casts: Sequence[tuple[str, str]] = ()
) -> set[tuple[str, str, str]]:
    """Every reason why there is no plan, as (kind, member, tensor or buffer).

    Kinds: `shape` and `dtype` (a member declares a tensor otherwise than the first source that has it), `missing` (no
    source holds some element that a target wants), `unwanted` (a source has a tensor that no target declares), `tie` (a
    target ties what a source holds apart, or ties contradict or chain), `doubled` and `unclaimed` (an element of a
    target's buffer is written twice, or never), `empty` (no copies).
    """
    faults: set[tuple[str, str, str]] = set()
    ties = all_ties(sources, targets)
    wanted = {ties.get(tensor.name, tensor.name) for layout in targets.values() for tensor in layout.tensors}
    declared: dict[str, LogicalTensor] = {}
    for feeds, side in ((True, sources), (False, targets)):
        allowed = () if feeds else tuple(casts)
        for member, layout in side.items():
            conflicts = [tie for tie in layout.ties if ties[tie.alias] != tie.name or tie.name in ties]
            faults |= {("tie", member, tie.alias) for tie in conflicts}
            for tensor in layout.tensors:
                name = ties.get(tensor.name, tensor.name)
                first = declared.setdefault(name, tensor) if feeds else declared.get(name, tensor)
                if tensor.shape != first.shape:
                    faults.add(("shape", member, tensor.name))
                if tensor.dtype != first.dtype and (first.dtype, tensor.dtype) not in allowed:
                    faults.add(("dtype", member, tensor.name))
                if feeds and name not in wanted:
                    faults.add(("unwanted", member, tensor.name))
                if feeds and tensor.name in ties.keys() - all_ties(sources).keys():
                    faults.add(("tie", member, tensor.name))
    for member, layout in targets.items():
        times = {buffer.name: np.zeros(buffer.numel, np.int64) for buffer in layout.buffers}
        for piece in layout:
            np.add.at(times[piece.buffer], elements_of(piece)[1], 1)
        for fill in layout.fills:
            np.add.at(times[fill.buffer], fill_elements(fill), 1)
        faults |= {("doubled", member, buffer) for buffer, count in times.items() if (count > 1).any()}
        faults |= {("unclaimed", member, buffer) for buffer, count in times.items() if (count == 0).any()}
    copies = naive_copies(sources, targets)
    faults |= {("missing", member, tensor) for (member, tensor, _), holders in copies.items() if not holders}
    return faults if copies else faults | {("empty", "", "")}


def poisoned_memory(layout: Layout) -> dict[str, Bits]:
    """Memory for every buffer, all bytes poison: what nobody writes stays recognisable."""
    memory: dict[str, Bits] = {}
    for buffer in layout.buffers:
        poison = np.full(buffer.numel * ITEM_BYTES[buffer.dtype], POISON_BYTE, np.uint8)
        memory[buffer.name] = poison.view(bits_dtype(buffer.dtype))
    return memory


def expected_memory(logical: Mapping[str, Bits], layout: Layout) -> dict[str, Bits]:
    """Slice whole logical tensors into a member's buffers; fills hold their value, unclaimed elements stay poison."""
    memory = poisoned_memory(layout)
    for piece in layout:
        indices, elements = elements_of(piece)
        memory[piece.buffer][elements] = logical[piece.tensor].ravel()[indices]
    dtypes = {buffer.name: buffer.dtype for buffer in layout.buffers}
    for fill in layout.fills:
        value = torch.tensor([fill.value]).to(getattr(torch, dtypes[fill.buffer]))
        memory[fill.buffer][fill_elements(fill)] = value.view(torch.uint8).numpy().view(bits_dtype(dtypes[fill.buffer]))
    return memory


def read_back(layout: Layout, memory: Mapping[str, Bits]) -> dict[str, dict[int, int]]:
    """What a member's memory says about the logical tensors: tensor → flat logical index → bits.

    Raises `ValueError` where two places of one member disagree.
    """
    found: dict[str, dict[int, int]] = defaultdict(dict)
    for piece in layout:
        indices, elements = elements_of(piece)
        for index, bits in zip(indices.tolist(), memory[piece.buffer][elements].tolist(), strict=True):
            if found[piece.tensor].setdefault(index, bits) != bits:
                raise ValueError(f"{piece.tensor}[{index}] has two values, one of them in buffer {piece.buffer}")
    return dict(found)
