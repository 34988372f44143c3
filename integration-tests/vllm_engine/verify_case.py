"""One engine start, compared with checkpoints that are right or wrong in one way. Prints one line of JSON.

Run as `python verify_case.py '{"tp": 2}' DIRECTORY`; `test_verify.py` does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import msgspec
import torch
from models import save_checkpoint
from safetensors.torch import load_file, save_file
from target_case import remove, shared_memory
from vllm import LLM

import weft
import weft_vllm

DAMAGED = ("model.layers.1.mlp.down_proj.weight", (77, 150))
"""Name and index of the one element that differs; the column is on the second rank."""


def variants(state: dict[str, torch.Tensor], directory: Path) -> dict[str, str]:
    """Checkpoints that differ from `state` in one way each."""
    name, index = DAMAGED
    flipped = state[name].clone()
    flipped.view(torch.uint8)[index[0], 2 * index[1]] ^= 1
    changed: dict[str, dict[str, torch.Tensor]] = {
        "equal": state,
        "flipped": {**state, name: flipped},
        "missing": {key: tensor for key, tensor in state.items() if key != "model.norm.weight"},
        "more": {**state, "model.extra.weight": torch.ones(3)},
        "float32": {key: tensor.float() for key, tensor in state.items()},
        "shape": {**state, "model.norm.weight": torch.ones(64, dtype=torch.bfloat16)},
    }
    paths = {}
    for label, tensors in changed.items():
        paths[label] = str(directory / f"{label}.safetensors")
        save_file(tensors, paths[label])
    return paths


def main() -> None:
    case, directory = json.loads(sys.argv[1]), Path(sys.argv[2])
    save_checkpoint(directory / "A", family="qwen3", tied=False, kv_heads=1, seed=1, dtype=torch.bfloat16)
    paths = variants(load_file(directory / "A" / "model.safetensors"), directory)
    llm = LLM(
        str(directory / "A"), skip_tokenizer_init=True, enforce_eager=True, dtype="bfloat16", max_model_len=128,
        tensor_parallel_size=case["tp"], weight_transfer_config={"backend": "weft"},
    )  # fmt: skip
    control = weft_vllm.control(llm)

    def outcome(path: str, **options: Any) -> dict[str, Any]:
        found = control.verify(path, **options)
        return {**msgspec.to_builtins(found), "failures": found.failures()}

    result = {label: outcome(path) for label, path in paths.items()}
    result["ignored"] = outcome(paths["more"], ignore=["model.extra.*"])
    result["cast"] = outcome(paths["float32"], casts=[("float32", "bfloat16")])
    try:
        control.verify(str(directory / "nowhere"))
    except weft.WeftError as error:
        result["nowhere"] = {"error": str(error)}
    (raw,) = {json.dumps(each["comparison"]["padding"]) for each in llm.collective_rpc(
        "weft_verify", args=(paths["equal"], [])
    )}  # fmt: skip
    result["raw"] = {"padding": json.loads(raw)}
    print("RESULT " + json.dumps(result), flush=True)
    shared = llm.collective_rpc(shared_memory)
    llm.llm_engine.engine_core.shutdown()
    remove(shared)


if __name__ == "__main__":
    main()
