"""The logical tensors of a model: names, shapes and dtypes of its Hugging Face checkpoint, without reading weights.

The headers of the checkpoint's safetensors files say it exactly, whatever wrote them. Where there are none (weights
made by `load_format="dummy"`, other file formats) the names come from the Transformers model that the config describes,
built on the meta device, under the names that `save_pretrained` gives them: ties are left out, and experts, which the
model holds fused, are one tensor each (`transformers/core_model_loading.py`).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from weft.errors import ConfigError
from weft.layout import LogicalTensor

_DTYPES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu",
    "BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64",
}  # fmt: skip
"""Names of the safetensors header (`safetensors/docs/source/metadata_parsing`) and weft's."""
_LONGEST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


def logical_tensors(path: str, config: Any, dtype: str) -> list[LogicalTensor]:
    """The checkpoint's tensors in name order: from the files under `path`, else from the Transformers `config` with
    `dtype`.

    Raises `ConfigError` when a file's header is damaged.
    """
    directory = Path(path)
    files = sorted(directory.glob("*.safetensors")) if directory.is_dir() else []
    tensors = [tensor for file in files for tensor in _header(file)] if files else _from_config(config, dtype)
    return sorted(tensors, key=lambda tensor: tensor.name)


def _header(file: Path) -> list[LogicalTensor]:
    with file.open("rb") as stream:
        prefix = stream.read(8)
        nbytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _LONGEST_HEADER_BYTES + 1
        if nbytes > _LONGEST_HEADER_BYTES:
            raise ConfigError(f"{file}: not a safetensors file (header of {nbytes} bytes)")
        try:
            entries = json.loads(stream.read(nbytes))
        except ValueError as error:
            raise ConfigError(f"{file}: the safetensors header is not JSON: {error}") from error
    unknown = sorted({e["dtype"] for name, e in entries.items() if name != "__metadata__"} - _DTYPES.keys())
    if unknown:
        raise ConfigError(f"{file}: holds dtypes {', '.join(unknown)}, weft knows {', '.join(_DTYPES)}")
    return [
        LogicalTensor(name, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        for name, entry in entries.items()
        if name != "__metadata__"
    ]


def _from_config(config: Any, dtype: str) -> list[LogicalTensor]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    tied = set(model.all_tied_weights_keys) if config.tie_word_embeddings else set()
    saved = revert_weight_conversion(model, {n: tensor for n, tensor in model.state_dict().items() if n not in tied})
    return [LogicalTensor(name, tuple(tensor.shape), dtype) for name, tensor in saved.items()]
