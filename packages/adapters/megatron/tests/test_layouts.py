"""Analytic layouts say exactly what Megatron holds, element by element."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError, NotSupportedError
from weft.layout import Layout
from weft_megatron import MegatronAdapter, Spec, adapter, megatron_layout
from weft_megatron.configs import read_config
from weft_megatron.mesh import padded_vocabulary
from weft_megatron.table import name_map

from .holdings import holdings, logical_state
from .reference import State, places

POISON = torch.tensor(float("nan")).view(torch.int32).item()


def make_config(**changes: Any) -> dict[str, Any]:
    config = {
        "model_type": "qwen3",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "intermediate_size": 12,
        "vocab_size": 11,
        "tie_word_embeddings": False,
    }
    return config | changes


def make_experts(**changes: Any) -> dict[str, Any]:
    experts = {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    return make_config(**(experts | changes))


def make_latent(**changes: Any) -> dict[str, Any]:
    latent = {
        "model_type": "deepseek_v3",
        "q_lora_rank": 6,
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 3,
        "qk_rope_head_dim": 2,
        "v_head_dim": 5,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 6,
        "first_k_dense_replace": 1,
        "num_nextn_predict_layers": 1,
    }
    return make_config(**(latent | changes))


def unfit_for_legacy(config: dict[str, Any]) -> bool:
    """Whether experts have biases, or no gates."""
    if "moe" in config.get("layers_block_type", ()):
        return True
    return config["model_type"] == "gpt_oss" or ("num_experts" in config and config.get("mlp_bias", False))


def divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int], int]:
    """A config, parallel sizes and a vocabulary divisor that Megatron accepts."""
    tp, pp = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 12) if n % tp == 0 or tp % n == 0]))
    queries = draw(st.sampled_from([n for n in range(1, 9) if n * groups % tp == 0]))
    head = draw(st.sampled_from([n for n in range(1, 17) if groups * (queries + 2) * n % tp == 0]))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3", "qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"]))
    config = make_config(
        model_type=family,
        hidden_size=draw(st.integers(1, 9)),
        num_hidden_layers=pp * draw(st.integers(1, 2)),
        num_attention_heads=queries * groups,
        num_key_value_heads=groups,
        head_dim=head,
        intermediate_size=tp * draw(st.integers(1, 5)),
        vocab_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()),
    )
    sizes = {"tp": tp, "pp": pp, "dp": draw(st.integers(1, 3))}
    biased = family in ("llama", "qwen3_moe") and draw(st.booleans())
    if biased:
        config |= {"attention_bias": True, "mlp_bias": True}
    if family in ("qwen3_moe", "mixtral", "glm4_moe", "gpt_oss"):
        biased = biased or family == "gpt_oss"
        sizes["etp"] = 1 if biased else draw(st.sampled_from(divisors(tp * sizes["dp"])))
        sizes["ep"] = draw(st.sampled_from(divisors(tp * sizes["dp"] // sizes["etp"])))
        count, wide = sizes["ep"] * draw(st.integers(1, 3)), sizes["etp"] * draw(st.integers(1, 4))
        config["num_experts_per_tok"] = 1
    if family == "qwen3_moe":
        config |= {
            "num_experts": count,
            "moe_intermediate_size": wide,
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": draw(st.lists(st.integers(0, 3), max_size=2)),
        }
    if family in ("mixtral", "gpt_oss"):
        config |= {"num_local_experts": count, "intermediate_size": wide, "attention_bias": family == "gpt_oss"}
    if family == "glm4_moe":
        config |= {
            "n_routed_experts": count,
            "n_shared_experts": draw(st.integers(0, 2)),
            "moe_intermediate_size": math.lcm(wide, tp),
            "first_k_dense_replace": draw(st.integers(0, 2)),
            "attention_bias": draw(st.booleans()),
            "use_qk_norm": draw(st.booleans()),
        }
    return config, sizes, draw(st.sampled_from([1, 2, 5, 16]))


@st.composite
def meshes_with_experts(draw: st.DrawFn) -> dict[str, int]:
    """Parallel sizes in which the expert ones factor."""
    tp, pp, dp = draw(st.sampled_from([1, 2, 3, 4])), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    sizes = {"tp": tp, "pp": pp, "dp": dp, "etp": draw(st.sampled_from(divisors(tp * dp)))}
    return sizes | {"ep": draw(st.sampled_from(divisors(tp * dp // sizes["etp"])))}


@st.composite
def latent_jobs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int], int]:
    """The same of multi-latent attention, shared experts and prediction layers."""
    sizes = draw(meshes_with_experts())
    tp, pp = sizes["tp"], sizes["pp"]
    rotary = 2 * draw(st.integers(1, 2))
    layers = pp * draw(st.integers(1, 2))
    config = make_latent(
        model_type=draw(st.sampled_from(["deepseek_v3", "kimi_k2"])),
        hidden_size=tp * draw(st.integers(1, 3)),
        num_hidden_layers=layers,
        num_attention_heads=tp * draw(st.integers(1, 2)),
        num_key_value_heads=tp,
        q_lora_rank=draw(st.sampled_from([None, tp, 3 * tp])),
        kv_lora_rank=tp * (rotary + draw(st.integers(1, 3))) - rotary,
        qk_nope_head_dim=draw(st.integers(1, 3)),
        qk_rope_head_dim=rotary,
        v_head_dim=draw(st.integers(1, 3)),
        intermediate_size=tp * draw(st.integers(1, 5)),
        n_routed_experts=sizes["ep"] * draw(st.integers(1, 3)),
        n_shared_experts=draw(st.integers(0, 2)),
        moe_intermediate_size=math.lcm(tp, sizes["etp"]) * draw(st.integers(1, 2)),
        first_k_dense_replace=draw(st.integers(0, layers)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        vocab_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()),
    )
    if config["num_nextn_predict_layers"]:
        sizes["mtp"] = config["num_nextn_predict_layers"]
    if config["q_lora_rank"] and draw(st.booleans()):
        config |= {"model_type": "glm_moe_dsa", "index_n_heads": draw(st.integers(1, 3))}
        config["index_head_dim"] = rotary + draw(st.integers(0, 3))
    return config, sizes, draw(st.sampled_from([1, 2, 5, 16]))


@st.composite
def delta_jobs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int], int]:
    """The same of layers with the gated delta rule, attention with gates, and a shared expert with one."""
    sizes = draw(meshes_with_experts())
    tp, pp = sizes["tp"], sizes["pp"]
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8) if n % tp == 0 or tp % n == 0]))
    queries = draw(st.sampled_from([n for n in range(1, 9) if n * groups % tp == 0]))
    layers, keys = pp * draw(st.integers(1, 2)), tp * draw(st.integers(1, 2))
    config = make_experts(
        model_type="qwen3_next",
        hidden_size=draw(st.integers(1, 5)),
        num_hidden_layers=layers,
        num_attention_heads=queries * groups,
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([n for n in range(1, 9) if groups * (2 * queries + 2) * n % tp == 0])),
        intermediate_size=tp * draw(st.integers(1, 3)),
        num_experts=sizes["ep"] * draw(st.integers(1, 3)),
        num_experts_per_tok=1,
        moe_intermediate_size=sizes["etp"] * draw(st.integers(1, 3)),
        shared_expert_intermediate_size=tp * draw(st.integers(0, 2)),
        mlp_only_layers=draw(st.lists(st.integers(0, 3), max_size=1)),
        layer_types=[draw(st.sampled_from(["linear_attention", "full_attention"])) for _ in range(layers)],
        linear_num_key_heads=keys,
        linear_num_value_heads=keys * draw(st.integers(1, 3)),
        linear_key_head_dim=draw(st.integers(1, 3)),
        linear_value_head_dim=draw(st.integers(1, 3)),
        linear_conv_kernel_dim=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 40)),
        tie_word_embeddings=draw(st.booleans()),
    )
    return config, sizes, draw(st.sampled_from([1, 2, 5, 16]))


@st.composite
def hybrid_jobs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int], int]:
    """The same of layers of Mamba, of attention, of MLPs and of experts."""
    sizes = draw(meshes_with_experts())
    tp, pp = sizes["tp"], sizes["pp"]
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6) if n % tp == 0 or tp % n == 0]))
    queries = draw(st.sampled_from([n for n in range(1, 9) if n * groups % tp == 0]))
    layers, state_groups = pp * draw(st.integers(1, 3)), tp * draw(st.integers(1, 2))
    kinds = ["linear_attention", "full_attention", "mlp", "moe"]
    config = make_config(
        model_type="nemotron_h",
        hidden_size=draw(st.integers(1, 5)),
        num_hidden_layers=layers,
        layers_block_type=[draw(st.sampled_from(kinds)) for _ in range(layers)],
        num_attention_heads=queries * groups,
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([n for n in range(1, 9) if groups * (queries + 2) * n % tp == 0])),
        intermediate_size=tp * draw(st.integers(1, 4)),
        n_routed_experts=sizes["ep"] * draw(st.integers(1, 3)),
        num_experts_per_tok=1,
        moe_intermediate_size=sizes["etp"] * draw(st.integers(1, 3)),
        moe_shared_expert_intermediate_size=tp * draw(st.integers(1, 2)),
        mamba_num_heads=state_groups * draw(st.integers(1, 2)),
        mamba_head_dim=draw(st.integers(1, 3)),
        n_groups=state_groups,
        ssm_state_size=draw(st.integers(1, 3)),
        conv_kernel=draw(st.integers(1, 4)),
        vocab_size=draw(st.integers(1, 40)),
    )
    return config, sizes, draw(st.sampled_from([1, 2, 5, 16]))


def write(layout: Layout, state: State) -> State:
    """Copy logical tensors into poisoned memory through the pieces, and write the fills."""
    memory = {b.name: torch.full((b.numel,), POISON, dtype=torch.int32).view(torch.float32) for b in layout.buffers}
    written: Counter[str] = Counter()
    for piece in layout:
        whole = state[piece.tensor].reshape(piece.box.factors)
        box = whole[tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))]
        memory[piece.buffer].as_strided(box.shape, piece.strides, piece.offset).copy_(box)
        written[piece.buffer] += box.numel()
    for fill in layout.fills:
        memory[fill.buffer].as_strided(fill.sizes, fill.strides, fill.offset).fill_(fill.value)
        written[fill.buffer] += math.prod(fill.sizes)
    assert written == {buffer.name: buffer.numel for buffer in layout.buffers}
    return memory


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.reshape(-1).view(torch.int32).tolist()


@pytest.mark.trap(1, 2, 3, 4, 5, 6, 7, 14, 15)
@settings(max_examples=300, deadline=None)
@given(jobs() | latent_jobs() | delta_jobs() | hybrid_jobs(), st.sampled_from(Spec))
def test_every_rank_holds_what_independent_slicing_gives(
    job: tuple[dict[str, Any], dict[str, int], int], spec: Spec
) -> None:
    config, sizes, divisor = job
    assume(not (spec.legacy and unfit_for_legacy(config)))
    state, padded = logical_state(config), padded_vocabulary(config["vocab_size"], divisor, sizes["tp"])
    if read_config(config).experts is None:
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    layouts = MegatronAdapter(make_vocab_size_divisible_by=divisor, spec=spec).layouts(config, sizes, "float32")
    holders = {name: torch.zeros(tensor.shape, dtype=torch.int32) for name, tensor in state.items()}
    assert len(layouts) == sizes["tp"] * sizes["pp"] * sizes["dp"]
    for place, layout in zip(places(sizes), layouts, strict=True):
        expected = holdings(config, state, place, padded, spec)
        found = write(layout, state)
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert bits(found[name]) == bits(tensor), name
        for piece in layout:
            whole = holders[piece.tensor].reshape(piece.box.factors)
            whole[tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))] += 1
        assert {tensor.name: tensor.shape for tensor in layout.tensors}.items() <= {
            name: tuple(tensor.shape) for name, tensor in state.items()
        }.items()
    assert all(bool(tensor.all()) for tensor in holders.values())
    copies = sizes["tp"] * sizes["dp"] // (sizes.get("ep", 1) * sizes.get("etp", sizes["tp"]))
    for name in (name for name in holders if ".experts." in name and not name.endswith(("down_proj.bias", "_bias"))):
        assert bool((holders[name] == copies).all()), name


@pytest.mark.trap(6)
@settings(max_examples=50, deadline=None)
@given(jobs() | latent_jobs() | delta_jobs() | hybrid_jobs(), st.sampled_from(Spec))
def test_names_of_all_ranks_together_are_those_of_the_map(
    job: tuple[dict[str, Any], dict[str, int], int], spec: Spec
) -> None:
    config, sizes, divisor = job
    assume(not (spec.legacy and unfit_for_legacy(config)))
    model = read_config(config)
    if model.experts is None:
        sizes = {axis: size for axis, size in sizes.items() if axis not in ("ep", "etp")}
    layouts = MegatronAdapter(make_vocab_size_divisible_by=divisor, spec=spec).layouts(config, sizes, "float32")
    names = name_map(model, spec)
    names.check(buffer.name for layout in layouts for buffer in layout.buffers)
    for layout in layouts:
        for piece in layout:
            assert piece.tensor in names.logical(piece.buffer)
            assert piece.buffer in names.local(piece.tensor)


@pytest.mark.trap(8)
def test_data_and_context_parallel_ranks_share_a_layout() -> None:
    layouts = adapter.layouts(make_config(), {"tp": 2, "pp": 2, "dp": 2, "cp": 2}, "bfloat16")
    assert len(layouts) == 16
    assert len({layout.address for layout in layouts}) == 4
    assert layouts[0] is layouts[2] is layouts[4] is layouts[6]
    assert layouts[8] is layouts[10]


@pytest.mark.trap(5, 20)
@pytest.mark.parametrize(("tp", "q", "k", "v"), [(1, 1, 1, 1), (2, 1, 1, 1), (8, 1, 0, 0), (16, 1, 0, 0)])
def test_a_shard_of_qkv_is_one_box_per_part(tp: int, q: int, k: int, v: int) -> None:
    config = make_config(
        hidden_size=1024, num_attention_heads=64, num_key_value_heads=4, head_dim=128, intermediate_size=64
    )
    layout = adapter.layouts(config, {"tp": tp}, "bfloat16")[0]
    pieces = [piece for piece in layout if piece.buffer == "decoder.layers.0.self_attention.linear_qkv.weight"]
    count = Counter(piece.tensor.split(".")[-2] for piece in pieces)
    assert count == Counter({"q_proj": q, "k_proj": k, "v_proj": v}) + Counter()
    # per layer: 2 norms, 2 qk norms, o, gate, up, down
    assert len(layout.pieces) == 2 + 1 + config["num_hidden_layers"] * (8 + q + k + v)


@pytest.mark.trap(5)
def test_more_ranks_than_groups_split_a_group_in_the_middle_of_a_head() -> None:
    config = make_config(num_attention_heads=4, num_key_value_heads=1, head_dim=2, hidden_size=3)
    layouts = adapter.layouts(config, {"tp": 4}, "float32")
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    rows = [
        [
            (piece.tensor.split(".")[-2][0], piece.box.lo[-2], piece.box.hi[-2])
            for piece in layout
            if piece.buffer == name
        ]
        for layout in layouts
    ]
    # 8 query rows, 2 key rows, 2 value rows over 4 ranks: 3 rows each
    assert rows == [[("q", 0, 3)], [("q", 3, 6)], [("q", 6, 8), ("k", 0, 1)], [("k", 1, 2), ("v", 0, 2)]]


@pytest.mark.trap(14)
@pytest.mark.parametrize(
    ("tp", "vocabulary", "rows"), [(1, 11, [11]), (2, 11, [8, 3]), (3, 9, [8, 1, 0]), (8, 64, [8] * 8)]
)
def test_padding_of_the_vocabulary_is_declared_and_holds_no_tensor(tp: int, vocabulary: int, rows: list[int]) -> None:
    config = make_config(vocab_size=vocabulary, num_attention_heads=24, num_key_value_heads=24, intermediate_size=24)
    layouts = MegatronAdapter(make_vocab_size_divisible_by=8 if tp > 1 else 16).layouts(config, {"tp": tp}, "float32")
    name = "embedding.word_embeddings.weight"
    for layout, real in zip(layouts, rows, strict=True):
        size = next(buffer.numel for buffer in layout.buffers if buffer.name == name)
        assert sum(piece.box.numel for piece in layout if piece.buffer == name) == real * 8
        assert sum(math.prod(fill.sizes) for fill in layout.fills if fill.buffer == name) == size - real * 8


@pytest.mark.trap(13)
@pytest.mark.parametrize(("pp", "copies"), [(1, 1), (2, 2), (4, 2)])
def test_a_tied_embedding_is_one_tensor_held_by_both_ends(pp: int, copies: int) -> None:
    config = make_config(tie_word_embeddings=True, num_hidden_layers=4)
    layouts = adapter.layouts(config, {"pp": pp}, "float32")
    holders = [piece.buffer for layout in layouts for piece in layout if piece.tensor == "model.embed_tokens.weight"]
    assert holders == ["embedding.word_embeddings.weight", "output_layer.weight"][:copies]
    assert all(tensor.name != "lm_head.weight" for layout in layouts for tensor in layout.tensors)
    assert [(tie.alias, tie.name) for tie in layouts[0].ties] == [("lm_head.weight", "model.embed_tokens.weight")]


@pytest.mark.trap(6)
def test_layers_keep_their_global_numbers_on_every_stage() -> None:
    layouts = adapter.layouts(make_config(num_hidden_layers=6), {"pp": 3}, "float32")
    assert [layout.groups for layout in layouts] == [
        ("embedding", "layers.0", "layers.1"),
        ("layers.2", "layers.3"),
        ("layers.4", "layers.5", "output"),
    ]
    assert {b.name for b in layouts[1].buffers} & {b.name for b in layouts[0].buffers} == set()


@pytest.mark.trap(6)
def test_experts_keep_their_global_numbers_on_every_rank() -> None:
    layouts = adapter.layouts(make_experts(), {"dp": 4, "ep": 2}, "float32")
    experts = [{int(b.name.split(".")[6]) for b in layout.buffers if ".local_experts." in b.name} for layout in layouts]
    assert experts == [{0, 1}, {2, 3}, {0, 1}, {2, 3}]
    assert layouts[0] is layouts[2]
    assert [layout.groups for layout in layouts] == [("embedding", "layers.0", "layers.1", "output")] * 4


@pytest.mark.trap(4)
def test_experts_are_divided_by_their_own_tensor_parallel_size() -> None:
    name = "decoder.layers.0.mlp.experts.local_experts.1.linear_fc1.weight"
    for sizes, rows in (
        ({"tp": 2, "etp": 1}, [[(0, 6), (0, 6)]] * 2),
        ({"dp": 2, "etp": 2}, [[(0, 3), (0, 3)], [(3, 6), (3, 6)]]),
    ):
        layouts = adapter.layouts(make_experts(), sizes, "float32")
        found = [[(p.box.lo[-2], p.box.hi[-2]) for p in layout if p.buffer == name] for layout in layouts]
        assert found == rows


def test_the_layout_of_one_rank_is_that_of_the_list() -> None:
    config, sizes = make_experts(), {"tp": 2, "dp": 2, "ep": 2, "etp": 1}
    every = adapter.layouts(config, sizes, "bfloat16")
    assert [megatron_layout(config, sizes, rank) for rank in range(4)] == list(every)
    with pytest.raises(ConfigError, match="rank 4 of a megatron job: it has ranks 0 to 3"):
        megatron_layout(config, sizes, 4)


@pytest.mark.trap(17)
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"dp": 3, "ep": 3}, ["experts 4 is not a multiple of ep=3"]),
        ({"tp": 4, "etp": 4, "dp": 3, "ep": 3}, ["experts 4", "ep=3", "expert intermediate size 6", "etp=4"]),
        ({"dp": 4, "ep": 8}, ["4 ranks", "etp 1 x ep 8 x pp 1 = 8"]),
    ],
)
def test_experts_that_do_not_divide_are_an_error_that_names_the_numbers(
    sizes: dict[str, int], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        adapter.layouts(make_experts(), sizes, "float32")
    assert [word for word in words if word not in str(caught.value)] == []


def test_biases_of_experts_that_are_divided_are_refused_as_megatron_refuses_them() -> None:
    config = make_experts(attention_bias=True, mlp_bias=True)
    with pytest.raises(ConfigError, match="biases do not divide among etp=2"):
        adapter.layouts(config, {"dp": 2, "etp": 2}, "float32")


def test_a_model_without_layers_for_experts_is_dense() -> None:
    config = make_experts(mlp_only_layers=[0, 1])
    assert adapter.layouts(config, {}, "float32")[0] == adapter.layouts(make_config(), {}, "float32")[0]


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts"])
def test_both_names_of_the_number_of_experts_are_read(key: str) -> None:
    config = {name: value for name, value in make_experts().items() if name != "num_experts"}
    layout = adapter.layouts(config | {key: 4}, {}, "float32")[0]
    assert layout == adapter.layouts(make_experts(), {}, "float32")[0]


def test_norms_may_have_a_dtype_of_their_own() -> None:
    layout = MegatronAdapter(norm_dtype="float32").layouts(make_config(), {"tp": 2}, "bfloat16")[0]
    dtypes = {buffer.name.split(".")[-2]: buffer.dtype for buffer in layout.buffers}
    assert dtypes["input_layernorm"] == dtypes["q_layernorm"] == dtypes["final_layernorm"] == "float32"
    assert dtypes["linear_qkv"] == dtypes["word_embeddings"] == "bfloat16"


@pytest.mark.parametrize("family", ["mistral", "qwen2_moe", "qwen3_5_moe", "deepseek_v2", "gemma2", ""])
def test_a_family_that_is_not_mapped_is_refused_by_name(family: str) -> None:
    with pytest.raises(NotSupportedError, match=f"model_type '{family}'"):
        adapter.layouts(make_config(model_type=family), {}, "bfloat16")


def test_biases_that_megatron_cannot_hold_are_refused() -> None:
    with pytest.raises(NotSupportedError, match="attention_bias=True and mlp_bias=False"):
        adapter.layouts(make_config(model_type="llama", attention_bias=True), {}, "bfloat16")


def test_expert_parallelism_of_a_dense_model_is_refused_by_name() -> None:
    with pytest.raises(NotSupportedError, match="ep=2"):
        adapter.layouts(make_config(), {"dp": 2, "ep": 2}, "bfloat16")


def test_every_size_that_does_not_divide_is_named() -> None:
    config = make_config(num_attention_heads=10, num_key_value_heads=5, intermediate_size=9)
    with pytest.raises(ConfigError) as caught:
        adapter.layouts(config, {"tp": 4}, "float32")
    for word in ("attention heads 10", "intermediate size 9", "key-value heads 5", "tp=4"):
        assert word in str(caught.value)
    with pytest.raises(ConfigError, match="6 layers do not divide into pp=4"):
        adapter.layouts(make_config(num_hidden_layers=6), {"pp": 4}, "float32")


def test_every_missing_size_of_experts_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter.layouts(make_config(model_type="qwen3_moe", num_experts_per_tok=0), {}, "float32")
    for word in ("num_experts is None", "num_experts_per_tok is 0", "moe_intermediate_size is None"):
        assert word in str(caught.value)


def test_every_missing_size_of_a_config_is_named() -> None:
    with pytest.raises(ConfigError) as caught:
        adapter.layouts({"model_type": "llama", "hidden_size": 0, "num_hidden_layers": "two"}, {}, "float32")
    for word in (
        "hidden_size is 0",
        "num_hidden_layers is 'two'",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ):
        assert word in str(caught.value)


def test_shared_experts_are_refused_by_name() -> None:
    with pytest.raises(NotSupportedError, match="shared experts"):
        adapter.layouts(make_experts(shared_expert_intermediate_size=64), {}, "bfloat16")


def make_hybrid(**changes: Any) -> dict[str, Any]:
    hybrid = {
        "model_type": "nemotron_h",
        "layers_block_type": ["linear_attention", "mlp"],
        "mamba_num_heads": 6,
        "mamba_head_dim": 2,
        "n_groups": 2,
        "ssm_state_size": 3,
        "conv_kernel": 4,
    }
    return make_config(**(hybrid | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layers_block_type": ["mamba", "window"], "moe_latent_size": 8}, "moe_latent_size=8, a layer of window"),
        ({"use_bias": True, "tie_word_embeddings": True}, "use_bias=True, tie_word_embeddings=True"),
        ({"mlp_hidden_act": "silu", "use_conv_bias": False}, "use_conv_bias=False, mlp_hidden_act='silu'"),
    ],
)
def test_hybrids_that_are_not_mapped_are_refused_by_what_they_have(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(NotSupportedError, match=f"nemotron_h with {words} is not mapped"):
        adapter.layouts(make_hybrid(**changes), {}, "bfloat16")


@pytest.mark.parametrize("kinds", [["linear_attention", "mlp"], ["mamba", "mlp"], "M-"])
def test_kinds_of_layers_go_by_several_names(kinds: list[str] | str) -> None:
    key = "hybrid_override_pattern" if isinstance(kinds, str) else "layers_block_type"
    config = {name: value for name, value in make_hybrid().items() if name not in ("layers_block_type", key)}
    layout = adapter.layouts(config | {key: kinds}, {}, "float32")[0]
    assert layout == adapter.layouts(make_hybrid(), {}, "float32")[0]
    with pytest.raises(ConfigError, match="num_hidden_layers is 3, and it has the kinds of 2"):
        adapter.layouts(config | {key: kinds, "num_hidden_layers": 3}, {}, "float32")


def test_groups_of_mamba_that_do_not_divide_are_named() -> None:
    with pytest.raises(ConfigError, match="heads of Mamba 6 is not a multiple of tp=4; groups of Mamba 2"):
        adapter.layouts(make_hybrid(), {"tp": 4}, "float32")


def test_rates_and_skips_of_mamba_may_be_in_float32_with_the_norms() -> None:
    layout = MegatronAdapter(norm_dtype="float32").layouts(make_hybrid(), {}, "bfloat16")[0]
    dtypes = {buffer.name: buffer.dtype for buffer in layout.buffers}
    small = {name.removeprefix("decoder.layers.0.") for name, dtype in dtypes.items() if dtype == "float32"}
    assert small == {
        "norm.weight", "mixer.A_log", "mixer.D", "decoder.layers.1.pre_mlp_layernorm.weight",
        "decoder.final_norm.weight",
    }  # fmt: skip


def test_experts_without_gates_have_no_legacy_layout() -> None:
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 6}
    config = make_hybrid(layers_block_type="ME", moe_shared_expert_intermediate_size=6, **experts)
    with pytest.raises(ConfigError, match="the legacy grouped layout is not mapped for experts without gates"):
        MegatronAdapter(spec=Spec.LEGACY).layouts(config, {}, "float32")
