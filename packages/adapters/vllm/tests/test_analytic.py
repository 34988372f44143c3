"""Layouts from a config alone: every element of every rank, cut by hand, in poisoned memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weft.errors import ConfigError, NotSupportedError
from weft_vllm import adapter, vllm_layout

from .by_hand import EXPERT_INNER, EXPERTS, HEAD, HIDDEN, INNER, LATENT, VOCABULARY, config, executed, numbered


@pytest.mark.trap(1, 2, 3, 5, 14)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tp", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_every_rank_holds_its_slices(family: str, tp: int, kv_heads: int) -> None:
    layouts = adapter.layouts(config(family, kv_heads=kv_heads), {"tp": tp}, "bfloat16")
    values = numbered(layouts[0])
    padded = np.zeros((128, HIDDEN))
    for rank, layout in enumerate(layouts):
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            padded[:VOCABULARY] = values[name]
            assert np.array_equal(held[name], np.split(padded, tp)[rank].ravel())
        prefix = "model.layers.1"
        q, k, v = (values[f"{prefix}.self_attn.{part}_proj.weight"] for part in "qkv")
        heads = [rank * kv_heads // tp + n for n in range(max(1, kv_heads // tp))]
        rows = [row for head in heads for row in range(head * HEAD, (head + 1) * HEAD)]
        qkv = np.concatenate([np.split(q, tp)[rank], k[rows], v[rows]])
        assert np.array_equal(held[f"{prefix}.self_attn.qkv_proj.weight"], qkv.ravel())
        gate, up, down = (values[f"{prefix}.mlp.{part}_proj.weight"] for part in ("gate", "up", "down"))
        both = np.concatenate([np.split(gate, tp)[rank], np.split(up, tp)[rank]])
        assert np.array_equal(held[f"{prefix}.mlp.gate_up_proj.weight"], both.ravel())
        assert np.array_equal(held[f"{prefix}.mlp.down_proj.weight"], np.split(down, tp, axis=1)[rank].ravel())


@pytest.mark.trap(6)
@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "dp": 2, "ep": 4}], ids=lambda p: "-".join(p) or "one"
)
def test_experts_are_cut_or_spread_whole(parallel: dict[str, int]) -> None:
    tp, ep = parallel.get("tp", 1), parallel.get("ep", 1)
    layouts = adapter.layouts(config("qwen3_moe", mlp_only_layers=[0]), parallel, "bfloat16")
    assert (len(layouts), adapter.replicas(parallel)) == (max(tp, ep), 1)
    ranges = np.array_split(np.arange(EXPERTS), ep) if ep > 1 else [np.arange(EXPERTS)] * tp
    cut = tp if ep == 1 else 1
    for rank, layout in enumerate(layouts):
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        assert "model.layers.0.mlp.gate_up_proj.weight" in held
        mlp = "model.layers.1.mlp"
        assert np.array_equal(held[f"{mlp}.gate.weight"], values[f"{mlp}.gate.weight"].ravel())
        named = [name for name in values if name.endswith("up_proj.weight") and ".experts." in name]
        assert sorted(named) == [f"{mlp}.experts.{n}.up_proj.weight" for n in ranges[rank]]
        w13, w2 = [], []
        for expert in ranges[rank]:
            gate, up, down = (values[f"{mlp}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
            w13 += [np.split(part, cut)[rank % cut].ravel() for part in (gate, up)]
            w2.append(np.split(down, cut, axis=1)[rank % cut].ravel())
        assert np.array_equal(held[f"{mlp}.experts.routed_experts.w13_weight"], np.concatenate(w13))
        assert np.array_equal(held[f"{mlp}.experts.routed_experts.w2_weight"], np.concatenate(w2))


@pytest.mark.trap(1, 2, 6, 17)
@pytest.mark.parametrize("query_rank", [12, None])
@pytest.mark.parametrize(
    "parallel", [{}, {"tp": 4}, {"tp": 2, "ep": 2}, {"dp": 4, "ep": 4}, {"tp": 2, "dp": 4, "ep": 8, "replicas": 2}]
)
def test_latent_attention_and_shared_experts(parallel: dict[str, int], query_rank: int | None) -> None:
    tp, dp, ep = (parallel.get(axis, 1) for axis in ("tp", "dp", "ep"))
    asked = config("kimi_k2", **{**LATENT, "q_lora_rank": query_rank})
    layouts = adapter.layouts(asked, parallel, "bfloat16")
    replicas = parallel.get("replicas", 1)
    assert (len(layouts), adapter.replicas(parallel)) == (tp * dp * replicas, replicas)
    assert len({id(layout) for layout in layouts}) == len({layout.address for layout in layouts}) == tp * dp
    for rank, layout in enumerate(layouts):
        assert vllm_layout(asked, parallel, rank).address == layout.address
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"

        def mine(name: str, axis: int, whole: bool = False, prefix: str = attention, turn: int = rank) -> Any:
            tensor = values[f"{prefix}.{name}.weight"]  # noqa: B023 - called at once
            return tensor if whole else np.split(tensor, tp, axis=axis)[turn % tp]

        first = [mine("kv_a_proj_with_mqa", 0, whole=True)]
        if query_rank:
            first.insert(0, mine("q_a_proj", 0, whole=True))
        fused = "fused_qkv_a_proj" if query_rank else "kv_a_proj_with_mqa"
        assert np.array_equal(held[f"{attention}.{fused}.weight"], np.concatenate(first).ravel())
        for name, axis in (("q_b_proj" if query_rank else "q_proj", 0), ("kv_b_proj", 0), ("o_proj", 1)):
            assert np.array_equal(held[f"{attention}.{name}.weight"], mine(name, axis).ravel())
        whole = ep > 1 and tp > 1 and dp > 1  # tokens are spread over the tensor-parallel ranks
        shared = f"{mlp}.shared_experts"
        gate_up = np.concatenate([mine(f"{part}_proj", 0, whole, shared) for part in ("gate", "up")])
        assert values[f"{shared}.gate_proj.weight"].shape == (2 * EXPERT_INNER, HIDDEN)
        assert np.array_equal(held[f"{shared}.gate_up_proj.weight"], gate_up.ravel())
        assert np.array_equal(held[f"{shared}.down_proj.weight"], mine("down_proj", 1, whole, shared).ravel())
        assert held[f"{mlp}.experts.routed_experts.w2_weight"].size == 8 // ep * EXPERT_INNER * HIDDEN // (
            tp if ep == 1 else 1
        )
        correction = f"{mlp}.gate.e_score_correction_bias"
        assert {tensor.name: tensor.dtype for tensor in layout.tensors}[correction] == "float32"
        assert np.array_equal(held[correction], values[correction])
        assert "model.layers.0.mlp.gate_up_proj.weight" in held


ALTERNATING = {"num_local_experts": 4, "intermediate_size": 16}


@pytest.mark.trap(4, 72)
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}, {"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}])
def test_alternating_columns_of_all_experts_are_one_piece(parallel: dict[str, int]) -> None:
    tp, ep = parallel.get("tp", 1), parallel.get("ep", 1)
    for rank, layout in enumerate(adapter.layouts(config("gpt_oss", **ALTERNATING), parallel, "bfloat16")):
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        mlp, cut = "model.layers.1.mlp", tp if ep == 1 else 1
        target = f"{mlp}.experts.routed_experts"
        here = slice(rank * 4 // ep, (rank + 1) * 4 // ep) if ep > 1 else slice(None)

        def mine(name: str, axis: int) -> Any:
            return np.split(values[f"{mlp}.experts.{name}"][here], cut, axis)[rank % cut]  # noqa: B023

        assert np.array_equal(held[f"{target}.w13_weight"], mine("gate_up_proj", 2).swapaxes(1, 2).ravel())
        assert np.array_equal(held[f"{target}.w13_bias"], mine("gate_up_proj_bias", 1).ravel())
        assert np.array_equal(held[f"{target}.w2_weight"], mine("down_proj", 1).swapaxes(1, 2).ravel())
        if rank % cut:
            assert not held[f"{target}.w2_bias"].any(), "the first rank alone adds it"
        else:
            assert np.array_equal(held[f"{target}.w2_bias"], values[f"{mlp}.experts.down_proj_bias"][here].ravel())
        sinks = np.split(values["model.layers.1.self_attn.sinks"], tp)[rank % tp]
        assert np.array_equal(held["model.layers.1.attn.sinks"], sinks)
        assert "model.embedding.weight" in held
        pieces = [piece for piece in layout if ".layers.1.mlp.experts." in piece.buffer]
        assert len(pieces) == len({piece.buffer for piece in pieces})


@pytest.mark.trap(13)
@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
@pytest.mark.parametrize("parallel", [{"tp": 2}, {"tp": 2, "ep": 2}, {"tp": 2, "dp": 2, "ep": 4}])
def test_experts_under_other_names_and_shared_ones_that_are_always_cut(family: str, parallel: dict[str, int]) -> None:
    glm = family == "glm4_moe"
    more = {**LATENT, "use_qk_norm": True, "attention_bias": True} if glm else {"num_local_experts": 8}
    mlp = "model.layers.1.mlp" if glm else "model.layers.1.block_sparse_moe"
    names = ("gate_proj", "up_proj", "down_proj") if glm else ("w1", "w3", "w2")
    width, ep = EXPERT_INNER if glm else INNER, parallel.get("ep", 1)
    for rank, layout in enumerate(adapter.layouts(config(family, **more), parallel, "bfloat16")):
        values = numbered(layout)
        held = executed(layout, values)
        here = range(rank * 8 // ep, (rank + 1) * 8 // ep) if ep > 1 else range(8)
        first = [values[f"{mlp}.experts.{expert}.{name}.weight"] for expert in here for name in names[:2]]
        if ep == 1:
            first = [np.split(tensor, 2)[rank] for tensor in first]
        assert np.array_equal(held[f"{mlp}.experts.routed_experts.w13_weight"], np.concatenate(first).ravel())
        assert values[f"{mlp}.experts.{here[0]}.{names[2]}.weight"].shape == (HIDDEN, width)
        dtypes = {tensor.name: tensor.dtype for tensor in layout.tensors}
        assert dtypes[f"{mlp}.gate.weight"] == ("float32" if glm else "bfloat16")
        if glm:
            assert held[f"{mlp}.shared_experts.down_proj.weight"].size == HIDDEN * 2 * EXPERT_INNER // 2
            assert {"model.layers.1.self_attn.q_norm.weight", "model.layers.1.self_attn.qkv_proj.bias"} <= held.keys()


@pytest.mark.trap(2, 13)
@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("qwen3", False), ("deepseek_v3", False)])
def test_stages_hold_their_layers_and_ends(family: str, tied: bool) -> None:
    asked = config(family, tied=tied, **{**LATENT, "num_hidden_layers": 5})
    parallel = {"tp": 2, "pp": 3, **({"dp": 2, "ep": 4} if family == "deepseek_v3" else {})}
    layouts = adapter.layouts(asked, parallel, "bfloat16")
    assert len(layouts) == (12 if family == "deepseek_v3" else 6)
    for rank, layout in enumerate(layouts):
        stage = rank // 2 % 3
        held = {int(tensor.name.split(".")[2]) for tensor in layout.tensors if ".layers." in tensor.name}
        assert held == [{0, 1}, {2, 3}, {4}][stage]
        ends = {tensor.name for tensor in layout.tensors if ".layers." not in tensor.name}
        wanted: list[set[str]] = [
            {"model.embed_tokens.weight"},
            set(),
            {"model.norm.weight", "model.embed_tokens.weight" if tied else "lm_head.weight"},
        ]
        assert ends == wanted[stage]
        assert bool(layout.ties) is (tied and stage == 2)
    everywhere = adapter.layouts(config("qwen3_moe"), {"pp": 2}, "bfloat16")
    assert all({"model.embed_tokens.weight", "lm_head.weight"} <= {t.name for t in each.tensors} for each in everywhere)


@pytest.mark.trap(13, 71)
@pytest.mark.parametrize("nested", [True, False])
def test_a_vision_tower_is_cut_beside_its_decoder(nested: bool) -> None:
    tower = {"depth": 2, "hidden_size": 6, "intermediate_size": 10, "num_heads": 2, "out_hidden_size": HIDDEN}
    text = config("qwen2_5_vl_text")
    asked = {**({"text_config": text} if nested else text), "model_type": "qwen2_5_vl", "vision_config": tower}
    for rank, layout in enumerate(adapter.layouts(asked, {"tp": 2}, "bfloat16")):
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        block = "visual.blocks.1"
        for kind in ("weight", "bias"):
            q, k, v = np.split(values[f"{block}.attn.qkv.{kind}"], 3)
            mine = np.concatenate([np.split(part, 2)[rank] for part in (q, k, v)])
            assert np.array_equal(held[f"{block}.attn.qkv.{kind}"], mine.ravel())
        for name in (f"{block}.attn.proj", f"{block}.mlp.down_proj", "visual.merger.mlp.2"):
            assert np.array_equal(held[f"{name}.weight"], np.split(values[f"{name}.weight"], 2, axis=1)[rank].ravel())
            assert np.array_equal(held[f"{name}.bias"], values[f"{name}.bias"])
        merger = "visual.merger.mlp.0.weight"
        assert values[merger].shape == (24, 24)
        assert np.array_equal(held[merger], np.split(values[merger], 2)[rank].ravel())
        assert values["visual.patch_embed.proj.weight"].shape == (6, 3, 2, 14, 14)
        layer = "layers.1.mlp.down_proj.weight"
        mine = np.split(values[f"model.{layer}"], 2, axis=1)[rank]
        assert np.array_equal(held[f"language_model.model.{layer}"], mine.ravel())
    with pytest.raises(ConfigError, match=r"vision heads 2 over tp 4; .*pp 2 of a model with a vision tower"):
        adapter.layouts(asked, {"tp": 4, "pp": 2}, "bfloat16")
    with pytest.raises(ConfigError, match="qwen2_5_vl lacks hidden_size, depth"):
        adapter.layouts({**asked, "vision_config": {}}, {}, "bfloat16")


@pytest.mark.trap(59, 63)
def test_copies_of_experts_follow_all_of_them() -> None:
    layouts = adapter.layouts(config("deepseek_v3", **LATENT), {"dp": 4, "ep": 4, "redundant": 4}, "bfloat16")
    held = []
    for layout in layouts:
        named = [piece.tensor for piece in layout if piece.buffer.endswith("w2_weight")]
        held += [int(name.split(".")[5]) for name in named]
        assert len(named) == 3
    assert held == [*range(8), *range(4)]


def test_the_remedy_for_an_ep_that_is_too_small_is_said() -> None:
    with pytest.raises(ConfigError, match=r"ep 64 is not tp 8 · dp 16 = 128.*say dp8,ep64,replicas2 for 2 engines"):
        adapter.world_size({"tp": 8, "dp": 16, "ep": 64})
    with pytest.raises(ConfigError, match="redundant 2 without ep"):
        adapter.world_size({"tp": 2, "redundant": 2})
    with pytest.raises(ConfigError, match=r"experts 8 \+ 3 redundant over ep 4: copies must divide"):
        adapter.layouts(config("deepseek_v3", **LATENT), {"dp": 4, "ep": 4, "redundant": 3}, "bfloat16")
    with pytest.raises(ConfigError, match="ep 3: vLLM loads equally many"):
        adapter.layouts(config("gpt_oss", **ALTERNATING), {"dp": 3, "ep": 3}, "bfloat16")
    with pytest.raises(ConfigError, match="gpt_oss does not divide: KV heads 2 against tp 4: vLLM does not repeat"):
        adapter.layouts(config("gpt_oss", **ALTERNATING), {"tp": 4}, "bfloat16")
    with pytest.raises(ConfigError, match="layers 2 over pp 3"):
        adapter.layouts(config("qwen3"), {"pp": 3}, "bfloat16")
    with pytest.raises(ConfigError, match="rank 16 of a vllm engine: it has ranks 0 to 15"):
        vllm_layout(config("qwen3"), {"tp": 2, "dp": 4, "replicas": 2}, 16)
    with pytest.raises(NotSupportedError, match="glm4_moe with tie_word_embeddings"):
        vllm_layout(config("glm4_moe", tied=True, **LATENT), {}, 0)


def test_a_trillion_parameters_on_128_ranks() -> None:
    kimi = {
        "model_type": "kimi_k2", "hidden_size": 7168, "intermediate_size": 18432, "moe_intermediate_size": 2048,
        "num_hidden_layers": 61, "num_attention_heads": 64, "vocab_size": 163840, **LATENT, "q_lora_rank": 1536,
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
        "n_routed_experts": 384, "n_shared_experts": 1,
    }  # fmt: skip
    layouts = adapter.layouts(kimi, {"dp": 128, "ep": 128, "replicas": 8}, "bfloat16")
    assert (len(layouts), len({id(layout) for layout in layouts})) == (1024, 128)
    tensors = {tensor.name: tensor.numel for layout in layouts[:128] for tensor in layout.tensors}
    assert 69_000 < len(tensors) < 71_000
    assert 1.02e12 < sum(tensors.values()) < 1.03e12
    assert {len(layout.pieces) for layout in layouts} == {1395}


def test_the_number_of_experts_as_transformers_writes_it() -> None:
    written = config("qwen3_moe", num_local_experts=EXPERTS)
    del written["num_experts"]
    (read,), (said,) = (adapter.layouts(c, {}, "bfloat16") for c in (written, config("qwen3_moe")))
    assert read.address == said.address


@pytest.mark.trap(13)
def test_families_differ_in_biases_norms_and_ties() -> None:
    def names(*arguments: Any, **options: Any) -> set[str]:
        (layout,) = adapter.layouts(config(*arguments, **options), {}, "bfloat16")
        assert bool(layout.ties) is options.get("tied", False)
        return {tensor.name.removeprefix("model.layers.0.") for tensor in layout.tensors}

    llama = names("llama")
    assert names("qwen2") - llama >= {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}
    assert {name for name in names("qwen3") - llama if "layers" not in name} == {
        "self_attn.q_norm.weight",
        "self_attn.k_norm.weight",
    }
    assert llama - names("llama", tied=True) == {"lm_head.weight"}
    assert "mlp.down_proj.bias" in names("llama", mlp_bias=True)


def test_ranks_of_replicas_follow_one_another_and_share_layouts() -> None:
    parallel = {"tp": 2, "dp": 3}
    layouts = adapter.layouts(config("qwen3"), parallel, "bfloat16")
    assert (adapter.world_size(parallel), adapter.replicas(parallel), len(layouts)) == (6, 3, 6)
    assert [layout.address for layout in layouts] == [layouts[0].address, layouts[1].address] * 3


@pytest.mark.trap(17)
def test_what_does_not_divide_or_is_not_known_is_named() -> None:
    with pytest.raises(ConfigError, match=r"heads 8 over tp 3.*KV heads 2 against tp 3"):
        adapter.layouts(config("qwen3"), {"tp": 3}, "bfloat16")
    with pytest.raises(ConfigError, match=r"ep 4 is not tp 2 · dp 1 = 2"):
        adapter.world_size({"tp": 2, "ep": 4})
    with pytest.raises(ConfigError, match=r"dp 2 without ep.*say ep4"):
        adapter.layouts(config("qwen3_moe"), {"tp": 2, "dp": 2}, "bfloat16")
    with pytest.raises(ConfigError, match="expert width 12 over tp 8"):
        adapter.layouts(config("qwen3_moe", moe_intermediate_size=12), {"tp": 8}, "bfloat16")
    with pytest.raises(ConfigError, match="experts 5 over ep 8"):
        adapter.layouts(config("qwen3_moe"), {"tp": 8, "ep": 8}, "bfloat16")
    with pytest.raises(ConfigError, match="num_experts"):
        adapter.layouts({**config("qwen3_moe"), "num_experts": None}, {}, "bfloat16")
    with pytest.raises(ConfigError, match="cp: vllm has tp, pp, dp"):
        adapter.world_size({"tp": 2, "cp": 2})
    with pytest.raises(NotSupportedError, match="falcon"):
        adapter.layouts(config("falcon"), {}, "bfloat16")
    with pytest.raises(ConfigError, match="vocab_size"):
        adapter.layouts({**config("llama"), "vocab_size": None}, {}, "bfloat16")


def test_what_the_engine_would_refuse_or_add_is_refused() -> None:
    with pytest.raises(ConfigError, match="ep 4 of a model without experts"):
        adapter.layouts(config("qwen3"), {"tp": 2, "dp": 2, "ep": 4}, "bfloat16")
    with pytest.raises(NotSupportedError, match="qwen3_moe with shared_expert_intermediate_size=64"):
        adapter.layouts(config("qwen3_moe", shared_expert_intermediate_size=64), {"tp": 1}, "bfloat16")
