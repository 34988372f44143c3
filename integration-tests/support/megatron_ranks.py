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
from support.megatron_model import end_job, logits_of, stage_logits, start_job
from transformers import Qwen3Config

from weft.contracts import Source, Target
from weft.errors import LayoutError, WeftError
from weft.layout import Layout
from weft_cli.demo.megatron_on_cpu import build_model, transformer_config
from weft_megatron import MegatronSource, MegatronTarget, member_name

README = Path(__file__).parents[2] / "packages" / "adapters" / "megatron" / "README.md"
State = Mapping[str, torch.Tensor]
Config = dict[str, Any]


@contextmanager
def mesh(**sizes: Any) -> Iterator[None]:
    """Megatron's groups of these sizes, over the same processes."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes)
    yield


def fill(layout: Layout, memory: Mapping[str, torch.Tensor], state: State) -> None:
    """Copy whole logical tensors into a rank's memory through the pieces of its layout, over poison."""
    for buffer in memory.values():
        buffer.fill_(float("nan"))
    for piece in layout:
        box = state[piece.tensor].reshape(piece.box.factors)
        box = box[tuple(slice(low, high) for low, high in zip(piece.box.lo, piece.box.hi, strict=True))]
        memory[piece.buffer].as_strided(box.shape, piece.strides, piece.offset).copy_(box)
    for pad in layout.fills:
        memory[pad.buffer].as_strided(pad.sizes, pad.strides, pad.offset).fill_(pad.value)


def inspect(
    rank: int, world: int, rendezvous: str, padded: int, cases: Mapping[str, tuple[Config, Config, str]]
) -> dict[str, Any]:
    """Everything about live layouts: of each case's (config, sizes, kind), of spoiled models, of moved memory."""
    start_job(rank, world, rendezvous)
    try:
        answers: dict[str, Any] = {}
        for case, (config, sizes, kind) in cases.items():
            with mesh(**sizes):
                answers[case] = _describe(config, padded, kind)
        config = next(iter(cases.values()))[0]
        with mesh():
            answers |= {f"spoiled: {name}": _faults(config, padded, spoil) for name, spoil in _SPOIL.items()}
            answers["moved"] = _moved(config, padded)
            answers["readme"] = _readme(config, padded)
            answers["gathers"] = _gathers(config, padded)
        return answers
    finally:
        end_job()


def _describe(config: Config, padded: int, kind: str) -> dict[str, Any]:
    """This rank's live layout of a model of one kind: bare, bare-bfloat16, float16, chunks."""
    dtype = torch.float32 if kind in ("bare", "chunks") else torch.bfloat16
    model: Any = build_model(config, padded_vocabulary=padded, dtype=dtype, chunk=0 if kind == "chunks" else None)
    if kind == "chunks":
        model = [model, build_model(config, padded_vocabulary=padded, chunk=1)]
    if kind == "float16":
        model = Float16Module(transformer_config(config, dtype), model)
    source, target = MegatronSource(model, config), MegatronTarget(model, config)
    assert isinstance(source, Source)
    assert isinstance(target, Target)
    modules = model if isinstance(model, list) else [model]
    pointers = {parameter.data_ptr() for module in modules for parameter in module.parameters()}
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
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    flat = [bucket.param_data.view(-1) for group in wrapped.bucket_groups for bucket in group.buckets]
    for data in flat:
        own = slice(rank * data.numel() // size, (rank + 1) * data.numel() // size)
        data.fill_(float("nan"))
        data[own] = torch.arange(data.numel(), dtype=data.dtype)[own]
    stale = any(bool(memory.isnan().any()) for memory in source.memory().values())
    source.hold(1).release()
    return stale, all(torch.equal(data, torch.arange(data.numel(), dtype=data.dtype)) for data in flat)


def compute_logits(
    rank: int, world: int, rendezvous: str, padded: int, checkpoints: Mapping[str, str], tokens: list[list[int]]
) -> dict[tuple[str, str], npt.NDArray[np.float32]]:
    """Logits of every checkpoint at every mesh, by model and mesh, on the ranks of last stages.

    Each model is filled through the layout of a target.
    """
    start_job(rank, world, rendezvous)
    try:
        answers = {}
        for name, tp, pp in (("tp1", 1, 1), ("tp2", 2, 1), ("tp4", 4, 1), ("tp2 pp2", 2, 2)):
            with mesh(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp):
                for model_name, path in checkpoints.items():
                    config = json.loads((Path(path) / "config.json").read_text())
                    model = build_model(config, padded_vocabulary=padded)
                    target = MegatronTarget(model, config)
                    fill(target.layout(), target.memory(), load_file(Path(path) / "model.safetensors"))
                    with torch.no_grad():
                        stage = logits_of if pp == 1 else stage_logits
                        logits = stage(model, torch.tensor(tokens), config["vocab_size"])
                    if logits is not None:
                        answers[model_name, name] = logits.numpy()
        return answers
    finally:
        end_job()


def _spoil_parameters(model: Any, config: Config) -> tuple[Any, Config]:
    first, second = model.decoder.layers[0], model.decoder.layers[1]
    first.mlp.linear_fc2.weight = torch.nn.Parameter(torch.zeros(3, 5))
    first.input_layernorm.extra = torch.nn.Parameter(torch.zeros(2))
    del first.pre_mlp_layernorm.weight
    second.self_attention.linear_proj.weight.data = second.self_attention.linear_proj.weight.data.half()
    second.mlp.linear_fc1.weight.data = second.mlp.linear_fc1.weight.data.t().contiguous().t()
    second.register_buffer("expert_bias", torch.zeros(4))
    return model, config


def _add_cache(model: Any, config: Config) -> tuple[Any, Config]:
    model.decoder.layers[1].register_buffer("cache", torch.zeros(4), persistent=False)
    return model, config


_SPOIL: Mapping[str, Callable[[Any, Config], tuple[Any, Config]]] = {
    "parameters": _spoil_parameters,
    "transient buffer": _add_cache,
    "other heads": lambda model, config: (
        model,
        config | {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": config["head_dim"] // 2},
    ),
    "untied config": lambda model, config: (model, config | {"tie_word_embeddings": False}),
    "other family": lambda model, config: (model, config | {"model_type": "llama"}),
    "mixture of experts": lambda model, config: (
        model,
        config | {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8},
    ),
    "not a model": lambda model, config: (model.decoder, config),
    "no chunks": lambda model, config: ([], config),
    "a chunk twice": lambda model, config: ([model, model], config),
}
