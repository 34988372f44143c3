"""Real agents over UCX's TCP: the interfaces they were given carry the bytes, whatever the environment says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from weft.errors import ConfigError, TransportError
from weft.member import Member
from weft.testing.crew import Crew, check, move, open_members, prepare_buckets, segments
from weft_nixl import factory
from weft_nixl.library import make_agent

TCP = {"ucx_settings": {"TLS": "tcp"}}
SECONDS = 120
NBYTES = 32 << 20
"""Of the refit in `across.py`."""


@pytest.mark.trap(32)
def test_an_environment_preset_for_others_neither_wins_nor_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """No agent can be made with these, as the last one here shows, which is made as an engine's own connector would."""
    monkeypatch.setenv("UCX_NET_DEVICES", "none_of_these")
    monkeypatch.setenv("UCX_TLS", "shm,self")
    before = dict(os.environ)
    buckets = [segments([(0, 0, 0, 7, (1 << 20) - 7)]), segments([])]
    crew = Crew("weft_nixl:factory", {"nics": ["lo"], **TCP}, in_process=False, seconds=60, short_seconds=3)
    try:
        open_members(crew, {"a": [1 << 20], "b": [1 << 20]})
        prepare_buckets(crew, {("a", "b"): buckets})
        crew["a"].call("fill", 1)
        move(crew, "a", "b", [0, 1], 1)
        check(crew, "a", "b", buckets, 1, 1)
    finally:
        crew.end()
    transport = factory({"nics": ["lo"], **TCP})
    transport.open(Member("c", None, None, None, 0, "here", "here", "cpu"))
    try:
        assert dict(os.environ) == before
        with pytest.raises(TransportError, match="creating the UCX backend"):
            make_agent("the engine's", {"UCX": {}}, False, {})
    finally:
        transport.close()


def test_a_device_that_this_host_does_not_have_is_refused_before_ucx_is_asked() -> None:
    transport = factory({"nics": ["none_of_these"]})
    with pytest.raises(ConfigError, match=r"no network device 'none_of_these'; up are .*lo"):
        transport.open(Member("c", None, None, None, 0, "here", "here", "cpu"))


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, timeout=SECONDS)


@pytest.fixture
def hosts() -> Iterator[Sequence[str]]:
    """Two network namespaces with two links between them, `rail0` and `rail1`, and nothing else."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and iproute2")
    names = [f"weft-{uuid.uuid4().hex[:8]}" for _ in range(2)]
    try:
        for name in names:
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        for rail in ("0", "1"):
            end = ("name", f"rail{rail}", "netns")
            ip("link", "add", *end, names[0], "type", "veth", "peer", *end, names[1])
            for number, name in enumerate(names, start=1):
                ip("-n", name, "address", "add", f"10.77.{rail}.{number}/24", "dev", f"rail{rail}")
                ip("-n", name, "link", "set", f"rail{rail}", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True, timeout=SECONDS)


def sent(host: str, rail: str) -> int:
    """Bytes that have left a host over an interface."""
    file = f"/sys/class/net/{rail}/statistics/tx_bytes"
    command = ["ip", "netns", "exec", host, "cat", file]
    return int(subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS).stdout)


def refit(hosts: Sequence[str], store: Path, nics: str) -> list[int]:
    """Bytes that left the source's host by rail, in a refit that only these devices may carry."""
    before = [sent(hosts[0], rail) for rail in ("rail0", "rail1")]
    program = [sys.executable, str(Path(__file__).with_name("across.py"))]
    environment = {**os.environ, "UCX_NET_DEVICES": "lo", "UCX_MAX_RMA_RAILS": "1"}
    members = [
        subprocess.Popen(
            ["ip", "netns", "exec", host, *program, role, f"file://{store}", nics],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for host, role in zip(hosts, ("source", "target"), strict=True)
    ]  # fmt: skip
    try:
        said = [member.communicate(timeout=SECONDS)[0] for member in members]
    finally:
        for member in members:
            member.kill()
            member.wait()
    assert [words.splitlines()[-1:] for words in said] == [["wrong: 0"]] * 2, "\n".join(said)
    return [sent(hosts[0], rail) - old for rail, old in zip(("rail0", "rail1"), before, strict=True)]


@pytest.mark.trap(32)
def test_the_bytes_take_the_rails_that_were_chosen_and_are_striped_over_them(
    hosts: Sequence[str], tmp_path: Path
) -> None:
    first, second = refit(hosts, tmp_path / "one", "rail1")
    assert second >= NBYTES
    assert first < NBYTES // 100
    both = refit(hosts, tmp_path / "both", "rail0,rail1")
    assert sum(both) >= NBYTES
    assert min(both) > NBYTES // 4, f"{both} bytes by rail"
