"""Bare gloo: torch's process group of two, sends and receives of plain chunks."""

from __future__ import annotations

from collections import deque
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from weft.contracts import Store
from weft.deadline import Deadline
from weft_cli.bench.bare import wait_for

_HOST = "127.0.0.1"
_DEPTH = 4
"""Chunks in flight."""
_TAG = 0

# torch's own annotations leave these out.
_dist: Any = dist


class GlooPair:
    """See `weft_cli.bench.bare.Pair`; also what sends tensor by tensor."""

    def __init__(self, group: Any, peer: int, memory: torch.Tensor, server: Any) -> None:
        self.group, self._peer, self._memory, self._server = group, peer, memory, server
        self._answer = torch.zeros(1, dtype=torch.uint8)

    def send(self, tensor: torch.Tensor) -> Any:
        """Start sending a dense tensor; the work has `wait`."""
        return self.group.send([tensor], self._peer, _TAG)

    def receive(self, tensor: torch.Tensor) -> Any:
        """Start receiving into a dense tensor."""
        return self.group.recv([tensor], self._peer, _TAG)

    def move(self, nbytes: int, chunk_bytes: int, deadline: Deadline) -> None:
        """See `Pair.move`."""
        sends = self._peer == 1
        start = self.send if sends else self.receive
        flight: deque[Any] = deque()
        for at in range(0, nbytes, chunk_bytes):
            if len(flight) == _DEPTH:
                flight.popleft().wait(_left(deadline))
            flight.append(start(self._memory[at : min(at + chunk_bytes, nbytes)]))
        for work in flight:
            work.wait(_left(deadline))
        (self.receive if sends else self.send)(self._answer).wait(_left(deadline))

    def close(self) -> None:
        """Let go of the group, then of the store that the sender hosts."""
        self.group = self._server = None


def open_pair(store: Store, key: str, *, sends: bool, memory: torch.Tensor, deadline: Deadline) -> GlooPair:
    """See `weft_cli.bench.bare.open_pair`. The sender is rank 0, and hosts the store in which the two meet."""
    if sends:
        server = _dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False)
        store.set(f"{key}/port", str(server.port).encode())
    else:
        port = int(wait_for(store, f"{key}/port", deadline))
        server = _dist.TCPStore(_HOST, port, is_master=False, wait_for_workers=False, timeout=_left(deadline))
    options = _dist.ProcessGroupGloo._Options()
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=_HOST)]
    options._timeout = _left(deadline)
    rank = 0 if sends else 1
    group = _dist.ProcessGroupGloo(_dist.PrefixStore(key, server), rank, 2, options)
    return GlooPair(group, 1 - rank, memory, server)


def _left(deadline: Deadline) -> timedelta:
    return timedelta(seconds=max(0.001, deadline.remaining()))
