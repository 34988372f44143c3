"""The part of the conformance suite of transports that goes to extremes: sizes, counts, lives. Needs pytest."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import ClassVar

import pytest

from weft.testing.crew import (
    KEY,
    Crew,
    check,
    differences,
    move,
    must_still_work,
    open_members,
    prepare_buckets,
    scattered,
    segments,
)
from weft.testing.losses import LossSuite
from weft.testing.puppet import EPOCH, POISON, PuppetError

_PEERS = 8
_POSTS = 1000
_LOOKED_AT = 25
"""Of so many posts, one has all its bytes compared."""
_GUARD = 100
"""Bytes before and behind the large segment that must stay as they are."""


class ExtremeSuite(LossSuite):
    """What every transport must do at the edges. Subclass `TransportSuite`, which has all of it."""

    large_bytes: ClassVar[int] = (2 << 30) + 4099
    """Length of the largest segment: behind what 31 bits count. Where memory is short, its test is skipped."""
    shared_process: ClassVar[bool] = True
    """Whether members may share a process: then the many peers of one test are threads, which start faster."""

    @pytest.mark.trap(33)
    def test_a_segment_of_more_than_two_gibibytes_arrives(self, crew: Crew) -> None:
        nbytes, size = self.large_bytes, 64
        available = _available_bytes()
        if available < 3 * nbytes:
            pytest.skip(f"needs {3 * nbytes >> 20} MiB of memory, {available >> 20} MiB are available")
        open_members(crew, {"a": [], "b": [nbytes + 2 * _GUARD]}, connect=False)
        crew["a"].call("register_zeros", nbytes)
        for name, peer in (("a", "b"), ("b", "a")):
            crew[name].call("connect", *crew[peer].call("record")[:2], crew.seconds)
        marks = [0, nbytes // 2, nbytes - size] + [at - size // 2 for at in (1 << 30, 1 << 31) if at < nbytes - size]
        for number, at in enumerate(marks, start=1):
            crew["a"].call("put", 0, at, bytes([number]) * size)
        prepare_buckets(crew, {("a", "b"): [segments([(0, 0, 0, _GUARD, nbytes)]), segments([])]})
        move(crew, "a", "b", [0, 1], 1, seconds=2 * crew.seconds)
        found = crew["b"].call("census", 0)
        wanted = {0: nbytes - len(marks) * size, POISON: 2 * _GUARD, **dict.fromkeys(range(1, len(marks) + 1), size)}
        assert found == wanted, f"bytes by value: {found} arrived, not {wanted}"
        for number, at in enumerate(marks, start=1):
            assert crew["b"].call("read", 0, _GUARD + at, size) == bytes([number]) * size, f"misplaced: byte {at}"
        for name in "ab":
            crew[name].call("open", name, 0, [])  # gives the memory back

    @pytest.mark.trap(33, 39)
    def test_a_hundred_thousand_small_segments_arrive(self, crew: Crew) -> None:
        rows, size = scattered(100_000, 60, 2)
        open_members(crew, {"a": [size], "b": [size]})
        most = min(len(rows) // 2, crew["a"].call("most_segments"))
        buckets = [rows[at : at + most] for at in range(0, len(rows), most)]
        prepare_buckets(crew, {("a", "b"): buckets})
        crew["a"].call("fill", 8)
        for version in (1, 2):
            crew["b"].call("poison")
            move(crew, "a", "b", range(len(buckets)), version)
            check(crew, "a", "b", [rows], 1, 1)

    @pytest.mark.trap(28, 35, 39)
    def test_a_bucket_is_posted_a_thousand_times(self, crew: Crew) -> None:
        second = segments([(0, 30_000, 0, 40_000, 9), (0, 30_100, 0, 50_000, 20_000)])
        buckets = [segments([(0, 0, 0, 7, 30_000)]), second]
        open_members(crew, {"a": [70_000], "b": [70_000]})
        prepare_buckets(crew, {("a", "b"): buckets})
        for version in range(_POSTS):
            looked_at = version % _LOOKED_AT == 0 or version == _POSTS - 1
            if looked_at:
                crew["a"].call("fill", version)
                crew["b"].call("poison")
            move(crew, "a", "b", [0, 1], version)
            if looked_at:
                check(crew, "a", "b", buckets, 1, 1)

    @pytest.mark.trap(41, 61)
    def test_eight_peers_send_and_receive(self, crew: Crew) -> None:
        size = 100_003
        names = [f"peer{index}" for index in range(_PEERS)]
        if self.shared_process:
            crew.share_process(names)
        records = open_members(
            crew, {"a": [_PEERS * size] * 2, **{name: [size, size] for name in names}}, connect=False
        )
        for name in names:
            crew["a"].call("connect", *records[name][:2], crew.seconds)
            crew[name].call("connect", *records["a"][:2], crew.seconds)
        there = {("a", name): [segments([(0, n * size, 0, 0, size)])] for n, name in enumerate(names)}
        back = {(name, "a"): [segments([(1, 0, 1, n * size, size)])] for n, name in enumerate(names)}
        prepare_buckets(crew, {**there, **back}, records=records)
        for version in (1, 2):
            for seed, name in enumerate(["a", *names]):
                crew[name].call("fill", 10 * version + seed)
            sent, returned = crew["a"].call("contents", 0), [crew[name].call("contents", 1) for name in names]
            for n in range(_PEERS):
                crew["a"].call("post", KEY, n, version, b"there", False)
            for n, name in enumerate(names):
                crew["a"].call("posted", n, name, crew.seconds)
                arrived = crew[name].call("collect", 1, crew.seconds)
                assert arrived == [["a", [version, "a", 0, EPOCH], n, b"there"]]
            for n, name in enumerate(names):
                crew[name].call("post", KEY, _PEERS + n, version, b"back", False)
            for n, name in enumerate(names):
                crew[name].call("posted", _PEERS + n, "a", crew.seconds)
            arrived = crew["a"].call("collect", _PEERS, crew.seconds)
            assert sorted((m[2], m[0]) for m in arrived) == [(_PEERS + n, name) for n, name in enumerate(names)]
            for n, name in enumerate(names):
                assert crew[name].call("contents", 0) == sent[n * size : (n + 1) * size], f"to {name}"
            assert crew["a"].call("contents", 1) == b"".join(returned)
        for name in names:
            crew[name].call("close")

    @pytest.mark.trap(18, 35, 64)
    def test_nothing_of_an_earlier_life_that_goes_on_is_delivered(self, crew: Crew) -> None:
        """`twin`'s second life, in another process, takes over while the first is still there and still sends."""
        rows = [segments([(0, 0, 0, 0, 50)]), segments([(0, 50, 0, 50, 50)])]
        a = open_members(crew, {"a": [100]}, connect=False)["a"]
        for life, name in enumerate("bc"):
            crew[name].call("open", "twin", life, [100])
        twins = [crew[name].call("record") for name in "bc"]
        crew["b"].call("connect", *a[:2], crew.seconds)
        crew["a"].call("connect", *twins[0][:2], crew.seconds)
        crew["b"].call("signal", "a", 1, b"first life")
        assert crew["a"].call("collect", 1, crew.seconds) == [["twin", [1, "twin", 0, EPOCH], None, b"first life"]]
        crew["a"].call("connect", *twins[1][:2], crew.seconds)
        crew["c"].call("connect", *a[:2], crew.seconds)
        with contextlib.suppress(PuppetError):  # some transports let the sender know, some do not
            crew["b"].call("signal", "a", 2, b"still there")
        known = {"a": a, "twin": twins[1]}
        sends = [(index, "a", each.tobytes()) for index, each in enumerate(rows)]
        receives = [(index, "twin", each.tobytes()) for index, each in enumerate(rows)]
        crew["a"].begin("prepare", KEY, [], receives, {"twin": known["twin"][2]}, crew.seconds)
        crew["c"].begin("prepare", KEY, sends, [], {"a": a[2]}, crew.seconds)
        for name in "ac":
            crew[name].end()
        crew["c"].call("fill", 5)
        for index in (0, 1):
            crew["c"].call("post", KEY, index, 3, b"", False)
            crew["c"].call("posted", index, "a", crew.seconds)
        arrived = crew["a"].call("collect", 2, crew.seconds)
        assert [message[1:3] for message in arrived] == [[[3, "twin", 1, EPOCH], index] for index in (0, 1)], (
            f"the earlier life was heard: {arrived}"
        )
        assert crew["a"].call("contents", 0) == crew["c"].call("contents", 0)
        with pytest.raises(PuppetError, match=r"DeadlineError"):
            crew["a"].call("collect", 1, 0.3)

    @pytest.mark.trap(34, 40, 44)
    def test_what_a_peer_finished_before_it_died_is_whole_or_lost(self, crew: Crew) -> None:
        rows = [segments([(0, 0, 0, 0, 3 << 20), (0, 4 << 20, 0, 4 << 20, 9)]), segments([])]
        open_members(crew, {"a": [5 << 20], "victim": [5 << 20]})
        prepare_buckets(crew, {("victim", "a"): rows})
        crew["victim"].call("fill", 3)
        sent = crew["victim"].call("contents", 0)
        crew["victim"].call("post", KEY, 0, 1, b"the last", False)
        crew["victim"].call("posted", 0, "a", crew.seconds)
        crew["victim"].kill()
        try:
            assert crew["a"].call("collect", 1, crew.seconds)[0][2:] == [0, b"the last"]
        except PuppetError as error:
            assert (error.kind, error.peer) == ("PeerLostError", "victim")  # noqa: PT017  # either way is right
        else:
            missing = differences([sent], crew["a"].call("contents", 0), rows, 0)
            assert not missing, f"announced, and then never in place: {missing}"
            assert crew["a"].call("lost", 1, crew.seconds) == ["victim"]
        must_still_work(crew, "a", "b")


def _available_bytes() -> int:
    """Memory that processes can still get, by Linux's own account."""
    rows = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(rows["MemAvailable"].split()[0]) << 10
