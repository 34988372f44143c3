"""Megatron-Core models, torch modules and checkpoints refit real vLLM engines and real Megatron-Core models.

Rows are ordered so that every engine starts once: the source's four processes change their mesh and join the next
job, and the engine leaves the former job for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from support.crew import Crew, hear, order, replaced_on_failure, tell
from support.matrix import (
    MEGATRON_SOURCES,
    RANKS,
    SMALL,
    TORCH_SOURCES,
    Engine,
    Mesh,
    Row,
    build_megatron,
    build_source,
    check_bytes,
    check_logits,
    check_reports,
    job_of,
    start_engine,
    two_versions,
)
from support.matrix_models import NEW_TOKENS, Architecture, clear_answers, make_checkpoint, ties_and_faults

import weft

TRANSPORTS = ("gloo", "nixl")
"""With every source and every target; `mapped` once, with both of them live."""
PROMPTS = 6
MOST_TIES = 1
"""Of `PROMPTS` completions."""
QWEN3 = Architecture("qwen3", tied=False)
QWEN3_TIED = Architecture("qwen3", tied=True)
QWEN2 = Architecture("qwen2", tied=False)
LLAMA = Architecture("llama", tied=False)
EXPERTS = Architecture("qwen3_moe", tied=False)
ENGINES = {
    "vllm tp1": Engine(QWEN3_TIED, 1),
    "vllm tp2": Engine(QWEN2, 2),
    # In bfloat16 rounding decides between experts, differently in every implementation.
    "vllm tp1 of experts": Engine(EXPERTS, 1, dtype="float32"),
    "vllm tp2 ep": Engine(EXPERTS, 2, ep=True, dtype="float32"),
}
MEGATRONS = {
    "megatron tp4": (4, Mesh(tp=4)),
    "megatron tp1 dp2": (2, Mesh()),
    "megatron tp1 ep2": (2, Mesh(ep=2)),
}
"""Ranks and their mesh."""
ENGINE_ROWS = [
    Row("tp2 pp2", "vllm tp1", "nixl", QWEN3_TIED),
    Row("tp4", "vllm tp1", "gloo", QWEN3_TIED, float32_norms=True),
    Row("tp2 dp2", "vllm tp1", "nixl", QWEN3_TIED),
    Row("tp2 pp2", "vllm tp2", "gloo", QWEN2),
    Row("tp4", "vllm tp2", "nixl", QWEN2, float32_norms=True),
    Row("tp2 dp2", "vllm tp2", "mapped", QWEN2),
    Row("tp1 ep4", "vllm tp2", "gloo", QWEN2),
    Row("tp2 ep2", "vllm tp2", "nixl", QWEN2),
    Row("fsdp", "vllm tp2", "gloo", QWEN2),
    Row("hsdp", "vllm tp2", "nixl", QWEN2),
    Row("safetensors", "vllm tp2", "gloo", QWEN2),
    Row("tp1 ep4", "vllm tp1 of experts", "nixl", EXPERTS, "float32", "float32"),
    Row("tp2 ep2", "vllm tp1 of experts", "gloo", EXPERTS, "float32", "float32"),
    Row("fsdp", "vllm tp1 of experts", "nixl", EXPERTS, "float32", "float32"),
    Row("hsdp", "vllm tp1 of experts", "gloo", EXPERTS, "float32", "float32"),
    Row("safetensors", "vllm tp1 of experts", "nixl", EXPERTS, "float32", "float32"),
    Row("tp1 ep4", "vllm tp2 ep", "gloo", EXPERTS, "float32", "float32"),
    Row("tp2 ep2", "vllm tp2 ep", "nixl", EXPERTS, "float32", "float32"),
    Row("fsdp", "vllm tp2 ep", "gloo", EXPERTS, "float32", "float32"),
    Row("hsdp", "vllm tp2 ep", "nixl", EXPERTS, "float32", "float32"),
    Row("safetensors", "vllm tp2 ep", "gloo", EXPERTS, "float32", "float32"),
]
MEGATRON_ROWS = [
    Row("tp2 pp2", "megatron tp4", "nixl", LLAMA, "float32", "float32"),
    Row("tp4", "megatron tp4", "gloo", QWEN3_TIED, "float32", "float32"),
    Row("tp2 dp2", "megatron tp4", "gloo", QWEN2),
    Row("tp2 pp2", "megatron tp1 dp2", "gloo", QWEN3_TIED),
    Row("tp4", "megatron tp1 dp2", "nixl", QWEN3, "float32", "float32"),
    Row("tp2 dp2", "megatron tp1 dp2", "nixl", LLAMA, "float32", "bfloat16"),
    Row("tp1 ep4", "megatron tp1 ep2", "gloo", EXPERTS, "float32", "float32"),
    Row("tp2 ep2", "megatron tp1 ep2", "nixl", EXPERTS),
    Row("fsdp", "megatron tp1 ep2", "nixl", EXPERTS, "float32", "float32"),
    Row("hsdp", "megatron tp1 ep2", "gloo", QWEN3_TIED),
    Row("safetensors", "megatron tp1 ep2", "gloo", EXPERTS, "float32", "float32"),
]
ROWS = ENGINE_ROWS + MEGATRON_ROWS
pytestmark = pytest.mark.timeout(600)


def seed_of(row: Row) -> int:
    """Of its two versions, whose weights no other row has."""
    return 10 + 2 * ROWS.index(row)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    server = weft.serve_store(host="127.0.0.1", port=0)
    yield server.url
    server.close()


@pytest.fixture(scope="module")
def trainers(logs: Path) -> Iterator[Crew]:
    crew = Crew("trainer", "support.matrix_rank", RANKS, logs, {"OMP_NUM_THREADS": "1"})
    yield crew
    crew.end()


@pytest.fixture(scope="module")
def modules(logs: Path) -> Iterator[Crew]:
    """Ranks of torch modules and of checkpoints."""
    crew = Crew("module", "support.torch_rank", RANKS, logs, {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"})
    yield crew
    crew.end()


@pytest.fixture
def source_of(trainers: Crew, modules: Crew) -> Callable[[Row], Crew]:
    return lambda row: trainers if row.source in MEGATRON_SOURCES else modules


@pytest.fixture(scope="module")
def mirrors(logs: Path) -> Iterator[Crew]:
    """The Megatron ranks that receive."""
    most = max(ranks for ranks, _ in MEGATRONS.values())
    crew = Crew("mirror", "support.matrix_rank", most, logs, {"OMP_NUM_THREADS": "1"})
    yield crew
    crew.end()


@pytest.fixture(scope="module")
def engine_of(logs: Path) -> Iterator[Callable[[str], Crew]]:
    """The vLLM engine of a target. There is one at a time: rows of one target come one after the other."""
    seated: dict[str, Crew] = {}

    def leave() -> None:
        for crew in seated.values():
            crew.end()
        seated.clear()

    def seat(target: str) -> Crew:
        if target not in seated:
            leave()
            seated[target] = start_engine(target, ENGINES[target], logs)
        return seated[target]

    yield seat
    leave()


def test_every_pair_of_source_target_transport_and_kind_of_model_occurs() -> None:
    meshes, experts = ("tp2 pp2", "tp4", "tp2 dp2"), ("tp1 ep4", "tp2 ep2", *TORCH_SOURCES)
    assert {*meshes, *experts} == {*MEGATRON_SOURCES, *TORCH_SOURCES}
    pairs = {(row.source, row.target) for row in ROWS}
    assert pairs == {
        *product(meshes, ("vllm tp1", "vllm tp2", "megatron tp4", "megatron tp1 dp2")),
        *product(experts, ("vllm tp1 of experts", "vllm tp2", "vllm tp2 ep", "megatron tp1 ep2")),
    }
    mapped = [row for row in ROWS if row.transport == "mapped"]
    assert [(row.source, row.target) for row in mapped] == [("tp2 dp2", "vllm tp2")]
    others = [row for row in ROWS if row not in mapped]
    assert {(row.target, row.transport) for row in others} == set(product([*ENGINES, *MEGATRONS], TRANSPORTS))
    assert {(row.source, row.transport) for row in others} == set(product([*meshes, *experts], TRANSPORTS))
    kinds = {(row.source, row.architecture == EXPERTS) for row in ROWS}
    assert kinds == {*product(experts, (False, True)), *product(meshes, (False,))}


@pytest.mark.trap(2, 4, 5, 6, 8, 13, 14, 16, 28, 29, 33, 35, 50, 71)
@pytest.mark.parametrize("row", ENGINE_ROWS, ids=str)
def test_a_live_engine_generates_the_reference_tokens_after_each_of_two_refits(
    row: Row, engine_of: Callable[[str], Crew], source_of: Callable[[Row], Crew], store: str, tmp_path: Path
) -> None:
    versions = two_versions(row, tmp_path, seed_of(row))
    digests: set[str] = set()
    engine, source = engine_of(row.target), source_of(row)
    with replaced_on_failure(source, engine):
        ranks, driver = source.children(), engine.children()
        build_source(row, ranks, tmp_path, versions[0][1])
        for version, checkpoint in versions:
            order(ranks, "fill", role="source", checkpoint=checkpoint.path)
            opening = version == 1 or row.static
            if opening:
                job = row.job(store, version)
                tell(driver, "open", replica="vllm", replicas=1, **job)
                tell(ranks, "open", roles=["source"], targets=ENGINES[row.target].tp, **job)
                hear(driver + ranks, "open")
            answers = clear_answers(checkpoint.reference, PROMPTS, seed=version)
            asked = {"prompts": [answer.prompt for answer in answers], "new_tokens": NEW_TOKENS}
            before = order(driver, "greedy", **asked)[0]["tokens"]
            assert sum(tokens != answer.tokens for tokens, answer in zip(before, answers, strict=True)) > PROMPTS // 2
            tell(driver, "receive", version=version)
            tell(ranks, "offer", version=version)
            received, *sent = hear(driver + ranks, f"refit of version {version}")
            ties, faults = ties_and_faults(answers, order(driver, "greedy", **asked)[0]["tokens"])
            assert faults == []
            assert ties <= MOST_TIES
            reports = [*sent, *(worker["refit"] for worker in received["workers"])]
            check_reports(version, reports, digests, warm=not opening)
        order(ranks, "close")


@pytest.mark.trap(2, 4, 5, 6, 8, 11, 13, 14, 28, 29, 33, 35, 41)
@pytest.mark.parametrize("row", MEGATRON_ROWS, ids=str)
def test_a_megatron_target_holds_every_byte_after_each_of_two_refits(
    row: Row, mirrors: Crew, source_of: Callable[[Row], Crew], store: str, tmp_path: Path
) -> None:
    versions = two_versions(row, tmp_path, seed_of(row))
    count, mesh = MEGATRONS[row.target]
    digests: set[str] = set()
    source = source_of(row)
    with replaced_on_failure(source, mirrors):
        ranks, targets = source.children(), mirrors.children()[:count]
        build_source(row, ranks, tmp_path, versions[0][1])
        wrap = row.target_dtype == "bfloat16"
        build_megatron(targets, "target", mesh, tmp_path, versions[0][1], row.target_dtype, wrap=wrap)
        for version, checkpoint in versions:
            order(ranks, "fill", role="source", checkpoint=checkpoint.path)
            opening = version == 1 or row.static
            if opening:
                job = row.job(store, version)
                tell(ranks, "open", roles=["source"], targets=count, **job)
                tell(targets, "open", roles=["target"], targets=count, **job)
                hear(ranks + targets, "open")
            order(targets, "poison", role="target")
            tell(targets, "receive", version=version)
            tell(ranks, "offer", version=version)
            reports = hear(ranks + targets, f"refit of version {version}")
            check_bytes(targets, "target", checkpoint)
            check_reports(version, reports, digests, warm=not opening)
        if row.target_dtype == "float32":
            check_logits(targets, versions[-1][1])
        order(ranks + targets, "close")


@pytest.mark.trap(2, 5, 28, 29)
def test_a_model_is_refitted_from_another_in_the_same_processes(trainers: Crew, store: str, tmp_path: Path) -> None:
    versions = [(n, make_checkpoint(tmp_path, QWEN3_TIED, torch.float32, seed=n)) for n in (1, 2)]
    digests: set[str] = set()
    with replaced_on_failure(trainers):
        ranks = trainers.children()
        build_megatron(ranks, "source", Mesh(tp=2, pp=2), tmp_path, versions[0][1], "float32", wrap=False)
        build_megatron(ranks, "target", Mesh(tp=4), tmp_path, versions[0][1], "float32", wrap=False)
        job = job_of("collocated", store, "nixl", SMALL)
        order(ranks, "open", roles=["source", "target"], targets=RANKS, **job)
        for version, checkpoint in versions:
            order(ranks, "fill", role="source", checkpoint=checkpoint.path)
            order(ranks, "poison", role="target")
            reports = order(ranks, "run", version=version)
            check_bytes(ranks, "target", checkpoint)
            check_bytes(ranks, "source", checkpoint)
            check_reports(version, reports, digests, warm=version > 1)
            check_logits(ranks, checkpoint)
        order(ranks, "close")
