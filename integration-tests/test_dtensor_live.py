"""Live modules in four real processes: FSDP2, HSDP, tensor parallelism, both, and FSDP1, refitting each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.dtensor_ranks import Job, Net, serve
from support.processes import run_ranks

from weft import Layout, Member, execute, plan, serve_store
from weft.testing.members import poison
from weft_dtensor import ModuleTarget

PAIRS = [
    ("fsdp", "fsdp tp", "nixl"),
    ("fsdp tp", "hsdp", "gloo"),
    ("hsdp columns", "tp4", "nixl"),
    ("tp2", "plain", "gloo"),
    ("hsdp", "fsdp", "nixl"),
    ("flat", "flat hybrid", "gloo"),
    ("flat hybrid", "flat", "nixl"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank found, by call."""
    server = serve_store()
    calls: dict[str, tuple[str, tuple[Any, ...]]] = {
        f"{source} to {target}": ("exchange", (source, target, Job(server.url, f"{source} to {target}", transport)))
        for source, target, transport in PAIRS
    }
    calls["one target"] = ("shares", ("aabb", [0], Job(server.url, "one target", "gloo")))
    calls["two targets"] = ("shares", ("aabb", [0, 3], Job(server.url, "two targets", "gloo")))
    calls["states"] = ("states", ())
    calls["flat states"] = ("flat states", ())
    rendezvous = f"file://{Path(tmp_path_factory.mktemp('ranks')) / 'rendezvous'}"
    try:
        ranks = run_ranks(serve, 4, rendezvous, list(calls.values()), seconds=200)
    finally:
        server.close()
    return [dict(zip(calls, found, strict=True)) for found in ranks]


@pytest.mark.trap(8, 13, 16, 18)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: " ".join(pair))
def test_every_placement_refits_every_byte_of_another_after_real_steps(
    answers: list[dict[str, Any]], pair: tuple[str, str, str]
) -> None:
    for rank in answers:
        found = rank[f"{pair[0]} to {pair[1]}"]
        assert found["wrong"] == []
        assert found["compared"] > 0
        assert found["losses"][1] < found["losses"][0]
        assert found["registrations"] == 0


def member(name: str, source: Layout | None, target: Layout | None) -> Member:
    return Member(
        name, source.address if source else None, target.address if target else None, "r" if target else None, 1,
        "here", "here", "cpu",
    )  # fmt: skip


@pytest.mark.trap(8, 10, 16)
@pytest.mark.parametrize("kind", ["fsdp", "fsdp tp", "hsdp columns", "hsdp", "tp2", "flat", "flat hybrid"])
def test_the_memory_of_all_ranks_makes_a_replicated_module_by_plan(answers: list[dict[str, Any]], kind: str) -> None:
    (case,) = [f"{source} to {target}" for source, target, _ in PAIRS if source == kind]
    held = {f"s/{rank}": Layout.decode(found[case]["layout"]) for rank, found in enumerate(answers)}
    memory = {
        f"s/{rank}": {name: torch.from_numpy(part) for name, part in found[case]["memory"].items()}
        for rank, found in enumerate(answers)
    }
    net = Net(3)
    target = ModuleTarget(net)
    poison(list(target.memory().values()))
    layouts = {layout.address: layout for layout in (*held.values(), target.layout())}
    planned = plan(
        [member(n, layout, None) for n, layout in held.items()], [member("t", None, target.layout())], layouts
    )
    execute(planned, layouts, memory, {"t": target.memory()})
    state = net.state_dict()
    for name, whole in answers[0][case]["whole"].items():
        assert state[name].numpy().tobytes() == whole.tobytes(), name
    statistics = planned.statistics
    assert statistics.bytes == target.layout().nbytes
    if kind in ("hsdp columns", "hsdp", "flat hybrid"):
        assert len(set(held.values())) == 2  # replicas of a shard share one layout
        assert all(nbytes > 0 for nbytes in statistics.egress_bytes.values())


@pytest.mark.trap(8, 10, 50)
def test_only_the_replica_that_helps_sends_and_the_others_stay_in_step(answers: list[dict[str, Any]]) -> None:
    one, two = ([rank[name] for rank in answers] for name in ("one target", "two targets"))
    assert not any(found["wrong"] for found in (*one, *two))
    assert one[0]["layout"] == one[2]["layout"] != one[1]["layout"] == one[3]["layout"]
    whole = sum(memory.nbytes for memory in ModuleTarget(Net(0)).memory().values())
    # What a rank's own target needs of it does not travel; the rest comes from the other shard on the same host.
    missing = [whole - found["held"] for found in one]
    assert min(missing) > 0
    for version in range(3):
        assert [found["sent"][version] for found in one] == [0, missing[0], 0, 0]
        assert [found["sent"][version] for found in two] == [0, missing[0], missing[3], 0]


@pytest.mark.trap(66)
def test_a_hold_puts_shards_back_finishes_pending_gathers_and_refuses_inside_a_forward_pass(
    answers: list[dict[str, Any]],
) -> None:
    for rank in answers:
        found = rank["states"]
        assert all(found[name] for name in ("unsharded", "resharded", "pending", "made", "intact"))
        (text,) = found["inside"]
        assert "FSDP parameters of layers.1 are in use (forward)" in text
        assert "the root module" in text
        assert "layers.0" not in text


@pytest.mark.trap(66)
def test_a_hold_of_flat_parameters_drops_what_was_gathered_and_takes_replaced_memory(
    answers: list[dict[str, Any]],
) -> None:
    for rank in answers:
        found = rank["flat states"]
        assert all(found[name] for name in ("allocated", "freed", "same layout"))
        assert found["replaced"]
        assert all(values == {3.0} for values in found["replaced"])
        inside, odd = found["texts"]
        assert "FSDP parameters of layers.1 are in use (forward)" in inside
        assert "layers.0" not in inside
        assert "layers.0.up.weight: was not contiguous when FSDP flattened it" in odd
        assert "layers.1.up.weight: was not contiguous" in odd
        assert found["dtypes"] == {"float32"}  # of the shards, not of what is computed with
