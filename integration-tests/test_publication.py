"""Published versions in real processes over real NIXL and gloo: bytes flow from replica to replica, and relays die."""

from __future__ import annotations

import pytest
from support.publication import TRAINER, Audience

from weft.store_server import serve_store


@pytest.mark.parametrize("transport", ["nixl", "gloo"])
def test_a_relay_that_is_killed_in_the_middle_is_replaced_and_versions_outlive_their_trainer(transport: str) -> None:
    server = serve_store()
    with Audience(server.url, f"published-{transport}", transport) as audience:
        audience.start(TRAINER, "relay")
        audience.tell(TRAINER, 1)
        assert audience.until("relay", "serves", 1) == ([], TRAINER, 1)

        audience.tell("relay", "halt when bytes leave")
        audience.start("reader")
        audience.until("relay", "gives", 1)
        audience.kill("relay")
        assert audience.until("reader", "serves", 1) == ([], TRAINER, 1)

        audience.kill(TRAINER)
        audience.start("relay")
        assert audience.until("relay", "serves", 1) == ([], "reader", 1)

        audience.start(TRAINER)
        audience.tell(TRAINER, 2)
        ends = [audience.until(name, "serves", 2) for name in ("relay", "reader")]
        assert all(wrong == [] and served == 2 for wrong, _, served in ends)
        assert TRAINER in {holder for _, holder, _ in ends}
    server.close()
