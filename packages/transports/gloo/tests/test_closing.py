"""What is left of an endpoint that has closed."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest

from weft.deadline import Deadlines
from weft.refit import Refit
from weft.roster import Expect
from weft.store_server import serve_store
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny
from weft_gloo.transport import GlooTransport

TINY = Tiny()


@pytest.mark.trap(28)
def test_sockets_and_staging_go_when_it_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    opened = GlooTransport.open

    def noted(self: GlooTransport, *arguments: Any) -> None:
        made.append(weakref.ref(self))
        opened(self, *arguments)

    monkeypatch.setattr(GlooTransport, "open", noted)
    server = serve_store()

    def play(name: str, **side: Any) -> None:
        with Refit(
            name=name, transport="gloo", store=server.url, job="closing", expect=Expect(1, 1),
            deadlines=Deadlines(*[60.0] * 6), **side,
        ) as refit:  # fmt: skip
            refit.run(1)

    source = MemorySource("trainer/0", TINY.source(0, 1))
    source.load(TINY.tensors(1))
    sides = [
        ("trainer/0", {"source": source}),
        ("rollout/0", {"target": MemoryTarget("rollout/0", TINY.target(0, 1)), "replica": "rollout"}),
    ]
    threads = [threading.Thread(target=play, args=(name,), kwargs=side) for name, side in sides]
    gc.collect()
    gc.disable()
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert [each() for each in made] == [None, None]
    finally:
        gc.enable()
    server.close()
