"""Names, shapes and dtypes of a checkpoint, from its files or from a config."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="names of a checkpoint come from transformers, which the engine brings")
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3MoeConfig

from weft.errors import ConfigError
from weft.layout import LogicalTensor
from weft_vllm.checkpoint import logical_tensors


def config(tied: bool) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip


def test_headers_of_the_files_decide(tmp_path: Path) -> None:
    save_file({"b": torch.zeros(3, 2, dtype=torch.bfloat16)}, tmp_path / "1.safetensors")
    save_file({"a": torch.zeros(4)}, tmp_path / "2.safetensors")
    assert logical_tensors(str(tmp_path), config(True), "float16") == [
        LogicalTensor("a", (4,), "float32"),
        LogicalTensor("b", (3, 2), "bfloat16"),
    ]


@pytest.mark.trap(13)
@pytest.mark.parametrize("tied", [True, False])
def test_without_files_the_config_names_what_is_saved(tied: bool, tmp_path: Path) -> None:
    names = [tensor.name for tensor in logical_tensors(str(tmp_path), config(tied), "bfloat16")]
    assert ("lm_head.weight" in names) is not tied
    assert names == sorted(names)
    assert len(names) == (13 if tied else 14)


@pytest.mark.trap(6)
def test_without_files_experts_are_named_one_by_one(tmp_path: Path) -> None:
    described = Qwen3MoeConfig(
        vocab_size=19, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=3, num_experts_per_tok=2, moe_intermediate_size=12,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(described).save_pretrained(tmp_path / "saved")
    saved = logical_tensors(str(tmp_path / "saved"), described, "float32")
    assert logical_tensors(str(tmp_path / "nothing"), described, "float32") == saved
    experts = {tensor.name: tensor.shape for tensor in saved if ".experts." in tensor.name}
    assert len(experts) == 9
    assert experts["model.layers.0.mlp.experts.2.down_proj.weight"] == (16, 12)


def test_a_damaged_header_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(ConfigError, match=r"model\.safetensors"):
        logical_tensors(str(tmp_path), config(True), "bfloat16")
