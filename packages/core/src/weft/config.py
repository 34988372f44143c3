"""The configuration of one member of a job: from Python, from environment variables and from a TOML file.

Python wins over the environment, the environment over the file, the file over defaults. The transport is a tagged
union: its name says which options there are, and that plug-in declares them (`weft.endpoint.Factory.options`).
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from weft.authentication import Secret
from weft.deadline import Deadlines
from weft.errors import ConfigError, PluginError, WeftError
from weft.options import REQUIRED, Given, fields, nearest, read
from weft.plugins import installed, load, transports_with
from weft.policy import Policy
from weft.roster import Expect
from weft.stores import shown
from weft.variables import FILE_VARIABLE, TRANSPORT, Layer, Variables, variable

_PYTHON = "Python"
_SECRET_WAYS = "give secret_file, the path of a file that holds it, or the variable WEFT_SECRET"


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What stands outside of any section: how one member finds its job."""

    transport: str | None = None
    """Plug-in that moves the bytes. With options of its own it is a table with the plug-in's `name`."""
    store: str | None = None
    """URL of the store where the members meet, such as `tcp://10.0.0.1:29511`."""
    job: str | None = None
    """Name of the job, equal on all of its members."""
    name: str | None = None
    """This member's name: unique in the job and stable over restarts."""
    replica: str | None = None
    """Replica that a target belongs to; sources have none."""
    replica_size: Annotated[int, msgspec.Meta(ge=1, extra={"unit": "members"})] = 1
    """Members of that replica."""
    host: str | None = None
    """Identity of this machine; members of equal host share memory. Found out if not given."""
    domain: str | None = None
    """Fabric domain, such as an NVLink domain; the host if not given."""
    secret: Secret | None = None
    """What the job's members know and nobody else, at least 16 bytes. Not in the file. Shown nowhere."""
    secret_file: str | None = None
    """Or a file that holds nothing else, white space around it apart."""

    removed: ClassVar[Mapping[str, str]] = {
        "transport_options": 'options stand beside the name of their transport: {"name": …, option: value}'
    }

    def __repr__(self) -> str:
        given = msgspec.structs.asdict(self)
        told = {**given, "store": None if self.store is None else shown(self.store)}  # it may have a password in it
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in told.items())})"


SECTIONS: Mapping[str, type] = {"": Settings, "expect": Expect, "policy": Policy, "deadlines": Deadlines}
"""What is the same for every transport."""


class Value(msgspec.Struct, frozen=True):
    """One value of a configuration."""

    key: str
    """`section.field`, or the mere field of `Settings`."""
    value: Any
    origin: str
    """`Python`, the variable, the file, or `default`."""


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration that fits together. What is still open, such as a member's name, may be missing."""

    settings: Settings
    transport_options: Mapping[str, Any]
    """Those that were given."""
    expect: Expect | None
    policy: Policy
    deadlines: Deadlines
    values: tuple[Value, ...]
    """Every value with its origin, in the order of the documentation."""
    unread: tuple[str, ...]
    """Environment variables `WEFT_…` that are nothing of this."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `weft.Refit`; source, target and control are the program's.

        Raises `ConfigError` that lists what must be given and is not.
        """
        needed = {name: getattr(self.settings, name) for name in (TRANSPORT, "store", "job", "name")}
        missing = [name for name, value in {**needed, "expect": self.expect}.items() if value is None]
        if missing:
            ways = ", ".join(f"{name} ({variable('', name)}{'_…' * (name == 'expect')})" for name in missing)
            raise ConfigError(f"the configuration lacks {ways}: give it in Python, by the variable or in the file")
        settings = msgspec.structs.asdict(self.settings)
        del settings["secret_file"]  # it has been read
        return {
            **settings,
            "transport_options": self.transport_options,
            "expect": self.expect,
            "policy": self.policy,
            "deadlines": self.deadlines,
        }


def load_config(
    values: Mapping[str, Any] | None = None,
    *,
    file: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Config:
    """Read a configuration: `values` before the environment before the file before defaults.

    `values` is shaped as the file is: settings, and a mapping, or the struct itself, per section. Without `file` the
    variable `WEFT_CONFIG` may name one. `environment` is the process's own if not given. Raises `ConfigError` that
    lists every fault of all three.
    """
    environment = os.environ if environment is None else environment
    faults: list[str] = []
    named = file or environment.get(FILE_VARIABLE)
    from_file = _flattened(_toml(Path(named)), str(named), faults) if named else {}
    from_python = _flattened(values or {}, _PYTHON, faults)
    variables = Variables(environment, SECTIONS, installed("weft.transports"))
    if ("", "secret") in from_file:
        faults.append(f"{named}: a secret does not belong here: {_SECRET_WAYS}")
    transport, given = _merged(from_file, variables, from_python, faults)
    kinds = {**SECTIONS, TRANSPORT: _options_of(transport, faults)}
    read_values = {section: _section(section, kind, given, transport, faults) for section, kind in kinds.items()}
    expect = read_values["expect"]
    if expect:
        absent = [field.name for field in fields(Expect) if ("expect", field.name) not in given]
        faults += [f"expect needs the option {name}" for name in absent]
    secret = _secret(read_values[""], faults)
    policy = Policy(**read_values["policy"])
    try:
        policy.check()
    except WeftError as error:
        faults.append(str(error))
    if faults:
        raise ConfigError("the configuration is wrong:" + "".join(f"\n  {fault}" for fault in dict.fromkeys(faults)))
    return Config(
        settings=Settings(**{**read_values[""], "secret": secret}),
        transport_options=read_values[TRANSPORT],
        expect=Expect(**expect) if expect else None,
        policy=policy,
        deadlines=Deadlines(**read_values["deadlines"]),
        values=tuple(_listed(kinds, read_values, given)),
        unread=tuple(variables.unread),
    )


def _secret(settings: Mapping[str, Any], faults: list[str]) -> Secret | None:
    """The secret that was given, or is in the file that was."""
    secret: Secret | None = settings.get("secret")
    file = settings.get("secret_file")
    if file is None:
        return secret
    if secret is not None:
        faults.append("secret and secret_file are both given: leave one out")
        return None
    try:
        return Secret.read(file)
    except ConfigError as error:
        faults.append(str(error))
        return None


def _toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"the configuration {file} cannot be read: {error}") from error


