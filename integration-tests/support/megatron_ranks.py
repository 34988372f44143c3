"""What Megatron ranks do in the tests of weft-megatron; runs in spawned processes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file
from support.megatron_families import build_model, transformer_config
from support.megatron_model import end_job, logits_of, stage_logits, start_job
from support.megatron_spoiled import DELTA_SPOIL, EXPERT_SPOIL, SPOIL, join_as_legacy, rename_as_grouped
from transformers import Qwen3Config

from weft.contracts import Source, Target
from weft.errors import LayoutError, WeftError
from weft.layout import Layout
from weft.testing.memory import box_of
from weft.views import fill_view, piece_view
from weft_megatron import MegatronSource, MegatronTarget, member_name

README = Path(__file__).parents[2] / "packages" / "adapters" / "megatron" / "README.md"
State = Mapping[str, torch.Tensor]
Config = dict[str, Any]


@contextmanager
def mesh(rank: int, world: int, rendezvous: str, sizes: Config) -> Iterator[None]:
    """Megatron's groups of these sizes, in a job of their own.

    Megatron forgets its groups without ending them: hundreds, with two threads each, would slow down the next mesh.
    """
    start_job(rank, world, f"{rendezvous} {sizes}", **sizes)
    try:
        yield
    finally:
        end_job()


def fill(layout: Layout, memory: Mapping[str, torch.Tensor], state: State) -> None:
    """Copy whole logical tensors into a rank's memory through the pieces of its layout, over poison."""
    for buffer in memory.values():
        buffer.fill_(float("nan"))
    for piece in layout:
        piece_view(piece, memory).copy_(box_of(state[piece.tensor], piece.box))
    for pad in layout.fills:
        fill_view(pad, memory[pad.buffer]).fill_(pad.value)


def inspect(
    rank: int,
    world: int,
    rendezvous: str,
    padded: int,
    cases: Mapping[str, tuple[Config, Config, str]],
    experts: Config,
    expert_sizes: Config,
    delta: Config,
) -> dict[str, Any]:
    """Everything about live layouts: of each case's (config, sizes, kind), of spoiled models, of moved memory.

    `experts` is the config of a model with experts, for a mesh of `expert_sizes`, and `delta` one with linear
    attention.
    """
    answers: dict[str, Any] = {}
    meshes = [sizes for _, sizes, _ in cases.values()]
    for sizes in [sizes for number, sizes in enumerate(meshes) if sizes not in meshes[:number]]:
        with mesh(rank, world, f"{rendezvous} of cases", sizes):
            for case, (config, wanted, kind) in cases.items():
                if wanted == sizes:
                    answers[case] = _describe(config, padded, kind)
    config = next(iter(cases.values()))[0]
    with mesh(rank, world, rendezvous, {}):
        answers |= {f"spoiled: {name}": _faults(config, padded, spoil) for name, spoil in SPOIL.items()}
        answers |= {f"spoiled delta: {name}": _faults(delta, padded, spoil) for name, spoil in DELTA_SPOIL.items()}
        answers["moved"] = _moved(config, padded)
        answers["readme"] = _readme(config, padded)
        answers["gathers"] = _gathers(config, padded)
    with mesh(rank, world, rendezvous, expert_sizes):
        for name, spoil in EXPERT_SPOIL.items():
            answers[f"spoiled experts: {name}"] = _faults(experts, padded, spoil)
        answers["gathers of experts"] = _gathers(experts, padded)
        answers["dtypes of a float32 router"] = _float32_router(experts, padded)
    return answers


def _describe(config: Config, padded: int, kind: str) -> dict[str, Any]:
    """This rank's live layout of a model of one kind: bare, bare-bfloat16, float16, chunks, grouped, legacy, mtp."""
    dtype = torch.float32 if kind in ("bare", "chunks", "grouped", "legacy", "mtp") else torch.bfloat16
    options = {"mtp_num_layers": config["num_nextn_predict_layers"]} if kind == "mtp" else {}
    chunk = 0 if kind == "chunks" else None
    model: Any = build_model(config, padded_vocabulary=padded, dtype=dtype, chunk=chunk, **options)
    if kind == "chunks":
        model = [model, build_model(config, padded_vocabulary=padded, chunk=1)]
    if kind == "grouped":
        rename_as_grouped(model)
    if kind == "legacy":
        join_as_legacy(model)
    if kind == "float16":
        model = Float16Module(transformer_config(config, dtype), model)
    source, target = MegatronSource(model, config), MegatronTarget(model, config)
    assert isinstance(source, Source)
    assert isinstance(target, Target)
    modules = model if isinstance(model, list) else [model]
    pointers = {
        tensor.data_ptr() for module in modules for tensor in module.state_dict().values() if tensor is not None
    }
    return {
        "address": source.layout().address,
        "target": target.layout().address,
        "in_place": {memory.data_ptr() for memory in source.memory().values()} == pointers,
        "name": member_name(),
    }


