"""weft adapter for Megatron-Core models, as source and as target.

`adapter` and everything analytic work without Megatron-Core; `MegatronSource`, `MegatronTarget` and `member_name` need
it and say what to install.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft_megatron.adapter import MegatronAdapter, megatron_layout
from weft_megatron.rows import Spec

if TYPE_CHECKING:
    from weft_megatron.live import MegatronSource, MegatronTarget, member_name

__all__ = ["MegatronAdapter", "MegatronSource", "MegatronTarget", "Spec", "adapter", "megatron_layout", "member_name"]

adapter = MegatronAdapter()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("weft_megatron.live"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
