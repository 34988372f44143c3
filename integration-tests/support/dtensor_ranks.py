"""What ranks of DTensor modules do in the tests of weft-dtensor; runs in spawned processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import weft
from weft.errors import LayoutError
from weft_dtensor import ModuleSource, ModuleTarget

POISON_BYTE = 0xFF
WIDTH, INNER, VOCABULARY = 6, 10, 13


class Block(nn.Module):
    """A residual layer with a persistent buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)
        self.register_buffer("steps", torch.zeros(3))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden + self.down(torch.tanh(self.up(self.norm(hidden))))


class Net(nn.Module):
    """Two layers between tied embeddings; no size divides by 4."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


TOKENS = torch.arange(24).view(4, 6) % VOCABULARY


def _shard(net: Net, **options: Any) -> None:
    for layer in net.layers:
        fully_shard(layer, **options)
    fully_shard(net, **options)


def _split_layers(net: Net, mesh: DeviceMesh) -> None:
    for layer in net.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def _flatten(net: Net, **options: Any) -> Net:
    """Torch's first FSDP; parameters of no layer in a flat one of their own."""
    options |= {"device_id": torch.device("cpu")}
    for n, layer in enumerate(net.layers):
        net.layers[n] = FullyShardedDataParallel(layer, **options)
    return FullyShardedDataParallel(net, **options)


