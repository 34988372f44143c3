"""Real Megatron-Core models refit real vLLM engines and real Megatron-Core models, in every pairing.

Rows are ordered so that every engine starts once: the trainer's four processes change their mesh and join the next
job, and the engine leaves the former job for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.crew import Crew, hear, order, replaced_on_failure, tell
from support.matrix_models import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    VOCABULARY,
    Architecture,
    Checkpoint,
    clear_answers,
    make_checkpoint,
    ties_and_faults,
)

import weft
from weft_cli.demo.processes import Child

SOURCES = {"tp2 pp2": (2, 2), "tp4": (4, 1), "tp2 dp2": (2, 1)}
"""(tp, pp) of the trainer's four ranks."""
ENGINES = {"vllm tp1": 1, "vllm tp2": 2}
MEGATRONS = {"megatron tp4": (4, 4), "megatron tp1 dp2": (2, 1)}
"""(ranks, tp)."""
TRANSPORTS = ("gloo", "nixl")
TRAINERS = 4
PROMPTS = 6
MOST_TIES = 1
"""Of `PROMPTS` completions."""
QWEN3 = Architecture("qwen3", tied=False)
QWEN3_TIED = Architecture("qwen3", tied=True)
QWEN2 = Architecture("qwen2", tied=False)
LLAMA = Architecture("llama", tied=False)
SMALL: dict[str, Any] = {"bucket_bytes": 64 << 10, "staging_bytes": 256 << 10}
"""Far less than the 2 MB of these models: many buckets, and staging slots that are used again."""
DEADLINES = dict.fromkeys(("rendezvous", "offer", "begin", "move", "vote", "commit"), 90.0)
"""Seconds, for every stage of a refit."""
TO_BFLOAT16: dict[str, Any] = {"casts": [["float32", "bfloat16"]]}


def job_of(name: str, store: str, transport: str, policy: dict[str, Any]) -> dict[str, Any]:
    """What all members of a job say when they join."""
    return {
        "store": store, "job": name, "transport": transport, "sources": TRAINERS, "policy": policy,
        "deadlines": DEADLINES,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One job. `dtype` is the checkpoint's and the trainer's."""

    source: str
    target: str
    transport: str
    architecture: Architecture
    dtype: str = "bfloat16"
    target_dtype: str = "bfloat16"
    float32_norms: bool = False
    """Whether the trainer's model is bare: under bfloat16 its norms are in float32 then, and they are cast."""

    def __str__(self) -> str:
        return f"{self.source} to {self.target} over {self.transport}"

    @property
    def policy(self) -> dict[str, Any]:
        """Casts are declared where they are needed, and nowhere else."""
        return SMALL | (TO_BFLOAT16 if self.float32_norms or self.dtype != self.target_dtype else {})

    def job(self, store: str) -> dict[str, Any]:
        """What all members say when they join."""
        return job_of(str(self), store, self.transport, self.policy)


ENGINE_MODELS = {"vllm tp1": QWEN3_TIED, "vllm tp2": QWEN2}
ENGINE_ROWS = [
    Row("tp2 pp2", "vllm tp1", "nixl", QWEN3_TIED),
    Row("tp4", "vllm tp1", "gloo", QWEN3_TIED, float32_norms=True),
    Row("tp2 dp2", "vllm tp1", "nixl", QWEN3_TIED),
    Row("tp2 pp2", "vllm tp2", "gloo", QWEN2),
    Row("tp4", "vllm tp2", "nixl", QWEN2, float32_norms=True),
    Row("tp2 dp2", "vllm tp2", "gloo", QWEN2),
]
MEGATRON_ROWS = [
    Row("tp2 pp2", "megatron tp4", "nixl", LLAMA, "float32", "float32"),
    Row("tp4", "megatron tp4", "gloo", QWEN3_TIED, "float32", "float32"),
    Row("tp2 dp2", "megatron tp4", "gloo", QWEN2),
    Row("tp2 pp2", "megatron tp1 dp2", "gloo", QWEN3_TIED),
    Row("tp4", "megatron tp1 dp2", "nixl", QWEN3, "float32", "float32"),
    Row("tp2 dp2", "megatron tp1 dp2", "nixl", LLAMA, "float32", "bfloat16"),
]
ROWS = ENGINE_ROWS + MEGATRON_ROWS
pytestmark = pytest.mark.timeout(600)


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
    crew = Crew("trainer", "support.matrix_rank", TRAINERS, logs, {"OMP_NUM_THREADS": "1"})
    crew.children()
    yield crew
    crew.end()


@pytest.fixture(scope="module")
def mirrors(logs: Path) -> Iterator[Crew]:
    """The Megatron ranks that receive."""
    crew = Crew(
        "mirror", "support.matrix_rank", max(ranks for ranks, _ in MEGATRONS.values()), logs, {"OMP_NUM_THREADS": "1"}
    )
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
            seated[target] = make_engine(target, logs)
        return seated[target]

    yield seat
    leave()


def make_engine(target: str, logs: Path) -> Crew:
    checkpoint = make_checkpoint(logs, ENGINE_MODELS[target], torch.bfloat16, seed=1)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(ENGINES[target])),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
    }
    start = {"checkpoint": checkpoint.path, "tp": ENGINES[target]}
    return Crew(target.replace(" ", "-"), "support.matrix_engine", 1, logs, environment, start)


