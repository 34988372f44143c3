"""Live Megatron-Core models hold exactly what their analytic layouts say, and say so when they do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.megatron_ranks import inspect
from support.processes import run_ranks

from weft.layout import Layout
from weft_megatron import MegatronAdapter, Spec
from weft_megatron.configs import read_config
from weft_megatron.parameters import Part, Stage, parameters
from weft_megatron.placement import layout_of

WORLD = 4
PADDED = 64


def make_config(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "qwen3",
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": 50,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_theta": 10000.0},
    }
    return config | changes


EXPERTS = make_config(
    model_type="qwen3_moe",
    tie_word_embeddings=False,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    mlp_only_layers=[1],
)
LATENT = make_config(
    model_type="deepseek_v3",
    tie_word_embeddings=False,
    num_key_value_heads=4,
    head_dim=8,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    num_nextn_predict_layers=1,
)
SPARSE = LATENT | {"model_type": "glm_moe_dsa", "index_n_heads": 3, "index_head_dim": 20, "index_topk": 4}
KIMI = LATENT | {"model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0}
MIXTRAL = make_config(
    model_type="mixtral", tie_word_embeddings=False, num_local_experts=8, num_experts_per_tok=2, intermediate_size=16
)
GLM = LATENT | {"model_type": "glm4_moe", "num_key_value_heads": 2, "attention_bias": True, "use_qk_norm": True}
GLM |= {"n_group": 1, "topk_group": 1, "n_shared_experts": 2}
GPT_OSS = MIXTRAL | {"model_type": "gpt_oss", "attention_bias": True}
NEXT = EXPERTS | {
    "model_type": "qwen3_next",
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "linear_attention"],
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
    "linear_conv_kernel_dim": 3,
    "shared_expert_intermediate_size": 8,
}
HYBRID = make_config(
    model_type="nemotron_h",
    tie_word_embeddings=False,
    layers_block_type=["linear_attention", "mlp", "full_attention", "moe"],
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=8,
    moe_shared_expert_intermediate_size=12,
    routed_scaling_factor=2.5,
    layer_norm_epsilon=1e-5,
    mamba_num_heads=8,
    mamba_head_dim=6,
    n_groups=4,
    ssm_state_size=5,
    conv_kernel=4,
)
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
ETP1 = {"expert_tensor_parallel_size": 1}
ETP2 = {"expert_tensor_parallel_size": 2}
TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
TP4 = {"tensor_model_parallel_size": 4}
ORDER = "pp-tp-cp-ep-dp"
LLAMA = make_config(model_type="llama", tie_word_embeddings=False)
QWEN2 = make_config(model_type="qwen2")
BIASED = make_config(model_type="llama", attention_bias=True, mlp_bias=True)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "tp2 pp2, tied": (make_config(), TP2 | PP2, "bare"),
    "tp2 pp2, stages first": (make_config(), TP2 | PP2 | {"order": ORDER}, "bare"),
    "tp4, two groups, qkv biases": (QWEN2, TP4, "bare"),
    "tp1 dp4, all biases": (BIASED, {}, "bare"),
    "tp2 dp2, wrapped": (LLAMA, TP2, "float16"),
    "tp2 dp2, float32 norms": (LLAMA, TP2, "bare-bfloat16"),
    "pp2 dp2, two chunks a stage": (
        make_config(tie_word_embeddings=False),
        PP2 | {"virtual_pipeline_model_parallel_size": 2},
        "chunks",
    ),
    "ep2": (EXPERTS, EP2, "bare"),
    "ep2, expert data parallel ranks first": (EXPERTS, EP2 | {"order": "tp-cp-dp-ep-pp"}, "bare"),
    "ep4, wrapped": (EXPERTS, EP4, "float16"),
    "ep2 etp2": (EXPERTS, EP2 | ETP2, "bare"),
    "tp2 ep2 etp1": (EXPERTS, TP2 | EP2 | ETP1, "bare"),
    "tp2 ep2 etp2, float32 norms": (EXPERTS, TP2 | EP2, "bare-bfloat16"),
    "pp2 ep2": (EXPERTS, PP2 | EP2, "bare"),
    "ep2, all biases": (EXPERTS | {"attention_bias": True, "mlp_bias": True}, EP2, "bare"),
    "tp2 ep2 etp1, latent attention": (LATENT, TP2 | EP2 | ETP1, "bare"),
    "tp2 pp2, sparse attention, prediction layer": (SPARSE, TP2 | PP2, "mtp"),
    "tp4, latent attention": (LATENT, TP4, "bare"),
    "pp2 ep2, prediction layer": (LATENT, PP2 | EP2, "mtp"),
    "tp2 pp2, tied, prediction layer": (LATENT | {"tie_word_embeddings": True}, TP2 | PP2, "mtp"),
    "tp2, tied, prediction layer": (LATENT | {"tie_word_embeddings": True}, TP2, "mtp"),
    "ep4, wrapped, latent attention": (KIMI | {"q_lora_rank": None}, EP4, "float16"),
    "tp2 ep2 etp1, mixtral": (MIXTRAL, TP2 | EP2 | ETP1, "bare"),
    "tp2 ep2 etp2, glm": (GLM, TP2 | EP2, "bare"),
    "pp2 ep2, glm, wrapped": (GLM, PP2 | EP2, "float16"),
    "tp2 ep2 etp1, gpt-oss": (GPT_OSS, TP2 | EP2 | ETP1, "bare"),
    "tp4, gpt-oss, wrapped": (GPT_OSS, TP4 | ETP1, "float16"),
    "dp4, gated delta": (NEXT, {}, "bare"),
    "tp2 pp2, gated delta": (NEXT, TP2 | PP2, "bare"),
    "tp4, gated delta, wrapped": (NEXT, TP4, "float16"),
    "tp2 ep2 etp1, gated delta": (NEXT, TP2 | EP2 | ETP1, "bare"),
    "dp4, mamba": (HYBRID, {}, "bare"),
    "tp2 pp2, mamba": (HYBRID, TP2 | PP2, "bare"),
    "tp4, mamba, wrapped": (HYBRID, TP4, "float16"),
    "tp2 ep2 etp1, mamba, float32 norms": (HYBRID, TP2 | EP2 | ETP1, "bare-bfloat16"),
    "ep2 etp2, legacy grouped": (EXPERTS, EP2 | ETP2, "legacy"),
    "ep2 etp2, renamed as grouped": (EXPERTS, EP2 | ETP2, "grouped"),
}
"""Config, sizes of `initialize_model_parallel`, and how the model is built."""


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank says, from one start of all of them."""
    rendezvous: Path = tmp_path_factory.mktemp("layouts") / "rendezvous"
    result: list[dict[str, Any]] = run_ranks(inspect, WORLD, str(rendezvous), PADDED, CASES, EXPERTS, EP2, NEXT)
    return result


