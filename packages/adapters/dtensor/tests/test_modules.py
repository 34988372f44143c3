"""Sources and targets over modules of plain tensors, in one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from weft import Layout, Member, NameMap, execute, plan
from weft.contracts import Group, Source, Target
from weft.errors import LayoutError
from weft.names import NameRule
from weft_dtensor import ModuleSource, ModuleTarget


class Block(nn.Module):
    """A layer with a persistent and a non-persistent buffer."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.register_buffer("scale", torch.randn(width))
        self.register_buffer("cache", torch.randn(3), persistent=False)


class Model(nn.Module):
    """Two layers between tied embeddings."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embed.weight


def member(name: str, source: Layout | None = None, target: Layout | None = None) -> Member:
    return Member(
        name, source.address if source else None, target.address if target else None, "r" if target else None, 1,
        "here", "here", "cpu",
    )  # fmt: skip


def move(source: ModuleSource, target: ModuleTarget) -> None:
    """Plan and execute in this process, into poisoned memory."""
    for memory in target.memory().values():
        memory.view(torch.uint8).fill_(0xFF)
    layouts = {layout.address: layout for layout in (source.layout(), target.layout())}
    planned = plan([member("s", source.layout())], [member("t", target=target.layout())], layouts)
    execute(planned, layouts, {"s": source.memory()}, {"t": target.memory()})


@pytest.mark.trap(13)
def test_a_module_takes_over_every_parameter_and_persistent_buffer_of_another() -> None:
    ours, theirs = Model(), Model()
    caches = [block.cache.clone() for block in theirs.layers]
    source, target = ModuleSource(ours), ModuleTarget(theirs)
    assert isinstance(source, Source)
    assert isinstance(target, Target)
    move(source, target)
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in ours.state_dict().items())
    assert all(torch.equal(block.cache, cache) for block, cache in zip(theirs.layers, caches, strict=True))
    assert [(tie.alias, tie.name) for tie in target.layout().ties] == [("head.weight", "embed.weight")]
    assert [name for name, _ in target.layout().skipped] == ["layers.0.cache", "layers.1.cache"]
    assert target.layout().groups == ("embed", "layers.0", "layers.1")


@pytest.mark.trap(13)
def test_wrappers_leave_no_trace_in_names() -> None:
    model, wrapped = Model(), Model()
    wrapped.layers[1] = checkpoint_wrapper(wrapped.layers[1])
    wrapped.layers[0] = torch.compile(wrapped.layers[0])  # type: ignore[call-overload]
    compiled = torch.compile(wrapped)
    assert any("_checkpoint_wrapped_module" in name for name, _ in compiled.named_parameters())
    assert any("_orig_mod" in name for name, _ in compiled.named_parameters())
    assert ModuleSource(compiled).layout().address == ModuleSource(model).layout().address


def test_two_tensors_of_one_name_without_prefixes_are_refused() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2))
    model._orig_mod = nn.Linear(2, 1, bias=False)
    with pytest.raises(LayoutError, match="weight: two tensors have this name"):
        ModuleSource(model)


def test_memory_aliases_the_module_and_a_transposed_tensor_is_described_where_it_is() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(12.0).view(3, 4).t())
    source = ModuleSource(model)
    assert source.memory()["weight"].data_ptr() == model.weight.data_ptr()
    assert source.memory()["weight"].tolist() == list(range(12))
    other = nn.Module()
    other.weight = nn.Parameter(torch.zeros(4, 3))
    move(source, ModuleTarget(other))
    assert torch.equal(other.weight, model.weight)
    back = nn.Module()
    back.weight = nn.Parameter(torch.zeros(3, 4).t())
    move(source, ModuleTarget(back))
    assert torch.equal(back.weight, model.weight)


def test_memory_with_gaps_can_be_read_and_is_refused_where_it_would_be_written() -> None:
    model, other = nn.Module(), nn.Module()
    model.weight = nn.Parameter(torch.arange(20.0).view(4, 5)[:, 1:4])
    other.weight = nn.Parameter(torch.zeros(4, 3))
    move(ModuleSource(model), ModuleTarget(other))
    assert torch.equal(other.weight, model.weight)
    with pytest.raises(LayoutError, match=r"weight: strides .* leave gaps"):
        ModuleTarget(model)


def test_every_tensor_that_cannot_be_described_is_named_at_once() -> None:
    model = nn.Module()
    model.wide = nn.Parameter(torch.zeros(3).expand(4, 3))
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    model.later = nn.Parameter(torch.zeros(2, device="meta"))
    model.few = nn.Parameter(torch.zeros(2, 2).to_sparse(), requires_grad=False)
    with pytest.raises(LayoutError) as caught:
        ModuleSource(model)
    text = str(caught.value)
    assert len(caught.value.faults) == 4
    for part in (
        "wide: strides (0, 1)",
        "phase: dtype complex64",
        "later: on the meta device",
        "few: a Tensor with layout torch.sparse_coo",
    ):
        assert part in text


def test_different_tensors_in_one_memory_are_refused_at_a_target() -> None:
    model = nn.Module()
    both = torch.zeros(8)
    model.first, model.second = nn.Parameter(both[:5]), nn.Parameter(both[4:])
    with pytest.raises(LayoutError, match="first and second share memory"):
        ModuleTarget(model)
    assert len(ModuleSource(model).layout().buffers) == 2


@pytest.mark.trap(18, 61)
def test_memory_that_has_moved_is_noticed_before_a_byte_moves() -> None:
    model = Model()
    source, target = ModuleSource(model), ModuleTarget(model)
    lease = source.hold(7)
    assert lease.version == 7
    lease.release()
    lease.release()
    assert target.begin(7) == 0
    model.layers[1].linear.weight.data = model.layers[1].linear.weight.data.clone()
    model.layers[0].scale = model.layers[0].scale.clone()
    for call in (source.hold, target.begin):
        with pytest.raises(LayoutError) as caught:
            call(8)
        assert sorted(fault.split(":")[0] for fault in caught.value.faults) == [
            "layers.0.scale",
            "layers.1.linear.weight",
        ]


def test_names_are_mapped_when_a_map_is_given() -> None:
    model = nn.Linear(2, 3)
    names = NameMap([NameRule(("weight",), ("w",)), NameRule(("bias",), ("b",))])
    assert [tensor.name for tensor in ModuleSource(model, names).layout().tensors] == ["w", "b"]
    with pytest.raises(LayoutError, match="bias: no rule covers this name"):
        ModuleSource(model, NameMap([NameRule(("weight",), ("w",))]))


def test_a_target_reloads_before_it_commits_and_remembers_a_failure() -> None:
    calls: list[str] = []
    target = ModuleTarget(nn.Linear(2, 2), reload=lambda: calls.append("reload"))
    target.land(Group(0, "weight", ("weight",)), None).synchronize()
    target.prepare_commit(1)
    assert calls == ["reload"]
    target.commit(1)
    error = RuntimeError("lost")
    target.abort(2, error)
    assert (target.version, target.failure) == (None, error)
    target.commit(3)
    assert (target.version, target.failure) == (3, None)


def test_nothing_is_produced() -> None:
    source = ModuleSource(nn.Linear(2, 2))
    assert source.produce(Group(0, "weight", ()), {}, None).query()
    with pytest.raises(LayoutError, match="weight: live, not produced"):
        source.produce(Group(0, "weight", ("weight",)), {"weight": torch.zeros(4)}, None)
