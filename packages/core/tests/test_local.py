"""The local transport keeps the contract."""

from typing import ClassVar

import pytest

from weft.errors import ConfigError
from weft.local import LocalHub, factory
from weft.testing.transports import TransportSuite


class TestLocal(TransportSuite):
    factory = "weft.local:factory"
    options: ClassVar = {"hub": LocalHub()}
    in_process = True


def test_local_needs_a_hub_and_nothing_else() -> None:
    with pytest.raises(ConfigError, match="hub="):
        factory({})
    with pytest.raises(ConfigError, match="hub="):
        factory({"hub": "somewhere"})
