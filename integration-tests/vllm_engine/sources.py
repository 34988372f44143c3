"""Sources that hold a checkpoint's tensors whole, in processes of their own: a trainer without a framework."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file

from weft.builder import LayoutBuilder
from weft.contracts import Event, Group, Lease, Stream
from weft.deadline import Deadlines
from weft.layout import Layout
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect


class _Held:
    def __init__(self, version: int) -> None:
        self.version = version

    def release(self) -> None:
        return None


class CheckpointSource:
    """Holds every `count`-th tensor of a checkpoint, from the `number`-th on; `load` replaces the values."""

    def __init__(self, path: str, number: int, count: int) -> None:
        state = load_file(path)
        self._mine = sorted(state)[number::count]
        builder = LayoutBuilder()
        arena = torch.zeros(sum(state[name].nbytes for name in self._mine), dtype=torch.uint8)
        self._memory: dict[str, torch.Tensor] = {}
        first = 0
        for name in self._mine:
            dtype = str(state[name].dtype).removeprefix("torch.")
            builder.tensor(name, state[name].shape, dtype)
            builder.buffer(name, dtype, state[name].numel(), group="all")
            builder.shard(name, name)
            self._memory[name] = arena[first : first + state[name].nbytes].view(state[name].dtype)
            first += state[name].nbytes
        self._layout = builder.build()
        self.load(path)

    def load(self, path: str) -> None:
        """Take the values of another checkpoint of the same model."""
        state = load_file(path)
        for name in self._mine:
            self._memory[name].copy_(state[name].flatten())

    def layout(self) -> Layout:
        """What this source holds."""
        return self._layout

    def memory(self) -> Mapping[str, torch.Tensor]:
        """One dense tensor per checkpoint tensor."""
        return self._memory

    def hold(self, version: int) -> Lease:
        """Nothing changes unless `load` is called."""
        return _Held(version)

    def produce(self, group: Group, out: Mapping[str, torch.Tensor], stream: Stream) -> Event:
        """There is nothing to produce."""
        raise NotImplementedError


class SourceProcesses:
    """`count` source processes that answer commands over pipes; use as a context manager."""

    def __init__(self, count: int, path: str, **refit: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes = []
        self._processes = []
        for number in range(count):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, path, number, count, refit), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __enter__(self) -> SourceProcesses:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            process.kill()
            process.join()

    def send(self, *command: Any) -> None:
        """Give every process a command."""
        for pipe in self._pipes:
            pipe.send(command)

    def answers(self, seconds: float = 90.0) -> list[Any]:
        """Every process's answer to the last command."""
        late = [n for n, pipe in enumerate(self._pipes) if not pipe.poll(seconds)]
        assert not late, f"sources {late} did not answer within {seconds} s"
        return [pipe.recv() for pipe in self._pipes]


def _serve(pipe: Connection, path: str, number: int, count: int, options: dict[str, Any]) -> None:
    source = CheckpointSource(path, number, count)
    refit = Refit(
        source=source, transport=options["transport"], store=options["store"], job=options["job"],
        name=f"trainer/{number}", expect=Expect(sources=count, replicas=options.get("replicas", 1)),
        policy=msgspec.convert(options["policy"], Policy), deadlines=Deadlines(**options["deadlines"]),
    )  # fmt: skip
    while True:
        command, *arguments = pipe.recv()
        try:
            if command == "open":
                refit.open()
                pipe.send("open")
            elif command == "offer":
                version, other = arguments
                source.load(other)
                offer = refit.offer(version)
                offer.released()
                pipe.send(offer.committed().digest)
            elif command == "hold":
                version, other = arguments
                source.load(other)
                offer = refit.offer(version)
                offer.released()
                pipe.send("released")
            elif command == "withdraw":
                offer.withdraw("the trainer has thought better of it")
                pipe.send("withdrawn")
            else:
                refit.close()
                pipe.send("closed")
        except Exception as error:  # noqa: BLE001 - whatever it is, the parent asserts on it
            pipe.send(f"{type(error).__name__}: {error}")