def analytic(config: dict[str, Any], sizes: dict[str, Any], kind: str) -> list[Layout]:
    tp, pp = sizes.get("tensor_model_parallel_size", 1), sizes.get("pipeline_model_parallel_size", 1)
    if kind == "chunks":
        # Stage s has the chunks s and s + 2, of one layer each.
        model = read_config(config)
        stages = [Stage(Part(), (s, s + 2), s == 0, s == 1, PADDED) for s in (0, 0, 1, 1)]
        held = [parameters(model, stage) for stage in stages]
        return [layout_of(model, s, h, {p.name: "float32" for p in h}) for s, h in zip(stages, held, strict=True)]
    adapter = MegatronAdapter(
        order=sizes.get("order", MegatronAdapter().order),
        make_vocab_size_divisible_by=PADDED // tp,
        norm_dtype="float32" if kind == "bare-bfloat16" else None,
        spec={"grouped": Spec.GROUPED, "legacy": Spec.LOCAL_LEGACY}.get(kind, Spec.LOCAL),
    )
    parallel = {"tp": tp, "pp": pp, "dp": WORLD // (tp * pp), "ep": sizes.get("expert_model_parallel_size", 1)}
    if kind == "mtp":
        parallel["mtp"] = config["num_nextn_predict_layers"]
    parallel["etp"] = sizes.get("expert_tensor_parallel_size", tp)
    return list(
        adapter.layouts(config, parallel, "float32" if kind in ("bare", "grouped", "legacy", "mtp") else "bfloat16")
    )


@pytest.mark.trap(2, 4, 6, 7, 8, 13, 14, 15)
@pytest.mark.parametrize("case", CASES)
def test_the_live_layout_of_every_rank_is_the_analytic_one(case: str, answers: list[dict[str, Any]]) -> None:
    expected = [layout.address for layout in analytic(*CASES[case])]
    assert [answer[case]["address"] for answer in answers] == expected
    assert [answer[case]["target"] for answer in answers] == expected
    assert all(answer[case]["in_place"] for answer in answers)
    assert [answer[case]["name"] for answer in answers] == [f"trainer/{rank}" for rank in range(WORLD)]


def test_cases_differ_between_ranks_where_they_should() -> None:
    default, other = (analytic(*CASES[case]) for case in ("tp2 pp2, tied", "tp2 pp2, stages first"))
    assert len({layout.address for layout in default}) == 4
    assert [default[rank].address for rank in (0, 2, 1, 3)] == [layout.address for layout in other]
    default, other = (analytic(*CASES[case]) for case in ("ep2", "ep2, expert data parallel ranks first"))
    assert len({layout.address for layout in default}) == 2
    assert [default[rank].address for rank in (0, 2, 1, 3)] == [layout.address for layout in other]
    assert len({layout.address for layout in analytic(*CASES["ep2 etp2"])}) == 4


@pytest.mark.trap(13)
def test_every_difference_of_a_model_is_reported_at_once(answers: list[dict[str, Any]]) -> None:
    kind, text = answers[0]["spoiled: parameters"]
    assert kind == "LayoutError"
    assert "6 faults" in text
    for words in (
        "layers.0.mlp.linear_fc2.weight: shape (3, 5), expected (32, 48)",
        "layers.0.input_layernorm.extra: float32(2,) is not part of this family",
        "layers.0.pre_mlp_layernorm.weight: missing",
        "weights have several dtypes, float16, float32",
        "layers.1.mlp.linear_fc1.weight: strides (1, 96)",
        "layers.1.expert_bias: float32(4,) is not part of this family",
    ):
        assert words in text


@pytest.mark.trap(13)
def test_a_buffer_that_is_in_no_checkpoint_is_skipped_with_its_reason(answers: list[dict[str, Any]]) -> None:
    kind, text = answers[0]["spoiled: transient buffer"]
    assert kind == ""
    assert text == "(('decoder.layers.1.cache', 'non-persistent buffer: recomputed, in no checkpoint'),)"


@pytest.mark.parametrize(
    ("spoiled", "kind", "words"),
    [
        ("other heads", "LayoutError", ["num_attention_heads=4", "num_query_groups=2", "kv_channels=16"]),
        ("untied config", "LayoutError", ["share_embeddings_and_output_weights=True", "output_layer.weight: missing"]),
        ("other family", "LayoutError", ["qk_layernorm=True", "q_layernorm.weight: float32(16,) is not part"]),
        ("mixture of experts", "LayoutError", ["num_moe_experts=None", "mlp.router.weight: missing"]),
        ("not a model", "ConfigError", ["expected a GPTModel", "TransformerBlock"]),
        ("no chunks", "ConfigError", ["empty list"]),
        ("a chunk twice", "LayoutError", ["layers [0, 1, 2, 3, 0, 1, 2, 3], expected distinct ones"]),
    ],
)
def test_a_model_that_is_not_the_configs_is_refused(
    spoiled: str, kind: str, words: list[str], answers: list[dict[str, Any]]
) -> None:
    found, text = answers[0][f"spoiled: {spoiled}"]
    assert found == kind
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ("other experts", ["num_moe_experts=4", "moe_router_topk=2", "moe_ffn_hidden_size=16", "experts.4.linear_fc1"]),
        ("other routing", ["moe_router_pre_softmax=False", "moe_router_topk_scaling_factor=2.5"]),
        ("experts elsewhere", ["moe_layer_freq=[1, 0, 1, 1]", "experts in the layers [0, 1]", "layers.2.mlp.router"]),
        ("a dense config", ["num_moe_experts=4", "mlp.router.weight: float32(4, 32) is not part of this family"]),
        ("expert bias", ["moe_router_enable_expert_bias=True", "router.expert_bias: float32(4,) is not part"]),
        ("shared experts", ["moe_shared_expert_intermediate_size=16", "shared_experts.weight: float32(2,) is not"]),
        ("legacy grouped experts", ["experts.weight1: shape (64, 32), expected (32, 64)"]),
    ],
)
@pytest.mark.trap(13)
def test_experts_that_are_not_the_configs_are_refused(
    spoiled: str, words: list[str], answers: list[dict[str, Any]]
) -> None:
    kind, text = answers[0][f"spoiled experts: {spoiled}"]
    assert kind == "LayoutError"
    assert [word for word in words if word not in text] == []


