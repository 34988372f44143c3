"""Analytic layouts say exactly what Megatron holds, element by element."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError, NotSupportedError
from weft.layout import Layout
from weft_megatron import MegatronAdapter, adapter
from weft_megatron.mesh import padded_vocabulary

from .reference import State, logical_state, megatron_shard

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


@st.composite
def jobs(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, int], int]:
    """A config, parallel sizes and a vocabulary divisor that Megatron accepts."""
    tp, pp = draw(st.sampled_from([1, 2, 3, 4, 6, 8])), draw(st.integers(1, 3))
    groups = draw(st.sampled_from([n for n in (1, 2, 3, 4, 6, 8, 12) if n % tp == 0 or tp % n == 0]))
    queries = draw(st.sampled_from([n for n in range(1, 9) if n * groups % tp == 0]))
    head = draw(st.sampled_from([n for n in range(1, 17) if groups * (queries + 2) * n % tp == 0]))
    family = draw(st.sampled_from(["llama", "qwen2", "qwen3"]))
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
    if family == "llama" and draw(st.booleans()):
        config |= {"attention_bias": True, "mlp_bias": True}
    return config, {"tp": tp, "pp": pp, "dp": draw(st.integers(1, 2))}, draw(st.sampled_from([1, 2, 5, 16]))


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


@pytest.mark.trap(1, 3, 4, 5, 14)
@settings(max_examples=150, deadline=None)
@given(jobs())
def test_every_rank_holds_what_independent_slicing_gives(job: tuple[dict[str, Any], dict[str, int], int]) -> None:
    config, sizes, divisor = job
    state, padded = logical_state(config), padded_vocabulary(config["vocab_size"], divisor, sizes["tp"])
    layouts = MegatronAdapter(make_vocab_size_divisible_by=divisor).layouts(config, sizes, "float32")
    covered = {name: torch.zeros_like(tensor, dtype=torch.bool) for name, tensor in state.items()}
    assert len(layouts) == sizes["tp"] * sizes["pp"] * sizes["dp"]
    for rank, layout in enumerate(layouts):
        # tp varies fastest, then dp, then pp, in Megatron's default order
        tp_rank, pp_rank = rank % sizes["tp"], rank // (sizes["tp"] * sizes["dp"])
        expected = megatron_shard(config, state, tp_rank, sizes["tp"], pp_rank, sizes["pp"], padded)
        found = write(layout, state)
        assert sorted(found) == sorted(expected)
        for name, tensor in expected.items():
            assert bits(found[name]) == bits(tensor), name
        for piece in layout:
            whole = covered[piece.tensor].reshape(piece.box.factors)
            whole[tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))] = True
        assert {tensor.name: tensor.shape for tensor in layout.tensors}.items() <= {
            name: tuple(tensor.shape) for name, tensor in state.items()
        }.items()
    assert all(bool(tensor.all()) for tensor in covered.values())


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


def test_norms_may_have_a_dtype_of_their_own() -> None:
    layout = MegatronAdapter(norm_dtype="float32").layouts(make_config(), {"tp": 2}, "bfloat16")[0]
    dtypes = {buffer.name.split(".")[-2]: buffer.dtype for buffer in layout.buffers}
    assert dtypes["input_layernorm"] == dtypes["q_layernorm"] == dtypes["final_layernorm"] == "float32"
    assert dtypes["linear_qkv"] == dtypes["word_embeddings"] == "bfloat16"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "gemma2", ""])
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
    with pytest.raises(ConfigError, match="3 layers do not divide into pp=2"):
        adapter.layouts(make_config(num_hidden_layers=3), {"pp": 2}, "float32")


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
