"""Layouts recorded from vLLM's own models for several ranks and meshes in one process, without an engine. Prints JSON.

Run as `python layout_case.py '{"tp": 1, …}' DIRECTORY`; `test_vllm_layouts.py` does. A rank's model needs only to be
told its ranks to build its parameters, so one process stands in for all of them. Post-load processing of experts wants
communicators once engines are data parallel, and kernels: those meshes and families are recorded as they are right
after loading.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from construction import as_on_nvidia, let_build
from independent import loaded_otherwise
from models import as_loaded, save_checkpoint
from safetensors.torch import load_file
from vllm.config import set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.distributed.parallel_state import get_dp_group, get_ep_group, get_pp_group, get_tp_group
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import utils as model_utils
from vllm.utils.torch_utils import set_default_torch_dtype

from weft.layout import Kind, Layout
from weft_vllm import adapter, plugin, vllm_layout
from weft_vllm.binding import RecordedLayout, record_layout
from weft_vllm.checkpoint import logical_tensors
from weft_vllm.compat import AtLoad, base_loader, meta_like
from weft_vllm.parameters import LOADER
from weft_vllm.target import VllmTarget

DENSE = [{"tp": 1}, {"tp": 2}, {"tp": 4}]
MIXTURE = [*DENSE, {"tp": 2, "ep": 2}, {"tp": 4, "ep": 4}]
WIDE = [{"tp": 2}, {"tp": 2, "ep": 2}, {"dp": 2, "ep": 2}, {"tp": 2, "dp": 2, "ep": 4}]
STAGES = [{"pp": 2}, {"tp": 2, "pp": 2}]

Case = tuple[str, dict[str, Any], list[dict[str, int]]]
CASES: list[Case] = [
    # Mixtures first, since vLLM makes the group of expert parallelism only for a model that has experts. The first has
    # a layer without, and a number of them that does not divide.
    ("qwen3_moe", {"kv_heads": 2, "mlp_only_layers": [0], "num_experts": 6}, MIXTURE),
    ("qwen3_moe", {"kv_heads": 1}, [*WIDE, *STAGES]),
    ("glm4_moe", {"kv_heads": 2}, MIXTURE),
    ("glm4_moe", {"kv_heads": 4, "use_qk_norm": True, "attention_bias": True, "num_hidden_layers": 4},
     [*WIDE, *STAGES]),
    ("mixtral", {"kv_heads": 2}, [*DENSE, *WIDE, *STAGES]),
    ("mixtral", {"kv_heads": 4, "tied": True}, STAGES),
    ("gpt_oss", {"kv_heads": 4}, [*DENSE, *WIDE, *STAGES]),
    ("deepseek_v3", {"kv_heads": 4}, [*DENSE, *WIDE]),
    ("deepseek_v3", {"kv_heads": 2, "q_lora_rank": None, "num_hidden_layers": 4}, [*WIDE, *STAGES]),
    *((family, {"kv_heads": kv, "tied": tied}, [*DENSE, *STAGES] if kv == 4 else DENSE)
      for family in ("llama", "qwen2", "qwen3") for tied in (True, False) for kv in (1, 4)),
    ("qwen2", {"kv_heads": 2, "num_hidden_layers": 5}, [{"pp": 3}]),
    ("qwen2_5_vl", {"kv_heads": 2}, DENSE),
    ("qwen3_next", {"kv_heads": 2, "num_hidden_layers": 4, "mlp_only_layers": [1], "layer_types": None},
     [*MIXTURE, *STAGES]),
    ("qwen3_next", {"kv_heads": 1}, WIDE),
    ("nemotron_h", {"kv_heads": 2}, [*MIXTURE, *WIDE[2:]]),
    ("nemotron_h", {"kv_heads": 2, "layers_block_type": ["mlp", "moe", "linear_attention"] * 2}, STAGES),
    ("nemotron_h", {"kv_heads": 4, "n_groups": 1}, DENSE),
    ("glm_moe_dsa", {"kv_heads": 4, "num_hidden_layers": 5, "index_topk_freq": 2}, [*MIXTURE, *STAGES]),
    ("glm_moe_dsa", {"kv_heads": 4, "first_k_dense_replace": 0}, WIDE),
    ("glm_moe_dsa", {"kv_heads": 4, "nvidia": True}, [*WIDE, *STAGES]),
    ("qwen2_5_vl", {"kv_heads": 4, "tied": True}, DENSE),
]  # fmt: skip


NOT_PROCESSED = {"nemotron_h", "glm_moe_dsa"}
"""vLLM has no kernels for them on CPU."""


def in_any_order(layout: Layout) -> tuple[Any, ...]:
    """What a layout says, whatever its buffers' order."""
    pieces = [(p.buffer, p.offset, p.strides, p.tensor, p.box.factors, p.box.lo, p.box.hi) for p in layout]
    buffers = [(b.name, b.dtype, b.numel, b.kind, layout.groups[b.group]) for b in layout.buffers]
    return sorted(pieces), sorted(buffers), sorted(t.name for t in layout.tensors), layout.fills


