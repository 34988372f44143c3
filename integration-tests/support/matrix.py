"""Rows of the matrix of real refits, and what is checked after each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.crew import Crew, hear, order
from support.matrix_models import PROMPT_TOKENS, VOCABULARY, Architecture, Checkpoint, make_checkpoint
from support.vllm_case import VLLM_PLUGINS

from weft_cli.demo.processes import Child

RANKS = 4
"""Processes of every source."""
SMALL: dict[str, Any] = {"bucket_bytes": 64 << 10, "staging_bytes": 256 << 10}
"""Far less than the 2 MB of these models: many buckets, and staging slots that are used again."""
TO_BFLOAT16: dict[str, Any] = {"casts": [["float32", "bfloat16"]]}
DEADLINES = dict.fromkeys(("rendezvous", "offer", "begin", "move", "vote", "commit"), 90.0)
"""Seconds, for every stage of a refit."""


@dataclass(frozen=True, slots=True)
class Mesh:
    """Megatron's parallel sizes."""

    tp: int = 1
    pp: int = 1
    ep: int = 1


MEGATRON_SOURCES = {
    "tp2 pp2": Mesh(tp=2, pp=2),
    "tp4": Mesh(tp=4),
    "tp2 dp2": Mesh(tp=2),
    "tp1 ep4": Mesh(ep=4),
    "tp2 ep2": Mesh(tp=2, ep=2),
}
TORCH_SOURCES = ("fsdp", "hsdp", "safetensors")
"""`fsdp` over four ranks, `hsdp` two by two, and the files of a checkpoint shared by four ranks."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A vLLM target: a model and parallel sizes."""

    architecture: Architecture
    tp: int
    ep: bool = False
    dtype: str = "bfloat16"


@dataclass(frozen=True, slots=True)
class Row:
    """One job, or one per version where the source is a checkpoint. `dtype` is the checkpoint's and the source's."""

    source: str
    target: str
    transport: str
    architecture: Architecture
    dtype: str = "bfloat16"
    target_dtype: str = "bfloat16"
    float32_norms: bool = False
    """Whether a Megatron source is bare: under bfloat16 its norms are in float32 then, and they are cast."""

    def __str__(self) -> str:
        return f"{self.architecture.family} {self.source} to {self.target} over {self.transport}"

    @property
    def static(self) -> bool:
        """Whether the source's bytes never change, so that every version is a job of its own."""
        return self.source == "safetensors"

    def job(self, store: str, version: int) -> dict[str, Any]:
        """What all members of the job say when they join. Casts are declared where they are needed, nowhere else."""
        casts = TO_BFLOAT16 if self.float32_norms or self.dtype != self.target_dtype else {}
        return job_of(f"{self} {version}", store, self.transport, SMALL | casts)


def job_of(name: str, store: str, transport: str, policy: dict[str, Any]) -> dict[str, Any]:
    """What all members of a job say when they join."""
    return {
        "store": store, "job": name, "transport": transport, "sources": RANKS, "policy": policy,
        "deadlines": DEADLINES,
    }  # fmt: skip


def two_versions(row: Row, directory: Path, seed: int) -> list[tuple[int, Checkpoint]]:
    """Versions 1 and 2, with weights drawn from this seed and the next."""
    dtype = getattr(torch, row.dtype)
    return [(n, make_checkpoint(directory, row.architecture, dtype, seed + n - 1)) for n in (1, 2)]


def build_megatron(
    ranks: list[Child], role: str, mesh: Mesh, directory: Path, checkpoint: Checkpoint, dtype: str, *, wrap: bool
) -> None:
    """Put the ranks into a mesh and build a model there."""
    for rank, child in enumerate(ranks):
        child.send(
            "mesh", rank=rank, world=len(ranks), rendezvous=str(directory / role), tp=mesh.tp, pp=mesh.pp, ep=mesh.ep
        )
    hear(ranks, "mesh")
    order(ranks, "build", role=role, checkpoint=checkpoint.path, dtype=dtype, wrap=wrap)


def build_source(row: Row, ranks: list[Child], directory: Path, checkpoint: Checkpoint) -> None:
    """Make the ranks of a crew the source of a row, with random weights."""
    if row.source in MEGATRON_SOURCES:
        wrap = row.dtype == "bfloat16" and not row.float32_norms
        build_megatron(ranks, "source", MEGATRON_SOURCES[row.source], directory, checkpoint, row.dtype, wrap=wrap)
        return
    for rank, child in enumerate(ranks):
        child.send("mesh", rank=rank, world=len(ranks), rendezvous=str(directory / "source"), kind=row.source)
    hear(ranks, "mesh")
    order(ranks, "build", role="source", checkpoint=checkpoint.path, dtype=row.dtype, wrap=False)


def start_engine(name: str, engine: Engine, logs: Path) -> Crew:
    """The process of a vLLM engine, which will start with weights that no row offers."""
    checkpoint = make_checkpoint(logs, engine.architecture, getattr(torch, engine.dtype), seed=1)
    environment = {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "|".join(str(core) for core in range(engine.tp)),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "TORCHDYNAMO_DISABLE": "1",
        "PYTHONPATH": str(VLLM_PLUGINS),
    }
    start = {"checkpoint": checkpoint.path, "tp": engine.tp, "ep": engine.ep, "dtype": engine.dtype}
    return Crew(name.replace(" ", "-"), "support.matrix_engine", 1, logs, environment, start)


def check_reports(version: int, reports: list[dict[str, Any]], digests: set[str], *, warm: bool) -> None:
    """All members speak of the same version and the same new weights; a warm refit registers and allocates nothing."""
    assert {report["version"] for report in reports} == {version}
    (digest,) = {report["digest"] for report in reports}
    assert digest not in digests | {""}
    digests.add(digest)
    assert max(report["bytes"] for report in reports) > 0
    if warm:
        assert sum(report["registrations"] + report["allocations"] for report in reports) == 0


def check_bytes(ranks: list[Child], role: str, checkpoint: Checkpoint) -> None:
    """Every byte of every rank's model is what a slice of the checkpoint gives, and together they are a whole one."""
    found = order(ranks, "compare", role=role, checkpoint=checkpoint.path)
    assert [fault for answer in found for fault in answer["wrong"]] == []
    # Every rank holds at least a quarter of the model, and its smallest dtype has two bytes.
    elements = sum(tensor.numel() for tensor in checkpoint.reference.parameters())
    assert min(answer["compared_bytes"] for answer in found) >= 2 * elements // RANKS


def check_logits(ranks: list[Child], checkpoint: Checkpoint) -> None:
    """In float32 the target computes what Hugging Face computes."""
    tokens = torch.randint(0, VOCABULARY, (2, PROMPT_TOKENS), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected = checkpoint.reference(tokens).logits
    assert expected.std() > 0.5
    for answer in order(ranks, "logits", role="target", tokens=tokens.tolist()):
        assert float((torch.tensor(answer["logits"]) - expected).abs().max()) < 1e-4
