"""What arrives for memory that is not contiguous ends up in that memory, and nothing between it changes."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from weft.box import Box
from weft.builder import LayoutBuilder
from weft.layout import Layout
from weft.policy import Policy
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.testing.job import Job, Part
from weft.testing.members import MemorySource, MemoryTarget

ROWS, COLUMNS = 96, 80
JOBS = count()


def held() -> Layout:
    """Two matrices and a scalar, dense, as a checkpoint has them."""
    builder = LayoutBuilder()
    for name, shape, dtype in (
        ("even", (ROWS, COLUMNS), "bfloat16"),
        ("odd", (ROWS, COLUMNS), "bfloat16"),
        ("scale", (), "float32"),
    ):
        builder.tensor(name, shape, dtype)
        builder.buffer(name, dtype, torch.Size(shape).numel(), group="layer")
        builder.shard(name, name)
    return builder.build()


def wanted() -> Layout:
    """Columns of the two by turns, with a row of padding after every eight rows; the scalar first."""
    split = Box((ROWS // 8, 8, COLUMNS), (0, 0, 0), (ROWS // 8, 8, COLUMNS))
    builder = LayoutBuilder()
    builder.tensor("scale", (), "float32")
    builder.buffer("scale", "float32", 1, group="layer")
    builder.shard("scale", "scale")
    builder.buffer("woven", "bfloat16", 2 * COLUMNS * (ROWS + ROWS // 8), group="layer")
    for index, name in enumerate(("even", "odd")):
        builder.tensor(name, (ROWS, COLUMNS), "bfloat16")
        builder.piece(name, split, "woven", index, (9 * 2 * COLUMNS, 2 * COLUMNS, 2))
    builder.fill("woven", 8 * 2 * COLUMNS, (ROWS // 8, 2 * COLUMNS), (9 * 2 * COLUMNS, 1), -1.0)
    return builder.build()


@pytest.mark.trap(27, 38)
@pytest.mark.parametrize(
    "policy",
    [
        Policy(),
        Policy(direct_run_bytes=1 << 40),
        Policy(direct_run_bytes=1 << 40, staging_bytes=65_536, bucket_bytes=4096),
        Policy(direct_run_bytes=1 << 40, digests=False),
    ],
    ids=["direct", "packed", "by turns", "without digests"],
)
def test_what_arrives_for_strided_memory_is_there(store_url: str, policy: Policy) -> None:
    source, target = MemorySource("s", held()), MemoryTarget("t", wanted())
    random = torch.Generator().manual_seed(0)
    weights = [
        {
            "even": torch.randn(ROWS, COLUMNS, generator=random).bfloat16(),
            "odd": torch.randn(ROWS, COLUMNS, generator=random).bfloat16(),
            "scale": torch.tensor(float(version)),
        }
        for version in (1, 2)
    ]

    def trains(refit: Refit) -> list[Report]:
        reports = []
        for version, tensors in enumerate(weights, 1):
            source.load(tensors)
            reports.append(refit.run(version))
        return reports

    def serves(refit: Refit) -> list[torch.Tensor]:
        found = []
        for version in (1, 2):
            target.poison()
            refit.run(version)
            found.append(target.contents()["woven"].clone())
            assert target.contents()["scale"].item() == version
        return found

    job = Job(store_url, Expect(1, 1), name=f"strided{next(JOBS)}", policy=policy)
    results = job.run([Part("s", trains, source=source), Part("t", serves, target=target, replica="r")])
    assert isinstance(results["t"], list), results
    for tensors, found in zip(weights, results["t"], strict=True):
        rows = torch.stack([tensors["even"], tensors["odd"]], dim=-1).view(ROWS // 8, 8, 2 * COLUMNS)
        padded = torch.cat([rows, torch.full((ROWS // 8, 1, 2 * COLUMNS), -1.0).bfloat16()], dim=1)
        assert torch.equal(found, padded.flatten())
