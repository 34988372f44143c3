"""Refits between two hosts, network namespaces, over real NIXL and gloo: a link that is slow, cut and restored."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import pytest
from support.hosts import FAR, RAILS, Hosts, address, two_hosts
from support.members import Cast, Role

TRAINERS, ENGINES = ("trainer/0", "trainer/1"), ("rollout0/0", "rollout0/1")
NAMES = (*TRAINERS, *ENGINES)
OPTIONS = {"gloo": {"interface": "rail0"}, "nixl": {"nics": ["rail0"], "ucx_settings": {"TLS": "tcp"}}}
SERVE = "import sys, weft; s = weft.serve_store(sys.argv[1]); print(s.url, flush=True); sys.stdin.read()"


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as made:
        made.shape("rail0", rate="400mbit", burst="64kb", queue="20ms")
        yield made


@pytest.fixture(scope="module")
def store(hosts: Hosts) -> Iterator[str]:
    """Of the trainers' host, reached over the link that is never cut."""
    command = ["ip", "netns", "exec", hosts.names[0], sys.executable, "-c", SERVE, address(0, "rail1")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            yield server.stdout.readline().strip()
        finally:
            server.kill()


@pytest.mark.trap(32)
def test_the_bytes_take_the_rails_that_were_chosen_and_are_striped_over_them(
    hosts: Hosts, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UCX_NET_DEVICES", "lo")
    monkeypatch.setenv("UCX_MAX_RMA_RAILS", "1")
    names = (TRAINERS[0], ENGINES[0])
    for nics in (["rail1"], ["rail0", "rail1"]):
        options = {**OPTIONS["nixl"], "nics": nics}
        roles = [
            Role(
                name, store, f"rails{len(nics)}", "nixl", sources=1, targets=1, limits=60.0, large=True, versions=1,
                options=options, host=name,
            )
            for name in names
        ]  # fmt: skip
        before = [hosts.sent(0, rail) for rail in RAILS]
        with Cast(roles, lambda name: hosts.starting_on(names.index(name))) as crew:
            said = crew.ends(*names)
        (report,) = [entry for entry in said[names[1]] if entry[0] == "report"]
        assert report[3] == []
        carried = [hosts.sent(0, rail) - old for rail, old in zip(RAILS, before, strict=True)]
        assert sum(carried) >= report[4]
        assert min(carried) > report[4] // 4 if len(nics) == 2 else carried[0] < report[4] // 100, carried


@pytest.mark.trap(10, 34, 40, 41, 47, 48)
@pytest.mark.parametrize("transport", sorted(OPTIONS))
def test_a_slow_link_that_is_cut_and_restored(hosts: Hosts, store: str, transport: str) -> None:
    """Version 1 arrives over the slow link, version 2 is cut off while its bytes move, version 3 is whole again."""
    side = {name: int(name in ENGINES) for name in NAMES}
    roles = [
        Role(
            name, store, f"hosts-{transport}", transport, limits=12.0, large=True, versions=3, said=3, again=True,
            options=OPTIONS[transport], host=f"host{side[name]}",
            freeze="land" if name == ENGINES[1] else "", freeze_version=2, freeze_seconds=2.0,
        )
        for name in NAMES
    ]  # fmt: skip
    before = hosts.sent(0, "rail0")
    with Cast(roles, lambda name: hosts.starting_on(side[name])) as crew:
        # It lands its first of 24 layers and gives back no more slots, so that its senders still have bytes to move.
        crew.until(ENGINES[1], "frozen")
        hosts.cut("rail0")
        with contextlib.ExitStack() as link:
            link.callback(hosts.restore, "rail0")
            for name in NAMES:
                crew.until(name, "error", seconds=90)
        carried = hosts.sent(0, "rail0") - before
        for name in NAMES:
            crew.tell(name)
        said = crew.ends(*NAMES)
    for name in NAMES:
        reports = {entry[1]: entry[2:] for entry in said[name] if entry[0] == "report"}
        assert sorted(reports) == [1, 3], said[name]
        assert reports[1][1] == reports[3][1] == [], said[name]
        (error,) = [entry for entry in said[name] if entry[0] == "error"]
        _, kind, text, safe, version = error
        assert kind in ("RefitAbortedError", "PeerLostError", "DeadlineError"), error
        others = TRAINERS if name in ENGINES else ENGINES
        assert any(other in text for other in others), f"{name} names nobody on the other host: {text}"
        assert safe, f"{name} would go on serving a mixture: {text}"
        assert version == (1 if name in ENGINES else -1)
    for version in (1, 3):
        digests = {entry[2] for name in NAMES for entry in said[name] if entry[:2] == ("report", version)}
        assert len(digests) == 1
    arrived = sum(entry[4] for name in ENGINES for entry in said[name] if entry[:2] == ("report", 1))
    assert carried > arrived, "the weights took another way than the link"


@pytest.mark.trap(34)
def test_a_link_with_a_delay_is_crossed_less_often_than_buckets_move(hosts: Hosts, store: str) -> None:
    """Each of the two sources has its 84 buckets for each of the two targets: several are on their way at a time."""
    side = {name: int(name in ENGINES) for name in NAMES}
    options = {**OPTIONS["nixl"], "nics": [FAR]}
    roles = [
        Role(name, store, "far", "nixl", limits=60.0, large=True, versions=1, options=options, host=f"host{side[name]}")
        for name in NAMES
    ]
    with hosts.far(0.05) as delay, Cast(roles, lambda name: hosts.starting_on(side[name])) as crew:
        said = crew.ends(*NAMES)
    reports = {name: next(entry for entry in said[name] if entry[0] == "report") for name in NAMES}
    assert all(report[3] == [] for report in reports.values())
    round_trips, buckets = max(delay.crossings) / 2, sum(reports[name][6] for name in ENGINES)
    assert round_trips > 2, "the weights took another way than the link"
    assert round_trips < buckets, "joining included, which says something all the time"
