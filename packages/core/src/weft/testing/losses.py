"""The half of the conformance suite of transports that loses peers: dead, frozen, restarted. Needs pytest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import pytest

from weft.testing.crew import (
    KEY,
    Crew,
    check,
    move,
    must_fail_naming,
    must_still_work,
    open_members,
    prepare_buckets,
    segments,
)
from weft.testing.puppet import EPOCH, PuppetError
from weft.testing.suite import Suite


class LossSuite(Suite):
    """What every transport must do when a peer is gone. Subclass `TransportSuite`, which has all of it."""

    factory: ClassVar[str]
    """`module:name` of its factory."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Given to the factory."""
    in_process: ClassVar[bool] = False
    """Whether members must share this process: threads instead of processes."""

    @pytest.fixture(scope="class")
    @classmethod
    def crew(cls) -> Iterator[Crew]:
        """Processes that all tests of the class share; each test opens fresh endpoints in them."""
        crew = Crew(cls.factory, cls.options, cls.in_process, cls.seconds, cls.short_seconds)
        yield crew
        crew.end()

    @pytest.mark.trap(40, 49)
    def test_a_peer_that_died_before_connecting_is_named(self, crew: Crew) -> None:
        records = open_members(crew, {"a": [10], "victim": [10]}, connect=False)
        crew["victim"].kill()

        def attempt() -> None:
            crew["a"].call("connect", *records["victim"][:2], crew.short_seconds)
            prepare_buckets(crew, {("a", "victim"): [segments([(0, 0, 0, 0, 5)])]}, records=records, only="a")
            crew["a"].call("post", KEY, 0, 1, b"", False)
            crew["a"].call("posted", 0, "victim", crew.short_seconds)

        must_fail_naming("victim", attempt)
        must_still_work(crew, "a", "b")

    @pytest.mark.trap(40)
    def test_a_peer_that_died_before_a_post_is_named_and_reported_once(self, crew: Crew) -> None:
        open_members(crew, {"a": [10], "victim": [10]})
        prepare_buckets(crew, {("a", "victim"): [segments([(0, 0, 0, 0, 5)]), segments([])]})
        move(crew, "a", "victim", [0, 1], 1)
        crew["victim"].kill()

        def attempt() -> None:
            crew["a"].call("post", KEY, 0, 2, b"", False)
            crew["a"].call("posted", 0, "victim", crew.short_seconds)

        must_fail_naming("victim", attempt)
        crew["a"].call("lost", 1, crew.short_seconds)
        assert crew["a"].call("lost", 1, 0.5) == []
        must_still_work(crew, "a", "b")

    @pytest.mark.trap(40)
    def test_a_receiver_learns_that_its_sender_died(self, crew: Crew) -> None:
        open_members(crew, {"a": [10], "victim": [10]})
        prepare_buckets(crew, {("victim", "a"): [segments([(0, 0, 0, 0, 5)]), segments([])]})
        move(crew, "victim", "a", [0, 1], 1)
        crew["victim"].kill()
        assert crew["a"].call("lost", 1, crew.short_seconds) == ["victim"]

    @pytest.mark.trap(40, 41)
    def test_a_peer_that_dies_while_bytes_move_is_named(self, crew: Crew) -> None:
        size, half = 64 << 20, 32 << 20
        open_members(crew, {"a": [size], "victim": [size]})
        prepare_buckets(crew, {("a", "victim"): [segments([(0, 0, 0, 0, half)]), segments([(0, 0, 0, half, half)])]})
        for bucket in (0, 1):
            crew["a"].call("post", KEY, bucket, 1, b"", False)
        crew["victim"].kill()

        def attempt() -> None:
            for bucket in (0, 1):
                crew["a"].call("posted", bucket, "victim", crew.short_seconds)
            crew["a"].call("signal", "victim", 1, b"")
            crew["a"].call("collect", 1, crew.short_seconds)

        must_fail_naming("victim", attempt)
        must_still_work(crew, "a", "b")

    @pytest.mark.trap(40)
    def test_a_frozen_peer_blocks_nothing_but_its_own_posts(self, crew: Crew) -> None:
        size = 64 << 20
        open_members(crew, {"a": [size], "victim": [size]})
        prepare_buckets(crew, {("a", "victim"): [segments([(0, 0, 0, 0, size)]), segments([(0, 0, 0, 0, 1)])]})
        crew["victim"].freeze()
        try:
            for bucket in (0, 1):
                crew["a"].call("post", KEY, bucket, 1, b"", False)
            for _ in range(20):
                crew["a"].call("signal", "victim", 1, bytes(1000))
            with pytest.raises(PuppetError, match=r"DeadlineError"):
                crew["a"].call("collect", 1, 1.0)
            crew["a"].call("cancel", 0)
            crew["a"].call("cancel", 1)
            crew["a"].call("release", KEY)
            must_still_work(crew, "a", "b")
        finally:
            crew["victim"].thaw()
            crew["victim"].kill()

    @pytest.mark.trap(18, 49, 64)
    def test_a_restarted_peer_is_reached_by_its_new_address(self, crew: Crew) -> None:
        buckets = [segments([(0, 0, 0, 10, 50)]), segments([(0, 60, 0, 70, 30)])]
        records = open_members(crew, {"a": [100], "victim": [100]})
        prepare_buckets(crew, {("a", "victim"): buckets, ("victim", "a"): [buckets[0]]})
        move(crew, "a", "victim", [0, 1], 1)
        crew["a"].call("release", KEY)
        crew["victim"].call("signal", "a", 1, b"from the first life")
        crew["victim"].kill()
        crew["victim"].call("open", "victim", 1, [100])
        records["victim"] = crew["victim"].call("record")
        crew["a"].call("connect", *records["victim"][:2], crew.seconds)
        crew["victim"].call("connect", *records["a"][:2], crew.seconds)
        prepare_buckets(crew, {("a", "victim"): buckets, ("victim", "a"): [buckets[0]]}, b"second", records=records)
        crew["a"].call("fill", 1)
        move(crew, "a", "victim", [0, 1], 2, b"second")
        check(crew, "a", "victim", buckets, 1, 1)
        crew["victim"].call("post", b"second", 2, 3, b"", False)
        crew["victim"].call("posted", 2, "a", crew.seconds)
        assert crew["a"].call("collect", 1, crew.seconds) == [["victim", [3, "victim", 1, EPOCH], 2, b""]]
        assert crew["a"].call("lost", 1, 0.3) == []
