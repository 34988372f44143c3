"""What several tests of core share: a store, and the transport `faulty` installed as a third party's would be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from weft.store_server import serve_store
from weft.testing.faults import install

# An example that takes long says something about the machine, not about the code.
settings.register_profile("weft", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("weft")


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    """The embedded store."""
    server = serve_store()
    yield server.url
    server.close()


@pytest.fixture
def faulty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installs `weft.testing.faults` under the name `faulty`."""
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
