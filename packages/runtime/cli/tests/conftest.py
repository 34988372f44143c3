"""An adapter of a framework that does not exist, installed as entry points are: a dist-info directory on the path."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from weft_cli.app import main

_ADAPTER = """
from weft.builder import LayoutBuilder
from weft.contracts import Capabilities
from weft.endpoint import Factory
from weft.errors import ConfigError

class Toy:
    axes = ("tp", "dp", "copies")

    def world_size(self, parallel):
        world = parallel.get("tp", 1) * parallel.get("dp", 1) * parallel.get("copies", 1)
        if world > 8:
            raise ConfigError(f"toy has at most 8 ranks, not {world}")
        return world

    def replicas(self, parallel):
        return parallel.get("dp", 1)

    def layouts(self, config, parallel, dtype):
        rows, ranks = config["hidden_size"], parallel.get("tp", 1)
        if rows % ranks:
            raise ConfigError(f"{rows} rows do not divide by tp={ranks}")
        result = []
        for rank in range(self.world_size(parallel)):
            part = rows // ranks
            builder = LayoutBuilder()
            for name in ("a", *config.get("more", ())):
                builder.tensor(name, (rows, 8), dtype)
                builder.buffer(name, dtype, part * 8, group=name)
                builder.shard(name, name, start=rank % ranks * part, stop=(rank % ranks + 1) * part)
            result.append(builder.build())
        return result

class Greedy(Toy):
    def layouts(self, config, parallel, dtype):
        return super().layouts({**config, "more": ["b"]}, parallel, dtype)

class Post:
    capabilities = Capabilities(True, ("cpu",), True, direct_run_bytes=1 << 20, max_segments=16)

toy, greedy = Toy(), Greedy()
post = Factory(lambda options: Post(), transport_api=1)
"""
_ENTRY_POINTS = """[weft.adapters]
toy = toy_framework:toy
greedy = toy_framework:greedy
absent = toy_framework_absent:adapter
[weft.transports]
toy-post = toy_framework:post
"""


@pytest.fixture
def toy_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Installs `toy` (one tensor), `greedy` (wants a second one), `absent` (does not import) and the transport
    `toy-post` (packs runs under 1 MiB); returns a config.json of 64 rows.
    """
    site = tmp_path / "site"
    info = site / "toy_framework-7.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-framework\nVersion: 7.0\n")
    (info / "entry_points.txt").write_text(_ENTRY_POINTS)
    (site / "toy_framework.py").write_text(_ADAPTER)
    monkeypatch.syspath_prepend(str(site))
    config = tmp_path / "config.json"
    config.write_text('{"hidden_size": 64}')
    return config


def run(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `weft <arguments>`."""
    monkeypatch.setattr(sys, "argv", ["weft", *arguments])
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code or 0
    captured = capsys.readouterr()
    assert isinstance(code, int)
    return code, captured.out, captured.err


@pytest.fixture
def weft(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    """Calls the command with the given arguments."""
    return lambda *arguments: run([str(argument) for argument in arguments], monkeypatch, capsys)
