"""What `weft doctor` learns from this package: whether torch has gloo, and where it would listen."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from weft.diagnosis import Finding
from weft.errors import ConfigError
from weft.hosts import choose_host


def diagnose(root: Path) -> list[Finding]:
    """Connects to nobody."""
    if not dist.is_available() or not dist.is_gloo_available():
        return [Finding("gloo", "broken", "this torch is built without it", "install a torch with torch.distributed")]
    try:
        host = choose_host("gloo", "", "", ())
    except ConfigError as error:
        return [Finding("gloo", "broken", str(error), "give the transport's option `host` or `interface`")]
    if host.startswith("127."):
        words = f"listens on {host}, which other hosts do not reach"
        return [Finding("gloo", "note", words, "for several hosts, give the option `host` or `interface`")]
    return [Finding("gloo", "ok", f"listens on {host}")]
