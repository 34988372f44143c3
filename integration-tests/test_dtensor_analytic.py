"""Analytic layouts of weft-dtensor against live Transformers models that its own plans have cut, on meshes of any rank.

torch's fake process group stands for the other ranks: nothing is communicated, all placements are real.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from support.tiny_models import random_model, tiny_config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.distributed.tensor_parallel import (
    apply_expert_parallelism,
    apply_tensor_parallelism,
    resolve_parallel_plans,
)

import weft
from weft import Layout
from weft.errors import ConfigError, LayoutError, NotSupportedError
from weft_dtensor import ModuleSource, adapter, dtensor_layout

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, Any] = {"moe_intermediate_size": 8, "num_experts": 8, "num_experts_per_tok": 2}
FAMILIES = {
    "qwen3": AutoConfig.for_model("qwen3", **SIZES, tie_word_embeddings=False),
    "llama tied": AutoConfig.for_model("llama", **SIZES, tie_word_embeddings=True),
    "qwen2": AutoConfig.for_model("qwen2", **SIZES, tie_word_embeddings=False),  # with biases
    "qwen3_moe": AutoConfig.for_model("qwen3_moe", **SIZES, **EXPERTS),
    "deepseek_v3": AutoConfig.for_model(
        "deepseek_v3", **{name: size for name, size in SIZES.items() if name != "head_dim"}, n_routed_experts=8,
        moe_intermediate_size=8, n_shared_experts=1, first_k_dense_replace=1, num_experts_per_tok=2, n_group=1,
        topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4,
    ),
    "gpt_oss": AutoConfig.for_model(
        "gpt_oss", **SIZES, num_local_experts=8, num_experts_per_tok=2, rope_parameters={"rope_type": "default"}
    ),
}  # fmt: skip
DENSE = ({"tp": 4}, {"fsdp": 2, "tp": 2}, {"replicate": 2, "fsdp": 2}, {"replicate": 2, "fsdp": 3, "tp": 2})
SPREAD = ({"fsdp": 4, "ep": 2}, {"fsdp": 2, "tp": 2, "ep": 4}, {"replicate": 2, "fsdp": 4, "tp": 2, "ep": 4})
CASES = [(family, sizes) for family in FAMILIES for sizes in DENSE] + [
    (family, sizes) for family in ("qwen3_moe", "deepseek_v3") for sizes in SPREAD
]
FAMILIES |= {
    name: tiny_config(name) for name in ("bamba", "glm_moe_dsa", "mixtral", "nemotron_h", "qwen2_5_vl", "qwen3_next")
}
CASES += [(family, {"replicate": 2, "fsdp": 3}) for family in ("bamba", "nemotron_h")]  # without plans of Transformers
CASES += [(family, {"fsdp": 2, "tp": 2}) for family in ("glm_moe_dsa", "mixtral", "qwen2_5_vl", "qwen3_next")]
CASES += [(family, {"fsdp": 2, "tp": 2, "ep": 4}) for family in ("glm_moe_dsa", "mixtral", "qwen3_next")]


@contextmanager
def standing(rank: int, world: int) -> Iterator[None]:
    """Be one rank of a world in which nobody else is."""
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        _clear_sharding_prop_cache()  # it would answer with meshes as the last rank saw them


def live(config: PretrainedConfig, sizes: dict[str, int]) -> PreTrainedModel:
    """What Transformers makes of a model over a mesh, with HSDP where it replicates."""
    replicate, fsdp, tp, ep = (sizes.get(axis, 1) for axis in ("replicate", "fsdp", "tp", "ep"))
    dense = init_device_mesh("cpu", (replicate, fsdp, tp), mesh_dim_names=("replicate", "fsdp", "tp"))
    spread = init_device_mesh("cpu", (replicate, fsdp * tp // ep, ep), mesh_dim_names=("replicate", "efsdp", "ep"))
    model = random_model(config)
    divided = DistributedConfig(fsdp_size=fsdp, tp_size=tp, ep_size=ep)
    dense_plan, expert_plan = resolve_parallel_plans(model, divided)
    if tp > 1:
        apply_tensor_parallelism(model, dense["tp"], dense_plan)
    if ep > 1:
        apply_expert_parallelism(model, spread["ep"], dense["tp"], expert_plan)
    model.tie_weights()
    for name, layer in model.named_modules():
        if ep > 1 and name.endswith(".experts"):
            fully_shard(layer, mesh=spread["replicate", "efsdp"])
    for name, layer in model.named_modules():
        if re.search(r"\.(layers|blocks)\.\d+$", name):
            fully_shard(layer, mesh=dense["replicate", "fsdp"])
    fully_shard(model, mesh=dense["replicate", "fsdp"])
    return model


@pytest.mark.trap(1, 2, 16)
@pytest.mark.parametrize(("family", "sizes"), CASES, ids=str)
def test_a_layout_from_a_config_is_that_of_the_model_that_transformers_cuts(family: str, sizes: dict[str, int]) -> None:
    config = FAMILIES[family]
    ranks = adapter.layouts(config.to_dict(), sizes, "float32")
    world = adapter.world_size(sizes)
    assert len(ranks) == world
    for rank in range(world):
        assert ranks[rank].address == described(config, sizes, rank).address, rank
    assert analytic(config, sizes, world - 1).address == ranks[-1].address


@pytest.mark.trap(16)
def test_lengths_that_torch_itself_mistakes_are_refused_from_a_config_and_live() -> None:
    config = AutoConfig.for_model("qwen3", **SIZES | {"intermediate_size": 9}, tie_word_embeddings=False)
    sizes = {"fsdp": 4, "tp": 2}  # 5 and 4 rows of gate and up over 4 ranks each
    found = [(_faults(described, config, sizes, rank), _faults(analytic, config, sizes, rank)) for rank in range(8)]
    assert all(faults == expected for faults, expected in found)
    assert {rank for rank, (faults, _) in enumerate(found) if faults} == {6, 7}  # as test_shards.py has it
    assert {fault.split(":")[0].split(".", 3)[3] for faults, _ in found for fault in faults} == {
        "mlp.gate_proj.weight", "mlp.up_proj.weight",
    }  # fmt: skip


def described(config: PretrainedConfig, sizes: dict[str, int], rank: int) -> Layout:
    """One rank's layout of a live model."""
    with standing(rank, adapter.world_size(sizes)):
        return ModuleSource(live(config, sizes)).layout()


