"""Settings of hypothesis: an example that takes long says something about the machine, not about the code."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("weft", deadline=None)
settings.load_profile("weft")
