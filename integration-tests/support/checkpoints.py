"""A trainer whose versions are checkpoints in files, of which engines know what they answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

from weft.builder import LayoutBuilder
from weft.layout import Layout


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """Has the methods of `weft.testing.tiny.Tiny`. Version 0 is a checkpoint of its own; the others take turns, so that
    neighbours are never the same.
    """

    folder: str
    count: int
    """Checkpoints, that of version 0 included."""

    def number(self, version: int) -> int:
        """Of the checkpoint of a version."""
        return 1 + (version - 1) % (self.count - 1) if version else 0

    def path(self, version: int) -> Path:
        """Of the checkpoint of a version."""
        return Path(self.folder) / str(self.number(version))

    def answers(self) -> list[list[list[int]]]:
        """By the number of a checkpoint, the greedy tokens after every prompt, as Transformers generates them."""
        said: list[list[list[int]]] = json.loads((Path(self.folder) / "answers.json").read_text())
        return said

    def wrong(self, version: int, answers: Sequence[Sequence[int]]) -> list[str]:
        """What is wrong with the answers of an engine that serves a version."""
        made = [number for number, said in enumerate(self.answers()) if said == answers]
        if made == [self.number(version)]:
            return []
        return [f"version {version} answers as checkpoints {made}, not as {self.number(version)}: {answers}"]

    def tensors(self, version: int) -> dict[str, torch.Tensor]:
        """The weights of a version."""
        return load_file(self.path(version) / "model.safetensors")

    def source(self, rank: int, size: int) -> Layout:
        """Every tensor is whole, at one of the sources."""
        builder, tensors = LayoutBuilder(), self.tensors(0)
        for name in sorted(tensors)[rank::size]:
            dtype = str(tensors[name].dtype).removeprefix("torch.")
            builder.tensor(name, tensors[name].shape, dtype)
            builder.buffer(name, dtype, tensors[name].numel(), group=".".join(name.split(".")[:3]))
            builder.shard(name, name)
        return builder.build()

    def target(self, rank: int, size: int) -> Layout:
        """All of it."""
        assert (rank, size) == (0, 1), "a replica of checkpoints is not cut"
        return self.source(0, 1)

    def expected(self, rank: int, size: int, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What the buffers of `target` hold."""
        return {name: tensor.flatten() for name, tensor in tensors.items()}
