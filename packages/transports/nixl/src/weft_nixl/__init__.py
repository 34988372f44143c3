"""weft transport over NIXL: one-sided writes by UCX (RDMA, CUDA IPC, shared memory, TCP)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.endpoint import Factory, parse_options
from weft_nixl.options import NixlOptions
from weft_nixl.transport import NixlTransport

__all__ = ["NixlOptions", "NixlTransport", "factory"]


def make(options: Mapping[str, Any]) -> NixlTransport:
    """A `nixl` transport that is not open yet; `options` are the fields of `NixlOptions`."""
    return NixlTransport(parse_options(NixlOptions, options, "nixl"))


factory = Factory(make, transport_api=1)
