"""One engine start: `VllmTarget` is driven by hand through three versions of weights. Prints one line of JSON.

Run as `python target_case.py '{"family": "qwen3", "tied": true, …}' DIRECTORY`; `test_vllm_target.py` does.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from models import NEW_TOKENS, as_loaded, gaps, prompts, reference_tokens, save_checkpoint
from safetensors.torch import load_file
from slices import Position, expected_parameters
from vllm import LLM, SamplingParams
from vllm._custom_ops import causal_conv1d_weight_pack, cpu_prepack_moe_weight

from weft.contracts import Group
from weft.testing.memory import box_of
from weft.views import piece_view
from weft_vllm import adapter
from weft_vllm.target import VllmTarget


def build(worker: Any) -> dict[str, Any]:
    """Make the target in the worker, poison what a refit must write, and describe it."""
    worker.weft_target = VllmTarget.from_worker(worker.get_model(), worker.vllm_config)
    layout = worker.weft_target.layout()
    return {
        **worker.weft_target.report(),
        "dtypes": sorted({tensor.dtype for tensor in layout.tensors}),
        "ties": [[tie.alias, tie.name] for tie in layout.ties],
        "encoded": as_loaded(layout).encoded.hex(),
    }


def refit(worker: Any, path: str, version: int) -> None:
    """Copy slices of a checkpoint where the layout wants them, group by group, into poisoned memory."""
    target = worker.weft_target
    state = load_file(f"{path}/model.safetensors")
    layout, memory = target.layout(), target.memory()
    target.begin(version)
    for index, name in enumerate(layout.groups):
        buffers = [buffer for buffer in layout.buffers if buffer.group == index]
        for buffer in buffers:
            memory[buffer.name].view(torch.uint8).fill_(0xA5)
        for piece in layout:
            if piece.buffer in {buffer.name for buffer in buffers}:
                piece_view(piece, memory).copy_(box_of(state[piece.tensor], piece.box))
        target.land(Group(index, name, tuple(buffer.name for buffer in buffers)), None)
    target.prepare_commit(version)
    target.commit(version)


def compare(worker: Any, path: str, config: dict[str, Any]) -> dict[str, Any]:
    """Compare every parameter with a slice made by hand. Packed weights of linears are read back by an identity; the
    slices of packed experts and convolutions go through vLLM's own packing.
    """
    model, parallel = worker.get_model(), worker.parallel_config
    ranks, stages = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    engine, engines = parallel.data_parallel_rank, parallel.data_parallel_size
    stage = parallel.rank // ranks
    at = Position(parallel.rank % ranks, ranks, parallel.enable_expert_parallel, stage, stages, engine, engines)
    expected = expected_parameters(load_file(f"{path}/model.safetensors"), config, at, worker.model_config.dtype)
    names = {name for name, _ in model.named_parameters()} | {"lm_head.weight"} & expected.keys()
    wrong, compared = sorted(names ^ expected.keys()), 0
    for name, want in expected.items():
        module = model.get_submodule(name.rpartition(".")[0])
        held = [getattr(module, name.rpartition(".")[2]).data]
        if want.ndim == 2 and hasattr(module, "cpu_linear"):
            read = module.cpu_linear(torch.eye(want.shape[1], dtype=want.dtype), module.weight, None).T.contiguous()
            held = [tensor for tensor in held if tensor.numel()] + [read]
        if hasattr(module, "_cpu_unpacked_conv_weight"):
            plain = want.squeeze(1).contiguous()
            wrong += [] if torch.equal(module._cpu_unpacked_conv_weight, plain) else [f"{name} beside the packed one"]
            want = causal_conv1d_weight_pack(plain)
        if name.endswith(("w13_weight", "w2_weight")):
            want = cpu_prepack_moe_weight(want, module.quant_method.moe_kernel.fused_experts.isa)
        for tensor in held:
            compared += tensor.numel() * tensor.element_size()
            found = tensor.cpu().contiguous()
            if found.shape != want.shape or not torch.equal(found.view(torch.uint8), want.view(torch.uint8)):
                wrong.append(name)
    return {"wrong": wrong, "compared_bytes": compared}


def pointers(worker: Any) -> dict[str, int]:
    """Where the engine's tensors are, and which objects its kernels are."""
    model = worker.get_model()
    tensors = {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    modules = {f"{name} {kernel}": id(getattr(owner, kernel)) for name, module in model.named_modules()
               for owner, kernel in ((module, "cpu_linear"), (getattr(module, "quant_method", None), "moe_kernel"))
               if hasattr(owner, kernel)}  # fmt: skip
    return {**tensors, **modules}


def shared_memory(worker: Any) -> list[str]:
    """What a killed worker would leave in shared memory."""
    return [str(path) for path in Path("/dev/shm").glob(f"*{os.environ['VLLM_DIST_IDENT']}*")]


def remove(shared: list[list[str]]) -> None:
    """vLLM ends its CPU workers by force and leaves their shared memory behind."""
    for paths in shared:
        for path in paths:
            Path(path).unlink(missing_ok=True)


def main() -> None:
    case, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    options = {"family": case["family"], "tied": case["tied"], "kv_heads": case["kv_heads"], "dtype": torch.bfloat16}
    models = [save_checkpoint(directory / name, seed=seed, **options) for seed, name in enumerate("ABC", 1)]
    llm = LLM(
        str(directory / "A"), skip_tokenizer_init=True, enforce_eager=True, dtype=case["dtype"], max_model_len=128,
        tensor_parallel_size=case["tp"], pipeline_parallel_size=case.get("pp", 1),
        enable_expert_parallel=case.get("ep", False),
        weight_transfer_config={"backend": "weft"},
        additional_config={"weft": {"cpu_linear": case["cpu_linear"]}} if case["cpu_linear"] else {},
    )  # fmt: skip
    asked = prompts(4)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)

    def tokens() -> list[list[int]]:
        answers = llm.generate([{"prompt_token_ids": p} for p in asked], sampling, use_tqdm=False)
        return [list(answer.outputs[0].token_ids) for answer in answers]

    config = models[0].config.to_dict()
    result: dict[str, Any] = {"ranks": llm.collective_rpc(build), "versions": []}
    parallel = {"tp": case["tp"], "pp": case.get("pp", 1), "ep": case["tp"] if case.get("ep") else 1}
    analytic = adapter.layouts(config, parallel, case["dtype"])
    result["analytic_equal"] = [
        r.pop("encoded") == a.encoded.hex() for r, a in zip(result["ranks"], analytic, strict=True)
    ]
    before = llm.collective_rpc(pointers)
    previous = loaded = tokens()
    first = models[0].to(getattr(torch, case["dtype"]))
    result["first_gaps"] = gaps(first, asked, previous, reference_tokens(first, asked))
    for version, name, number in ((1, "B", 1), (2, "C", 2), (3, "C", 2), (4, "A", 0)):
        llm.collective_rpc(refit, args=(str(directory / name), version))
        assert llm.reset_prefix_cache()
        model = models[number].to(getattr(torch, case["dtype"]))
        got, want = tokens(), reference_tokens(model, asked)
        result["versions"].append(
            {"changed": got != previous, "gaps": gaps(model, asked, got, want),
             "memory": llm.collective_rpc(compare, args=(str(directory / name), config))}
        )  # fmt: skip
        previous = got
    result["as_loaded"] = previous == loaded
    result["pointers_stable"] = llm.collective_rpc(pointers) == before
    print("RESULT " + json.dumps(result), flush=True)
    shared = llm.collective_rpc(shared_memory)
    llm.llm_engine.engine_core.shutdown()
    remove(shared)


if __name__ == "__main__":
    main()