def build(kind: str, seed: int) -> Net:
    """A net whose tensors are placed in one of the ways of `kind` over four ranks. Collective."""
    net = Net(seed)
    if kind == "flat":
        return _flatten(net, use_orig_params=True)
    if kind == "flat hybrid":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        strategy = ShardingStrategy._HYBRID_SHARD_ZERO2
        return _flatten(net, use_orig_params=False, device_mesh=mesh, sharding_strategy=strategy)
    if kind == "fsdp":
        _shard(net, mesh=init_device_mesh("cpu", (4,)))
    elif kind == "hsdp":
        _shard(net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    elif kind == "hsdp columns":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        _shard(net, mesh=mesh, shard_placement_fn=lambda tensor: Shard(tensor.ndim - 1) if tensor.ndim == 2 else None)
    elif kind == "fsdp tp":
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
        _split_layers(net, mesh["tp"])
        _shard(net, mesh=mesh["fsdp"])
    elif kind in ("tp2", "tp4"):
        size = int(kind[2:])
        mesh = init_device_mesh("cpu", (4 // size, size), mesh_dim_names=("dp", "tp"))
        _split_layers(net, mesh["tp"])
    elif kind != "plain":
        raise ValueError(kind)
    return net


def step(net: Net, version: int) -> float:
    """One real training step, equal on every rank; returns the loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    loss = nn.functional.cross_entropy(net(TOKENS).flatten(0, 1), (TOKENS * 7 % VOCABULARY).flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        for layer in net.layers:
            layer.steps.fill_(version)
    return float(loss)


def whole(net: Net) -> dict[str, torch.Tensor]:
    """Every tensor, gathered by torch. Collective."""
    with torch.no_grad():
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()
            for name, tensor in net.state_dict().items()
        }


def logits(net: Net) -> torch.Tensor:
    """Collective."""
    with torch.no_grad():
        return net(TOKENS)


def _equal(found: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [n for n in wanted if not torch.equal(found[n].view(torch.uint8), wanted[n].view(torch.uint8))]


@dataclass(frozen=True, slots=True)
class Job:
    """How the members of one job find each other."""

    store: str
    name: str
    transport: str

    def refit(self, rank: int, source: ModuleSource | None, target: ModuleTarget | None, **more: Any) -> weft.Refit:
        """This rank's handle, not open yet."""
        return weft.Refit(
            source=source, target=target, transport=self.transport, store=self.store, job=self.name,
            name=f"rank/{rank}", deadlines=weft.Deadlines(*[30.0] * 6), **more,
        )  # fmt: skip


def serve(rank: int, world: int, rendezvous: str, calls: list[tuple[str, tuple[Any, ...]]]) -> list[Any]:
    """Join a group of gloo, make each call `(function of this module, arguments)`, leave."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    functions: Mapping[str, Callable[..., Any]] = {
        "exchange": exchange, "shares": shares, "states": states, "flat states": flat_states,
    }  # fmt: skip
    try:
        return [functions[name](rank, *arguments) for name, arguments in calls]
    finally:
        dist.destroy_process_group()


def exchange(rank: int, source_kind: str, target_kind: str, job: Job) -> dict[str, Any]:
    """Train a net placed in one way, refit one placed in another, twice; what differed, and the plan's inputs."""
    trained, served = build(source_kind, 1), build(target_kind, 2)
    source, target = ModuleSource(trained), ModuleTarget(served)
    wrong: list[str] = []
    losses = []
    # Colwise shards of 10 over 4 ranks are uneven, which torch's tensor-parallel layers cannot run.
    runs = target_kind != "tp4"
    expect = weft.Expect(sources=4, replicas=1)
    with job.refit(rank, source, target, replica="served", replica_size=4, expect=expect) as refit:
        for version in (1, 2):
            losses.append(step(trained, version))
            if runs:
                logits(served)  # leaves FSDP's root unsharded, with weights that will be old
            target.begin(version)
            for memory in target.memory().values():
                memory.view(torch.uint8).fill_(POISON_BYTE)
            report = refit.run(version)
            wrong += [f"version {version}: {name}" for name in _equal(whole(served), whole(trained))]
            if runs and not torch.allclose(logits(served), logits(trained), atol=1e-5):
                wrong.append(f"version {version}: logits")
            registrations = report.registrations
    state = {name: tensor.numpy() for name, tensor in whole(trained).items()}
    return {
        "wrong": wrong,
        "losses": losses,
        "compared": sum(memory.nbytes for memory in target.memory().values()),
        "layout": source.layout().encoded,
        "memory": {name: memory.numpy().copy() for name, memory in source.memory().items()},
        "whole": state if rank == 0 else {},
        "registrations": registrations,
    }


def shares(rank: int, hosts: str, targets: list[int], job: Job) -> dict[str, Any]:
    """HSDP 2×2 feeds a plain replica on each of these ranks, three times; `hosts[rank]` is where a rank says it is."""
    trained, served = build("hsdp", 1), Net(2)
    source = ModuleSource(trained)
    target = ModuleTarget(served) if rank in targets else None
    replica = {"replica": f"served{rank}"} if target else {}
    expect = weft.Expect(sources=4, replicas=len(targets))
    sent, wrong = [], []
    with job.refit(rank, source, target, host=hosts[rank], expect=expect, **replica) as refit:
        for version in (1, 2, 3):
            step(trained, version)
            offer = refit.offer(version)
            if target is not None:
                for memory in target.memory().values():
                    memory.view(torch.uint8).fill_(POISON_BYTE)
                refit.receive(version)
            offer.released()
            sent.append(offer.committed().bytes)
            expected = whole(trained)
            if target is not None:
                wrong += [f"version {version}: {name}" for name in _equal(whole(served), expected)]
    return {"sent": sent, "wrong": wrong, "layout": source.layout().address, "held": source.layout().nbytes}


def states(rank: int) -> dict[str, Any]:
    """What `hold` does about FSDP's unsharded states."""
    net = build("fsdp", 1)
    source = ModuleSource(net)
    logits(net)
    unsharded = not isinstance(net.embed.weight, DTensor)
    source.hold(1).release()
    first = isinstance(net.embed.weight, DTensor)
    net.layers[1].unshard(async_op=True)
    source.hold(2).release()
    again = isinstance(net.layers[1].up.weight, DTensor)
    net.layers[0].unshard()
    made = ModuleSource(net).layout().address == source.layout().address
    texts: list[str] = []

    def inside(*_: Any) -> None:
        try:
            source.hold(3)
        except LayoutError as error:
            texts.append(str(error))

    handle = net.layers[1].down.register_forward_hook(inside)
    before = logits(net)
    handle.remove()
    return {
        "unsharded": unsharded, "resharded": first, "pending": again, "made": made, "inside": texts,
        "intact": torch.equal(before, logits(net)),
    }  # fmt: skip


def flat_states(rank: int) -> dict[str, Any]:
    """What `hold` does about the first FSDP's states, and what cannot be described."""
    net = build("flat", 1)
    source = ModuleSource(net)
    logits(net)
    gathered = net._handle.flat_param._full_param_padded.untyped_storage()
    allocated = gathered.nbytes() > 0
    source.hold(1).release()
    freed = gathered.nbytes() == 0
    layout = ModuleSource(net).layout().address
    for parameter in net.parameters():  # what an optimizer does that swaps memory instead of writing to it
        parameter.data = torch.full_like(parameter.data, 3.0)
    source.hold(2).release()
    replaced = [set(memory.tolist()) for name, memory in source.memory().items() if not name.endswith("steps")]
    texts: list[str] = []

    def inside(*_: Any) -> None:
        try:
            source.hold(3)
        except LayoutError as error:
            texts.append(str(error))

    net.layers[1].down.register_forward_hook(inside)
    logits(net)
    odd = Net(1)
    odd.layers[0].up.weight = nn.Parameter(torch.zeros(WIDTH, INNER).t())
    odd.layers[1].up.weight = nn.Parameter(torch.zeros(WIDTH, INNER).t())
    try:
        ModuleSource(_flatten(odd, use_orig_params=False))
    except LayoutError as error:
        texts.append(str(error))
    mixed = FullyShardedDataParallel(
        Net(1), device_id=torch.device("cpu"), mixed_precision=MixedPrecision(param_dtype=torch.bfloat16)
    )
    kept = ModuleSource(mixed)
    logits(mixed)
    kept.hold(1).release()
    return {
        "allocated": allocated, "freed": freed, "same layout": layout == source.layout().address,
        "replaced": replaced, "texts": texts, "dtypes": {buffer.dtype for buffer in kept.layout().buffers},
    }  # fmt: skip
