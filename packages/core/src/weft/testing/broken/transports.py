"""Broken transports: `local`, each with one method that does it wrong."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weft.contracts import SEGMENT, Bucket, Event, Message, Prepared, TransferProgram, Work
from weft.deadline import Deadline
from weft.endpoint import Envelope, Factory
from weft.errors import PeerLostError, TransportError
from weft.local import LocalHub, LocalTransport
from weft.local import make as make_local
from weft.member import Member, Tag
from weft.testing.broken import Fault


class Drops(LocalTransport):
    """Leaves out the last segment of every bucket that has several."""

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        kept = max(1, len(bucket.segments) - 1)
        super().copy(program, replace(bucket, segments=bucket.segments[:kept]), envelope)


class Repeats(LocalTransport):
    """Delivers every message twice."""

    def poll(self) -> Sequence[Message]:
        return [message for message in super().poll() for _ in range(2)]


class Reorders(LocalTransport):
    """Gives what has arrived newest first."""

    def poll(self) -> Sequence[Message]:
        return super().poll()[::-1]


class Flips(LocalTransport):
    """Changes one bit of every bucket."""

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        rows = bucket.segments[bucket.segments["nbytes"] > 0]
        for row in rows[:1]:
            program.regions[row["region"]].memory[int(row["offset"])] ^= 0x10
        super().copy(program, bucket, envelope)
        for row in rows[:1]:
            program.regions[row["region"]].memory[int(row["offset"])] ^= 0x10


class Overruns(LocalTransport):
    """Writes one byte more than it was asked to, where the regions have one."""

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        segments, remote = bucket.segments.copy(), program.remote_regions[bucket.peer]
        for row in segments[:1]:
            ends = (row["offset"] + row["nbytes"], row["remote_offset"] + row["nbytes"])
            if ends[0] < program.regions[row["region"]].nbytes and ends[1] < remote[row["remote_region"]].nbytes:
                row["nbytes"] += 1
        super().copy(program, replace(bucket, segments=segments), envelope)


class Lies(LocalTransport):
    """Announces a bucket, and calls it done, before its bytes: they follow with the next bucket."""

    def __init__(self, hub: LocalHub) -> None:
        super().__init__(hub)
        self._owed = np.empty(0, SEGMENT)

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        self._owed, segments = bucket.segments, self._owed
        super().copy(program, replace(bucket, segments=segments), envelope)


class ForgetsDeadlines(LocalTransport):
    """Waits for a peer for as long as it takes."""

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        while True:
            try:
                return super().connect(peer, address, deadline)
            except PeerLostError:
                time.sleep(0.01)


class IgnoresEvents(LocalTransport):
    """Sends at once, whether the bytes are ready or not."""

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        return super().post(prepared, bucket, tag, note, None)


class Counts31(LocalTransport):
    """Counts the bytes of a segment in 31 bits."""

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        segments = bucket.segments.copy()
        segments["nbytes"] %= 1 << 31
        super().copy(program, replace(bucket, segments=segments), envelope)


class Counts15(LocalTransport):
    """Counts the segments of a bucket in 15 bits."""

    def copy(self, program: TransferProgram, bucket: Bucket, envelope: Envelope) -> None:
        kept = len(bucket.segments) % (1 << 15)
        super().copy(program, replace(bucket, segments=bucket.segments[:kept]), envelope)


class Tires(LocalTransport):
    """Gives nothing back after a post: at some time it has nothing left."""

    def __init__(self, hub: LocalHub) -> None:
        super().__init__(hub)
        self._left = 500

    def post(self, prepared: Prepared, bucket: int, tag: Tag, note: bytes, after: Event | None) -> Work:
        self._left -= 1
        if self._left < 0:
            raise TransportError("no handles are left")
        return super().post(prepared, bucket, tag, note, after)


class Crowded(LocalTransport):
    """Has room for four peers: the oldest has to go."""

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        super().connect(peer, address, deadline)
        for name in list(self._peers)[:-4]:
            self.disconnect(name)


class KnowsByName(LocalTransport):
    """Takes whoever has the name of a peer for that peer."""

    def connect(self, peer: Member, address: bytes, deadline: Deadline) -> None:
        before = self._peers.get(peer.name)
        super().connect(peer, address, deadline)
        if before is not None:
            self._inbox.admit(peer.name, before)


class Owes(Lies):
    """Has what it owes die with it."""


def _factory(kind: type[LocalTransport]) -> Factory:
    def make(options: Mapping[str, Any]) -> LocalTransport:
        make_local(options)
        return kind(options["hub"])

    return Factory(make, transport_api=1)


drops = _factory(Drops)
repeats = _factory(Repeats)
reorders = _factory(Reorders)
flips = _factory(Flips)
overruns = _factory(Overruns)
lies = _factory(Lies)
forgets_deadlines = _factory(ForgetsDeadlines)
ignores_events = _factory(IgnoresEvents)
counts_31 = _factory(Counts31)
counts_15 = _factory(Counts15)
tires = _factory(Tires)
crowded = _factory(Crowded)
knows_by_name = _factory(KnowsByName)
owes = _factory(Owes)

_EVERY_BYTE = "test_every_byte_of_every_shape_arrives_and_no_other_byte_changes"
FAULTS = (
    Fault("drops", f"{_EVERY_BYTE}[unaligned]", "never written"),
    Fault("repeats", "test_every_message_is_delivered_once", "delivered more than once"),
    Fault("reorders", "test_signals_arrive_in_order_and_after_what_was_finished_before", "overtook one another"),
    Fault("flips", f"{_EVERY_BYTE}[unaligned]", "1 changed on the way"),
    Fault("overruns", f"{_EVERY_BYTE}[unaligned]", "outside all segments"),
    Fault("lies", "test_a_bucket_is_announced_only_when_all_its_bytes_are_in_place", "announced before all bytes"),
    Fault(
        "forgets_deadlines", "test_a_peer_that_died_before_connecting_is_named", "has not answered within", seconds=1
    ),
    Fault("ignores_events", "test_a_post_waits_for_its_event_without_blocking", "left before its event"),
    Fault("counts_31", "test_a_segment_of_more_than_two_gibibytes_arrives", "bytes by value"),
    Fault("counts_15", "test_a_hundred_thousand_small_segments_arrive", "never written"),
    Fault("tires", "test_a_bucket_is_posted_a_thousand_times", "no handles are left"),
    Fault("crowded", "test_eight_peers_send_and_receive", "PeerLostError"),
    Fault("knows_by_name", "test_nothing_of_an_earlier_life_that_goes_on_is_delivered", "earlier life was heard"),
    Fault("owes", "test_what_a_peer_finished_before_it_died_is_whole_or_lost", "never in place"),
)
