"""Variables of a configuration: `WEFT_JOB`, `WEFT_POLICY_STAGING_BYTES`; `WEFT_NIXL_RAILS` for `nixl`'s option."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from weft.options import Given, fields, nearest

FILE_VARIABLE = "WEFT_CONFIG"
"""Names the file where no argument does."""
TRANSPORT = "transport"
"""The section of the transport's own options. Its tag, the plug-in's name, is the setting of the same name."""
_PREFIX = "WEFT_"
_OF_A_SERVICE = re.compile(r".*_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT(_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)")
"""What Kubernetes sets in every container for a service called `weft`, or `weft-…`."""

Layer = dict[tuple[str, str], Given]
"""What one origin gives, by section and field; settings are in section ``."""


def variable(section: str, field: str, transport: str = "") -> str:
    """The environment variable of a field; that of a transport's option has the plug-in's name."""
    words = [transport if section == TRANSPORT else section, field]
    return _PREFIX + "_".join(word for word in words if word).upper().replace("-", "_")


class Variables:
    """What the environment gives: settings and sections, and options by the transport whose they are."""

    def __init__(self, environment: Mapping[str, str], sections: Mapping[str, type], transports: Sequence[str]) -> None:
        self.layer: Layer = {}
        """All but options of transports."""
        self.faults: list[str] = []
        self.unread: list[str] = []
        """Variables that begin with `WEFT_` and are like nothing here, or are those of a Kubernetes service `weft`."""
        self._by_transport: dict[str, Layer] = {}
        settings = {variable("", field.name): field.name for field in fields(sections[""])}
        words = [known.removeprefix(_PREFIX) for known in (*settings, FILE_VARIABLE)]
        prefixes = {f"{variable(section, '')}_": (section, "") for section in sections if section}
        prefixes |= {f"{variable(TRANSPORT, '', name)}_": (TRANSPORT, name) for name in transports}
        for name, text in sorted(environment.items()):
            if not name.startswith(_PREFIX) or name == FILE_VARIABLE:
                continue
            prefix = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")
            if name in settings:
                self.layer["", settings[name]] = Given(text, name, text=True)
            elif prefix:
                section, transport = prefixes[prefix]
                layer = self._by_transport.setdefault(transport, {}) if transport else self.layer
                layer[section, name.removeprefix(prefix).lower()] = Given(text, name, text=True)
            elif _OF_A_SERVICE.fullmatch(name) or not (similar := nearest(name.removeprefix(_PREFIX), words)):
                self.unread.append(name)
            else:
                self.faults.append(f"{name}: there is no such variable; did you mean {_PREFIX}{similar}?")

    def options(self, transport: str | None) -> Layer:
        """Options of this transport."""
        return self._by_transport.get(transport or "", {})

    def foreign_faults(self, transport: str | None) -> Iterator[str]:
        """What is wrong with options of other transports: that they are there."""
        for other, layer in self._by_transport.items():
            for one in layer.values() if other != transport else ():
                yield (
                    f"{one.origin}: it is for transport {other!r}, but the transport is {transport!r}: unset it, or "
                    f"set {variable('', TRANSPORT)}={other}"
                )