def stand_in(group: Any, rank: int, size: int) -> None:
    """Let a group of one process say that this is another rank of a larger one."""
    group.rank = group.rank_in_group = rank
    group.ranks, group.world_size = list(range(size)), size


@dataclass(frozen=True)
class Recorded:
    """What a rank's model wants."""

    layout: RecordedLayout
    never_written: int
    """Elements."""
    otherwise: list[str] | None
    """Parameters that the model's own loader fills otherwise; None where it did not run."""


def recorded(config: Any, rank: int, parallel: dict[str, int], family: str) -> Recorded:
    """Record one rank's model; the last of a mesh is loaded, too."""
    tp, pp, dp, ep = (parallel.get(axis, 1) for axis in ("tp", "pp", "dp", "ep"))
    tp_rank, pp_rank, dp_rank = rank % tp, rank // tp % pp, rank // (tp * pp)
    stand_in(get_tp_group(), tp_rank, tp)
    stand_in(get_pp_group(), pp_rank, pp)
    stand_in(get_dp_group(), dp_rank, dp)
    if config.model_config.is_moe:
        stand_in(get_ep_group(), dp_rank * tp + tp_rank if ep > 1 else 0, ep)
    sizes = config.parallel_config
    sizes.tensor_parallel_size, sizes.pipeline_parallel_size, sizes.data_parallel_size = tp, pp, dp
    sizes.data_parallel_rank, sizes.enable_expert_parallel = dp_rank, ep > 1
    config.compilation_config.static_forward_context.clear()
    model_utils._model_to_pp_missing_layer_names.clear()  # keyed by the id of a model that may be gone
    with set_default_torch_dtype(torch.bfloat16):
        model: Any = initialize_model(config)
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    model._weft_at_load = {name: AtLoad(meta_like(tensor), tensor.data_ptr()) for name, tensor in named}
    of = config.model_config
    found = record_layout(model, logical_tensors(of.model, of.hf_config, "bfloat16"))
    otherwise = None
    if rank == adapter.world_size(parallel) - 1:
        otherwise = loaded_otherwise(model, found, load_file(Path(of.model) / "model.safetensors"))
    if dp > 1 or family in NOT_PROCESSED:
        return Recorded(found, 0, otherwise)
    base_loader.process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    target = VllmTarget.from_worker(model, config)
    return Recorded(target.recorded, target.never_written(), otherwise)


def main() -> None:
    directory = Path(sys.argv[2])
    plugin.register()
    let_build()
    results: dict[str, Any] = {}
    for number, (family, more, meshes) in enumerate(CASES):
        path = directory / f"{family}-{number}"
        options = {"tied": False, **more}
        nvidia = options.pop("nvidia", False)
        model = save_checkpoint(path, family=family, seed=1, dtype=torch.bfloat16, **options)
        engine = EngineArgs(
            model=str(path), skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=64,
            weight_transfer_config={"backend": "weft"},
        )  # fmt: skip
        config = engine.create_engine_config()
        with set_current_vllm_config(config), as_on_nvidia(nvidia):
            if not results:
                init_distributed_environment(1, 0, f"file://{directory}/rendezvous", 0, "gloo")
                initialize_model_parallel(1, 1)
            for parallel in meshes:
                for rank in range(adapter.world_size(parallel)):
                    found = recorded(config, rank, parallel, family)
                    layout = found.layout.layout
                    analytic = vllm_layout(model.config.to_dict(), parallel, rank)
                    results[f"{path.name} {parallel} rank {rank}"] = {
                        "equal": nvidia or as_loaded(layout).address == analytic.address,
                        "equal_in_any_order": in_any_order(as_loaded(layout)) == in_any_order(analytic),
                        "packed": [
                            buffer.name
                            for buffer in layout.buffers
                            if buffer.kind is Kind.SCRATCH and not buffer.name.startswith(LOADER)
                        ],
                        "float32": sorted(tensor.name for tensor in layout.tensors if tensor.dtype == "float32"),
                        "loader_landed": found.layout.loader_landed,
                        "never_written": found.never_written,
                        "otherwise": found.otherwise,
                        "pieces": len(layout.pieces),
                    }
    print("RESULT " + json.dumps(results), flush=True)


if __name__ == "__main__":
    main()
