"""Modules against checkpoints, without Transformers."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from torch import nn

from weft.errors import ConfigError
from weft.verification import Request, State, Verifier
from weft_dtensor import adapter, verify_module


class Tied(nn.Module):
    """An embedding that is also the output layer, a norm, and a buffer that no checkpoint holds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed_tokens = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3, bias=False)
        self.lm_head = nn.Linear(3, 7, bias=False)
        self.lm_head.weight = self.embed_tokens.weight
        self.register_buffer("cache", torch.ones(2), persistent=False)


def write(file: Path, tensors: dict[str, torch.Tensor]) -> str:
    """A safetensors file of float32 tensors, by the format's description."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(file)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def test_a_module_is_compared_by_name_with_ties_and_leftovers(tmp_path: Path) -> None:
    model = Tied()
    found = verify_module(model, write(tmp_path / "a", weights(model)))
    assert found.failures() == []
    assert [each.name for each in found.tensors] == ["embed_tokens.weight", "norm.weight"]
    assert dict(found.left_out)["cache"].startswith("non-persistent buffer")
    other = weights(model) | {"lm_head.weight": model.lm_head.weight + 1}
    found = verify_module(model, write(tmp_path / "b", other))
    assert [each.name for each in found.tensors if each.state is State.DIFFERENT] == ["lm_head.weight"]


def test_a_bfloat16_module_equals_its_float32_checkpoint_by_a_declared_cast(tmp_path: Path) -> None:
    model = Tied()
    path = write(tmp_path / "a", weights(model))
    model.to(torch.bfloat16)
    assert {each.state for each in verify_module(model, path).tensors} == {State.UNEQUAL_KIND}
    assert verify_module(model, path, casts=(("float32", "bfloat16"),)).failures() == []


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request(model="m", checkpoint="m", parallel={"tp": 2}), "it has no tp"),
        (Request(model="m", checkpoint="m", dtype="bfloat61"), "dtype 'bfloat61'"),
    ],
)
def test_what_a_module_does_not_have_is_refused(request_: Request, words: str) -> None:
    assert isinstance(adapter, Verifier)
    with pytest.raises(ConfigError, match=words):
        adapter.verify(request_, print)
