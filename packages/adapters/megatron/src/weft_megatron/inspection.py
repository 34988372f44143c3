"""Reading a live Megatron model: what this rank holds, checked against what it should hold."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from weft.errors import ConfigError, LayoutError
from weft.layout import ITEM_BYTES, Layout
from weft_megatron.adapter import starts_in_float32
from weft_megatron.agreement import config_faults
from weft_megatron.configs import read_config
from weft_megatron.parameters import Parameter, Part, Stage, parameters
from weft_megatron.placement import layout_of
from weft_megatron.rows import Spec
from weft_megatron.table import name_map
from weft_megatron.upstream import Chunk, chunks_of


class HasToDict(Protocol):
    """A transformers `PretrainedConfig`."""

    def to_dict(self) -> dict[str, Any]:
        """The config as a mapping."""
        ...


@dataclass(frozen=True, slots=True)
class Inspection:
    """One rank's live model as weft sees it."""

    chunks: tuple[Chunk, ...]
    layout: Layout
    memory: Mapping[str, torch.Tensor]
    """Flat views of the live parameters, by buffer name."""

    def check_addresses(self) -> None:
        """Raise `LayoutError` with every parameter whose memory is no longer the one that was inspected."""
        now = _tensors(self.chunks)
        faults = [
            f"{name}: moved since it was inspected; make the source or target after wrapping or casting the model"
            for name, memory in self.memory.items()
            if name not in now or now[name].data_ptr() != memory.data_ptr()
        ]
        if faults:
            raise LayoutError(faults)


def inspect_model(model: Any, hf_config: Mapping[str, Any] | HasToDict) -> Inspection:
    """Find all parameters and persistent buffers of this rank and prove that they are what the config implies.

    Ranks come from the process groups that the model was built with, never from the global rank (trap 2). Each buffer
    has its parameter's dtype, so norms and routers may be float32 beside bfloat16 weights. Raises `LayoutError` with
    every difference of configuration, name, shape and dtype, and what `chunks_of` and `read_config` raise.
    """
    config = hf_config if isinstance(hf_config, Mapping) else hf_config.to_dict()
    decoder, chunks = read_config(config), chunks_of(model)
    decoder = decoder.predicting(max(chunk.predictors for chunk in chunks))
    faults = list(dict.fromkeys(fault for chunk in chunks for fault in config_faults(chunk, decoder)))
    layers = [layer for chunk in chunks for layer in chunk.layers]
    count = decoder.layers + decoder.predictors
    if len(set(layers)) < len(layers) or any(layer >= count for layer in layers):
        faults.append(f"chunks hold the layers {layers}, expected distinct ones below {count}")
    tensors = _tensors(chunks)
    stage = Stage(
        tensor=chunks[0].tensor,
        layers=tuple(layers),
        first=any(chunk.first for chunk in chunks),
        last=any(chunk.last for chunk in chunks),
        padded_vocabulary=chunks[0].padded_vocabulary,
        experts=chunks[0].experts if decoder.experts else Part(),
        expert_tensor=chunks[0].expert_tensor if decoder.experts else Part(),
    )
    spec = _spec(tensors)
    names = name_map(decoder, spec)
    tensors = {name: tensor for name, tensor in tensors.items() if names.skipped(name) is None}
    try:
        held = parameters(decoder, stage, spec)
    except ConfigError as error:
        raise LayoutError([*faults, str(error)]) from error
    faults += _differences(held, tensors)
    if faults:
        raise LayoutError(faults)
    transient = (name for name in _transient(chunks) if names.skipped(name) is None)
    skipped = [(name, "non-persistent buffer: recomputed, in no checkpoint") for name in transient]
    dtypes = {name: _dtype(tensor) for name, tensor in tensors.items()}
    layout = layout_of(decoder, stage, held, dtypes, skipped)
    return Inspection(tuple(chunks), layout, {parameter.name: _flat(tensors[parameter.name]) for parameter in held})


def _spec(names: Iterable[str]) -> Spec:
    """The layer specification that gives such names."""
    names = list(names)
    fused = any(name.endswith(".layer_norm_weight") for name in names)
    if any(name.endswith(".mlp.experts.weight1") for name in names):
        return Spec.LEGACY if fused else Spec.LOCAL_LEGACY
    grouped = any(".mlp.experts.linear_fc1.weight" in name for name in names)
    return Spec.GROUPED if grouped else Spec.TRANSFORMER_ENGINE if fused else Spec.LOCAL


def _tensors(chunks: Sequence[Chunk]) -> dict[str, torch.Tensor]:
    return {chunk.global_name(name): tensor for chunk in chunks for name, tensor in chunk.parameters()}


def _transient(chunks: Sequence[Chunk]) -> list[str]:
    return sorted(chunk.global_name(name) for chunk in chunks for name in chunk.transient_buffers())


def _differences(held: Sequence[Parameter], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    expected = {parameter.name: parameter for parameter in held}
    faults = [
        f"{name}: missing from the model, expected shape {p.shape}"
        for name, p in expected.items()
        if name not in tensors
    ]
    weights = {_dtype(tensors[name]) for name in expected if name in tensors and not _may_be_float32(name)}
    if len(weights) > 1:
        faults.append(
            f"weights have several dtypes, {', '.join(sorted(weights))}; expected one (norms and routers may differ)"
        )
    for name, tensor in tensors.items():
        dtype = _dtype(tensor)
        if name not in expected:
            faults.append(f"{name}: {dtype}{tuple(tensor.shape)} is not part of this family, and no skip covers it")
            continue
        if tuple(tensor.shape) != expected[name].shape:
            faults.append(f"{name}: shape {tuple(tensor.shape)}, expected {expected[name].shape}")
        if dtype not in ITEM_BYTES or type(tensor.data) is not torch.Tensor:
            faults.append(
                f"{name}: {dtype} in a {type(tensor.data).__name__}, expected a plain tensor of a dtype weft moves"
            )
        elif _may_be_float32(name) and dtype not in {*weights, "float32"}:
            faults.append(f"{name}: {dtype}, expected the weights' dtype or float32")
        if not tensor.is_contiguous():
            faults.append(f"{name}: strides {tensor.stride()}, expected contiguous memory")
    return faults


def _may_be_float32(name: str) -> bool:
    """Whether a parameter may be float32 beside weights of a smaller dtype."""
    return starts_in_float32(name) or ".mlp.router." in name


def _dtype(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1)
