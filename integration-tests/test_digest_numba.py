"""Digests that numba compiles are those of the definition, element by element, and what large members use."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
import torch

from weft.digest import Digest, Runs, digest_array
from weft.digest_numba import NumbaSums
from weft.digesters import Held
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.store_server import serve_store
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches
from weft.views import byte_view


def matrices(random: Random, generator: np.random.Generator) -> list[Held]:
    """Two that lie at one place of two tensors: rows of any length, with gaps in memory and in their tensor, anywhere
    in a storage.
    """
    itemsize = random.choice((1, 2, 4, 8))
    rows, length = (
        random.randint(1, 9),
        random.choice((1, random.randint(1, 40), random.randint(1, 30_000 // itemsize))),
    )
    stride = random.choice((1, 1, 1, 2, 3))
    apart, distance = length + random.choice((0, 1, 4, 512)), length * stride + random.choice((0, 1, 4, 1024))
    before, offset = (random.choice((0, 8, random.randint(0, 40))) for _ in range(2))
    nbytes = offset + rows * apart * itemsize
    whole = torch.from_numpy(generator.integers(0, 256, before + nbytes, dtype=np.uint8))
    start = random.choice((0, 1024, random.randint(0, 9000)))
    shape = [rows, length], [apart, 1], [distance, stride]
    return [
        (whole[before:], Runs.of_nest(seed, itemsize, offset, start, *shape)) for seed in (1, random.getrandbits(64))
    ]


@pytest.mark.parametrize("seed", range(4))
def test_any_matrices_give_the_digest_of_their_elements_as_often_as_they_are_asked(seed: int) -> None:
    random, generator = Random(seed), np.random.default_rng(seed)
    for _ in range(40):
        held = [each for _ in range(random.randint(0, 3)) for each in matrices(random, generator)]
        compute = NumbaSums(held)
        for _ in range(2):
            assert compute() == sum((runs.elements(byte_view(memory)) for memory, runs in held), Digest())
            for memory, _ in held:
                memory.bitwise_xor_(0x5A)


def test_large_members_digest_by_numba(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.digesters.COMPILED_BYTES", 1)
    tiny = Tiny()
    weights = tiny.tensors(1)
    source, target = MemorySource("source", tiny.source(0, 1)), MemoryTarget("target", tiny.target(0, 1))

    def send(refit: Refit) -> Report:
        source.load(weights)
        return refit.run(1)

    def take(refit: Refit) -> Report:
        target.poison()
        report = refit.run(1)
        assert not mismatches(target.contents(), tiny.expected(0, 1, weights))
        return report

    with serve_store() as server:
        job = Job(server.url, Expect(1, 1), name="compiled")
        reports = job.run(
            [
                Part("source", send, source=source),
                Part("target", take, target=target, replica="replica", replica_size=1),
            ]
        )
    all_succeeded(reports)
    whole = (digest_array(name, tensor.view(torch.int16).numpy()) for name, tensor in weights.items())
    assert {report.digest for report in reports.values()} == {sum(whole, Digest()).hex()}
    assert {report.digested_by for report in reports.values()} == {"numba"}