def two_versions(row: Row, directory: Path) -> list[tuple[int, Checkpoint]]:
    """Versions 1 and 2, with weights that no other row has."""
    first = 10 + 2 * ROWS.index(row)
    dtype = getattr(torch, row.dtype)
    return [(n, make_checkpoint(directory, row.architecture, dtype, first + n)) for n in (1, 2)]


def build(
    ranks: list[Child], role: str, tp: int, pp: int, directory: Path, checkpoint: Checkpoint, dtype: str, *, wrap: bool
) -> None:
    """Put the ranks into a mesh and build a model there."""
    for rank, child in enumerate(ranks):
        child.send("mesh", rank=rank, world=len(ranks), rendezvous=str(directory / role), tp=tp, pp=pp)
    hear(ranks, "mesh")
    order(ranks, "build", role=role, checkpoint=checkpoint.path, dtype=dtype, wrap=wrap)


def build_source(row: Row, ranks: list[Child], directory: Path, checkpoint: Checkpoint) -> None:
    tp, pp = SOURCES[row.source]
    wrap = row.dtype == "bfloat16" and not row.float32_norms
    build(ranks, "source", tp, pp, directory, checkpoint, row.dtype, wrap=wrap)


def check_reports(version: int, reports: list[dict[str, Any]], digests: set[str]) -> None:
    """All members speak of the same version and the same new weights; a warm refit registers and allocates nothing."""
    assert {report["version"] for report in reports} == {version}
    (digest,) = {report["digest"] for report in reports}
    assert digest not in digests | {""}
    digests.add(digest)
    assert min(report["bytes"] for report in reports) > 0
    if version > 1:
        assert sum(report["registrations"] + report["allocations"] for report in reports) == 0


def check_bytes(ranks: list[Child], role: str, checkpoint: Checkpoint) -> None:
    found = order(ranks, "compare", role=role, checkpoint=checkpoint.path)
    assert [fault for answer in found for fault in answer["wrong"]] == []
    # Every rank holds at least a quarter of the model, and its smallest dtype has two bytes.
    elements = sum(tensor.numel() for tensor in checkpoint.reference.parameters())
    assert min(answer["compared_bytes"] for answer in found) >= 2 * elements // TRAINERS


