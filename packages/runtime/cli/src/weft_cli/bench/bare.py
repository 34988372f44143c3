"""The limit: a network's own transfers of as many bytes as a refit moves, between the same processes, without weft."""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping
from typing import Protocol

import torch

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import DeadlineError

CHUNK_BYTES = (256 << 10, 1 << 20, 4 << 20, 16 << 20)
"""Every transfer is made in chunks of each of these; the fastest is the limit."""
SHORT_BYTES = 4 << 20
"""Transfers up to this size are polled for without a pause."""
PAUSE_SECONDS = 100e-6
"""Between polls of longer ones: whoever spins takes the processor from those who copy."""
MODULES: Mapping[str, str] = {
    "nixl": "weft_cli.bench.bare_nixl",
    "gloo": "weft_cli.bench.bare_gloo",
    "mapped": "weft_cli.bench.bare_mapped",
}
"""Where a transport's bare form is; others have none."""


class Pair(Protocol):
    """One end of a bare connection, over a memory of as many bytes at both ends."""

    def move(self, nbytes: int, chunk_bytes: int, deadline: Deadline) -> None:
        """The first `nbytes`, from the sender's memory to the receiver's, in chunks. Both ends call it alike.

        Returns at the sender when the receiver has said that it has everything, at the receiver when it has.
        """
        ...

    def close(self) -> None:
        """Let go."""
        ...


def open_pair(transport: str, store: Store, key: str, *, sends: bool, memory: torch.Tensor, deadline: Deadline) -> Pair:
    """One end of the pair that meets in `store` under `key`; `memory` is one-dimensional uint8."""
    module = importlib.import_module(MODULES[transport])
    made: Pair = module.open_pair(store, key, sends=sends, memory=memory, deadline=deadline)
    return made


def wait_for(store: Store, key: str, deadline: Deadline) -> bytes:
    """What somebody puts under a key. Raises `DeadlineError`."""
    value = store.get(key)
    while value is None:
        if deadline.expired():
            raise DeadlineError(f"the benchmark's key {key}", deadline.seconds, [])
        time.sleep(0.002)
        value = store.get(key)
    return value


def meet(store: Store, key: str, members: int, deadline: Deadline) -> None:
    """Everybody waits for everybody. Raises `DeadlineError`."""
    store.add(key, 1)
    deadline.wait(lambda: store.add(key, 0) >= members, f"the benchmark's barrier {key}", list)
