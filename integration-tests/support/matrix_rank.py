"""A process that is one rank of one or two live Megatron-Core models, and takes part in refits when told to.

Run as `python -m support.matrix_rank` by `weft_cli.demo.processes`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import Float16Module
from safetensors.torch import load_file
from support.megatron_model import end_job, logits_of, start_job

import weft
import weft_megatron
from weft_cli.demo.channel import Handler, Reply, serve
from weft_cli.demo.megatron_on_cpu import build_model, transformer_config
from weft_cli.demo.megatron_slices import Cut

POISON_BYTE = 0xA5


@dataclass(frozen=True, slots=True)
class Part:
    """This rank's part of one model."""

    model: GPTModel
    wrapped: Any
    """The model as the trainer would hold it: bare, or in `Float16Module`."""
    config: dict[str, Any]
    cut: Cut

    def expected(self, name: str, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """What a parameter must hold, in this model's dtype (float32 masters are rounded to nearest even)."""
        parameter = self.model.get_parameter(name)
        return self.cut.parameter(name, state).to(parameter.dtype)


class Rank:
    """The commands that a rank answers. A role is `source` or `target`."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}
        self._refit: Any = None
        self._rank = 0
        self._started = False

    def handlers(self) -> dict[str, Handler]:
        """By command name."""
        names = ("mesh", "build", "fill", "poison", "open", "offer", "receive", "run", "compare", "logits", "close")
        return {name: getattr(self, name) for name in names}

    def mesh(self, rank: int, world: int, rendezvous: str, tp: int, pp: int, ep: int = 1) -> None:
        """Leave the former process group and join another; models built before stay. Collective."""
        if self._started:
            end_job()
        self._started, self._rank = True, rank
        start_job(
            rank,
            world,
            rendezvous,
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=1,
        )

    def build(self, role: str, checkpoint: str, dtype: str, wrap: bool) -> None:
        """This rank's part of the model of a checkpoint, for the groups of `mesh`."""
        config = json.loads(Path(checkpoint, "config.json").read_text())
        tp = parallel_state.get_tensor_model_parallel_world_size()
        padded = -(-config["vocab_size"] // (64 * tp)) * 64 * tp
        torch_dtype = getattr(torch, dtype)
        model = build_model(config, padded_vocabulary=padded, dtype=torch_dtype)
        wrapped = Float16Module(transformer_config(config, torch_dtype), model) if wrap else model
        # Padding of a source is nobody's business; at a target it must be zero.
        cut = Cut.here(config, padded, float("nan") if role == "source" else 0.0)
        self._parts[role] = Part(model, wrapped, config, cut)

    def fill(self, role: str, checkpoint: str) -> None:
        """Take the weights of a checkpoint, by plain slicing."""
        part, state = self._parts[role], load_file(f"{checkpoint}/model.safetensors")
        with torch.no_grad():
            for name, parameter in part.model.named_parameters():
                parameter.copy_(part.expected(name, state))

    def poison(self, role: str) -> None:
        """Overwrite every parameter."""
        for parameter in self._parts[role].model.parameters():
            parameter.data.view(torch.uint8).fill_(POISON_BYTE)

    def open(
        self,
        roles: list[str],
        store: str,
        job: str,
        transport: str,
        sources: int,
        targets: int,
        policy: dict[str, Any],
        deadlines: dict[str, float],
    ) -> None:
        """Take part in a job, with the models of these roles, after leaving the former one. Collective over the job."""
        if self._refit is not None:
            self._refit.close()
        source, target = self._parts.get("source"), self._parts.get("target")
        self._refit = weft.Refit(
            source=weft_megatron.MegatronSource(source.wrapped, source.config)
            if source and "source" in roles
            else None,
            target=weft_megatron.MegatronTarget(target.wrapped, target.config)
            if target and "target" in roles
            else None,
            transport=transport,
            store=store,
            job=job,
            name=f"{'+'.join(roles)}/{self._rank}",
            replica="megatron" if "target" in roles else None,
            replica_size=targets,
            expect=weft.Expect(sources=sources, replicas=1),
            deadlines=weft.Deadlines(**deadlines),
            policy=msgspec.convert(policy, weft.Policy),
        )
        self._refit.open()

    def offer(self, version: int) -> Reply:
        """Offer the source's weights, and wait until the target has committed them."""
        offer = self._refit.offer(version)
        offer.released()
        return _reply(offer.committed())

    def receive(self, version: int) -> Reply:
        """Install a version."""
        return _reply(self._refit.receive(version))

    def run(self, version: int) -> Reply:
        """Offer and install a version."""
        return _reply(self._refit.run(version))

    def compare(self, role: str, checkpoint: str) -> Reply:
        """Every byte of every parameter against a plain slice of the checkpoint."""
        part, state = self._parts[role], load_file(f"{checkpoint}/model.safetensors")
        compared, wrong = 0, []
        for name, parameter in part.model.named_parameters():
            found, expected = (_bytes(tensor) for tensor in (parameter.detach(), part.expected(name, state)))
            compared += found.numel()
            different = int((found != expected).sum())
            if different:
                wrong.append(f"rank {self._rank}: {name}: {different} of {found.numel()} bytes differ")
        return {"compared_bytes": compared, "wrong": wrong}

    def logits(self, role: str, tokens: list[list[int]]) -> Reply:
        """Logits of a model that is one pipeline stage. Collective over the tensor-parallel group."""
        part = self._parts[role]
        with torch.no_grad():
            logits = logits_of(part.model, torch.tensor(tokens), part.config["vocab_size"])
        return {"logits": logits.tolist()}

    def close(self) -> None:
        """Leave the job and forget the models."""
        self._refit.close()
        self._refit = None
        self._parts.clear()


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def _reply(report: weft.Report) -> Reply:
    reply: Reply = msgspec.to_builtins(report)
    return reply


if __name__ == "__main__":
    serve(Rank().handlers())