def check_logits(ranks: list[Child], checkpoint: Checkpoint) -> None:
    """In float32 the target computes what Hugging Face computes."""
    tokens = torch.randint(0, VOCABULARY, (2, PROMPT_TOKENS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = checkpoint.reference(tokens).logits
    assert expected.std() > 0.5
    for answer in order(ranks, "logits", role="target", tokens=tokens.tolist()):
        assert float((torch.tensor(answer["logits"]) - expected).abs().max()) < 1e-4


def test_every_pair_of_source_target_and_transport_occurs() -> None:
    targets = [*ENGINES, *MEGATRONS]
    assert {(row.source, row.target) for row in ROWS} == set(product(SOURCES, targets))
    assert {(row.target, row.transport) for row in ROWS} == set(product(targets, TRANSPORTS))
    assert {(row.source, row.transport) for row in ROWS} == set(product(SOURCES, TRANSPORTS))


@pytest.mark.trap(2, 4, 5, 8, 13, 14, 28, 29, 33, 35)
@pytest.mark.parametrize("row", ENGINE_ROWS, ids=str)
def test_a_live_engine_generates_the_reference_tokens_after_each_of_two_refits(
    row: Row, engine_of: Callable[[str], Crew], trainers: Crew, store: str, tmp_path: Path
) -> None:
    versions = two_versions(row, tmp_path)
    digests: set[str] = set()
    engine = engine_of(row.target)
    with replaced_on_failure(trainers, engine):
        ranks, driver = trainers.children(), engine.children()
        build_source(row, ranks, tmp_path, versions[0][1])
        job = row.job(store)
        tell(driver, "open", replica="vllm", replicas=1, **job)
        tell(ranks, "open", roles=["source"], targets=ENGINES[row.target], **job)
        hear(driver + ranks, "open")
        for version, checkpoint in versions:
            answers = clear_answers(checkpoint.reference, PROMPTS, seed=version)
            asked = {"prompts": [answer.prompt for answer in answers], "new_tokens": NEW_TOKENS}
            before = order(driver, "greedy", **asked)[0]["tokens"]
            assert sum(tokens != answer.tokens for tokens, answer in zip(before, answers, strict=True)) > PROMPTS // 2
            order(ranks, "fill", role="source", checkpoint=checkpoint.path)
            tell(driver, "receive", version=version)
            tell(ranks, "offer", version=version)
            received, *sent = hear(driver + ranks, f"refit of version {version}")
            ties, faults = ties_and_faults(answers, order(driver, "greedy", **asked)[0]["tokens"])
            assert faults == []
            assert ties <= MOST_TIES
            check_reports(version, [*sent, *(worker["refit"] for worker in received["workers"])], digests)
        order(ranks, "close")


@pytest.mark.trap(2, 4, 5, 8, 11, 13, 14, 28, 29, 33, 35, 41)
@pytest.mark.parametrize("row", MEGATRON_ROWS, ids=str)
def test_a_megatron_target_holds_every_byte_after_each_of_two_refits(
    row: Row, mirrors: Crew, trainers: Crew, store: str, tmp_path: Path
) -> None:
    versions = two_versions(row, tmp_path)
    count, tp = MEGATRONS[row.target]
    digests: set[str] = set()
    with replaced_on_failure(trainers, mirrors):
        ranks, targets = trainers.children(), mirrors.children()[:count]
        build_source(row, ranks, tmp_path, versions[0][1])
        build(targets, "target", tp, 1, tmp_path, versions[0][1], row.target_dtype, wrap=row.target_dtype == "bfloat16")
        job = row.job(store)
        tell(ranks, "open", roles=["source"], targets=count, **job)
        tell(targets, "open", roles=["target"], targets=count, **job)
        hear(ranks + targets, "open")
        for version, checkpoint in versions:
            order(ranks, "fill", role="source", checkpoint=checkpoint.path)
            order(targets, "poison", role="target")
            tell(targets, "receive", version=version)
            tell(ranks, "offer", version=version)
            reports = hear(ranks + targets, f"refit of version {version}")
            check_bytes(targets, "target", checkpoint)
            check_reports(version, reports, digests)
        if row.target_dtype == "float32":
            check_logits(targets, versions[-1][1])
        order(ranks + targets, "close")


@pytest.mark.trap(2, 5, 28, 29)
def test_a_model_is_refitted_from_another_in_the_same_processes(trainers: Crew, store: str, tmp_path: Path) -> None:
    versions = [(n, make_checkpoint(tmp_path, QWEN3_TIED, torch.float32, seed=n)) for n in (1, 2)]
    digests: set[str] = set()
    with replaced_on_failure(trainers):
        ranks = trainers.children()
        build(ranks, "source", 2, 2, tmp_path, versions[0][1], "float32", wrap=False)
        build(ranks, "target", 4, 1, tmp_path, versions[0][1], "float32", wrap=False)
        job = job_of("collocated", store, "nixl", SMALL)
        order(ranks, "open", roles=["source", "target"], targets=TRAINERS, **job)
        for version, checkpoint in versions:
            order(ranks, "fill", role="source", checkpoint=checkpoint.path)
            order(ranks, "poison", role="target")
            reports = order(ranks, "run", version=version)
            check_bytes(ranks, "target", checkpoint)
            check_bytes(ranks, "source", checkpoint)
            check_reports(version, reports, digests)
            check_logits(ranks, checkpoint)
        order(ranks, "close")
