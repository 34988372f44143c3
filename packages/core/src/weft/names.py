"""Name maps: how the names a framework uses on one rank relate to the logical names of the checkpoint.

A map is a list of declared rules, ties and skips. It knows names only: which part of which tensor sits where is the
layout's business. A name that no rule covers, that two rules cover, or that two tensors claim is a fault, and all
faults come at once (traps 6 and 13).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from weft.errors import LayoutError
from weft.layout import Tie

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_NUMBER = "(?:0|[1-9][0-9]*)"


@dataclass(frozen=True, slots=True)
class NameRule:
    """Templates of local names and of the logical names they hold; `{layer}`-like placeholders stand for numbers.

    One local and several logical names: fused tensors. Several local and one logical name: a stacked tensor. Every
    template of a rule has the same placeholders; use `expand` for an index that only one side has.
    """

    local: tuple[str, ...]
    """Templates of the framework's own names, global over ranks: with global layer and expert numbers (trap 6)."""
    logical: tuple[str, ...]
    """Templates of checkpoint names, in the order in which the local tensor holds them."""


@dataclass(frozen=True, slots=True)
class Skip:
    """Local names that are left out on purpose."""

    pattern: str
    """A template, in which `*` stands for any characters."""
    reason: str
    """Why, for people."""


@dataclass(frozen=True, slots=True)
class _Match:
    """One template of one rule that fits a name, and the numbers that make it fit."""

    rule: NameRule
    numbers: Mapping[str, str]


def expand(*templates: str, **indices: Iterable[int]) -> tuple[str, ...]:
    """Write out placeholders that only one side of a rule has; the first index varies slowest, the template fastest.

    >>> expand("experts.{expert}.gate", "experts.{expert}.up", expert=range(2))
    ('experts.0.gate', 'experts.0.up', 'experts.1.gate', 'experts.1.up')
    """
    rows = [dict(zip(indices, map(str, numbers), strict=True)) for numbers in product(*indices.values())]
    return tuple(_fill(template, row) for row in rows for template in templates)


class NameMap:
    """Rules, ties and skips of one framework and model. Immutable.

    Raises `LayoutError` with every fault of the declaration itself: rules with several names on both sides,
    placeholders that differ within a rule, a template named twice, ties of ties.
    """

    def __init__(self, rules: Sequence[NameRule], *, ties: Sequence[Tie] = (), skips: Sequence[Skip] = ()) -> None:
        self.rules, self.ties, self.skips = tuple(rules), tuple(ties), tuple(skips)
        self._canonical = {tie.alias: tie.name for tie in ties}
        self._local = [(_compile(template), rule) for rule in rules for template in rule.local]
        self._logical = [(_compile(template), rule) for rule in rules for template in rule.logical]
        self._skips = [(_compile(skip.pattern, wildcard=True), skip) for skip in skips]
        faults = [*_rule_faults(self.rules), *_tie_faults(self.ties)]
        if faults:
            raise LayoutError(faults)

    def canonical(self, logical: str) -> str:
        """The name that a tied alias stands for; other names unchanged."""
        return self._canonical.get(logical, logical)

    def logical(self, local: str) -> tuple[str, ...]:
        """Logical names that a local tensor holds, ties resolved, in the rule's order.

        Raises `LayoutError` when no rule or more than one fits.
        """
        match = _only(local, _matches(local, self._local))
        return tuple(self.canonical(_fill(template, match.numbers)) for template in match.rule.logical)

    def local(self, logical: str) -> tuple[str, ...]:
        """Every local name that holds a logical tensor: the parts of a stack in order, and the copies of tied names.

        Raises `LayoutError` when no rule fits, or more than one fits the same name.
        """
        name = self.canonical(logical)
        names = [name, *(tie.alias for tie in self.ties if tie.name == name)]
        found = {name: matches for name in names if (matches := _matches(name, self._logical))}
        if not found:
            _only(name, [])
        matches = [_only(name, matches) for name, matches in found.items()]
        return tuple(_fill(template, match.numbers) for match in matches for template in match.rule.local)

    def skipped(self, local: str) -> str | None:
        """Why a local name is left out, or None when it is not."""
        return next((skip.reason for pattern, skip in self._skips if pattern.fullmatch(local)), None)

    def check(self, names: Iterable[str]) -> None:
        """Check the local names of one rank, or of all ranks together.

        Raises `LayoutError` with every name that nothing covers, that two templates or a rule and a skip cover, or
        whose logical tensor another name claims too (a declared tie or stack excepted).
        """
        faults: list[str] = []
        claims: dict[str, tuple[str, tuple[str, ...]]] = {}
        for name in dict.fromkeys(names):
            matches, reason = _matches(name, self._local), self.skipped(name)
            if len(matches) + (reason is not None) != 1:
                faults.append(_count_fault(name, matches, reason))
                continue
            for match in matches:
                stack = tuple(_fill(template, match.numbers) for template in match.rule.local)
                for logical in (_fill(template, match.numbers) for template in match.rule.logical):
                    first, companions = claims.setdefault(logical, (name, stack))
                    if name not in companions:
                        remedy = "declare a tie or a stack, or make the names global"
                        faults.append(f"{first} and {name} both hold {logical}: {remedy}")
        if faults:
            raise LayoutError(faults)


