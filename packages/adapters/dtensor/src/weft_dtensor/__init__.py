"""weft adapter for torch modules of plain tensors or DTensors, and for safetensors checkpoints.

`ModuleSource` and `ModuleTarget` take a live module under FSDP1, FSDP2, HSDP, tensor parallelism or none;
`CheckpointSource` takes the files of a checkpoint; `adapter` and `dtensor_layout` make layouts from a Hugging Face
config.
"""

from weft_dtensor.adapter import DTensorAdapter, dtensor_layout
from weft_dtensor.checkpoint import CheckpointSource
from weft_dtensor.live import ModuleSource, ModuleTarget
from weft_dtensor.naming import family_rules, identity_names
from weft_dtensor.verification import verify_module

__all__ = [
    "CheckpointSource",
    "DTensorAdapter",
    "ModuleSource",
    "ModuleTarget",
    "adapter",
    "dtensor_layout",
    "family_rules",
    "identity_names",
    "verify_module",
]

adapter = DTensorAdapter()
