"""Counting what a warm refit must not do, from outside weft: NIXL registrations and tensor allocations of this
process.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from torch.profiler import ProfilerActivity, profile

_MEMORY = "[memory]"
"""What torch's profiler calls an event of its allocators."""


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

    def start(self) -> None:
        """Count from here."""
        self._before = self._registrations
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.start()

    def stop(self) -> dict[str, int]:
        """What happened since `start`: registrations, allocations of tensors, and their bytes."""
        self._profile.stop()
        events = self._profile.profiler.kineto_results.events()
        sizes = [event.nbytes() for event in events if event.name() == _MEMORY and event.nbytes() > 0]
        self._profile = None
        return {
            "registrations": self._registrations - self._before,
            "allocations": len(sizes),
            "allocated_bytes": sum(sizes),
        }
