"""The limit: bare NIXL writes of as many bytes as a refit moves, between the same processes, without weft."""

from __future__ import annotations

import importlib
import importlib.util
import time
from typing import Any

import torch

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import DeadlineError

CHUNK_BYTES = (64 << 10, 1 << 20, 4 << 20, 16 << 20)
REPEATS = 3
BATCH_BYTES = 16 << 20
"""Bytes per NIXL handle: one handle over everything is slower."""
DEPTH = 2
PAUSE_SECONDS = 100e-6
"""Between polls: whoever spins takes the processor from those who copy."""


def wait_for(store: Store, key: str, deadline: Deadline) -> bytes:
    value = store.get(key)
    while value is None:
        if deadline.expired():
            raise DeadlineError(f"the benchmark's key {key}", deadline.seconds, [])
        time.sleep(0.002)
        value = store.get(key)
    return value


def _agent(name: str) -> Any:
    wheel = next(name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name))
    api = importlib.import_module(f"{wheel}._api")
    # NIXL's own progress thread spins on a core that the copies need.
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _meet(store: Store, key: str, members: int, deadline: Deadline) -> None:
    """Everybody waits for everybody."""
    store.add(key, 1)
    deadline.wait(lambda: store.add(key, 0) >= members, f"the benchmark's barrier {key}", list)


def send(store: Store, pair: int, members: int, memory: torch.Tensor, deadline: Deadline) -> dict[int, list[float]]:
    """Write `memory` to the pair's receiver, in chunks of every size; seconds until the receiver has answered."""
    agent = _agent(f"raw-send-{pair}")
    registered = agent.register_memory([(memory.data_ptr(), memory.numel(), 0, "")], "DRAM")
    peer = agent.add_remote_agent(wait_for(store, f"raw/{pair}/metadata", deadline))
    store.set(f"raw/{pair}/sender", agent.get_agent_metadata())
    address = int(wait_for(store, f"raw/{pair}/address", deadline))
    agent.make_connection(peer)
    seconds: dict[int, list[float]] = {}
    for chunk in CHUNK_BYTES:
        starts = range(0, memory.numel(), chunk)
        sizes = [min(chunk, memory.numel() - start) for start in starts]
        lists = [
            agent.prep_xfer_dlist(side, [(base + s, n, 0) for s, n in zip(starts, sizes, strict=True)], "DRAM")
            for side, base in (("NIXL_INIT_AGENT", memory.data_ptr()), (peer, address))
        ]
        per_batch = max(1, BATCH_BYTES // chunk)
        handles = []
        for first in range(0, len(sizes), per_batch):
            rows = list(range(first, min(first + per_batch, len(sizes))))
            handles.append(agent.make_prepped_xfer("WRITE", lists[0], rows, lists[1], rows, b""))
        for repeat in range(REPEATS + 1):
            _meet(store, f"raw/meet/{chunk}/{repeat}", members, deadline)
            begin = time.perf_counter()
            _write(agent, handles, f"{chunk}/{repeat}".encode(), deadline)
            _await_notice(agent, f"{chunk}/{repeat}".encode(), deadline)
            if repeat:  # the first one warms up
                seconds.setdefault(chunk, []).append(time.perf_counter() - begin)
        for handle in handles:
            handle.release()
        for prepared in lists:
            prepared.release()
    agent.deregister_memory(registered)
    return seconds


def _write(agent: Any, handles: list[Any], notice: bytes, deadline: Deadline) -> None:
    """Keep `DEPTH` batches in flight; the last one goes alone and carries the notification."""
    flight: list[Any] = []
    for number, handle in enumerate(handles):
        last = number == len(handles) - 1
        while len(flight) >= (1 if last else DEPTH):
            flight = [posted for posted in flight if agent.check_xfer_state(posted) != "DONE"]
            time.sleep(0 if len(flight) < DEPTH else PAUSE_SECONDS)
            if deadline.expired():
                raise DeadlineError("a bare NIXL write", deadline.seconds, [])
        agent.transfer(handle, notice if last else b"")
        flight.append(handle)
    while agent.check_xfer_state(handles[-1]) != "DONE":
        if deadline.expired():
            raise DeadlineError("a bare NIXL write", deadline.seconds, [])


def receive(store: Store, pair: int, members: int, memory: torch.Tensor, deadline: Deadline) -> None:
    """The other end of `send`: answers every write's notification."""
    agent = _agent(f"raw-receive-{pair}")
    registered = agent.register_memory([(memory.data_ptr(), memory.numel(), 0, "")], "DRAM")
    store.set(f"raw/{pair}/address", str(memory.data_ptr()).encode())
    store.set(f"raw/{pair}/metadata", agent.get_agent_metadata())
    peer = agent.add_remote_agent(wait_for(store, f"raw/{pair}/sender", deadline))
    agent.make_connection(peer)
    for chunk in CHUNK_BYTES:
        for repeat in range(REPEATS + 1):
            _meet(store, f"raw/meet/{chunk}/{repeat}", members, deadline)
            _await_notice(agent, f"{chunk}/{repeat}".encode(), deadline)
            agent.send_notif(peer, f"{chunk}/{repeat}".encode())
    _meet(store, "raw/end", members // 2, deadline)
    agent.deregister_memory(registered)


def _await_notice(agent: Any, expected: bytes, deadline: Deadline) -> None:
    while not any(expected in notices for notices in agent.get_new_notifs().values()):
        time.sleep(PAUSE_SECONDS)
        if deadline.expired():
            raise DeadlineError(f"notification {expected!r}", deadline.seconds, [])
