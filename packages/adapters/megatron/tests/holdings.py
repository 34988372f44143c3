"""What the oracle says a rank holds, under the names of the specification that its model was built with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft_megatron import Spec

from .hybrid_reference import hybrid_shapes, hybrid_shard
from .reference import Place, State, engine_names, legacy_names, logical_shapes, megatron_shard, random_state

HYBRID = "nemotron_h"


def logical_state(config: Mapping[str, Any]) -> State:
    """A random checkpoint: every element of every tensor differs from all others."""
    return random_state(hybrid_shapes(config) if config["model_type"] == HYBRID else logical_shapes(config))


def holdings(config: Mapping[str, Any], state: State, place: Place, padded: int, spec: Spec) -> State:
    """Every parameter of one rank."""
    if config["model_type"] == HYBRID:
        return hybrid_shard(config, state, place, padded, engine=spec.fused, grouped=spec is Spec.GROUPED)
    held = megatron_shard(config, state, place, padded, engine=spec.fused)
    if spec.legacy:
        held = legacy_names(held)
    return engine_names(held, grouped=spec is Spec.GROUPED) if spec.fused else held