def analytic(config: PretrainedConfig, sizes: dict[str, int], rank: int) -> Layout:
    """One rank's layout from its config."""
    return dtensor_layout(config.to_dict(), sizes, rank, "float32")


def _faults(
    describe: Callable[[PretrainedConfig, dict[str, int], int], Layout],
    config: PretrainedConfig,
    sizes: dict[str, int],
    rank: int,
) -> tuple[str, ...]:
    try:
        describe(config, sizes, rank)
    except LayoutError as error:
        return error.faults
    return ()


@pytest.mark.trap(8, 12)
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tp": 2}, {"fsdp": 2, "tp": 2, "ep": 4}], ids=str)
def test_all_ranks_together_make_a_whole_model(sizes: dict[str, int]) -> None:
    config = FAMILIES["qwen3_moe"].to_dict()
    ranks = adapter.layouts(config, sizes, "bfloat16")
    (target,) = adapter.layouts(config, {}, "bfloat16")
    sources = [
        weft.Member(f"s/{rank}", held.address, None, None, 0, "here", "here", "cpu") for rank, held in enumerate(ranks)
    ]
    wanted = weft.Member("t", None, target.address, "r", 1, "here", "here", "cpu")
    whole = weft.plan(sources, [wanted], {layout.address: layout for layout in (*ranks, target)})
    assert whole.statistics.bytes == target.nbytes
    assert min(whole.statistics.egress_bytes.values()) > 0


@pytest.mark.trap(8, 10, 50)
@pytest.mark.parametrize(
    ("targets", "senders"),
    [
        (["far"], {0: 1 / 8, 1: 1 / 8, 2: 1 / 8, 3: 1 / 8}),  # all replicas are equally near: equal shares
        (["h2"], {2: 1 / 2}),  # one replica is beside the only target: the others would not help
        (["h1", "h3"], {1: 1 / 2, 3: 1 / 2}),
        (["h0", "far"], {0: 1 / 2, 1: 1 / 6, 2: 1 / 6, 3: 1 / 6}),  # the busy one is spared
    ],
    ids=str,
)
def test_only_the_replicas_of_hsdp_that_help_send_and_they_do_in_equal_shares(
    targets: list[str], senders: dict[int, float]
) -> None:
    config = AutoConfig.for_model(
        "qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=2, vocab_size=32768, head_dim=128,
        num_attention_heads=16, num_key_value_heads=8, tie_word_embeddings=False,
    ).to_dict()  # fmt: skip
    sizes = {"replicate": 4, "fsdp": 2}
    ranks = adapter.layouts(config, sizes, "bfloat16")
    (wanted,) = adapter.layouts(config, {}, "bfloat16")
    sources = [
        weft.Member(f"s/{rank}", held.address, None, None, 0, f"h{rank // 2}", "here", "cpu")
        for rank, held in enumerate(ranks)
    ]
    served = [
        weft.Member(f"t/{n}", None, wanted.address, f"r{n}", 1, host, "here", "cpu") for n, host in enumerate(targets)
    ]
    statistics = weft.plan(sources, served, {layout.address: layout for layout in (*ranks, wanted)}).statistics
    assert statistics.bytes == len(targets) * wanted.nbytes
    for rank in range(8):
        share = statistics.egress_bytes.get(f"s/{rank}", 0) / wanted.nbytes
        assert share == pytest.approx(senders.get(rank // 2, 0), rel=0.05), rank
    assert statistics.egress_over_bound < 1.03


@pytest.mark.trap(17)
def test_sizes_that_a_plan_cannot_divide_are_named_with_their_numbers() -> None:
    moe, dense = (FAMILIES[family].to_dict() for family in ("qwen3_moe", "qwen3"))
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.experts\.gate_up_proj: ep=3 does not divide its 8 experts"):
        adapter.layouts(moe, {"fsdp": 3, "ep": 3}, "bfloat16")
    with pytest.raises(ConfigError, match=r"lm_head\.weight: tp=3 does not divide its 64 rows"):
        adapter.layouts(dense, {"tp": 3}, "bfloat16")
    with pytest.raises(NotSupportedError, match="ep=2: Qwen3ForCausalLM of the installed Transformers has no ep_plan"):
        adapter.layouts(dense, {"fsdp": 2, "ep": 2}, "bfloat16")
    with pytest.raises(ConfigError, match="rank 4 of a mesh of 4: it has ranks 0 to 3"):
        dtensor_layout(dense, {"tp": 4}, 4)
