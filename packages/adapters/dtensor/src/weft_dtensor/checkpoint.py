"""A safetensors checkpoint as a source: bootstraps a fleet from disk."""

from __future__ import annotations

import json
import mmap
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from weft.builder import LayoutBuilder
from weft.errors import ConfigError, LayoutError
from weft.layout import ITEM_BYTES, Layout
from weft.live import LiveSource
from weft_dtensor.headers import StoredTensor, read_checkpoint, stamp_of
from weft_dtensor.pieces import group_of

_HEAD = "lm_head.weight"
_EMBEDDING = "embed_tokens.weight"


class CheckpointSource(LiveSource):
    """One of `world` ranks that serve a Hugging Face safetensors checkpoint (`weft.contracts.Source`) from its files.

    `path` is a directory with `model.safetensors` or `model.safetensors.index.json`, or one file. Each rank holds whole
    tensors, in equal shares of bytes in file order: every rank that is given the same files and `world` divides alike.
    Names, shapes and dtypes are the files' own. Where `config.json` ties the embeddings, `lm_head.weight` is a tie, be
    it absent or an equal copy on disk.

    Files are mapped, not read: memory is private pages that the system reads on first use. `copied_bytes` counts what
    had to be copied because a tensor does not lie at a multiple of its element size. Raises `ConfigError` with every
    fault of the files, by file and tensor; `hold` raises `LayoutError` that names every file that has changed since.
    """

    def __init__(self, path: str | os.PathLike[str], rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise ConfigError(f"rank {rank} of {world}: expected 0 <= rank < world")
        self._path = Path(path)
        stored = read_checkpoint(self._path)
        self._stamps = {tensor.file: tensor.stamp for tensor in stored}
        self.copied_bytes = 0
        kept, ties = _untied(self._path, stored)
        own = _share(kept, rank, world)
        super().__init__(_layout(own, ties), self._map(own), self._check_files)

    def __repr__(self) -> str:
        return f"CheckpointSource({str(self._path)!r}, {self._layout!r}, {self.copied_bytes} bytes copied)"

    def _check_files(self) -> None:
        faults = [
            f"{file}: changed since it was mapped; make the source again"
            for file, stamp in self._stamps.items()
            if not file.is_file() or stamp_of(file.stat()) != stamp
        ]
        if faults:
            raise LayoutError(faults)

    def _map(self, own: Sequence[StoredTensor]) -> dict[str, torch.Tensor]:
        """Map, of each file, the pages that hold this rank's tensors."""
        memory: dict[str, torch.Tensor] = {}
        for file in dict.fromkeys(tensor.file for tensor in own if tensor.nbytes):
            inside = [tensor for tensor in own if tensor.file == file and tensor.nbytes]
            start = inside[0].offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            mapped = _mapped(file, start, inside[-1].offset + inside[-1].nbytes)
            for tensor in inside:
                view = mapped[tensor.offset - start :][: tensor.nbytes]
                if view.data_ptr() % ITEM_BYTES[tensor.dtype]:
                    view = view.clone()
                    self.copied_bytes += tensor.nbytes
                memory[tensor.name] = view.view(getattr(torch, tensor.dtype))
        return memory


def _mapped(file: Path, start: int, stop: int) -> torch.Tensor:
    """Bytes `start:stop` of a file as private memory: writing to it, which nobody does, would not reach the file.

    Writable pages, because registering memory with a network may ask for them.
    """
    with file.open("rb") as stream:
        pages = mmap.mmap(stream.fileno(), stop - start, access=mmap.ACCESS_COPY, offset=start)
    return torch.frombuffer(pages, dtype=torch.uint8)


def _share(stored: Sequence[StoredTensor], rank: int, world: int) -> list[StoredTensor]:
    """The tensors whose middle byte lies in this rank's share of all bytes."""
    total = max(1, sum(tensor.nbytes for tensor in stored))
    own, at = [], 0
    for tensor in stored:
        if min((at + tensor.nbytes // 2) * world // total, world - 1) == rank:
            own.append(tensor)
        at += tensor.nbytes
    return own


def _untied(path: Path, stored: Sequence[StoredTensor]) -> tuple[list[StoredTensor], dict[str, str]]:
    """The tensors without copies that the config ties, and the ties."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    try:
        config = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: expected an object")
    embeddings = [tensor for tensor in stored if f".{tensor.name}".endswith(f".{_EMBEDDING}")]
    if not _ties_embeddings(config) or len(embeddings) != 1:
        return list(stored), {}
    heads = [tensor for tensor in stored if tensor.name == _HEAD]
    if heads and not _equal(heads[0], embeddings[0]):
        return list(stored), {}
    return [tensor for tensor in stored if tensor.name != _HEAD], {_HEAD: embeddings[0].name}


def _ties_embeddings(config: Mapping[str, object]) -> bool:
    inner = config.get("text_config")
    nested = inner.get("tie_word_embeddings") if isinstance(inner, dict) else None
    return bool(config.get("tie_word_embeddings", nested))


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = (_mapped(each.file, 0, each.offset + each.nbytes)[each.offset :] for each in (one, other))
    return torch.equal(left, right)


def _layout(own: Sequence[StoredTensor], ties: Mapping[str, str]) -> Layout:
    builder = LayoutBuilder()
    for tensor in own:
        builder.tensor(tensor.name, tensor.shape, tensor.dtype)
        if tensor.nbytes:
            numel = tensor.nbytes // ITEM_BYTES[tensor.dtype]
            builder.buffer(tensor.name, tensor.dtype, numel, group=group_of(tensor.name))
            builder.shard(tensor.name, tensor.name)
    for alias, name in ties.items():
        builder.tie(alias, name)
    return builder.build()
