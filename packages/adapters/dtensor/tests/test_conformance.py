"""Modules and checkpoints keep the contracts of sources and targets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from weft.testing.sources import SourceSuite, Trainer
from weft.testing.targets import Engine, TargetSuite
from weft_dtensor import CheckpointSource, ModuleSource, ModuleTarget

from .test_checkpoint import sharded, weights
from .test_modules import Model


class TestModuleSource(SourceSuite):
    @pytest.fixture
    def make(self) -> Callable[[], Trainer]:
        def trainer() -> Trainer:
            model = Model()

            def step() -> None:
                with torch.no_grad():
                    for tensor in (*model.parameters(), *model.buffers()):
                        tensor += 1

            return Trainer(ModuleSource(model), model.state_dict, step)

        return trainer


class TestCheckpointSource(SourceSuite):
    @pytest.fixture
    def make(self, tmp_path: Path) -> Callable[[], Trainer]:
        tensors = weights()
        sharded(tmp_path, tensors)
        return lambda: Trainer(CheckpointSource(tmp_path), lambda: tensors, step=None)


class TestModuleTarget(TargetSuite):
    @pytest.fixture
    def make(self) -> Callable[[], Engine]:
        def engine() -> Engine:
            model = Model()
            state = model.state_dict()
            return Engine(
                ModuleTarget(model), model.state_dict, lambda: {name: state[name].data_ptr() for name in state}
            )

        return engine
