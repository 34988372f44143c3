"""The process that loads what is to be verified: its output goes to a log, and all that it starts ends with it."""

from __future__ import annotations

from typing import Any

import msgspec

from weft.errors import ConfigError, WeftError
from weft.plugins import load
from weft.verification import Request, Verifier
from weft_cli.demo.channel import Reply, serve


def verify(adapter: str, request: dict[str, Any]) -> Reply:
    """Let an adapter verify; weft's own errors are an answer, with whether the command line is at fault."""
    try:
        plugin = load("weft.adapters", adapter)
        if not isinstance(plugin, Verifier):
            raise ConfigError(f"adapter {adapter!r} has nothing that can be verified; use vllm or module")
        found = plugin.verify(msgspec.convert(request, Request), print)
    except WeftError as error:
        return {"error": str(error), "usage": isinstance(error, ConfigError)}
    return {"verification": msgspec.to_builtins(found)}


if __name__ == "__main__":
    serve({"verify": verify})
