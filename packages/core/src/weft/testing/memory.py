"""What the suites of sources and of targets share: layouts, the memory they speak of, and what it holds."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from weft.box import Box
from weft.contracts import Group, OfFramework, Source, Target
from weft.formats import format_fault
from weft.layout import Layout
from weft.views import Memory, piece_view, torch_dtype


def check_layouts(one: Layout, again: Layout, other: Layout) -> None:
    """One side's layout asked twice, and that of an equal side, are the same content."""
    assert again.address == one.address, "the layout has changed since it was asked first"
    assert other.address == one.address, "equal ranks have different layouts: names or sizes depend on the process"
    assert Layout.decode(one.encoded) == one


def check_description(side: Source | Target) -> None:
    """What is said of tensors is about the layout's own and well-formed, and so is whose weights they are. The error
    lists everything.
    """
    layout = side.layout()
    named = {tensor.name for tensor in layout.tensors}
    faults = [f"{name}: a format of no tensor" for name in sorted(layout.formats.keys() - named)]
    faults += [f"{name}: an extra of no tensor" for name in sorted(layout.extra.keys() - named)]
    faults += [f"{name}: {why}" for name, each in layout.formats.items() if (why := format_fault(each))]
    texts: list[object] = [
        text for each in layout.formats.values() for text in (each.name, *each.metadata, *each.metadata.values())
    ]
    texts += [text for said in layout.extra.values() for text in (*said, *said.values())]
    if isinstance(side, OfFramework):
        texts += side.framework
        faults += [f"framework is {side.framework}: give a name and a version"] * (not all(side.framework))
    faults += [f"{text!r} is no text" for text in texts if not isinstance(text, str)]
    if layout.accepts and isinstance(side, Source):
        faults.append("only targets accept formats")
    assert not faults, "; ".join(faults)


def check_memory(layout: Layout, memory: Memory) -> None:
    """Every buffer has memory of its dtype and size: dense, of one dimension. The error lists everything."""
    named = {buffer.name: buffer for buffer in layout.buffers}
    faults = [f"{name}: in the layout, without memory" for name in sorted(named.keys() - memory.keys())]
    faults += [f"{name}: memory that the layout does not name" for name in sorted(memory.keys() - named.keys())]
    for name in sorted(named.keys() & memory.keys()):
        buffer, tensor = named[name], memory[name]
        wanted = (torch_dtype(buffer.dtype), (buffer.numel,), True)
        found = (tensor.dtype, tuple(tensor.shape), tensor.is_contiguous())
        if found != wanted:
            faults.append(f"{name}: (dtype, shape, dense) is {found}, the layout says {wanted}")
    assert not faults, "; ".join(faults)


def groups(layout: Layout) -> list[Group]:
    """The groups as `produce` and `land` get them, in order."""
    return [
        Group(index, name, tuple(buffer.name for buffer in layout.buffers if buffer.group == index))
        for index, name in enumerate(layout.groups)
    ]


def box_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """A view of a box of a dense whole tensor, by slicing it in its split: independent of how boxes count elements."""
    part = tensor.reshape(box.factors)
    for axis, (low, high) in enumerate(zip(box.lo, box.hi, strict=True)):
        part = part.narrow(axis, low, high - low)
    return part


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor's bytes, one row per element."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device).copy_(tensor.detach())
    return dense.view(-1).view(torch.uint8).view(dense.numel(), dense.element_size())


def unequal(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """In words, how many elements differ in any bit; empty when none."""
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        return f"{found.dtype}{list(found.shape)}, expected {wanted.dtype}{list(wanted.shape)}"
    wrong = (bits(found) != bits(wanted)).any(1)
    return f"{int(wrong.sum())} of {found.numel()} elements differ" if wrong.any() else ""


def all_unequal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> str:
    """In words, every name whose tensors differ; empty when none does."""
    faults = [f"{name}: missing" for name in sorted(wanted.keys() - found.keys())]
    faults += [
        f"{name}: {fault}"
        for name in sorted(wanted.keys() & found.keys())
        if (fault := unequal(found[name], wanted[name]))
    ]
    return "; ".join(faults)


def piece_faults(layout: Layout, memory: Memory, tensors: Mapping[str, torch.Tensor]) -> str:
    """In words, every piece whose memory does not hold its box of the whole tensors; empty when all do."""
    faults = []
    for piece in layout:
        if fault := unequal(piece_view(piece, memory), box_of(tensors[piece.tensor], piece.box)):
            faults.append(f"{piece.tensor} {piece.box} in buffer {piece.buffer}: {fault}")
    return "; ".join(faults)
