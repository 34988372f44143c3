"""What torch makes of this machine: devices, NCCL, the settings of its allocator."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from importlib.metadata import entry_points
from pathlib import Path

import torch

from weft.diagnosis import Finding
from weft.facts import facts_of
from weft.topology import read_topology

_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def diagnose(root: Path) -> list[Finding]:
    """Of the torch in this environment. Starts CUDA where there is some."""
    return [*_devices(len(read_topology(root / "sys").gpus)), *expandable_segments(os.environ, _classic_pools())]


def _devices(gpus: int) -> Iterator[Finding]:
    version = f"{torch.__version__}, {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'built without CUDA'}"
    if gpus and torch.version.cuda is None:
        fix = "install a torch that is built for the CUDA of this machine's driver"
        yield Finding("torch", "broken", f"{version}, on a machine with {gpus} GPUs", fix)
        return
    yield Finding("torch", "ok", version)
    weights = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    yield Finding("a member here", "ok", f"tells the others: {facts_of(weights)}")
    if gpus and not torch.cuda.is_available():
        fix = "see CUDA_VISIBLE_DEVICES, the driver's version (nvidia-smi), and the rights to /dev/nvidia*"
        yield Finding("CUDA", "broken", f"torch finds none of {gpus} GPUs", fix)
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        text = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, sm{properties.major}{properties.minor}"
        yield Finding(f"cuda:{index}", "ok", text)
    if torch.cuda.is_available() and torch.distributed.is_nccl_available():
        yield Finding("NCCL", "ok", ".".join(str(part) for part in torch.cuda.nccl.version()))


def expandable_segments(environment: Mapping[str, str], classic_pools: bool) -> list[Finding]:
    """Whether torch's CUDA memory can be registered for RDMA; `classic_pools` says whether there is another kind."""
    asked = [
        name for name in _SETTINGS if "expandable_segments:true" in environment.get(name, "").replace(" ", "").lower()
    ]
    if not asked:
        return [Finding("expandable segments", "ok", "off")]
    words = f"{asked[0]}={environment[asked[0]]}: torch's memory cannot be registered for RDMA"
    fix = "allocate weights, and open weft.Refit, within `with weft_cudamalloc.pool():`"
    if classic_pools:
        return [Finding("expandable segments", "note", f"{words}, unless it is of a cudaMalloc pool", fix)]
    return [Finding("expandable segments", "broken", words, f"pip install weft-cudamalloc, then {fix}")]


def _classic_pools() -> bool:
    return any(point.name == "cudamalloc" for point in entry_points(group="weft.allocators"))
