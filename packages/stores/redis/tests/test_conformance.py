"""The conformance suite of stores, against a real Redis server."""

from __future__ import annotations

from typing import Any

import pytest

from weft.testing.stores import StoreSuite


class TestRedisStore(StoreSuite):
    @pytest.fixture
    def url(self, server: Any) -> str:
        return server.url_with_password