@pytest.mark.parametrize(
    ("spoiled", "words"),
    [
        ("zero-centered norm", ["layers.0: the norm behind its delta rule is zero-centered"]),
        ("other sizes", ["linear_num_value_heads=8", "linear_conv_kernel_dim=3", "in_proj.weight: shape (144, 32)"]),
        ("no gates", ["attention_output_gate=False", "moe_shared_expert_gate=False"]),
        ("other layers", ["layers.1.self_attention.in_proj.weight: missing", "layers.1.self_attention.linear_qkv"]),
    ],
)
@pytest.mark.trap(13, 15)
def test_linear_attention_that_is_not_the_configs_is_refused(
    spoiled: str, words: list[str], answers: list[dict[str, Any]]
) -> None:
    kind, text = answers[0][f"spoiled delta: {spoiled}"]
    assert kind == "LayoutError"
    assert [word for word in words if word not in text] == []


@pytest.mark.trap(6)
def test_experts_under_another_ranks_numbers_are_refused_by_every_rank(answers: list[dict[str, Any]]) -> None:
    for rank, answer in enumerate(answers):
        kind, text = answer["spoiled experts: other numbers"]
        own, other = (0, 2) if rank % 2 == 0 else (2, 0)
        assert kind == "LayoutError"
        assert f"experts.local_experts.{own}.linear_fc1.weight: missing from the model" in text
        assert f"experts.local_experts.{other}.linear_fc1.weight: float32(32, 32) is not part of this family" in text


def test_a_router_may_be_in_float32(answers: list[dict[str, Any]]) -> None:
    assert [answer["dtypes of a float32 router"] for answer in answers] == [("float32", "bfloat16")] * WORLD


def test_memory_that_moved_is_noticed_before_it_is_used(answers: list[dict[str, Any]]) -> None:
    held, begun = answers[0]["moved"]
    assert held == begun
    assert "decoder.layers.1.mlp.linear_fc2.weight: moved since it was inspected" in held


def test_the_readmes_example_runs(answers: list[dict[str, Any]]) -> None:
    assert [answer["readme"]["name"] for answer in answers] == [f"trainer/{rank}" for rank in range(WORLD)]
    assert "MegatronSource" in answers[0]["readme"]["source"]
    assert "MegatronTarget" in answers[0]["readme"]["target"]


@pytest.mark.trap(66)
def test_hold_finishes_the_parameter_gather_that_ddp_put_off(answers: list[dict[str, Any]]) -> None:
    assert [answer["gathers"] for answer in answers] == [(True, True)] * WORLD
    assert [answer["gathers of experts"] for answer in answers] == [(True, True)] * WORLD
