"""Counting, from outside weft, what a warm refit must not do: calls of other libraries, tensors made, memory taken."""

from __future__ import annotations

import functools
import importlib
import threading
import tracemalloc
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_MEMORY = "[memory]"
"""What torch's profiler calls an event of its allocators."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What happened between `Watch.start` and `Watch.stop`."""

    calls: Mapping[str, int]
    """How often each watched function was called, in any thread."""
    tensors: Sequence[str]
    """Every allocation of a tensor, in words: in the thread that watches, whatever torch's allocators gave, temporaries
    of its operations included; in threads started since the watch was entered, every operation that gave a new storage.
    """
    python_bytes: int
    """The most that Python objects and numpy arrays took at a time, over what they had taken at the start."""


class Watch:
    """Watches this process for as long as it is entered.

    `calls` are functions as `module:Class.name`, whose calls are counted, such as NIXL's
    `nixl._api:nixl_agent.register_memory`. Enter it before what is watched starts threads and makes its objects.
    """

    def __init__(self, calls: Sequence[str] = ()) -> None:
        self._names = calls
        self._lock = threading.Lock()
        self._on = False
        self._calls: dict[str, int] = {}
        self._tensors: list[str] = []
        self._taken = 0
        self._profile: Any = None
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        for name in self._names:
            module, _, path = name.partition(":")
            path, _, function = path.rpartition(".")
            owner = functools.reduce(getattr, path.split("."), importlib.import_module(module))
            self._replace(owner, function, functools.partial(self._counted, name))
        self._replace(threading.Thread, "run", self._followed)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def start(self) -> None:
        """Count from here."""
        with self._lock:
            self._calls, self._tensors = dict.fromkeys(self._names, 0), []
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()
        tracemalloc.start()
        self._taken, _ = tracemalloc.get_traced_memory()
        self._on = True

    def stop(self) -> Seen:
        """What has happened since `start`. From the same thread."""
        self._on = False
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self._profile.stop()
        events = [e for e in self._profile.profiler.kineto_results.events() if e.name() == _MEMORY and e.nbytes() > 0]
        here = [f"{threading.current_thread().name}: {event.nbytes()} bytes" for event in events]
        with self._lock:
            return Seen(self._calls, [*here, *self._tensors], peak - self._taken)

    def called(self, name: str) -> None:
        """A watched function was called."""
        with self._lock:
            if self._on:
                self._calls[name] += 1

    def made(self, what: str) -> None:
        """A thread has made a tensor."""
        with self._lock:
            if self._on:
                self._tensors.append(f"{threading.current_thread().name}: {what}")

    def _replace(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        original = getattr(owner, name)
        setattr(owner, name, wrap(original))
        self._undo.callback(setattr, owner, name, original)

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counted(*arguments: Any, **options: Any) -> Any:
            self.called(name)
            return function(*arguments, **options)

        return counted

    def _followed(self, run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
        """torch's profiler sees memory of one thread only; the others get what torch lets one put around operations."""

        def followed(thread: threading.Thread) -> None:
            with _Following(self):
                run(thread)

        return followed


class _Following(TorchDispatchMode):
    """Tells a watch of every operation of this thread whose result is not in the memory of its arguments."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watch = watch

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {_storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and _storage(leaf) not in given:
                self._watch.made(f"{func}, {leaf.untyped_storage().nbytes()} bytes")
        return result


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
