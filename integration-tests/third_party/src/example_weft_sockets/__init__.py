"""An example of a weft transport: one-sided writes over plain TCP sockets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from example_weft_sockets.transport import Options, SocketTransport
from weft.endpoint import Factory, parse_options

__all__ = ["Options", "SocketTransport", "factory"]


def make(options: Mapping[str, Any]) -> SocketTransport:
    """A transport that is not open yet; `options` are the fields of `Options`."""
    return SocketTransport(parse_options(Options, options, "example-sockets"))


factory = Factory(make, transport_api=1)
