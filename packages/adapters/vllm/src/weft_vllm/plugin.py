"""Entry point of group `vllm.general_plugins`: vLLM calls it in every process, before models are loaded."""

from __future__ import annotations

from weft_vllm import compat


def register() -> None:
    """Register the backend `weft` and install the hooks that act for it alone. Idempotent."""
    compat.register_engine()
    compat.register_trainer_engine()
    compat.install_hooks()
