"""A process that is one rank of a live torch module, or of a checkpoint's files, and offers versions when told to.

Run as `python -m support.torch_rank` by `weft_cli.demo.processes`.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, AutoModelForCausalLM

import weft
from weft_cli.demo.channel import Handler, Reply, serve
from weft_dtensor import CheckpointSource, ModuleSource

WAIT = timedelta(seconds=120)
MESHES: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {
    "fsdp": ((4,), ("shard",)),
    "hsdp": ((2, 2), ("replicate", "shard")),
}
"""Sizes and names of the device mesh, by kind of source."""


class Rank:
    """The commands that a rank answers."""

    def __init__(self) -> None:
        self._kind = ""
        self._rank = self._world = 0
        self._module: Any = None
        self._files = ""
        self._refit: weft.Refit | None = None

    def handlers(self) -> dict[str, Handler]:
        """By command name."""
        return {name: getattr(self, name) for name in ("mesh", "build", "fill", "open", "offer", "close")}

    def mesh(self, rank: int, world: int, rendezvous: str, kind: str) -> None:
        """Take this rank of a source of this kind; leave the former process group and join another. Collective."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self._kind, self._rank, self._world = kind, rank, world
        torch.set_num_threads(1)
        if kind in MESHES:
            dist.init_process_group(
                "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world, timeout=WAIT
            )

    def build(self, role: str, checkpoint: str, dtype: str, wrap: bool) -> None:
        """The model of a checkpoint, with random weights and every layer sharded; nothing where files are served."""
        if self._kind not in MESHES:
            return
        torch.manual_seed(self._rank)
        sizes, names = MESHES[self._kind]
        mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
        self._module = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(checkpoint)).to(
            getattr(torch, dtype)
        )
        for layer in self._module.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(self._module, mesh=mesh)

    def fill(self, role: str, checkpoint: str) -> None:
        """Take the weights of a checkpoint. Collective."""
        if self._kind not in MESHES:
            self._files = checkpoint
            return
        whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=self._module.dtype).state_dict()
        set_model_state_dict(self._module, whole, options=StateDictOptions(full_state_dict=True))

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
        """Take part in a job, after leaving the former one. Collective over the job."""
        if self._refit is not None:
            self._refit.close()
        source = (
            ModuleSource(self._module)
            if self._kind in MESHES
            else CheckpointSource(self._files, self._rank, self._world)
        )
        self._refit = weft.Refit(
            source=source,
            transport=transport,
            store=store,
            job=job,
            name=f"source/{self._rank}",
            expect=weft.Expect(sources=sources, replicas=1),
            deadlines=weft.Deadlines(**deadlines),
            policy=msgspec.convert(policy, weft.Policy),
        )
        self._refit.open()

    def offer(self, version: int) -> Reply:
        """Offer the weights, and wait until the target has committed them."""
        assert self._refit is not None
        offer = self._refit.offer(version)
        offer.released()
        reply: Reply = msgspec.to_builtins(offer.committed())
        return reply

    def close(self) -> None:
        """Leave the job and forget the module."""
        assert self._refit is not None
        self._refit.close()
        self._refit = self._module = None


if __name__ == "__main__":
    serve(Rank().handlers())
