"""Names on disk: identity, and the models that Transformers 5 holds otherwise than their checkpoints do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weft.errors import LayoutError
from weft.names import NameMap, NameRule, Skip, expand


@dataclass(frozen=True, slots=True)
class Family:
    """How the local names of one family differ from those on disk."""

    prefixes: Mapping[str, str] = field(default_factory=dict)
    """Beginnings of names; the first that fits is replaced."""
    endings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Ends of names; several on disk are the parts of a fused tensor, `{expert}` numbers its first axis."""


_FUSED_EXPERTS = Family(
    endings={
        "mlp.experts.gate_up_proj": (
            "mlp.experts.{expert}.gate_proj.weight",
            "mlp.experts.{expert}.up_proj.weight",
        ),
        "mlp.experts.down_proj": ("mlp.experts.{expert}.down_proj.weight",),
    }
)
_MIXTRAL = Family(
    endings={
        "mlp.experts.gate_up_proj": (
            "block_sparse_moe.experts.{expert}.w1.weight",
            "block_sparse_moe.experts.{expert}.w3.weight",
        ),
        "mlp.experts.down_proj": ("block_sparse_moe.experts.{expert}.w2.weight",),
        "mlp.gate.weight": ("block_sparse_moe.gate.weight",),
    }
)
_NEMOTRON_H = Family(
    prefixes={"model.": "backbone."},
    endings={
        "mixer.experts.up_proj": ("mixer.experts.{expert}.up_proj.weight",),
        "mixer.experts.down_proj": ("mixer.experts.{expert}.down_proj.weight",),
    },
)
_QWEN2_VL = Family(prefixes={"model.visual.": "visual.", "model.language_model.": "model."})
FAMILIES: Mapping[str, Family] = {
    **dict.fromkeys(
        ("deepseek_v3", "glm4_moe", "glm_moe_dsa", "olmoe", "qwen2_moe", "qwen3_moe", "qwen3_next"), _FUSED_EXPERTS
    ),
    "mixtral": _MIXTRAL,
    "nemotron_h": _NEMOTRON_H,
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl"), _QWEN2_VL),
}
"""By `model_type`, from `transformers/conversion_mapping.py` (5.19). Fused `gate_up_proj` is [E, 2·I, H], others are
[E, ...]. All other families are taken to be named as on disk.
"""

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


def family_rules(family: str, shapes: Shapes) -> list[NameRule]:
    """Rules for the names of a Transformers model that differ from those on disk; `family` is its `model_type`. None
    for a family whose names do not.
    """
    known = FAMILIES.get(family, Family())
    rules: dict[str, NameRule] = {}
    for name, shape in shapes.items():
        local = _template(name)
        if local not in rules:
            rules[local] = NameRule((local,), _on_disk(known, local, shape))
    return [rule for rule in rules.values() if rule.local != rule.logical]


def _template(name: str) -> str:
    """A name with placeholders for its numbers."""
    return ".".join(f"{{number{n}}}" if part.isdigit() else part for n, part in enumerate(name.split(".")))


def _on_disk(family: Family, local: str, shape: tuple[int, ...]) -> tuple[str, ...]:
    """Templates of the names on disk of a template of local names."""
    begins = next((prefix for prefix in family.prefixes if local.startswith(prefix)), "")
    name = family.prefixes.get(begins, "") + local.removeprefix(begins)
    ends = next((ending for ending in family.endings if name.endswith(f".{ending}")), None)
    if ends is None:
        return (name,)
    on_disk = [name.removesuffix(ends) + ending for ending in family.endings[ends]]
    return tuple(dict.fromkeys(expand(*on_disk, expert=range(shape[0]))))


def default_names(shapes: Shapes, config: Any) -> NameMap:
    """Identity, and `family_rules` for a Transformers `config` (an object or a mapping, or None)."""
    family = config.get("model_type") if isinstance(config, Mapping) else getattr(config, "model_type", None)
    return identity_names(shapes, family_rules(family, shapes) if family else ())
