"""Warm refits over gloo, NIXL and mapped memory register nothing and allocate nothing, as counted from outside weft."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft_gloo.link
import weft_nixl.transport
from weft.policy import Policy
from weft.refit import Refit
from weft.roster import Expect
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches
from weft.testing.watch import Seen, Watch

REGISTER = "nixl._api:nixl_agent.register_memory"
TINY = Tiny()
COLD, WARM = 3, 10
PYTHON_BYTES = 1 << 18
"""What Python takes for messages and reports, whatever the model's size."""
MEMORY = torch.zeros(5000, dtype=torch.uint8)
BOTH = pytest.mark.parametrize("transport", ["gloo", "nixl", "mapped"])


def watched(transport: str, store: Path, here: str = "target", on: threading.Event | None = None) -> Seen:
    """What `WARM` refits did; the `here` side runs in this thread, the other in another. `on` is set meanwhile."""
    source, target = MemorySource("trainer/0", TINY.source(0, 1)), MemoryTarget("rollout/0", TINY.target(0, 1))
    tensors = TINY.tensors(1)
    source.load(tensors)
    faults: list[BaseException] = []

    def refit_of(side: str) -> Refit:
        return Refit(
            source=source if side == "source" else None, target=target if side == "target" else None,
            transport=transport, store=f"file://{store}", job="watched", expect=Expect(1, 1),
            name="trainer/0" if side == "source" else "rollout/0", replica=None if side == "source" else "rollout",
            policy=Policy(bucket_bytes=1 << 12, staging_bytes=1 << 16),
        )  # fmt: skip

    def refits(refit: Refit, side: str, first: int, last: int) -> None:
        for version in range(first, last):
            if side == "target":
                target.poison()
            report = refit.run(version)
            assert version <= COLD or report.registrations == report.allocations == 0

    def there() -> None:
        side = "source" if here == "target" else "target"
        try:
            with refit_of(side) as refit:
                refits(refit, side, 1, COLD + WARM + 2)
        except BaseException as error:  # noqa: BLE001  # raised again below
            faults.append(error)

    with Watch([REGISTER]) as watch:
        other = threading.Thread(target=there, name="other")
        other.start()
        with refit_of(here) as refit:
            refits(refit, here, 1, COLD + 1)
            watch.start()
            (on or threading.Event()).set()
            refits(refit, here, COLD + 1, COLD + WARM + 1)
            seen = watch.stop()
            refits(refit, here, COLD + WARM + 1, COLD + WARM + 2)
        other.join(60)
    assert not other.is_alive()
    assert not faults, faults
    assert mismatches(target.contents(), TINY.expected(0, 1, tensors)) == []
    return seen


@pytest.mark.trap(28, 31)
@pytest.mark.parametrize("here", ["source", "target"])
@BOTH
def test_warm_refits_make_nothing(transport: str, here: str, tmp_path: Path) -> None:
    seen = watched(transport, tmp_path / "store", here)
    assert seen.calls == {REGISTER: 0}
    assert seen.tensors == []
    assert seen.python_bytes < PYTHON_BYTES


def seed(
    monkeypatch: pytest.MonkeyPatch, on: threading.Event, owner: type, name: str, extra: Callable[[Any], object]
) -> None:
    """Have a method do something more in the first call that is watched."""
    original, calls = getattr(owner, name), count()
    kept: list[object] = []

    def seeded(self: Any, *arguments: Any) -> Any:
        if on.is_set() and next(calls) == 0:
            kept.append(extra(self))
        return original(self, *arguments)

    monkeypatch.setattr(owner, name, seeded)


@pytest.mark.trap(28, 31)
def test_one_call_too_many_shows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the thread that watches: a region registered again, a copy of a tensor, an array."""

    def extra(transport: Any) -> object:
        again = transport._agent.register_memory([(MEMORY.data_ptr(), MEMORY.nbytes, 0, "")], "DRAM")
        return again, MEMORY.clone(), np.zeros(2 * PYTHON_BYTES, np.uint8)

    on = threading.Event()
    seed(monkeypatch, on, weft_nixl.transport.NixlTransport, "post", extra)
    seen = watched("nixl", tmp_path / "store", "source", on)
    assert seen.calls == {REGISTER: 1}
    assert seen.tensors == [f"MainThread: {MEMORY.nbytes} bytes"]
    assert seen.python_bytes > 2 * PYTHON_BYTES


@pytest.mark.trap(28)
def test_one_tensor_too_many_shows_in_every_thread(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A member's own thread, and one that its transport started."""
    on = threading.Event()
    seed(monkeypatch, on, weft_gloo.GlooTransport, "post", lambda _: MEMORY.clone())
    seed(monkeypatch, on, weft_gloo.link.Link, "_arrived", lambda _: MEMORY.new_empty(70))
    mine, transports = sorted(watched("gloo", tmp_path / "store", on=on).tensors)
    assert mine == f"other: aten.clone.default, {MEMORY.nbytes} bytes"
    assert re.fullmatch(r"weft-gloo take from (trainer|rollout)/0: aten.new_empty.default, 70 bytes", transports)
