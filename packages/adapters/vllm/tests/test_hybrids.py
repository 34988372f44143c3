"""Layouts of hybrids and of sparse attention from a config alone, cut by hand, in poisoned memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from weft.errors import ConfigError, NotSupportedError
from weft.layout import Kind
from weft_vllm import adapter, vllm_layout

from .by_hand import HIDDEN, LATENT, config, executed, numbered

DELTA = {
    "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 3, "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 2, "shared_expert_intermediate_size": 8, "full_attention_interval": 2,
}  # fmt: skip
MAMBA = {
    "hybrid_override_pattern": "M*E-", "mamba_num_heads": 8, "mamba_head_dim": 3, "n_groups": 4, "ssm_state_size": 5,
    "conv_kernel": 2, "n_routed_experts": 8, "n_shared_experts": 1, "moe_shared_expert_intermediate_size": 8,
}  # fmt: skip


def share(tensor: Any, tp: int, rank: int, axis: int = 0) -> Any:
    return np.split(tensor, tp, axis)[rank]


@pytest.mark.trap(15)
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gated_delta_projections_are_cut_by_key_heads(tp: int) -> None:
    for rank, layout in enumerate(adapter.layouts(config("qwen3_next", **DELTA), {"tp": tp}, "bfloat16")):
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        name = "model.layers.0.linear_attn"
        keys, rows = 4 * 3, 8 * 5
        heads = np.split(values[f"{name}.in_proj_qkvz.weight"], 4)  # of every key head its q, k, v and z
        mine = np.concatenate(heads[rank * 4 // tp : (rank + 1) * 4 // tp])
        assert mine.shape == ((2 * keys + 2 * rows) // tp, HIDDEN)
        assert np.array_equal(held[f"{name}.in_proj_qkvz.weight"], mine.ravel())
        q, k, v = np.split(values[f"{name}.conv1d.weight"], [keys, 2 * keys])
        assert v.shape == (rows, 1, 2)
        mine = np.concatenate([share(part, tp, rank) for part in (q, k, v)])
        assert np.array_equal(held[f"{name}.conv1d.weight"], mine.ravel())
        for each in ("in_proj_ba.weight", "dt_bias", "A_log"):
            assert np.array_equal(held[f"{name}.{each}"], share(values[f"{name}.{each}"], tp, rank).ravel())
        assert np.array_equal(
            held[f"{name}.out_proj.weight"], share(values[f"{name}.out_proj.weight"], tp, rank, 1).ravel()
        )
        assert {t.name: t.dtype for t in layout.tensors}[f"{name}.A_log"] == "float32"
        attention = "model.layers.1.self_attn"
        q, k = values[f"{attention}.q_proj.weight"], values[f"{attention}.k_proj.weight"]
        assert q.shape == (2 * 8 * 4, HIDDEN), "a query and a gate per head"
        kv = share(k, 2, rank * 2 // tp) if tp > 1 else k
        assert np.array_equal(held[f"{attention}.qkv_proj.weight"][: (q.size // tp + kv.size)],
                              np.concatenate([share(q, tp, rank), kv]).ravel())  # fmt: skip
        mlp = "model.layers.1.mlp"
        assert values[f"{mlp}.shared_expert_gate.weight"].shape == (1, HIDDEN)
        assert held[f"{mlp}.shared_expert.gate_up_proj.weight"].size == 2 * 8 * HIDDEN // tp


@pytest.mark.trap(15, 70)
@pytest.mark.parametrize(("tp", "groups"), [(1, 4), (2, 4), (4, 4), (1, 1), (4, 1)])
def test_mamba_projections_are_cut_block_by_block_and_lone_groups_are_whole(tp: int, groups: int) -> None:
    asked = config("nemotron_h", **{**MAMBA, "n_groups": groups})
    for rank, layout in enumerate(adapter.layouts(asked, {"tp": tp}, "bfloat16")):
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        name, engine = "backbone.layers.0.mixer", "model.layers.0.mixer"
        inner, shared = 8 * 3, groups * 5

        def blocks(tensor: Any, *sizes: int) -> Any:
            parts = np.split(tensor, np.cumsum(sizes)[:-1])
            assert len(parts[-1]) == sizes[-1]
            cut = [part if len(part) == shared and groups == 1 else share(part, tp, rank) for part in parts]  # noqa: B023
            return np.concatenate(cut).ravel()

        projection = blocks(values[f"{name}.in_proj.weight"], inner, inner, shared, shared, 8)
        assert np.array_equal(held[f"{engine}.in_proj.weight"], projection)
        for kind in ("weight", "bias"):
            convolution = blocks(values[f"{name}.conv1d.{kind}"], inner, shared, shared)
            assert np.array_equal(held[f"{engine}.conv1d.{kind}"], convolution)
        for each in ("D", "dt_bias", "norm.weight"):
            assert np.array_equal(held[f"{engine}.{each}"], share(values[f"{name}.{each}"], tp, rank))
        assert np.array_equal(held[f"loader:{name}.A_log"], values[f"{name}.A_log"]), "the engine computes with all"
        assert [b.name for b in layout.buffers if b.kind is Kind.SCRATCH] == [f"loader:{name}.A_log"]
        assert {layout.groups[buffer.group] for buffer in layout.buffers if ".0." in buffer.name} == {"model.layers.0"}
        mixture = "model.layers.2.mixer"
        up = [values[f"backbone.layers.2.mixer.experts.{n}.up_proj.weight"] for n in range(8)]
        mine = np.concatenate([share(each, tp, rank) for each in up]).ravel()
        assert np.array_equal(held[f"{mixture}.experts.routed_experts.w13_weight"], mine), "experts without a gate"
        up = share(values["backbone.layers.3.mixer.up_proj.weight"], tp, rank)
        assert np.array_equal(held["model.layers.3.mixer.up_proj.weight"], up.ravel())
        assert {"model.embed_tokens.weight", "model.norm_f.weight", "model.layers.3.norm.weight"} <= held.keys()


def test_layers_are_known_by_letters_and_by_words() -> None:
    words = config("nemotron_h", **{**MAMBA, "layers_block_type": ["mamba", "full_attention", "moe", "mlp"]})
    letters = config("nemotron_h", **MAMBA)
    assert vllm_layout(words, {}, 0).address == vllm_layout(letters, {}, 0).address


@pytest.mark.trap(13)
def test_indexers_are_whole_on_every_rank_of_the_layers_that_have_them() -> None:
    indexed = {**LATENT, "index_n_heads": 3, "index_head_dim": 5, "num_hidden_layers": 4}
    asked = config("glm_moe_dsa", **indexed, index_topk_freq=2)
    for layout in adapter.layouts(asked, {"tp": 2}, "bfloat16"):
        values = numbered(layout)
        held = executed(layout, values)
        assert all((memory != -1).all() for memory in held.values())
        assert {name.split(".")[2] for name in held if ".indexer." in name} == {"0", "1", "3"}
        name = "model.layers.1.self_attn.indexer"
        both = np.concatenate([values[f"{name}.{part}.weight"] for part in ("wk", "weights_proj")])
        assert both.shape == (5 + 3, HIDDEN)
        assert np.array_equal(held[f"{name}.wk_weights_proj.weight"], both.ravel())
        assert np.array_equal(held[f"{name}.wq_b.weight"], values[f"{name}.wq_b.weight"].ravel())
        assert {t.dtype for t in layout.tensors if ".k_norm." in t.name} == {"float32"}
    named = config("glm_moe_dsa", **indexed, index_topk_pattern="FSFS")
    kept = {b.name.split(".")[2] for b in vllm_layout(named, {}, 0).buffers if ".indexer." in b.name}
    assert kept == {"0", "2"}


@pytest.mark.parametrize(("pp", "is_whole"), [(1, True), (2, False)])
def test_layers_of_glm5_without_experts_are_whole_where_tokens_are_spread(pp: int, is_whole: bool) -> None:
    asked = config("glm_moe_dsa", **LATENT, index_n_heads=3, index_head_dim=5)
    layout = vllm_layout(asked, {"tp": 2, "dp": 2, "ep": 4, "pp": pp}, 1)
    (dense,) = (b for b in layout.buffers if b.name == "model.layers.0.mlp.down_proj.weight")
    assert dense.numel == HIDDEN * 24 // (1 if is_whole else 2)


def test_what_vllm_has_not_or_weft_has_not_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"mamba heads 8 over tp 16; mamba groups 4 over tp 16: vLLM repeats"):
        adapter.layouts(config("nemotron_h", **MAMBA), {"tp": 16}, "bfloat16")
    with pytest.raises(ConfigError, match="gated-delta key heads 4 over tp 8"):
        adapter.layouts(config("qwen3_next", **DELTA), {"tp": 8}, "bfloat16")
    with pytest.raises(NotSupportedError, match="nemotron_h with use_bias=True, moe_latent_size=4"):
        adapter.layouts(config("nemotron_h", **MAMBA, use_bias=True, moe_latent_size=4), {}, "bfloat16")
    with pytest.raises(NotSupportedError, match="without use_conv_bias"):
        adapter.layouts(config("nemotron_h", **MAMBA, use_conv_bias=False), {}, "bfloat16")
    with pytest.raises(NotSupportedError, match=r"layers X; mapped are M, \*, E, -"):
        adapter.layouts(config("nemotron_h", **{**MAMBA, "hybrid_override_pattern": "MX"}), {}, "bfloat16")
    with pytest.raises(ConfigError, match="nemotron_h lacks layers_block_type"):
        adapter.layouts(config("nemotron_h", **{**MAMBA, "hybrid_override_pattern": None}), {}, "bfloat16")
    with pytest.raises(NotSupportedError, match="qwen3_next with tie_word_embeddings"):
        adapter.layouts(config("qwen3_next", tied=True, **DELTA), {}, "bfloat16")
    with pytest.raises(ConfigError, match="glm_moe_dsa lacks index_n_heads, index_head_dim"):
        adapter.layouts(config("glm_moe_dsa", **LATENT), {}, "bfloat16")
