"""What the oracle says a rank holds, under the names of the specification that its model was built with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft_megatron import Spec

from .reference import Place, State, engine_names, legacy_names, megatron_shard


def holdings(config: Mapping[str, Any], state: State, place: Place, padded: int, spec: Spec) -> State:
    """Every parameter of one rank."""
    held = megatron_shard(config, state, place, padded, engine=spec.fused)
    if spec.legacy:
        held = legacy_names(held)
    return engine_names(held, grouped=spec is Spec.GROUPED) if spec.fused else held
