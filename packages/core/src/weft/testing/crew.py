"""What the conformance suite of transports is written in: named puppets, segments, steps of several members."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from weft.contracts import SEGMENT
from weft.testing.puppet import POISON, Puppet, PuppetError

KEY = b"program"

Segments = npt.NDArray[np.void]
Shape = tuple[Sequence[int], Sequence[int], Sequence[Segments]]


def segments(rows: Sequence[tuple[int, int, int, int, int]]) -> Segments:
    """Rows of (region, offset, remote region, remote offset, bytes)."""
    return np.array(list(rows), dtype=SEGMENT)


def mirrored(rows: Segments) -> Segments:
    """The same segments seen from the other end."""
    names = ["remote_region", "remote_offset", "region", "offset", "nbytes"]
    out = np.empty(len(rows), SEGMENT)
    for name, other in zip(SEGMENT.names or (), names, strict=True):
        out[name] = rows[other]
    return out


def scattered(count: int, longest: int, seed: int) -> tuple[Segments, int]:
    """`count` segments of 1..longest bytes in shuffled order, with gaps, and the size of a region that holds them."""
    random = np.random.default_rng(seed)
    nbytes = random.integers(1, longest + 1, count)
    at = np.cumsum(nbytes + random.integers(0, 3, count)) - nbytes
    to = np.cumsum(nbytes + random.integers(0, 3, count)) - nbytes
    rows = np.zeros(count, SEGMENT)
    rows["offset"], rows["remote_offset"], rows["nbytes"] = at, to, nbytes
    random.shuffle(rows)
    return rows, int(max(at[-1], to[-1]) + longest)


def shapes() -> dict[str, Shape]:
    """Sizes of the sender's regions, of the receiver's, and the buckets, for every shape that has been a problem."""
    mixed, size = scattered(300, 5000, 1)
    return {
        "whole regions": (
            [4096, 70000],
            [70000, 4096],
            [segments([(0, 0, 1, 0, 4096)]), segments([(1, 0, 0, 0, 70000)])],
        ),
        "single bytes": ([16], [16], [segments([(0, 3, 0, 5, 1)]), segments([(0, 15, 0, 0, 1), (0, 0, 0, 15, 1)])]),
        "unaligned": ([1 << 16], [1 << 16], [segments([(0, 1, 0, 3, 999), (0, 1001, 0, 1013, 30001)])]),
        "several regions in one bucket": (
            [1000, 2000, 3000],
            [3000, 1000, 2000],
            [segments([(2, 7, 0, 1, 2900), (0, 0, 2, 500, 1000), (1, 11, 1, 13, 900)]), segments([(0, 0, 1, 0, 10)])],
        ),
        "empty buckets and empty segments": (
            [64],
            [64],
            [segments([]), segments([(0, 64, 0, 64, 0)]), segments([(0, 5, 0, 5, 0), (0, 8, 0, 9, 7)])],
        ),
        "large": ([48 << 20], [48 << 20], [segments([(0, 5, 0, 9, 40 << 20), (0, 41 << 20, 0, 44 << 20, 3 << 20)])]),
        "scattered": ([size], [size], [mixed[:170], mixed[170:]]),
        "large and small in turn": (
            [8 << 20],
            [8 << 20],
            [
                segments([(0, 0, 0, 1, 3), (0, 100, 0, 50, 3 << 20), (0, 9, 0, 30, 10)]),
                segments([(0, 4 << 20, 0, 4 << 20, 4 << 20), (0, 7, 0, 40, 2)]),
            ],
        ),
    }


class Crew:
    """Named puppets, started when first needed and again when they were killed."""

    def __init__(
        self, factory: str, options: Mapping[str, Any], in_process: bool, seconds: float, short_seconds: float
    ) -> None:
        self._arguments = (factory, options, in_process, 3 * seconds)
        self.seconds, self.short_seconds = seconds, short_seconds
        self._puppets: dict[str, Puppet] = {}

    def __getitem__(self, name: str) -> Puppet:
        puppet = self._puppets.get(name)
        if puppet is None or not puppet.alive:
            puppet = self._puppets[name] = Puppet(*self._arguments)
        return puppet

    def share_process(self, names: Sequence[str]) -> None:
        """Have these members be threads of the process that runs the tests."""
        factory, options, _, answer_seconds = self._arguments
        for name in names:
            self._puppets.setdefault(name, Puppet(factory, options, True, answer_seconds))

    def end(self) -> None:
        """End them all."""
        for puppet in self._puppets.values():
            puppet.end_all()


Records = dict[str, list[Any]]


def open_members(crew: Crew, sizes: Mapping[str, Sequence[int]], incarnation: int = 0, connect: bool = True) -> Records:
    """Open an endpoint per name, with regions of these sizes; connect everybody with everybody."""
    for name, regions in sizes.items():
        crew[name].begin("open", name, incarnation, list(regions))
    for name in sizes:
        crew[name].end()
    return connect_members(crew, list(sizes)) if connect else {name: crew[name].call("record") for name in sizes}


def connect_members(crew: Crew, names: Sequence[str]) -> Records:
    """Connect everybody with everybody."""
    records: Records = {name: crew[name].call("record") for name in names}
    for name in names:
        for peer in names:
            if peer != name:
                crew[name].call("connect", *records[peer][:2], crew.seconds)
    return records


def prepare_buckets(
    crew: Crew,
    ways: Mapping[tuple[str, str], Sequence[Segments]],
    key: bytes = KEY,
    records: Records | None = None,
    only: str | None = None,
) -> None:
    """Prepare buckets, numbered through all (sender, receiver) pairs in order, at every member that takes part."""
    names = sorted({name for pair in ways for name in pair})
    known = records if records is not None else {name: crew[name].call("record") for name in names}
    sends: dict[str, list[tuple[int, str, bytes]]] = {name: [] for name in names}
    receives: dict[str, list[tuple[int, str, bytes]]] = {name: [] for name in names}
    index = 0
    for (sender, receiver), buckets in ways.items():
        for rows in buckets:
            sends[sender].append((index, receiver, rows.tobytes()))
            receives[receiver].append((index, sender, mirrored(rows).tobytes()))
            index += 1
    remote = {name: known[name][2] for name in names}
    acting = [name for name in names if only in (None, name)]
    for name in acting:
        seconds = crew.seconds if only is None else crew.short_seconds
        crew[name].begin("prepare", key, sends[name], receives[name], remote, seconds)
    errors: list[PuppetError] = []
    for name in acting:
        try:
            crew[name].end()
        except PuppetError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def move(
    crew: Crew,
    sender: str,
    receiver: str,
    buckets: Sequence[int],
    version: int,
    key: bytes = KEY,
    seconds: float | None = None,
) -> None:
    """Post buckets at once and wait until all have arrived, each with its version and note."""
    seconds = crew.seconds if seconds is None else seconds
    for bucket in buckets:
        crew[sender].call("post", key, bucket, version, b"note %d" % bucket, False)
    for bucket in buckets:
        crew[sender].call("posted", bucket, receiver, seconds)
    arrived = crew[receiver].call("collect", len(buckets), seconds)
    assert sorted((m[2], m[3], m[1][0], m[0]) for m in arrived) == sorted(
        (bucket, b"note %d" % bucket, version, sender) for bucket in buckets
    )


def check(
    crew: Crew, sender: str, receiver: str, buckets: Sequence[Segments], regions: int, remote_regions: int
) -> None:
    """The receiver's regions hold the segments' bytes, and poison everywhere else."""
    source = [crew[sender].call("contents", index) for index in range(regions)]
    for index in range(remote_regions):
        faults = differences(source, crew[receiver].call("contents", index), buckets, index)
        assert not faults, f"region {index}: {faults}"


def differences(source: Sequence[bytes], contents: bytes, buckets: Sequence[Segments], region: int) -> str:
    """In words, how a region's contents differ from what the segments put on poison; empty when they do not."""
    found = np.frombuffer(contents, np.uint8)
    expected, inside = np.full_like(found, POISON), np.zeros(len(found), bool)
    for rows in buckets:
        for local, offset, remote, remote_offset, nbytes in rows.tolist():
            if remote == region:
                expected[remote_offset : remote_offset + nbytes] = np.frombuffer(
                    source[local], np.uint8, nbytes, offset
                )
                inside[remote_offset : remote_offset + nbytes] = True
    wrong = found != expected
    kinds = {
        "were never written": wrong & inside & (found == POISON),
        "changed on the way": wrong & inside & (found != POISON),
        "lie outside all segments and were written": wrong & ~inside,
    }
    faults = [f"{mask.sum()} {kind}, the first at {mask.argmax()}" for kind, mask in kinds.items() if mask.any()]
    return f"of {len(found)} bytes {'; '.join(faults)}" if faults else ""


def must_fail_naming(peer: str, attempt: Callable[[], None]) -> None:
    """The attempt ends within its deadline with an error that names the peer."""
    with pytest.raises(PuppetError) as caught:
        attempt()
    assert caught.value.kind in ("PeerLostError", "DeadlineError")
    assert peer in caught.value.text


def must_still_work(crew: Crew, name: str, peer: str) -> None:
    """`name`, whatever has happened to it, still reaches somebody new once its losses are reported."""
    crew[name].call("lost", 1, 0.5)
    crew[peer].call("open", peer, 0, [10])
    records = {each: crew[each].call("record") for each in (name, peer)}
    crew[name].call("connect", *records[peer][:2], crew.seconds)
    crew[peer].call("connect", *records[name][:2], crew.seconds)
    buckets = [segments([(0, 0, 0, 0, 5)]), segments([(0, 5, 0, 5, 5)])]
    prepare_buckets(crew, {(name, peer): buckets}, b"still works", records)
    for bucket in (0, 1):
        crew[name].call("post", b"still works", bucket, 1, b"", False)
        crew[name].call("posted", bucket, peer, crew.seconds)
    assert [message[0] for message in crew[peer].call("collect", 2, crew.seconds)] == [name, name]
