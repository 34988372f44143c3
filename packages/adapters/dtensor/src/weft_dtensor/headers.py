"""Reading the headers of a safetensors checkpoint: which tensor lies where, without touching its bytes."""

from __future__ import annotations

import json
import math
import os
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import ConfigError
from weft.layout import ITEM_BYTES

DTYPES: Mapping[str, str] = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu", "BF16": "bfloat16", "F16": "float16", "I16": "int16", "F32": "float32",
    "I32": "int32", "F64": "float64", "I64": "int64",
}  # fmt: skip
"""The format's names of dtypes (`safetensors/docs/source/metadata_parsing`), and weft's."""
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST_HEADER_BYTES = 100_000_000
"""The format's own limit."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    file: Path
    offset: int
    """First byte, from the start of the file."""
    nbytes: int
    stamp: tuple[int, int, int]
    """Of the file when its header was read; see `stamp_of`."""


def stamp_of(status: os.stat_result) -> tuple[int, int, int]:
    """What differs once a file is another one: inode, bytes, nanoseconds of its last change."""
    return status.st_ino, status.st_size, status.st_mtime_ns


def read_checkpoint(path: Path) -> list[StoredTensor]:
    """All tensors of a checkpoint, in the order of files and of bytes within them.

    `path` is a safetensors file, or a directory with `model.safetensors` or `model.safetensors.index.json`. Raises
    `ConfigError` with every fault: files that are missing, cut short or not safetensors, tensors that the index places
    elsewhere.
    """
    faults: list[str] = []
    placed: dict[str, str] | None = None
    if path.is_file():
        files = [path]
    elif (path / INDEX).is_file():
        placed = _read_index(path / INDEX)
        files = [path / name for name in sorted(set(placed.values()))]
    elif (path / SINGLE).is_file():
        files = [path / SINGLE]
    else:
        raise ConfigError(f"{path}: expected a safetensors file, or a directory with {SINGLE} or {INDEX}")
    tensors = [tensor for file in files for tensor in _read_header(file, faults)]
    if placed is not None:
        found = {tensor.name: tensor.file.name for tensor in tensors}
        for name in sorted(placed.keys() | found.keys()):
            wanted, there = placed.get(name), found.get(name)
            if wanted != there and (wanted is None or (path / wanted).is_file()):
                where = f"is not in {INDEX}" if wanted is None else f"should be in {wanted}"
                faults.append(f"{path}: tensor {name} {where}, it is in {there or 'no file'}")
    count = Counter(tensor.name for tensor in tensors)
    faults += [f"{path}: tensor {name} is in {times} files" for name, times in sorted(count.items()) if times > 1]
    if not faults and not tensors:
        faults.append(f"{path}: holds no tensors")
    if faults:
        raise ConfigError("the checkpoint cannot be read: " + "; ".join(faults))
    return tensors


def _read_index(file: Path) -> dict[str, str]:
    try:
        index = json.loads(file.read_text())
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    placed = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        raise ConfigError(f"{file}: expected a weight_map from tensor names to file names")
    return placed


def _read_header(file: Path, faults: list[str]) -> list[StoredTensor]:
    """The tensors of one file by offset; faults are added to the list."""
    if not file.is_file():
        faults.append(f"{file}: missing, {INDEX} names it")
        return []
    with file.open("rb") as stream:
        status = os.fstat(stream.fileno())
        total = status.st_size
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= header_bytes <= min(_LONGEST_HEADER_BYTES, total - 8):
            faults.append(f"{file}: not a safetensors file, or cut short (header of {header_bytes} in {total} bytes)")
            return []
        try:
            entries = json.loads(stream.read(header_bytes))
        except ValueError as error:
            faults.append(f"{file}: the safetensors header is not JSON: {error}")
            return []
    if not isinstance(entries, dict):
        faults.append(f"{file}: the safetensors header is not an object")
        return []
    tensors = []
    for name, entry in entries.items():
        if name != "__metadata__":
            try:
                tensors.append(_tensor(name, entry, file, 8 + header_bytes, status))
            except ConfigError as error:
                faults.append(f"{file}: tensor {name} {error}")
    return sorted(tensors, key=lambda tensor: (tensor.offset, tensor.name))


def _tensor(name: str, entry: Any, file: Path, start: int, status: os.stat_result) -> StoredTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        sizes = [int(n) for n in (*shape, begin, end)]
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"has a header entry without dtype, shape and data_offsets: {entry!r}") from error
    if dtype not in DTYPES:
        raise ConfigError(f"has dtype {dtype}, weft knows {', '.join(DTYPES)}")
    nbytes = math.prod(shape) * ITEM_BYTES[DTYPES[dtype]]
    if min(sizes) < 0 or end - begin != nbytes:
        raise ConfigError(f"is {dtype} of shape {list(shape)}, {nbytes} bytes, but lies at bytes {begin}:{end}")
    if start + end > status.st_size:
        raise ConfigError(f"ends at byte {start + end} of a file of {status.st_size}: the file is cut short")
    return StoredTensor(name, shape, DTYPES[dtype], file, start + begin, nbytes, stamp_of(status))