def _compile(template: str, *, wildcard: bool = False) -> re.Pattern[str]:
    parts: list[str] = []
    seen: set[str] = set()
    for n, part in enumerate(_PLACEHOLDER.split(template)):
        if n % 2 == 0:
            parts.append(".*".join(map(re.escape, part.split("*"))) if wildcard else re.escape(part))
        elif part in seen:
            parts.append(f"(?P={part})")
        else:
            parts.append(f"(?P<{part}>{_NUMBER})")
            seen.add(part)
    return re.compile("".join(parts))


def _fill(template: str, numbers: Mapping[str, str]) -> str:
    return _PLACEHOLDER.sub(lambda found: numbers.get(found[1], found[0]), template)


def _matches(name: str, patterns: Sequence[tuple[re.Pattern[str], NameRule]]) -> list[_Match]:
    found = ((pattern.fullmatch(name), rule) for pattern, rule in patterns)
    return [_Match(rule, match.groupdict()) for match, rule in found if match]


def _only(name: str, matches: Sequence[_Match]) -> _Match:
    if len(matches) != 1:
        raise LayoutError([_count_fault(name, matches, None)])
    return matches[0]


def _count_fault(name: str, matches: Sequence[_Match], reason: str | None) -> str:
    covers = [f"rule {', '.join(match.rule.local)} <-> {', '.join(match.rule.logical)}" for match in matches]
    if reason is not None:
        covers.append(f"a skip ({reason})")
    if not covers:
        return f"{name}: no rule covers this name; add one, or a skip with its reason"
    return f"{name}: covered {len(covers)} times: {'; '.join(covers)}"


def _rule_faults(rules: Sequence[NameRule]) -> list[str]:
    faults: list[str] = []
    owners: dict[tuple[str, str], NameRule] = {}
    for rule in rules:
        where = f"rule {', '.join(rule.local)} <-> {', '.join(rule.logical)}"
        if not rule.local or not rule.logical or (len(rule.local) > 1 and len(rule.logical) > 1):
            faults.append(f"{where}: one side must have exactly one name and the other at least one")
        if len({frozenset(_PLACEHOLDER.findall(template)) for template in (*rule.local, *rule.logical)}) > 1:
            faults.append(f"{where}: its names have different placeholders; write the one-sided ones out with `expand`")
        for side, templates in (("local", rule.local), ("logical", rule.logical)):
            for template in templates:
                if (side, template) in owners:
                    faults.append(f"{where}: the {side} name {template} is declared twice")
                owners[side, template] = rule
    return faults


def _tie_faults(ties: Sequence[Tie]) -> list[str]:
    count = Counter(tie.alias for tie in ties)
    twice = [f"tie {alias}: declared {times} times" for alias, times in count.items() if times > 1]
    chained = [f"tie {tie.alias} = {tie.name}: {tie.name} is an alias itself" for tie in ties if tie.name in count]
    return twice + chained
