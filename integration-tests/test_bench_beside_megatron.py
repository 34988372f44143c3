"""Beside Megatron-Core's own planner: it is given what makes its plan right, and both move equal bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import msgspec
import pytest
import torch

from weft_cli.bench import megatron_planner
from weft_cli.bench.beside import run_beside
from weft_cli.bench.megatron_planner import Sizes, run_megatron
from weft_cli.models import load_config

SMALL = {
    "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "num_experts": 16, "moe_intermediate_size": 32, "vocab_size": 1024, "intermediate_size": 128,
}  # fmt: skip


def small() -> dict[str, Any]:
    return {**load_config("qwen3-30b-a3b"), **SMALL}


def test_megatrons_plan_writes_every_element_of_every_target_once(monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    shapes: list[dict[str, tuple[int, ...]]] = []
    keep, describe = megatron_planner._Collectives.keep, megatron_planner._metadata

    def kept(self: Any, made: list[Any], src: int) -> None:
        plans.extend(made)
        keep(self, made, src)

    def described(*arguments: Any) -> list[Any]:
        found = describe(*arguments)
        shapes.append({meta.name: meta.shape for meta in found})
        return found

    monkeypatch.setattr(megatron_planner._Collectives, "keep", kept)
    monkeypatch.setattr(megatron_planner, "_metadata", described)
    source, target = Sizes(2, 2, 8, 8, 1), Sizes(4, 1, 4, 1, 4)
    made = run_megatron(small(), source, target)
    for rank in range(target.world):
        written: dict[str, Any] = defaultdict(int)
        for operation in plans[source.world + rank].recv_ops:
            assert operation.peer_rank < source.world
            name = operation.param_name
            counts = written.setdefault(name, torch.zeros(shapes[source.world + rank][name], dtype=torch.int32))
            counts[operation.my_slice] += 1
        assert {name: tuple(counts.shape) for name, counts in written.items()} == shapes[source.world + rank]
        assert all(bool((counts == 1).all()) for counts in written.values())
    needed = sum(math.prod(shape) for held in shapes[source.world :] for shape in held.values())
    assert made.bytes == needed * 2


def test_both_planners_move_equal_bytes() -> None:
    row = run_beside("qwen3-30b-a3b", small(), 64, 300)
    assert (row.source_ranks, row.target_ranks) == (64, 32)
    assert row.weft.bytes == row.megatron.bytes
    assert row.megatron.operations >= row.weft.operations
    assert row.megatron.egress_max_over_mean >= row.weft.egress_max_over_mean
    assert row.megatron_version.startswith("0.16.")
    assert msgspec.json.decode(msgspec.json.encode(row))["ratios"]["balance"] == pytest.approx(
        row.megatron.egress_max_over_mean / row.weft.egress_max_over_mean
    )
