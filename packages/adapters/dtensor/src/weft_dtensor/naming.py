"""Names on disk: identity, and the models that Transformers 5 holds otherwise than their checkpoints do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from weft.errors import LayoutError
from weft.names import NameMap, NameRule, Skip, expand

_FUSED_EXPERTS = ("deepseek_v3", "glm4_moe", "olmoe", "qwen2_moe", "qwen3_moe")
"""Values of `model_type` whose `mlp.experts.gate_up_proj` [E, 2·I, H] and `down_proj` [E, H, I] are, on disk,
`gate_proj`, `up_proj` and `down_proj` of each expert (`transformers/conversion_mapping.py`, "qwen2_moe").
"""
_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}

Shapes = Mapping[str, tuple[int, ...]]
"""Whole shapes by local name."""


def identity_names(shapes: Shapes, rules: Sequence[NameRule] = (), skips: Sequence[Skip] = ()) -> NameMap:
    """A map of these local names: by `rules` and `skips` where they apply, every other name as it is."""
    special = NameMap(rules, skips=skips)
    plain = [name for name in shapes if special.skipped(name) is None and not _covered(special, name)]
    return NameMap([*rules, *(NameRule((name,), (name,)) for name in plain)], skips=skips)


def _covered(names: NameMap, name: str) -> bool:
    try:
        return bool(names.logical(name))
    except LayoutError:
        return False


def expert_rules(shapes: Shapes) -> list[NameRule]:
    """Rules for experts held fused, from the shapes of the fused tensors."""
    rules: dict[str, NameRule] = {}
    for name, shape in shapes.items():
        match = _EXPERTS.fullmatch(name)
        if match and len(shape) == 3:
            prefix = re.sub(r"\d+", "{layer}", match[1], count=1)
            local = f"{prefix}.{match[2]}"
            logical = [f"{prefix}.{{expert}}.{part}.weight" for part in _PARTS[match[2]]]
            rules.setdefault(local, NameRule((local,), expand(*logical, expert=range(shape[0]))))
    return list(rules.values())


def default_names(shapes: Shapes, config: Any) -> NameMap:
    """Identity, and `expert_rules` for a Transformers `config` (an object or a mapping, or None) of a family in the
    table above.
    """
    family = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return identity_names(shapes, expert_rules(shapes) if family in _FUSED_EXPERTS else ())