def _flattened(values: Mapping[str, Any], origin: str, faults: list[str]) -> Layer:
    """Sections and their fields side by side. A transport's tag is the setting `transport`."""
    layer: Layer = {}
    for key, value in values.items():
        if isinstance(value, msgspec.Struct):
            value = msgspec.to_builtins(value)
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            value = dataclasses.asdict(value)
        if isinstance(value, Mapping) and (key in SECTIONS or key == TRANSPORT):
            layer |= {(key, field): Given(one, origin) for field, one in value.items()}
        elif key in SECTIONS:
            faults.append(f"{origin}: {key} is {value!r}, expected a table of its fields")
        elif isinstance(value, Mapping) and key not in Settings.removed:
            sections = [*filter(None, SECTIONS), TRANSPORT]
            meant = nearest(key, sections) or ", ".join(sections)
            faults.append(f"{origin}: there is no section {key!r}; did you mean {meant}?")
        else:
            layer["", key] = Given(value, origin)
    tag = layer.pop((TRANSPORT, "name"), None)
    if tag is not None:
        layer["", TRANSPORT] = tag
    return layer


def _merged(from_file: Layer, variables: Variables, from_python: Layer, faults: list[str]) -> tuple[str | None, Layer]:
    """The transport that was chosen, and what holds."""
    tags = [layer.get(("", TRANSPORT)) for layer in (from_python, variables.layer, from_file)]
    chosen = next((tag for tag in tags if tag is not None), None)
    transport = chosen.value if chosen and isinstance(chosen.value, str) else None
    faults += variables.faults
    faults += variables.foreign_faults(transport)
    for layer in (from_file, from_python):
        faults += _taken_over_faults(layer, chosen)
    return transport, {**from_file, **variables.layer, **variables.options(transport), **from_python}


def _taken_over_faults(layer: Layer, chosen: Given | None) -> list[str]:
    """Take out the options that stand beside the name of another transport than the chosen one, and say so of each."""
    tag = layer.get(("", TRANSPORT))
    if tag is None or chosen is None or tag.value == chosen.value:
        return []
    names = [field for section, field in layer if section == TRANSPORT]
    faults = []
    for name in names:
        one = layer.pop((TRANSPORT, name))
        faults.append(
            f"{one.origin}: option {name} is for transport {tag.value!r}, but {chosen.origin} chooses "
            f"{chosen.value!r}: leave it out, or choose {tag.value!r}"
        )
    return faults


def _options_of(transport: str | None, faults: list[str]) -> type | None:
    """The struct that the plug-in declares; None for none, and for options that are the plug-in's own business."""
    if transport is None:
        return None
    try:
        kind: type | None = getattr(load("weft.transports", transport), "options", None)
    except PluginError as error:
        faults.append(str(error))
        return None
    return kind


def _section(section: str, kind: type | None, given: Layer, transport: str | None, faults: list[str]) -> dict[str, Any]:
    mine = {field: one for (where, field), one in given.items() if where == section}
    if kind is None:
        if transport is None:
            faults += [f"{one.origin}: option {name} of no transport: choose one by name" for name, one in mine.items()]
        return {name: one.value for name, one in mine.items()}
    what = {"": "the configuration", TRANSPORT: f"transport {transport!r}"}.get(section, section)
    values, found = read(kind, mine, what, transports_with if section == TRANSPORT else _sections_with)
    faults += found
    return values


def _sections_with(name: str) -> Sequence[str]:
    return [section for section, kind in SECTIONS.items() if section and name in {one.name for one in fields(kind)}]


def _listed(kinds: Mapping[str, type | None], values: Mapping[str, Mapping[str, Any]], given: Layer) -> Iterator[Value]:
    for section, kind in kinds.items():
        known = {field.name: field.default for field in fields(kind)} if kind is not None else {}
        for name in known | dict(values[section]):
            value = values[section].get(name, None if known.get(name) is REQUIRED else known.get(name))
            one = given.get((section, name))
            if (section, name) == ("", "store") and value is not None:
                value = shown(value)  # it may have a password in it
            yield Value(f"{section}.{name}".lstrip("."), value, one.origin if one else "default")
