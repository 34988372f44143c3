"""Refits of GPU memory: the same bytes as on CPU. Needs a CUDA device and NIXL."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import pytest
import torch

import weft
from weft.builder import LayoutBuilder
from weft.digest import Runs, tensor_seed
from weft.layout import Layout
from weft.testing.members import MemorySource, MemoryTarget
from weft.views import byte_view

pytestmark = pytest.mark.gpu
ROWS, COLUMNS = 512, 384


class OnDevice:
    """A member over plain memory, moved to the GPU."""

    def __init__(self, member: Any) -> None:
        self._member = member
        self._memory = {name: tensor.to("cuda:0") for name, tensor in member.memory().items()}

    def memory(self) -> Mapping[str, torch.Tensor]:
        return self._memory

    def __getattr__(self, name: str) -> Any:
        return getattr(self._member, name)


def layout(*, axis: int, start: int, stop: int) -> Layout:
    builder = LayoutBuilder()
    builder.tensor("w", (ROWS, COLUMNS), "bfloat16")
    builder.buffer("w", "bfloat16", (stop - start) * (COLUMNS if axis == 0 else ROWS), group="g")
    builder.shard("w", "w", axis=axis, start=start, stop=stop)
    return builder.build()


@pytest.mark.parametrize("direct_run_bytes", [1, 1 << 20])
def test_gpu_memory_arrives_straight_and_packed(direct_run_bytes: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    whole = torch.randn(ROWS, COLUMNS).bfloat16()
    source = MemorySource("trainer/0", layout(axis=0, start=0, stop=ROWS))
    source.load({"w": whole})
    target = MemoryTarget("rollout/0", layout(axis=1, start=100, stop=300))
    held, wanted = OnDevice(source), OnDevice(target)
    reports: list[weft.Report] = []
    with weft.serve_store() as server:

        def take_part(name: str, **side: Any) -> None:
            policy = weft.Policy(direct_run_bytes=direct_run_bytes)
            expect = weft.Expect(sources=1, replicas=1)
            with weft.Refit(
                transport="nixl", store=server.url, job="gpu", name=name, expect=expect, policy=policy, **side
            ) as refit:
                reports.extend(refit.run(version) for version in (1, 2))

        members = [
            threading.Thread(target=take_part, args=("trainer/0",), kwargs={"source": held}),
            threading.Thread(target=take_part, args=("rollout/0",), kwargs={"target": wanted, "replica": "rollout"}),
        ]
        for member in members:
            member.start()
        for member in members:
            member.join(120.0)
    assert len(reports) == 4
    columns = Runs.of_nest(tensor_seed("w"), 2, 100 * 2, 100, [ROWS, 200], [COLUMNS, 1], [COLUMNS, 1])
    assert {report.digest for report in reports} == {columns.digest(byte_view(whole)).hex()}
    assert {report.digested_by for report in reports} <= {"triton", "torch"}
    assert torch.equal(wanted.memory()["w"].cpu().view(ROWS, 200), whole[:, 100:300])
