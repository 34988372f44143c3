"""Two members meet in a process group of their own, without the default one and without a world."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from weft.deadline import Deadline
from weft.errors import DeadlineError

# torch's own annotations leave these out.
_dist: Any = dist
PrefixStore, ProcessGroupGloo, TCPStore = _dist.PrefixStore, _dist.ProcessGroupGloo, _dist.TCPStore

_LOOK_SECONDS = 0.005
_AGREE_SECONDS = 0.5


def serve(host: str) -> Any:
    """A store on a free port, hosted by this process for as long as the object lives."""
    return TCPStore(host, 0, is_master=True, wait_for_workers=False)


def listen(host: str) -> Any:
    """A gloo device, which all process groups of this member share."""
    return ProcessGroupGloo.create_device(hostname=host)


def meet(
    host: str,
    port: int,
    rank: int,
    pair: str,
    peer: str,
    device: Any,
    deadline: Deadline,
    stopped: Callable[[], bool],
) -> Any:
    """The 2-rank group of `pair`, whose store is at `host:port`. Blocks until the peer comes too.

    Raises `DeadlineError` that names the peer, `RuntimeError` (torch's) when the store or the peer cannot be reached.
    """
    store = TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=_left(deadline))
    attempt = _agree(PrefixStore(pair, store), rank, peer, deadline, stopped)
    options = ProcessGroupGloo._Options()
    options._devices = [device]
    options._threads = 1
    options._timeout = _left(deadline)
    return ProcessGroupGloo(PrefixStore(f"{pair}/{attempt}", store), rank, 2, options)


def _agree(store: Any, rank: int, peer: str, deadline: Deadline, stopped: Callable[[], bool]) -> str:
    """A name for this attempt that only two present members arrive at, whatever earlier attempts left in the store."""
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("offer", mine)
        answer = _read(store, f"answer/{mine}", peer, deadline, stopped)
        store.set(f"agreed/{mine}/{answer}", "")
        return f"{mine}/{answer}"
    while True:
        offer = _read(store, "offer", peer, deadline, stopped)
        store.set(f"answer/{offer}", mine)
        look_until = time.monotonic() + _AGREE_SECONDS
        while time.monotonic() < look_until:
            if store.check([f"agreed/{offer}/{mine}"]):
                return f"{offer}/{mine}"
            _pause(peer, deadline, stopped)


def _read(store: Any, key: str, peer: str, deadline: Deadline, stopped: Callable[[], bool]) -> str:
    while not store.check([key]):
        _pause(peer, deadline, stopped)
    return str(store.get(key), "ascii")


def _pause(peer: str, deadline: Deadline, stopped: Callable[[], bool]) -> None:
    if deadline.expired() or stopped():
        raise DeadlineError(f"connecting to {peer}", deadline.seconds, [peer])
    time.sleep(_LOOK_SECONDS)


def _left(deadline: Deadline) -> timedelta:
    return timedelta(seconds=max(0.001, deadline.remaining()))
