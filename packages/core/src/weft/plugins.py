"""Plug-ins: entry points of the groups in `GROUPS`. Each is imported when it is asked for; nothing is remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from weft.contracts import TRANSPORT_API
from weft.errors import PluginError
from weft.options import fields, nearest

GROUPS: Mapping[str, str] = {
    "weft.transports": "transport",
    "weft.stores": "store",
    "weft.allocators": "allocator",
    "weft.encodings": "encoding",
    "weft.adapters": "adapter",
}
"""Every group, and what one of its plug-ins is called."""


@dataclass(frozen=True, slots=True)
class PluginInfo:
    """One entry point that is installed."""

    name: str
    distribution: str
    """Name of the distribution that brings it."""
    version: str
    """That distribution's version."""
    value: str
    """What it points at, `module:attribute`."""
    state: str
    """`ok` or `broken`."""
    reason: str = ""
    """Why it is broken."""


def discover(group: str) -> list[PluginInfo]:
    """Every plug-in of a group, by name. Imports each: what does not import is listed as broken, with its reason."""
    points = _installed(group)
    infos = []
    for point in points:
        rivals = _claims([other for other in points if other.name == point.name])
        reason = f"claimed by {rivals}: uninstall all but one" if rivals else _import_fault(point)
        distribution, version = _origin(point)
        infos.append(PluginInfo(point.name, distribution, version, point.value, "broken" if reason else "ok", reason))
    return infos


def load(group: str, name: str) -> Any:
    """What the entry point `name` of `group` points at; imports that plug-in and no other.

    Raises `PluginError` when it is not installed (naming the package to install), does not import, is claimed by two
    distributions, or is a transport for another `TRANSPORT_API`.
    """
    role = GROUPS.get(group, group)
    points = _installed(group)
    found = [point for point in points if point.name == name]
    if not found:
        names = [point.name for point in points]
        similar = nearest(name, names)
        hint = f"did you mean {similar!r}? " if similar else ""
        raise PluginError(
            f"no {role} {name!r} is installed: {hint}pip install weft-{name} may provide it; "
            f"installed: {', '.join(names) or 'none'}"
        )
    if rivals := _claims(found):
        raise PluginError(f"{role} {name!r} is claimed by {rivals}: uninstall all but one")
    point = found[0]
    distribution, version = _origin(point)
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:  # a foreign module may raise anything while it is imported
        raise PluginError(f"{role} {name!r} of {distribution} {version} does not import: {_words(error)}") from error
    if fault := _api_fault(point, plugin):
        raise PluginError(f"{role} {name!r} of {distribution} {version} {fault}")
    return plugin


def installed(group: str) -> list[str]:
    """Names of every plug-in of a group, in order. Imports none."""
    return sorted({point.name for point in _installed(group)})


def declared_options() -> dict[str, type]:
    """The struct of options of every transport that declares one, by name. Imports each; skips what does not import."""
    declared: dict[str, type] = {}
    for name in installed("weft.transports"):
        try:
            kind = getattr(load("weft.transports", name), "options", None)
        except PluginError:  # `weft plugins` says why
            continue
        if kind is not None:
            declared[name] = kind
    return declared


def transports_with(option: str) -> Sequence[str]:
    """The transports that have an option of this name, in words; for hints. Imports each."""
    return [
        f"transport {name!r}"
        for name, kind in declared_options().items()
        if option in {field.name for field in fields(kind)}
    ]


def _installed(group: str) -> list[EntryPoint]:
    return sorted(set(entry_points(group=group)), key=lambda point: (point.name, *_origin(point), point.value))


def _claims(points: list[EntryPoint]) -> str:
    """Who claims one name, when that is more than one distribution or one value."""
    if len(points) < 2:
        return ""
    return " and ".join("{} {}".format(*_origin(point)) + f" ({point.value})" for point in points)


def _origin(point: EntryPoint) -> tuple[str, str]:
    return ("unknown distribution", "?") if point.dist is None else (point.dist.name, point.dist.version)


def _import_fault(point: EntryPoint) -> str:
    try:
        plugin = point.load()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # a foreign module may raise anything while it is imported
        return _words(error)
    return _api_fault(point, plugin)


def _api_fault(point: EntryPoint, plugin: Any) -> str:
    """Why a transport was not written for this core; empty for all others."""
    if point.group != "weft.transports":
        return ""
    api = getattr(plugin, "transport_api", None)
    if not isinstance(api, int):
        return (
            f"does not say which transport API it was written for, this weft-core has {TRANSPORT_API}: make "
            f"{point.value} a weft.endpoint.Factory(make, transport_api=…)"
        )
    if api == TRANSPORT_API:
        return ""
    older = _origin(point)[0] if api < TRANSPORT_API else "weft-core"
    return f"was written for transport API {api}, this weft-core has {TRANSPORT_API}: pip install --upgrade {older}"


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
