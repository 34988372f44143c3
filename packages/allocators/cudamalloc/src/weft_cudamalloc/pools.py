"""Pools of classic CUDA memory, as torch's `MemPool`."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

import torch

from weft.errors import ConfigError, NotSupportedError
from weft_cudamalloc.native import ALLOCATE, OBJECT, RELEASE, bind
from weft_cudamalloc.runtime import load_runtime

_LOG = logging.getLogger(__name__)


class Pool:
    """While it is entered, what this thread allocates on one CUDA device comes from `cudaMalloc`.

    Tensors stay where they are after the pool is left, and keep their memory when the pool is dropped; memory that no
    tensor holds any more goes back to the device when the pool is dropped and `torch.cuda.empty_cache()` is called.
    Entering it again, also while it is entered, is allowed; one thread at a time.
    """

    def __init__(self, device: torch.device | str | int | None = None) -> None:
        asked = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cuda")
        if asked.type != "cuda":
            raise ConfigError(f"a cudaMalloc pool is on a CUDA device, not on {asked}")
        self.device: torch.device | None = None
        """Where its memory is; None if it does nothing."""
        self.reason = inactive_reason()
        """Why it does nothing; empty if it is in force."""
        self._routes: list[AbstractContextManager[None]] = []
        if self.reason:
            _LOG.warning("a cudaMalloc pool does nothing: %s", self.reason)
            return
        # With the index of the current device where none was asked for.
        self.device = torch.empty(0, device=asked).device
        allocator = _allocator()
        with torch.cuda.device(self.device):  # a MemPool belongs to the device that is current when it is made
            self._pool = torch.cuda.MemPool(allocator.allocator())
        self._prove()

    @property
    def active(self) -> bool:
        """Whether memory comes from `cudaMalloc`; otherwise everything is as if there were no pool, and `reason` says
        why.
        """
        return not self.reason

    def reserved_bytes(self) -> int:
        """Bytes that the pool has of its device, in use or cached; 0 if it does nothing."""
        return sum(segment["total_size"] for segment in self._pool.snapshot()) if self.active else 0

    def __enter__(self) -> Pool:
        if self.active:
            route = torch.cuda.use_mem_pool(self._pool, self.device)
            route.__enter__()
            self._routes.append(route)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.active:
            self._routes.pop().__exit__(kind, error, trace)

    def __repr__(self) -> str:
        return f"Pool({self.device})" if self.active else f"Pool(does nothing: {self.reason})"

    def _prove(self) -> None:
        """Allocate once: some versions of torch refuse such pools under expandable segments, on the first allocation.

        Raises `NotSupportedError` with torch's own words.
        """
        words = "its memory is in an expandable segment"
        try:
            with self:
                torch.empty(1, dtype=torch.uint8, device=self.device)
            refused = any(segment.get("is_expandable") for segment in self._pool.snapshot())
        except RuntimeError as error:
            if "expandable" not in str(error):
                raise
            words, refused = str(error).splitlines()[0], True
        if refused:
            raise NotSupportedError(
                f"torch {torch.__version__} makes no cudaMalloc pool on {self.device}: {words}. Upgrade torch, or turn "
                "expandable_segments off in PYTORCH_CUDA_ALLOC_CONF"
            )


class CudaMallocAllocator:
    """`weft.contracts.Allocator` over one pool per device, which it keeps."""

    def __init__(self) -> None:
        self._pools: dict[torch.device, Pool] = {}

    def allocate(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """One-dimensional uint8 tensor of uninitialised memory. Raises `ConfigError` where there is no CUDA."""
        held = self._pools.get(device) or self._pools.setdefault(device, Pool(device))
        with held:
            if held.device is None:
                raise ConfigError(f"allocator 'cudamalloc' has no memory on {device}: {held.reason}")
            return torch.empty(nbytes, dtype=torch.uint8, device=held.device)


def pool(device: torch.device | str | int | None = None) -> Pool:
    """A pool on `device`, or on the current one. Without CUDA it does nothing, warns of it in the log, and says so.

    Raises `PluginError` where there is CUDA, but not its runtime or the compiled half of this package, and
    `NotSupportedError` for a torch that has no such pools with its present settings.
    """
    return Pool(device)


def factory(options: Mapping[str, Any]) -> CudaMallocAllocator:
    """The `cudamalloc` allocator. Raises `ConfigError` for options: it has none."""
    if options:
        raise ConfigError(f"allocator 'cudamalloc' has no options, {', '.join(sorted(options))} are given")
    return CudaMallocAllocator()


def inactive_reason() -> str:
    """Why there is no CUDA memory in this process; empty if there is."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"


@functools.cache
def _allocator() -> torch.cuda.memory.CUDAPluggableAllocator:
    """Torch's object over `libpool.so`: one for the process, since memory outlives the pools that it came from."""
    runtime = load_runtime()
    if runtime.shadow:
        _LOG.warning(
            "%s was loaded before the CUDA runtime %s and answers for it in libraries loaded from now on; call "
            "weft_cudamalloc.load_runtime() earlier",
            runtime.shadow,
            runtime.path,
        )
    bind(runtime)
    return torch.cuda.memory.CUDAPluggableAllocator(str(OBJECT), ALLOCATE, RELEASE)
