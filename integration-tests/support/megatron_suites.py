"""The conformance suites over Megatron-Core models; `test_megatron_conformance.py` runs them in their own process."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from support.megatron_model import end_job, start_job

from weft.testing.sources import SourceSuite, Trainer
from weft.testing.targets import Engine, TargetSuite
from weft_cli.demo.megatron_on_cpu import build_model
from weft_megatron import MegatronSource, MegatronTarget

pytestmark = [
    pytest.mark.filterwarnings("ignore:full scope is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:MLP requires ffn_hidden_size:DeprecationWarning"),
]

VOCABULARY, PADDED = 61, 64
HEADS, GROUPS, HEAD, HIDDEN, EXPERTS = 4, 2, 8, 16, 4
DENSE = {
    "model_type": "qwen3",
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_theta": 10000.0},
    "tie_word_embeddings": False,
}
SPARSE = DENSE | {
    "model_type": "qwen3_moe",
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def run(rank: int, world: int, rendezvous: str) -> int:
    """The exit code of pytest over this file, within a job of one rank."""
    start_job(rank, world, rendezvous)
    try:
        return int(pytest.main([__file__, "-q", "-p", "no:cacheprovider"]))
    finally:
        end_job()


@pytest.fixture(params=[DENSE, SPARSE], ids=["dense", "moe"])
def config(request: pytest.FixtureRequest) -> dict[str, object]:
    return request.param


def logical(model: GPTModel) -> dict[str, torch.Tensor]:
    """The Hugging Face tensors in an unsharded model's parameters, by Megatron's names."""
    found = {}
    for name, parameter in model.named_parameters():
        value = parameter.detach()
        ours = name.replace("decoder.layers.", "model.layers.")
        if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            found["lm_head.weight" if name.startswith("output") else "model.embed_tokens.weight"] = value[:VOCABULARY]
        elif name == "decoder.final_layernorm.weight":
            found["model.norm.weight"] = value
        elif name.endswith("linear_qkv.weight"):
            grouped = value.view(GROUPS, HEADS // GROUPS + 2, HEAD, HIDDEN)
            parts = {"q": grouped[:, :-2], "k": grouped[:, -2], "v": grouped[:, -1]}
            for part, rows in parts.items():
                found[ours.replace("attention.linear_qkv", f"attn.{part}_proj")] = rows.reshape(-1, HIDDEN)
        elif name.endswith("linear_fc1.weight"):
            stem = ours.replace("experts.local_experts", "experts").removesuffix("linear_fc1.weight")
            found[f"{stem}gate_proj.weight"], found[f"{stem}up_proj.weight"] = value.chunk(2)
        else:
            for theirs, hugging_face in NAMES.items():
                ours = ours.replace(theirs, hugging_face)
            found[ours] = value
    return found


NAMES = {
    "pre_mlp_layernorm": "post_attention_layernorm",
    "self_attention.linear_proj": "self_attn.o_proj",
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
    "experts.local_experts": "experts",
    "linear_fc2": "down_proj",
    "router": "gate",
}


class TestMegatronSource(SourceSuite):
    @pytest.fixture
    def make(self, config: dict[str, object]) -> Callable[[], Trainer]:
        def trainer() -> Trainer:
            model = build_model(config, padded_vocabulary=PADDED)

            def step() -> None:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter += 1

            return Trainer(MegatronSource(model, config), lambda: logical(model), step)

        return trainer


class TestMegatronTarget(TargetSuite):
    @pytest.fixture
    def make(self, config: dict[str, object]) -> Callable[[], Engine]:
        def engine() -> Engine:
            model = build_model(config, padded_vocabulary=PADDED)

            def addresses() -> dict[str, int]:
                return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}

            return Engine(MegatronTarget(model, config), lambda: logical(model), addresses)

        return engine
