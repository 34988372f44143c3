"""What each rank of the engine must hold, cut from a Hugging Face state dict by plain torch and nothing of weft: the
other half of the reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

_VOCABULARY_STEP = 64
"""vLLM pads vocabularies to this (`model_executor/layers/vocab_parallel_embedding.py`, DEFAULT_VOCAB_PADDING_SIZE);
padding rows are zero.
"""
_REPLICATED = ("input_layernorm", "post_attention_layernorm", "q_norm", "k_norm", "model.norm", "mlp.gate.weight")


def expected_parameters(state: Mapping[str, torch.Tensor], rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Every parameter of rank `rank` of a vLLM Qwen3 or Qwen3-MoE with `ranks` tensor-parallel ranks, by vLLM's names;
    experts stacked as they are before vLLM packs them.

    The key-value heads must divide by `ranks`.
    """
    expected: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ".experts." in name:
            continue
        stem, _, _ = name.rpartition(".")
        if "embed_tokens" in name or "lm_head" in name:
            padding = -tensor.shape[0] % _VOCABULARY_STEP
            padded = torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])])
            expected[name] = _part(padded, 0, rank, ranks)
        elif any(part in name for part in _REPLICATED):
            expected[name] = tensor
        elif stem.endswith(("o_proj", "down_proj")):
            expected[name] = _part(tensor, 1, rank, ranks)
        elif stem.endswith("q_proj"):
            parts = [state[name.replace("q_proj", other)] for other in ("q_proj", "k_proj", "v_proj")]
            expected[name.replace("q_proj", "qkv_proj")] = torch.cat([_part(part, 0, rank, ranks) for part in parts])
        elif stem.endswith("gate_proj"):
            parts = [state[name.replace("gate_proj", other)] for other in ("gate_proj", "up_proj")]
            expected[name.replace("gate_proj", "gate_up_proj")] = torch.cat(
                [_part(part, 0, rank, ranks) for part in parts]
            )
        elif not stem.endswith(("k_proj", "v_proj", "up_proj")):
            raise ValueError(f"{name}: no rule says where vLLM keeps it")
    for mlp in sorted({name.partition(".experts.")[0] for name in state if ".experts." in name}):
        experts = [_expert(state, f"{mlp}.experts.{n}", rank, ranks) for n in range(len(state[f"{mlp}.gate.weight"]))]
        for stacked, each in zip(("w13_weight", "w2_weight"), zip(*experts, strict=True), strict=True):
            expected[f"{mlp}.experts.routed_experts.{stacked}"] = torch.stack(each)
    return expected


def _expert(state: Mapping[str, torch.Tensor], name: str, rank: int, ranks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate over up, and down, of one expert."""
    gate, up, down = (state[f"{name}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return torch.cat([_part(gate, 0, rank, ranks), _part(up, 0, rank, ranks)]), _part(down, 1, rank, ranks)


@dataclass(frozen=True, slots=True)
class ByteComparison:
    """How the engine's memory compares with the reference."""

    compared_bytes: int
    mismatched_bytes: int
    mismatched_parameters: tuple[str, ...]
    """`rank N: name`, with what is wrong; also parameters that are missing, unexpected, misshapen or without
    elements.
    """


def compare(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], rank: int) -> ByteComparison:
    """Compare one rank's parameters, byte for byte."""
    compared, wrong, faults = 0, 0, []
    for name in sorted(expected.keys() | found.keys()):
        where = f"rank {rank}: {name}"
        if name not in found:
            faults.append(f"{where}: the engine does not have it")
        elif found[name].numel() == 0:
            faults.append(f"{where}: has no elements")
        elif name not in expected:
            faults.append(f"{where}: the reference does not have it")
        elif _kind(found[name]) != _kind(expected[name]):
            faults.append(f"{where}: is {_kind(found[name])}, not {_kind(expected[name])}")
        else:
            ours, theirs = _bytes(expected[name]), _bytes(found[name])
            different = int((ours != theirs).sum())
            compared += ours.numel()
            wrong += different
            if different:
                faults.append(f"{where}: {different} of {ours.numel()} bytes differ")
    return ByteComparison(compared, wrong, tuple(faults))


def _part(tensor: torch.Tensor, axis: int, rank: int, ranks: int) -> torch.Tensor:
    if tensor.shape[axis] % ranks:
        raise ValueError(f"an axis of {tensor.shape[axis]} does not divide among {ranks} ranks")
    size = tensor.shape[axis] // ranks
    return tensor.narrow(axis, rank * size, size)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype}{tuple(tensor.shape)}"
