"""Megatron-Core computes the logits that Hugging Face computes, when filled through weft's layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from support.megatron_ranks import compute_logits
from support.processes import run_ranks
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

WORLD = 4
PADDED = 64
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "attn_implementation": "eager",
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS: dict[str, Any] = {
    f"{name}, {'tied' if tied else 'untied'}": (config, model, {"tie_word_embeddings": tied} | more)
    for name, config, model, more in (
        ("llama", LlamaConfig, LlamaForCausalLM, {}),
        ("llama with biases", LlamaConfig, LlamaForCausalLM, {"attention_bias": True, "mlp_bias": True}),
        # Qwen2 has no head_dim of its own.
        ("qwen2", Qwen2Config, Qwen2ForCausalLM, {"head_dim": 4}),
        ("qwen3", Qwen3Config, Qwen3ForCausalLM, {}),
    )
    for tied in (True, False)
}
MODELS |= {
    "experts": (Qwen3MoeConfig, Qwen3MoeForCausalLM, EXPERTS | {"norm_topk_prob": True}),
    "experts in one layer, tied": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0], "tie_word_embeddings": True},
    ),
}
SIGMOID = {
    "n_routed_experts": 8,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
LATENT = SIGMOID | {
    # Transformers takes it for the rotary part.
    "head_dim": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "n_group": 4,
    "topk_group": 2,
}
INDEXER = {"n_group": 1, "topk_group": 1, "index_n_heads": 2, "index_head_dim": 12, "index_topk": 6}
STACKED = {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False}
PARTLY = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.5}
MODELS |= {
    "mixtral": (MixtralConfig, MixtralForCausalLM, STACKED),
    "deepseek": (DeepseekV3Config, DeepseekV3ForCausalLM, LATENT),
    "deepseek without a query vector": (DeepseekV3Config, DeepseekV3ForCausalLM, LATENT | {"q_lora_rank": None}),
    "glm": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        SIGMOID | {"attention_bias": True, "use_qk_norm": True, "rope_parameters": PARTLY},
    ),
    "glm 5": (GlmMoeDsaConfig, GlmMoeDsaForCausalLM, LATENT | INDEXER),
    "gpt-oss": (GptOssConfig, GptOssForCausalLM, STACKED),
}
NEXT = EXPERTS | {
    "num_hidden_layers": 4,
    # With more ranks than these Megatron 0.16.1 takes all heads' gates for the queries of one rank, and fails.
    "num_key_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "norm_topk_prob": True,
    "mlp_only_layers": [2],
    "shared_expert_intermediate_size": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "tie_word_embeddings": False,
    "rope_parameters": PARTLY,
}
HYBRID = {
    "layers_block_type": ["linear_attention", "moe", "mlp", "full_attention"],
    "n_routed_experts": 8,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 8,
    "routed_scaling_factor": 2.5,
    "layer_norm_epsilon": 1e-5,
    "mamba_num_heads": 8,
    "mamba_head_dim": 6,
    "n_groups": 4,
    "ssm_state_size": 5,
    "conv_kernel": 4,
}
MODELS |= {"mamba": (NemotronHConfig, NemotronHForCausalLM, HYBRID)}
MODELS |= {"gated delta": (Qwen3NextConfig, Qwen3NextForCausalLM, NEXT)}
TP2 = {"tensor_model_parallel_size": 2}
EP2 = {"expert_model_parallel_size": 2}
ETP1 = {"expert_tensor_parallel_size": 1}
MESHES: dict[str, dict[str, int]] = {
    "tp1": {},
    "tp2": TP2,
    "tp4": {"tensor_model_parallel_size": 4},
    "tp2 pp2": TP2 | {"pipeline_model_parallel_size": 2},
}
EXPERT_MESHES: dict[str, dict[str, int]] = {
    "ep2": EP2,
    "ep4": {"expert_model_parallel_size": 4},
    "tp2 ep2 etp1": TP2 | EP2 | ETP1,
    "tp2 ep2 etp2": TP2 | EP2,
}
RUNS = [(name, mesh) for name in MODELS if name.startswith(("llama", "qwen", "experts")) for mesh in MESHES]
RUNS += [(name, mesh) for name in MODELS if name.startswith("experts") for mesh in EXPERT_MESHES]
RUNS += [
    (name, mesh) for name in ("mixtral", "deepseek", "glm", "glm 5") for mesh in ("tp2 pp2", "ep4", "tp2 ep2 etp1")
]
RUNS += [("gated delta", mesh) for mesh in ("tp1", "tp2", "tp4", "tp2 pp2", "tp2 ep2 etp1")]
RUNS += [("mamba", mesh) for mesh in (*MESHES, "tp2 ep2 etp1")]
# Megatron does not divide experts with biases.
RUNS += [("deepseek without a query vector", "tp4"), *(("gpt-oss", mesh) for mesh in ("tp1", "ep4", "tp2 ep2 etp1"))]
Logits = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Logits], list[dict[tuple[str, str], Logits]]]:
    """Logits of Hugging Face by model, and of every Megatron rank by model and mesh, from one start of all ranks."""
    directory: Path = tmp_path_factory.mktemp("outputs")
    torch.manual_seed(7)
    tokens = torch.randint(0, SIZES["vocab_size"], (3, 17))
    checkpoints, expected = {}, {}
    for name, (config, model_class, more) in MODELS.items():
        model = model_class(config(**(SIZES | more))).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms start at one and biases at zero, where a mistake would not show.
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if parameter.dim() == 1 else 0.0))
            for buffer_name, buffer in model.named_buffers():
                if buffer_name.endswith("e_score_correction_bias"):
                    buffer.copy_(torch.randn_like(buffer) * 0.2)
            expected[name] = model(tokens).logits.numpy()
        checkpoints[name] = str(directory / name)
        model.save_pretrained(checkpoints[name])
    found = run_ranks(
        compute_logits,
        WORLD,
        str(directory / "rendezvous"),
        PADDED,
        checkpoints,
        tokens.tolist(),
        MESHES | EXPERT_MESHES,
        RUNS,
    )
    return expected, found


@pytest.mark.trap(4, 5, 6, 13, 14, 15)
@pytest.mark.parametrize(("name", "mesh"), RUNS)
def test_megatron_gives_the_logits_of_hugging_face(
    name: str, mesh: str, both: tuple[dict[str, Logits], list[dict[tuple[str, str], Logits]]]
) -> None:
    expected, found = both
    answers = [answer[name, mesh] for answer in found if (name, mesh) in answer]
    assert len(answers) == (2 if mesh == "tp2 pp2" else WORLD)
    assert expected[name].std() > 0.5
    for answer in answers:
        assert answer.shape == expected[name].shape
        # Both are sums of float32 in orders of their own, which recurrent layers carry on; a wrong weight shows in 0.1.
        assert np.abs(answer - expected[name]).max() < 5e-4
