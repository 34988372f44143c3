"""Where NIXL is found, and what its exceptions mean in weft's terms. The rest sees NIXL through this module."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from types import ModuleType, TracebackType
from typing import Any

import torch

from weft.errors import PeerLostError, TransportError
from weft_nixl.environment import imposed, report

INSTALL = "weft-nixl needs NIXL: pip install 'weft-nixl[cu12]' (CUDA 12, or no CUDA at all) or 'weft-nixl[cu13]'"


def candidates(cuda: str | None) -> tuple[str, ...]:
    """Modules that may hold NIXL, best first: the dispatching `nixl`, then the wheel of torch's CUDA (like "13.0")."""
    wheels = ("nixl_cu13", "nixl_cu12") if (cuda or "").startswith("13") else ("nixl_cu12", "nixl_cu13")
    return ("nixl", *wheels)


def find(names: Sequence[str]) -> tuple[ModuleType, ModuleType]:
    """`_api` and `_bindings` of the first of these that imports. Raises `ImportError` that says what to install."""
    reasons = []
    for name in names:
        try:
            return importlib.import_module(f"{name}._api"), importlib.import_module(f"{name}._bindings")
        except ImportError as error:
            reasons.append(f"{name}: {error}")
    raise ImportError(f"{INSTALL} (tried {'; '.join(reasons)})")


_api, _bindings = find(candidates(torch.version.cuda))

_MEANING: Mapping[str, str] = {
    "nixlBackendError": "the network backend failed; its own log on stderr says more",
    "nixlCancelledError": "the transfer was cancelled",
    "nixlInvalidParamError": "NIXL rejects an argument: a descriptor index or a backend parameter",
    "nixlMismatchError": "local and remote descriptors differ in number or size",
    "nixlNotAllowedError": "NIXL does not allow this in its present state",
    "nixlNotFoundError": "memory that is not registered over there (any more), a peer that is not connected, or a "
    "plug-in that lacks a library",
    "nixlNotPostedError": "the transfer was never posted",
    "nixlNotSupportedError": "no backend can do this with memory of this kind",
    "nixlRemoteDisconnectError": "its process or the link to it is gone",
    "nixlRepostActiveError": "the transfer is still active",
    "nixlUnknownError": "NIXL reports an unknown error",
}
"""By class name, so that a release of NIXL without one of them still imports."""

FOREIGN: tuple[type[Exception], ...] = tuple(getattr(_bindings, name) for name in _MEANING if hasattr(_bindings, name))
"""What NIXL raises."""


def translate(error: Exception, what: str, peer: str) -> TransportError:
    """NIXL's error in weft's terms. `peer` is whom it concerns, or empty."""
    name = type(error).__name__
    if name == "nixlRemoteDisconnectError" and peer:
        return PeerLostError(peer, f"{what}: {_MEANING[name]} ({error})")
    whose = f" (peer {peer})" if peer else ""
    return TransportError(f"{what}{whose}: {_MEANING.get(name, 'NIXL failed')} ({name}: {error})")


class translated:  # as `contextlib.suppress`
    """Map what NIXL raises inside; the only place where its exceptions are caught by kind."""

    __slots__ = ("_peer", "_what")

    def __init__(self, what: str, peer: str = "") -> None:
        self._what, self._peer = what, peer

    def __enter__(self) -> None:
        """Many thousand times per refit, hence no generator."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, FOREIGN):
            raise translate(error, self._what, self._peer) from error


def make_agent(
    name: str, backends: Mapping[str, Mapping[str, str]], progress_thread: bool, variables: Mapping[str, str]
) -> Any:
    """A `nixl_agent` with these back ends and their parameters, for which the environment says `variables`.

    The environment itself stays as it is. Raises `TransportError` when a back end is not available.
    """
    report(variables, os.environ)
    with imposed(variables):
        configuration = _api.nixl_agent_config(
            enable_prog_thread=progress_thread, backends=[], sync_mode=_api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT
        )
        agent = _api.nixl_agent(name, configuration)
        for backend, parameters in backends.items():
            if backend not in agent.get_plugin_list():
                has = ", ".join(sorted(agent.get_plugin_list()))
                raise TransportError(f"this NIXL has no backend {backend!r}; it has {has}")
            with translated(f"creating the {backend} backend with {dict(parameters)}, {dict(variables)}"):
                agent.create_backend(backend, dict(parameters))
    return agent