def _faults(config: Config, padded: int, spoil: Callable[[Any, Config], tuple[Any, Config]]) -> tuple[str, str]:
    """The class and text of the error that a spoiled model gives, or its skips where there is none."""
    model, described = spoil(build_model(config, padded_vocabulary=padded), dict(config))
    try:
        source = MegatronSource(model, described)
    except WeftError as error:
        return type(error).__name__, str(error)
    return "", str(source.layout().skipped)


def _moved(config: Config, padded: int) -> list[str]:
    """What `hold` and `begin` say once a parameter has other memory."""
    model = build_model(config, padded_vocabulary=padded)
    source, target = MegatronSource(model, config), MegatronTarget(model, config)
    lease = source.hold(3)
    lease.release()
    lease.release()
    assert lease.version == 3
    assert target.begin(3) == 0
    weight = model.decoder.layers[1].mlp.linear_fc2.weight
    weight.data = weight.data.clone()
    texts = []
    for call in (source.hold, target.begin):
        try:
            call(4)
        except LayoutError as error:
            texts.append(str(error))
    return texts


def _readme(config: Config, padded: int) -> dict[str, str]:
    """What the example for live models in the package's README leaves behind."""
    found = {"model": build_model(config, padded_vocabulary=padded), "hf_config": Qwen3Config(**config)}
    exec(re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)[0], found)
    return {name: str(found[name]) for name in ("name", "source", "target")}


def _gathers(config: Config, padded: int) -> tuple[bool, bool]:
    """Whether parameters were stale before `hold`, and are right after it, when DDP overlaps its parameter gather.

    Each rank writes new values to its own shard only, as the distributed optimizer's step does.
    """
    model = build_model(config, padded_vocabulary=padded)
    overlapped = DistributedDataParallelConfig(
        use_distributed_optimizer=True, overlap_param_gather=True, overlap_grad_reduce=True
    )
    wrapped = DistributedDataParallel(transformer_config(config), overlapped, model)
    source = MegatronSource(wrapped, config)
    flat = []
    for groups, place in (
        (wrapped.bucket_groups, parallel_state.get_data_parallel_group()),
        (wrapped.expert_parallel_bucket_groups, parallel_state.get_expert_data_parallel_group()),
    ):
        for data in [bucket.param_data.view(-1) for group in groups for bucket in group.buckets]:
            share = data.numel() // place.size()
            own = slice(place.rank() * share, (place.rank() + 1) * share)
            data.fill_(float("nan"))
            data[own] = torch.arange(data.numel(), dtype=data.dtype)[own]
            flat.append(data)
    stale = all(bool(data.isnan().any()) for data in flat)
    source.hold(1).release()
    return stale, all(torch.equal(data, torch.arange(data.numel(), dtype=data.dtype)) for data in flat)


def _float32_router(config: Config, padded: int) -> tuple[str, str]:
    """Dtypes of a router and of the expert beside it, as the layout has them."""
    model = build_model(config, padded_vocabulary=padded, dtype=torch.bfloat16)
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.mlp.router.float()
    dtypes = {buffer.name: buffer.dtype for buffer in MegatronSource(model, config).layout().buffers}
    expert = next(name for name in dtypes if ".local_experts." in name)
    return dtypes["decoder.layers.0.mlp.router.weight"], dtypes[expert]


def compute_logits(
    rank: int,
    world: int,
    rendezvous: str,
    padded: int,
    checkpoints: Mapping[str, str],
    tokens: list[list[int]],
    meshes: Mapping[str, Config],
    runs: list[tuple[str, str]],
) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    """Logits of each of the `runs`, of a checkpoint and a mesh, by these, on the ranks of last stages.

    Each model is filled through the layout of a target.
    """
    answers = {}
    for name, sizes in meshes.items():
        with mesh(rank, world, rendezvous, sizes):
            for model_name in [model for model, place in runs if place == name]:
                path = checkpoints[model_name]
                config = json.loads((Path(path) / "config.json").read_text())
                model = build_model(config, padded_vocabulary=padded)
                target = MegatronTarget(model, config)
                fill(target.layout(), target.memory(), load_file(Path(path) / "model.safetensors"))
                with torch.no_grad():
                    stage = stage_logits if "pipeline_model_parallel_size" in sizes else logits_of
                    logits = stage(model, torch.tensor(tokens), config["vocab_size"])
                if logits is not None:
                    answers[model_name, name] = logits.numpy()
    return answers
