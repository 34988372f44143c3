"""Layouts recorded from vLLM's own models for several ranks and TP sizes in one process, without an engine. Prints
JSON.

Run as `python layout_case.py '{"tp": 1, …}' DIRECTORY`; `test_vllm_layouts.py` does. A rank's model needs only to be
told its rank to build its parameters, so one process stands in for all of them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from models import as_loaded, save_checkpoint
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import get_tp_group
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.utils.torch_utils import set_default_torch_dtype

from weft.layout import Kind
from weft_vllm import adapter, plugin
from weft_vllm.compat import base_loader
from weft_vllm.target import VllmTarget


def recorded(config: Any, rank: int, parallel: dict[str, int]) -> VllmTarget:
    """The target of one rank's model, with weights that were never loaded."""
    group = get_tp_group()
    group.rank_in_group, group.world_size = rank, parallel["tp"]
    config.parallel_config.enable_expert_parallel = "ep" in parallel
    config.compilation_config.static_forward_context.clear()
    with set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(config)
    base_loader.process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    return VllmTarget.from_worker(model, config)


DENSE = [{"tp": 1}, {"tp": 2}, {"tp": 4}]
MIXTURE = [*DENSE, {"tp": 2, "ep": 2}, {"tp": 4, "ep": 4}]


def main() -> None:
    directory = Path(sys.argv[2])
    plugin.register()
    results: dict[str, Any] = {}
    dense = [
        (family, tied, kv, {}) for family in ("llama", "qwen2", "qwen3") for tied in (True, False) for kv in (1, 4)
    ]
    # First, since vLLM makes the group of expert parallelism only for a model that has any. With a layer without
    # experts, and a number of them that does not divide.
    mixtures = [("qwen3_moe", False, 2, {"mlp_only_layers": [0], "num_experts": 6}), ("glm4_moe", False, 2, {})]
    for family, tied, kv_heads, more in [*mixtures, *dense]:
        path = directory / f"{family}-{tied}-{kv_heads}"
        model = save_checkpoint(path, family=family, tied=tied, kv_heads=kv_heads, seed=1, dtype=torch.bfloat16, **more)
        engine = EngineArgs(
            model=str(path), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64,
            weight_transfer_config={"backend": "weft"},
        )  # fmt: skip
        config = engine.create_engine_config()
        with set_current_vllm_config(config):
            if not results:
                init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
                initialize_model_parallel(1, 1)
            for parallel in MIXTURE if family.endswith("_moe") else DENSE:
                mapped = family != "glm4_moe"
                analytic = adapter.layouts(model.config.to_dict(), parallel, "bfloat16") if mapped else ()
                for rank in range(parallel["tp"]):
                    target = recorded(config, rank, parallel)
                    layout = target.layout()
                    packed = [buffer.name for buffer in layout.buffers if buffer.kind is Kind.SCRATCH]
                    results[f"{path.name} {parallel} rank {rank}"] = {
                        "equal": as_loaded(layout).address == analytic[rank].address if mapped else None,
                        "packed": packed,
                        "float32": [tensor.name for tensor in layout.tensors if tensor.dtype == "float32"],
                        "loader_landed": target.recorded.loader_landed,
                        "never_written": target.never_written(),
                        "pieces": len(layout.pieces),
                    }
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
