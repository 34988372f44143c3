"""Real agents over UCX's TCP: the interfaces they were given carry the bytes, whatever the environment says."""

from __future__ import annotations

import os

import pytest

from weft.errors import ConfigError, TransportError
from weft.member import Member
from weft.testing.crew import Crew, check, move, open_members, prepare_buckets, segments
from weft_nixl import factory
from weft_nixl.library import make_agent

TCP = {"ucx_settings": {"TLS": "tcp"}}


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
