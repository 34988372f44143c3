"""What `weft bench packing` moves, and which length it finds best."""

from __future__ import annotations

import msgspec
import pytest
from typer.testing import CliRunner

from weft.errors import ConfigError
from weft.lower import SLOTS, lower, run_elements
from weft.member import Member
from weft.plan import plan
from weft.policy import Policy
from weft.slices import slice_of
from weft_cli.app import application
from weft_cli.bench import packing_command, plot
from weft_cli.bench.gathering import GatheringRow
from weft_cli.bench.packing import STRIDED, Packing, PackingRow, best_threshold, runs_layout


def row(run_bytes: int, straight: float, packed: float) -> PackingRow:
    return PackingRow(
        run_bytes=run_bytes, bytes=1000, straight_seconds_median=straight, packed_seconds_median=packed,
        straight_over_packed=straight / packed, wrong_bytes=0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ratios", "best"),
    [
        ([4, 2, 0.5, 0.5], 4),
        ([4, 2, 2, 2], 16),
        ([0.9, 0.5, 0.5, 0.5], 1),
        ([8, 0.9, 2, 0.5], 8),
        ([8, 0.4, 2, 0.5], 2),
    ],
)
def test_the_best_length_is_the_one_that_loses_least(ratios: list[float], best: int) -> None:
    assert best_threshold([row(1 << n, ratio, 1.0) for n, ratio in enumerate(ratios)]) == best


@pytest.mark.parametrize("length", [256, 4 << 20])
def test_runs_have_their_length_and_packing_gathers_and_scatters_them(length: int) -> None:
    held, wanted = (runs_layout(length, 16, STRIDED[role]) for role in ("source", "target"))
    members = [
        Member("s", held.address, None, None, 1, "h", "h", "cpu"),
        Member("t", None, wanted.address, "r", 1, "h", "h", "cpu"),
    ]
    layouts = {layout.address: layout for layout in (held, wanted)}
    for threshold, ways in ((length, {(None, 0)}), (length + 1, {(n, 1) for n in range(SLOTS)})):
        made = plan(members[:1], members[1:], layouts, Policy(direct_run_bytes=threshold))
        buckets = lower(slice_of(made, "s")).sends
        assert sum(bucket.nbytes for bucket in buckets) == 16 * length
        assert {(bucket.slot, len(bucket.gathered)) for bucket in buckets} <= ways
        for bucket in buckets:
            assert (run_elements(bucket.copies) == length).all()
            assert bucket.gathered.all()
            assert bucket.scattered.all()


def test_a_figure_has_a_rate_for_every_length_and_way() -> None:
    rows = [row(256, 4.0, 1.0), row(512, 1.0, 2.0)]
    found = Packing(transport="mine", direct_run_bytes=1, best_direct_run_bytes=512, rows=rows)
    lines = {line["name"]: (line["x"], line["y"]) for line in plot.packing([found])["data"]}
    assert lines == {
        "mine, straight": ([256, 512], [2.5e-7, 1e-6]), "mine, packed": ([256, 512], [1e-6, 5e-7])
    }  # fmt: skip


@pytest.mark.parametrize(("wrong_bytes", "code"), [(0, 0), (3, 1)])
def test_the_command_says_what_is_best_and_what_the_transport_says(
    wrong_bytes: int, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [msgspec.structs.replace(row(256, 4.0, 1.0), wrong_bytes=wrong_bytes), row(512, 1.0, 2.0)]
    found = Packing(transport="mine", direct_run_bytes=16_384, best_direct_run_bytes=512, rows=rows)
    monkeypatch.setattr(packing_command, "run_packing", lambda name: found)
    result = CliRunner().invoke(application, ["bench", "packing", "--transport", "mine"])
    assert result.exit_code == code
    assert "direct_run_bytes = 512; the transport says 16,384" in " ".join(result.output.split())
    result = CliRunner().invoke(application, ["bench", "packing", "--transport", "mine", "--json"])
    assert result.exit_code == code
    assert msgspec.json.decode(result.stdout, type=list[Packing]) == [found]


def test_the_command_asks_for_many_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    found = GatheringRow(
        transport="mine", sources=3, bytes=4096, each_seconds_median=1e-3, gathered_seconds_median=2e-3,
        each_over_gathered=0.5, wrong_bytes=0,
    )  # fmt: skip
    monkeypatch.setattr(packing_command, "run_gathering", lambda name, sources: [found] * (sources - 2))
    result = CliRunner().invoke(application, ["bench", "packing", "--transport", "mine", "--sources", "3"])
    assert result.exit_code == 0
    assert "3 sources to one target" in result.output
    assert "2,000" in result.output
    result = CliRunner().invoke(application, ["bench", "packing", "--sources", "3", "--plot", "rates.html"])
    assert isinstance(result.exception, ConfigError)
