"""Beside Megatron-Core's own planner and refit: what these are given makes them right, and both move equal bytes."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import msgspec
import pytest
import torch
from support.megatron_refit_alone import refit_and_spoil

from weft.policy import Policy
from weft.store_server import serve_store
from weft_cli.bench import megatron_planner
from weft_cli.bench.beside import run_beside
from weft_cli.bench.cases import case_of, named_case
from weft_cli.bench.isolated import in_own_process
from weft_cli.bench.megatron_planner import Sizes, run_megatron
from weft_cli.bench.run import run_case
from weft_cli.bench.settings import Case
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


def dense(source: str, target: str) -> Case:
    config = {**load_config("qwen3-0.6b"), **SMALL}
    return case_of("mine", config, source, target, "gloo", Policy(), 2, collocated=True, beside_megatron=True)


def test_megatrons_own_refit_takes_turns_with_wefts() -> None:
    row = run_case(dense("megatron:pp2", "megatron:tp2"))
    assert row["wrong_bytes"] == 0
    assert row["ratio_to_megatron"] == pytest.approx(row["megatron_seconds_median"] / row["seconds_median"])
    assert row["ratio_to_beside"] is None
    assert named_case("four-ranks-nixl", False, 2, reuse=True).beside_megatron


def test_bytes_that_megatrons_own_refit_leaves_wrong_are_found() -> None:
    with serve_store() as server:
        argument = msgspec.msgpack.encode((dense("megatron:tp1", "megatron:tp1"), server.url))
        right, wrong = msgspec.msgpack.decode(in_own_process(refit_and_spoil, argument, 120))
    assert right == "right"
    assert "bytes wrong" in wrong
