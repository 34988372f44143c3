"""UCX's settings, set for one agent and against the environment without leaving a trace in it (trap 32).

UCX obeys `UCX_*` variables before anything that NIXL is told, and NIXL's own list of devices names no interface and no
second port. Both read the environment while a back end is created, and only then: so then it says what weft wants.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager

from weft_nixl.options import NixlOptions

_LOG = logging.getLogger(__name__)
_environment = threading.Lock()
"""The environment is the process's: one agent at a time may change it."""


def ucx_variables(options: NixlOptions, nics: Sequence[str]) -> dict[str, str]:
    """Variables of UCX for these options and these devices, over all of which large writes are striped."""
    variables = {}
    if nics:
        variables["UCX_NET_DEVICES"] = ",".join(nics)
    if len(nics) > 1:
        variables |= {"UCX_MAX_RMA_RAILS": str(len(nics)), "UCX_MAX_RNDV_RAILS": str(len(nics))}
    return variables | {f"UCX_{name}": str(value) for name, value in options.ucx_settings.items()}


def report(wanted: Mapping[str, str], environment: Mapping[str, str]) -> None:
    """Say in the log which preset variables do not count, and which do, since nothing here contradicts them."""
    preset = {name: value for name, value in sorted(environment.items()) if name.startswith("UCX_")}
    for name, value in preset.items():
        if name not in wanted:
            _LOG.warning("transport 'nixl' obeys %s=%s of the environment", name, value)
        elif wanted[name] != value:
            _LOG.warning("transport 'nixl' uses %s=%s, not %s of the environment", name, wanted[name], value)


@contextmanager
def imposed(wanted: Mapping[str, str], environment: MutableMapping[str, str] = os.environ) -> Iterator[None]:
    """Let the process's environment say this inside, and what it said before afterwards."""
    with _environment:
        before = {name: environment.get(name) for name in wanted}
        environment.update(wanted)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    environment.pop(name, None)
                else:
                    environment[name] = value
