"""What `weft doctor` learns from this package: with which redis-py it speaks. It knows no server to ask."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from weft.diagnosis import Finding


def diagnose(root: Path) -> list[Finding]:
    """Connects to nobody."""
    return [Finding("redis", "ok", f"redis-py {version('redis')}; whether a server answers: redis-cli -u URL ping")]
