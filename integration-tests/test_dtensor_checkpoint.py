"""Safetensors checkpoints and Transformers models through weft-dtensor: files to live modules, and analytic layouts."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import COMMON, tiny
from support.transported import Over
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)

import weft
from weft import Member, Refit, plan, serve_store
from weft.testing.job import Part, all_succeeded
from weft.testing.members import poison
from weft.views import piece_view
from weft_dtensor import CheckpointSource, ModuleSource, ModuleTarget, adapter

CONFIGS = {
    "dense tied": Qwen3Config(**COMMON, tie_word_embeddings=True),
    "dense": Qwen3Config(**COMMON, tie_word_embeddings=False),
    "moe": Qwen3MoeConfig(**COMMON, moe_intermediate_size=8, num_experts=5, num_experts_per_tok=2),
}
README = Path(__file__).parents[1] / "packages" / "adapters" / "dtensor" / "README.md"


def model(kind: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()


def outputs(found: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return found(torch.arange(12).view(2, 6)).logits


@pytest.fixture(params=sorted(CONFIGS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path]:
    """A checkpoint in several files, as Transformers writes it."""
    model(request.param, 1).save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return request.param, tmp_path


@pytest.mark.trap(13, 71)
@pytest.mark.parametrize("transport", ["local", "gloo", "nixl"])
def test_a_module_filled_from_files_computes_what_transformers_does(saved: tuple[str, Path], transport: str) -> None:
    kind, path = saved
    served = model(kind, 2)
    target = ModuleTarget(served)
    poison([memory.view(torch.uint8) for memory in target.memory().values()])
    server = serve_store()
    job = Over(server.url, weft.Expect(sources=2, replicas=1), transport=transport)

    def send(refit: Refit) -> int:
        offer = refit.offer(1)
        offer.released()
        return offer.committed().bytes

    parts = [Part(f"file/{rank}", send, source=CheckpointSource(path, rank, 2)) for rank in range(2)]
    parts.append(Part("served", lambda refit: refit.receive(1).bytes, target=target, replica="served"))
    try:
        results = job.run(parts)
    finally:
        server.close()
    all_succeeded(results)
    assert results["file/0"] > 0
    assert results["file/1"] > 0
    assert results["file/0"] + results["file/1"] == results["served"] == target.layout().nbytes
    assert torch.equal(outputs(served), outputs(AutoModelForCausalLM.from_pretrained(path)))
    assert torch.equal(outputs(served), outputs(model(kind, 1)))


@pytest.mark.trap(71)
def test_a_modules_names_and_boxes_are_those_on_disk(saved: tuple[str, Path]) -> None:
    kind, path = saved
    source = ModuleSource(model(kind, 1))
    stored = {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}
    assert {t.name: t.shape for t in source.layout().tensors} == {n: tuple(t.shape) for n, t in stored.items()}
    for piece in source.layout():
        view = piece_view(piece, source.memory())
        assert torch.equal(view.reshape(-1), stored[piece.tensor].reshape(-1)), piece


@pytest.mark.parametrize(
    "family",
    [
        "bamba", "deepseek_v3", "glm4_moe", "glm_moe_dsa", "gpt_oss", "mixtral", "nemotron_h", "olmoe", "qwen2_5_vl",
        "qwen2_moe", "qwen2_vl", "qwen3_moe", "qwen3_next",
    ],
)  # fmt: skip
@pytest.mark.trap(13, 15, 71)
def test_names_and_boxes_of_every_family_are_those_on_disk(family: str, tmp_path: Path) -> None:
    made = tiny(family)
    for tensor in made.state_dict().values():
        tensor.copy_(torch.randn(tensor.shape))  # so that no two parts of anything are equal
    made.save_pretrained(tmp_path)
    source, stored = ModuleSource(made), CheckpointSource(tmp_path)
    on_disk = {tensor.name: tensor.shape for tensor in stored.layout().tensors}
    assert {tensor.name: tensor.shape for tensor in source.layout().tensors} == on_disk
    compared = 0
    for piece in source.layout():
        held = piece_view(piece, source.memory())
        assert torch.equal(held.reshape(-1), stored.memory()[piece.tensor]), piece
        compared += held.numel()
    assert compared == sum(math.prod(shape) for shape in on_disk.values())
    (layout,) = adapter.layouts(made.config.to_dict(), {}, "float32")
    assert layout.address == source.layout().address


@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_layouts_from_a_config_are_those_of_the_live_module(kind: str) -> None:
    (layout,) = adapter.layouts(CONFIGS[kind].to_dict(), {}, "float32")
    assert layout.address == ModuleTarget(model(kind, 1)).layout().address


@pytest.mark.trap(8, 16, 71)
@pytest.mark.parametrize("kind", sorted(CONFIGS))
def test_uneven_shards_from_a_config_cover_a_whole_module(kind: str) -> None:
    ranks = adapter.layouts(CONFIGS[kind].to_dict(), {"fsdp": 3, "replicate": 2}, "float32")
    assert len(ranks) == adapter.world_size({"fsdp": 3, "replicate": 2}) == 6
    assert [ranks[rank].address for rank in range(3)] == [ranks[rank].address for rank in range(3, 6)]
    target = adapter.layouts(CONFIGS[kind].to_dict(), {}, "float32")[0]
    layouts = {layout.address: layout for layout in (*ranks, target)}
    sources = [
        Member(f"s/{rank}", layout.address, None, None, 0, "here", "here", "cpu") for rank, layout in enumerate(ranks)
    ]
    whole = plan(sources, [Member("t", None, target.address, "r", 1, "here", "here", "cpu")], layouts)
    assert whole.statistics.bytes == target.nbytes
    assert min(whole.statistics.egress_bytes.values()) > 0


@pytest.mark.trap(10, 71)
def test_a_mixture_of_eighteen_thousand_tensors_plans_to_full_coverage() -> None:
    config = {
        "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "vocab_size": 151936, "tie_word_embeddings": False,
    }  # fmt: skip
    ranks = adapter.layouts(config, {"fsdp": 4}, "bfloat16")
    (target,) = adapter.layouts(config, {}, "bfloat16")
    assert len(target.tensors) == 18_867
    sources = [
        Member(f"s/{rank}", held.address, None, None, 0, "here", "here", "cpu") for rank, held in enumerate(ranks)
    ]
    wanted = Member("t", None, target.address, "r", 1, "here", "here", "cpu")
    whole = plan(sources, [wanted], {layout.address: layout for layout in (*ranks, target)})
    assert whole.statistics.bytes == target.nbytes
    assert whole.statistics.tensors == 18_867
    assert whole.statistics.egress_max_over_mean < 1.01


def test_a_config_that_transformers_refuses_is_an_error_of_the_config() -> None:
    with pytest.raises(weft.ConfigError, match="makes no language model"):
        adapter.layouts({"model_type": "nobody"}, {}, "float32")


def test_the_readmes_examples_run(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 3
    model("moe", 1).save_pretrained(tmp_path)
    found: dict[str, Any] = {"path": tmp_path, "model": model("moe", 2)}
    found["hf_config"] = Qwen3MoeConfig(**COMMON, moe_intermediate_size=8, num_experts=8).to_dict()
    for block in blocks:
        exec(block, found)
    assert torch.equal(outputs(found["model"]), outputs(model("moe", 1)))
    assert len(found["layouts"]) == 16
