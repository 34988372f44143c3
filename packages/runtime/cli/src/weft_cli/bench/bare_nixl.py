"""Bare NIXL: writes with re-used handles in batches, and a notification after the last."""

from __future__ import annotations

import importlib
import importlib.util
import time
from typing import Any

import torch

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import DeadlineError
from weft_cli.bench.bare import PAUSE_SECONDS, SHORT_BYTES, wait_for

_BATCH_BYTES = 16 << 20
"""Bytes per NIXL handle: one handle over everything is slower."""
_DEPTH = 2
_HELLO = b"hello"


class NixlPair:
    """See `weft_cli.bench.bare.Pair`."""

    def __init__(self, agent: Any, peer: Any, registered: Any, addresses: tuple[int, int] | None) -> None:
        """`addresses` are the memory's here and at the receiver; None at the receiver."""
        self._agent, self._peer, self._registered, self._addresses = agent, peer, registered, addresses
        self._turn = 0
        self._handles: dict[tuple[int, int], list[Any]] = {}
        self._lists: list[Any] = []

    def move(self, nbytes: int, chunk_bytes: int, deadline: Deadline) -> None:
        """See `Pair.move`. Handles are made in the first of equal moves."""
        self._turn += 1
        notice = str(self._turn).encode()
        pause = PAUSE_SECONDS if nbytes > SHORT_BYTES else 0
        if self._addresses is None:
            self._await(notice, pause, deadline)
            self._agent.send_notif(self._peer, notice)
            return
        if (nbytes, chunk_bytes) not in self._handles:
            self._handles[nbytes, chunk_bytes] = self._prepare(nbytes, chunk_bytes, self._addresses)
        self._write(self._handles[nbytes, chunk_bytes], notice, pause, deadline)
        self._await(notice, pause, deadline)

    def _prepare(self, nbytes: int, chunk: int, addresses: tuple[int, int]) -> list[Any]:
        starts = range(0, nbytes, chunk)
        sizes = [min(chunk, nbytes - start) for start in starts]
        lists = [
            self._agent.prep_xfer_dlist(side, [(base + s, n, 0) for s, n in zip(starts, sizes, strict=True)], "DRAM")
            for side, base in zip(("NIXL_INIT_AGENT", self._peer), addresses, strict=True)
        ]
        self._lists += lists
        per_batch = max(1, _BATCH_BYTES // chunk)
        handles = []
        for first in range(0, len(sizes), per_batch):
            rows = list(range(first, min(first + per_batch, len(sizes))))
            handles.append(self._agent.make_prepped_xfer("WRITE", lists[0], rows, lists[1], rows, b""))
        return handles

    def _write(self, handles: list[Any], notice: bytes, pause: float, deadline: Deadline) -> None:
        """Keep `_DEPTH` batches in flight; the last one goes alone and carries the notification."""
        flight: list[Any] = []
        for number, handle in enumerate(handles):
            last = number == len(handles) - 1
            while len(flight) >= (1 if last else _DEPTH):
                flight = [posted for posted in flight if self._agent.check_xfer_state(posted) != "DONE"]
                time.sleep(0 if len(flight) < _DEPTH else pause)
                _in_time("a bare NIXL write", deadline)
            self._agent.transfer(handle, notice if last else b"")
            flight.append(handle)
        while self._agent.check_xfer_state(handles[-1]) != "DONE":
            _in_time("a bare NIXL write", deadline)

    def _await(self, expected: bytes, pause: float, deadline: Deadline) -> None:
        while not any(expected in notices for notices in self._agent.get_new_notifs().values()):
            time.sleep(pause)
            _in_time(f"notification {expected!r}", deadline)

    def close(self) -> None:
        """Release and deregister."""
        for handle in (handle for handles in self._handles.values() for handle in handles):
            handle.release()
        for prepared in self._lists:
            prepared.release()
        self._agent.deregister_memory(self._registered)
        self._handles, self._lists = {}, []


def open_pair(store: Store, key: str, *, sends: bool, memory: torch.Tensor, deadline: Deadline) -> NixlPair:
    """See `weft_cli.bench.bare.open_pair`."""
    mine, other = ("sender", "receiver") if sends else ("receiver", "sender")
    agent = _agent(f"{key}/{mine}")
    registered = agent.register_memory([(memory.data_ptr(), memory.numel(), 0, "")], "DRAM")
    store.set(f"{key}/{mine}/address", str(memory.data_ptr()).encode())
    store.set(f"{key}/{mine}", agent.get_agent_metadata())
    peer = agent.add_remote_agent(wait_for(store, f"{key}/{other}", deadline))
    address = int(wait_for(store, f"{key}/{other}/address", deadline))
    agent.make_connection(peer)
    _greet(agent, peer, store, f"{key}/{mine}/met", f"{key}/{other}/met", deadline)
    return NixlPair(agent, peer, registered, (memory.data_ptr(), address) if sends else None)


def _greet(agent: Any, peer: Any, store: Store, mine: str, other: str, deadline: Deadline) -> None:
    """Until messages pass both ways: while a connection forms, both ends must call NIXL for them to leave."""
    agent.send_notif(peer, _HELLO)
    met = False
    while not met or store.get(other) is None:
        if any(_HELLO in notices for notices in agent.get_new_notifs().values()):
            met = True
            store.set(mine, b"")
        time.sleep(PAUSE_SECONDS)
        _in_time("a bare NIXL connection", deadline)


def _agent(name: str) -> Any:
    wheel = next(name for name in ("nixl_cu12", "nixl_cu13") if importlib.util.find_spec(name))
    api = importlib.import_module(f"{wheel}._api")
    # NIXL's own progress thread spins on a core that the copies need.
    return api.nixl_agent(name, api.nixl_agent_config(enable_prog_thread=False, backends=["UCX"]))


def _in_time(what: str, deadline: Deadline) -> None:
    if deadline.expired():
        raise DeadlineError(what, deadline.seconds, [])
