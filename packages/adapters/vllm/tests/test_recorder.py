"""What loaders do is recorded as copies only where it is copies, on small loaders made by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch

from weft.layout import LogicalTensor
from weft_vllm.overlay import overlay
from weft_vllm.recorder import LoadRecordingError, record
from weft_vllm.recording import SlotRecord

Loader = Callable[[torch.Tensor, torch.Tensor], object]


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run(loader: Loader, slot: torch.Tensor, *shape: int, dtype: str = "float32") -> SlotRecord:
    def load(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for _, tensor in weights:
            loader(slot, tensor)

    return record(load, [LogicalTensor("w", shape, dtype)], {"slot": slot})["slot"]


def replay(loader: Loader, slot_shape: tuple[int, ...], shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """The parameter as real loading leaves it, and as the recorded copies leave it; both start out poisoned."""
    source = torch.arange(1.0, 1.0 + int(torch.Size(shape).numel())).reshape(shape)
    loaded = torch.full(slot_shape, -7.0)
    loader(loaded, source.clone())
    entry = run(loader, meta(*slot_shape), *shape)
    assert entry.derived == []
    replayed = torch.full(slot_shape, -7.0)
    placed, _ = overlay(replayed.numel(), entry.writes)
    for part in placed:
        where = replayed.as_strided(part.memory.sizes, part.memory.strides, part.memory.offset)
        if isinstance(part.value, float):
            where.fill_(part.value)
        else:
            view = part.value.view
            where.copy_(source.as_strided(view.sizes, view.strides, view.offset))
    return loaded, replayed


LOADERS: dict[str, tuple[Loader, tuple[int, ...], tuple[int, ...]]] = {
    "whole": (lambda p, w: p.data.copy_(w), (4, 6), (4, 6)),
    "narrow rows": (lambda p, w: p.data.copy_(w.narrow(0, 3, 2)), (2, 6), (8, 6)),
    "narrow columns": (lambda p, w: p.data.copy_(w[:, 2:5]), (4, 3), (4, 6)),
    "into a range": (lambda p, w: p.data.narrow(0, 2, 4).copy_(w), (8, 6), (4, 6)),
    "transposed": (lambda p, w: p.data.copy_(w.t()), (6, 4), (4, 6)),
    "into a transposed view": (lambda p, w: p.data.t().copy_(w), (6, 4), (4, 6)),
    "chunks": (lambda p, w: [a.copy_(b) for a, b in zip(p.data.chunk(2, 1), w.chunk(2), strict=True)], (3, 8), (6, 4)),
    "unbound": (lambda p, w: [p.data[n].copy_(row) for n, row in enumerate(reversed(w.unbind(0)))], (3, 5), (3, 5)),
    "interleaved": (lambda p, w: p.data.view(4, 2, 5).copy_(w.view(2, 4, 5).transpose(0, 1)), (8, 5), (8, 5)),
    "alternating columns": (lambda p, w: p.data[:, ::2].copy_(w), (4, 6), (4, 3)),
    "flattened": (lambda p, w: p.data.copy_(w.reshape(-1)), (24,), (4, 6)),
    "a scalar": (lambda p, w: p.data.copy_(w.reshape(1)), (1,), ()),
    "padded": (lambda p, w: (p[:5].data.copy_(w), p[5:].data.fill_(0)), (8, 3), (5, 3)),
    "zeroed, then partly written": (lambda p, w: (p.data.zero_(), p.data[1:3].copy_(w)), (5, 3), (2, 3)),
    "written twice, overlapping": (lambda p, w: (p.data[:3].copy_(w[:3]), p.data[2:].copy_(w[3:])), (5, 2), (6, 2)),
    "copied, zeroed and copied again": (lambda p, w: (p[:2].copy_(w), w.zero_(), p[2:].copy_(w)), (4, 3), (2, 3)),
    "zeroed through a view of all": (lambda p, w: (w.t().zero_(), p.copy_(w[1:])), (3, 5), (4, 5)),
    "a detached copy": (lambda p, w: p.data.copy_(w.detach().clone().contiguous()[1:3]), (2, 6), (4, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", LOADERS)
def test_recorded_copies_leave_what_loading_leaves(name: str) -> None:
    loaded, replayed = replay(*LOADERS[name])
    assert torch.equal(loaded, replayed)


def test_live_memory_is_not_touched_and_views_cost_no_storage() -> None:
    entry = run(lambda p, w: p.data.copy_(w), meta(1 << 20, 1 << 14), 1 << 20, 1 << 14)
    assert len(entry.writes) == 1


DERIVED: dict[str, Loader] = {
    "negated and exponentiated": lambda p, w: p.data.copy_(-torch.exp(w)),
    "scaled in place after its copy": lambda p, w: (p.data.copy_(w), p.data.mul_(2)),
    "read after its copy and written again": lambda p, w: (p.data.copy_(w), p.data.copy_(p.data.clone())),
    "its first rows read and written into the last": lambda p, w: (p.data.copy_(w), p.data[2:].copy_(p.data[:2])),
    "changed in place before its copy": lambda p, w: (w.add_(1), p.data.copy_(w)),
    "zeroed in part before its copy": lambda p, w: (w[:2].zero_(), p.data.copy_(w)),
    "zeroed and changed again before its copy": lambda p, w: (w.zero_(), w[0].add_(1), p.data.copy_(w)),
    "cast through a narrower type": lambda p, w: p.data.copy_(w.to(torch.bfloat16).to(torch.float32)),
    "the bits of another type": lambda p, w: p.data.copy_(w.view(torch.int32)),
    "broadcast": lambda p, w: p.data.copy_(w[:1]),
    "a constant from nowhere": lambda p, w: (p.data.copy_(w), p.data.copy_(torch.ones(4, 4))),
    "added to": lambda p, w: p.data.add_(w),
    "permuted by a computed index": lambda p, w: p.data.copy_(w[torch.tensor([1, 0, 3, 2])]),
    "a sum of two parts": lambda p, w: p.data.copy_(torch.cat([w[:2] + w[2:], w[2:]])),
}  # fmt: skip


@pytest.mark.trap(70)
@pytest.mark.parametrize("name", DERIVED)
def test_anything_but_copies_is_derived_and_never_a_copy(name: str) -> None:
    entry = run(DERIVED[name], meta(4, 4), 4, 4)
    assert entry.derived
    assert entry.inputs == {"w"}


def test_a_cast_to_the_parameters_dtype_is_a_copy() -> None:
    entry = run(lambda p, w: p.data.copy_(w.to(torch.bfloat16)[:2]), meta(2, 4, dtype=torch.bfloat16), 4, 4)
    assert entry.derived == []
    assert len(entry.writes) == 1


def test_values_asked_for_while_loading_are_an_error_that_names_the_tensor() -> None:
    with pytest.raises(LoadRecordingError, match="checkpoint tensor w"):
        run(lambda p, w: p.data.fill_(w.max().item()), meta(4, 4), 4, 4)


@pytest.mark.trap(55)
def test_a_loader_bound_to_a_live_tensor_is_an_error() -> None:
    live = torch.zeros(4, 4)
    with pytest.raises(LoadRecordingError, match="live engine"):
        run(lambda p, w: live.copy_(w), meta(4, 4), 4, 4)


@pytest.mark.trap(53)
def test_a_parameter_whose_memory_is_replaced_while_loading_is_an_error() -> None:
    def loader(parameter: torch.Tensor, weight: torch.Tensor) -> None:
        parameter.data = torch.empty(4, 4, device="meta")

    with pytest.raises(LoadRecordingError, match="replaced the memory of slot"):
        run(loader, meta(4, 4), 4, 4)


@pytest.mark.trap(13)
def test_what_no_copy_reaches_is_reported_as_holes() -> None:
    entry = run(lambda p, w: (p.data[:2].copy_(w), p.data[5:].fill_(0)), meta(6, 4), 2, 4)
    placed, holes = overlay(24, entry.writes)
    assert [(hole.offset, hole.sizes) for hole in holes] == [(8, (3, 4))]
    assert len(placed) == 2
