"""Counting what a warm refit must not do, from outside weft: NIXL registrations and tensor allocations of this
process.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

_MEMORY = "[memory]"
"""What torch's profiler calls an event of its allocators."""
_ENGINE = "engine's own processing"
_PROCESS = "process_weights_after_loading"
"""What vLLM calls its own work on weights that have been loaded."""


class Observer:
    """Wraps NIXL's registration call and runs torch's memory profiler, both on demand. From one thread, the one that
    refits.
    """

    def __init__(self) -> None:
        """Wrap `nixl_agent.register_memory` for the life of this process. Make it before any agent registers memory."""
        self._registrations = 0
        self._before = 0
        self._profile: Any = None
        if importlib.util.find_spec("nixl") is None:
            return
        agent = importlib.import_module("nixl._api").nixl_agent
        register = agent.register_memory

        def counted(this: Any, *arguments: Any, **options: Any) -> Any:
            self._registrations += 1
            return register(this, *arguments, **options)

        agent.register_memory = counted

    def tell_apart(self, model: nn.Module) -> None:
        """Mark what vLLM itself does to loaded weights, so that what it allocates then is counted apart."""
        for module in model.modules():
            for owner in (module, getattr(module, "quant_method", None)):
                if hasattr(owner, _PROCESS):
                    setattr(owner, _PROCESS, _marked(getattr(owner, _PROCESS)))

    def start(self) -> None:
        """Count from here."""
        self._before = self._registrations
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> dict[str, int]:
        """What happened since `start`: registrations, and allocations of tensors by weft and by the engine."""
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        self._profile = None
        spans = [(e.start_ns(), e.start_ns() + e.duration_ns()) for e in events if e.name() == _ENGINE]
        moments = [event.start_ns() for event in events if event.name() == _MEMORY and event.nbytes() > 0]
        engine = sum(any(start <= moment <= end for start, end in spans) for moment in moments)
        return {
            "warm_registrations": self._registrations - self._before,
            "warm_allocations": len(moments) - engine,
            "warm_engine_allocations": engine,
        }


def _marked(process: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(process)
    def marked(*arguments: Any, **options: Any) -> Any:
        with record_function(_ENGINE):
            return process(*arguments, **options)

    return marked
