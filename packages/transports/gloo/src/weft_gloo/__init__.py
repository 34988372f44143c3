"""weft transport over torch.distributed gloo: CPU memory, any network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.endpoint import Factory, parse_options
from weft_gloo.options import GlooOptions
from weft_gloo.transport import GlooTransport

__all__ = ["GlooOptions", "GlooTransport", "factory"]


def make(options: Mapping[str, Any]) -> GlooTransport:
    """A `gloo` transport that is not open yet; `options` are the fields of `GlooOptions`."""
    return GlooTransport(parse_options(GlooOptions, options, "gloo"))


factory = Factory(make, transport_api=1)
