"""One Megatron rank: a child process that trains its part of the policy and offers it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from safetensors.torch import load_file, save_file

import weft
import weft_megatron
from weft_cli.demo.channel import Handler, Reply, serve
from weft_cli.demo.gather import gather_state
from weft_cli.demo.megatron_on_cpu import answer_cuda_calls
from weft_cli.demo.observe import Observer
from weft_cli.demo.policy import Trainer, make_policy
from weft_cli.demo.settings import JOB, Settings


class TrainerRank:
    """The commands a trainer rank answers."""

    def __init__(self) -> None:
        self._observer = Observer()
        self._settings: Settings
        self._config: dict[str, Any] = {}
        self._model: Any = None
        self._trainer: Trainer
        self._refit: Any = None

    def handlers(self) -> dict[str, Handler]:
        """By command name."""
        return {
            "start": self.start,
            "connect": self.connect,
            "train": self.train,
            "offer": self.offer,
            "start_counting": self.start_counting,
            "stop_counting": self.stop_counting,
            "gather": self.gather,
            "close": self.close,
        }

    def start(self, settings: dict[str, Any], rank: int) -> None:
        """Build this rank's part of the policy from the checkpoint. Collective. Ranks meet in a file: no port can
        collide.
        """
        made = msgspec.convert(settings, Settings)
        torch.set_num_threads(1)
        torch.manual_seed(made.seed)
        answer_cuda_calls()
        dist.init_process_group(
            "gloo", init_method=f"file://{made.directory}/trainers", rank=rank, world_size=made.trainer_ranks
        )
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=made.trainer_tensor_parallel,
            expert_model_parallel_size=made.trainer_expert_parallel,
        )
        self._settings, self._rank = made, rank
        self._config = json.loads(Path(made.checkpoint, "config.json").read_text())
        state = load_file(f"{made.checkpoint}/model.safetensors")
        self._model = make_policy(self._config, state, getattr(torch, made.dtype))
        self._trainer = Trainer(self._model, made)

    def connect(self, store: str) -> None:
        """Meet the other ranks and the engine."""
        made = self._settings
        self._refit = weft.Refit(
            source=weft_megatron.MegatronSource(self._model, self._config),
            transport=made.transport,
            store=store,
            job=JOB,
            name=f"trainer/{self._rank}",
            expect=weft.Expect(sources=made.trainer_ranks, replicas=1),
        )
        self._refit.open()

    def train(self, sequences: list[list[int]], advantages: list[list[float]]) -> Reply:
        """One policy-gradient step. Collective."""
        return {"loss": self._trainer.step(torch.tensor(sequences), torch.tensor(advantages))}

    def offer(self, version: int) -> Reply:
        """Offer the weights as they are now, and wait until the engine has committed them."""
        offer = self._refit.offer(version=version)
        offer.released()
        report = offer.committed(replicas="all")
        return {"digest": report.digest, "seconds": report.seconds}

    def start_counting(self) -> None:
        """Count registrations and allocations from here."""
        self._observer.start()

    def stop_counting(self) -> Reply:
        """What was counted since."""
        return {"counts": [self._observer.stop()]}

    def gather(self, directory: str) -> None:
        """Rank 0 writes the whole model as a Hugging Face checkpoint, without its configuration. Collective."""
        state = gather_state(self._model, self._config)
        if self._rank == 0:
            save_file(state, f"{directory}/model.safetensors", metadata={"format": "pt"})

    def close(self) -> None:
        """Leave the job. Collective."""
        self._refit.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    serve(TrainerRank().handlers())
