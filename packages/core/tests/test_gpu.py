"""Digests of CUDA memory: those of the processor, in the order of streams, and what they cost beside a copy."""

from __future__ import annotations

import importlib.util
import os
import statistics
from collections.abc import Callable
from random import Random

import pytest
import torch

from weft.digest import Digest, Runs, tensor_seed
from weft.digesters import TORCH, TRITON, Digester, Digesters, Held, key_table, on_device, units, way_on
from weft.member import Region

from .nests import random_bytes, random_nest

pytestmark = pytest.mark.gpu
GIB = 1 << 30


@pytest.fixture(params=[TORCH, TRITON])
def way(request: pytest.FixtureRequest) -> str:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if request.param == TRITON and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if request.param == TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: the interpreter does not read CUDA memory")
    return str(request.param)


def digester(way: str, held: list[Held], monkeypatch: pytest.MonkeyPatch) -> Digester:
    monkeypatch.setattr("weft.digesters.way_on", lambda device, nbytes: way)
    return Digesters([Region("held", memory) for memory, _ in held]).of(held)


def seconds(work: Callable[[], object]) -> float:
    """Median of ten, on the device, after one to warm up."""
    found = []
    for _ in range(11):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1000)
    return statistics.median(found[1:])


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_any_nests_give_the_digest_of_the_processor(way: str, itemsize: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(25):
        random = Random(f"{itemsize} {seed}")
        held = []
        while len(held) < 3:
            memory, runs = random_nest(random, itemsize, 60)
            held.append((memory, runs))
        expected = sum((runs.digest(memory.numpy()) for memory, runs in held), Digest())
        there = [(memory.to("cuda"), runs) for memory, runs in held]
        assert digester(way, there, monkeypatch)() == expected, f"seed {seed}"


def test_what_the_current_stream_still_writes_is_digested(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = random_bytes(Random(1), 8 << 20)
    runs = Runs.of_nest(tensor_seed("t"), 2, 0, 0, [4 << 20], [1], [1])
    there, new = torch.zeros_like(memory, device="cuda"), memory.to("cuda")
    compute = digester(way, [(there, runs)], monkeypatch)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(100_000_000)
        there.copy_(new)
        assert compute() == runs.digest(memory.numpy())


def test_memory_of_another_than_the_current_device_is_digested(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    memory, runs = random_nest(Random(2), 2, 60)
    compute = digester(way, [(memory.to("cuda:1"), runs), (memory.to("cuda:0"), runs)], monkeypatch)
    once = runs.digest(memory.numpy())
    assert torch.cuda.current_device() == 0
    assert compute() == once + once


def test_triton_is_what_digests_where_it_is_installed() -> None:
    expected = TORCH if importlib.util.find_spec("triton") is None else TRITON
    assert way_on(torch.device("cuda", 0), 1) == expected


@pytest.mark.parametrize("shape", ["dense", "columns", "askew"])
def test_the_cost_beside_a_copy_of_the_same_bytes_on_the_device(
    way: str, shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Printed, and not judged: of a run, of the columns of a matrix, and of elements that lie askew to words."""
    memory = torch.randint(0, 256, (GIB + 64,), dtype=torch.uint8, device="cuda")
    nests = {"dense": (0, 0, [GIB // 2], [1]), "columns": (0, 5120, [GIB // 20480, 5120], [10240, 1]),
             "askew": (2, 2, [GIB // 8], [1])}  # fmt: skip
    offset, start, sizes, strides = nests[shape]
    runs = Runs.of_nest(tensor_seed("t"), 2, offset, start, sizes, strides, strides)
    compute = on_device(way, units(memory, runs), key_table(memory.device))
    nbytes = 2 * runs.rows * runs.length
    source, copy = memory[:nbytes], torch.empty(nbytes, dtype=torch.uint8, device="cuda")
    digest, copied = seconds(compute), seconds(lambda: copy.copy_(source))
    with capsys.disabled():
        print(
            f"\n{way} {shape}: {nbytes / digest / 1e9:.0f} GB/s, copy {nbytes / copied / 1e9:.0f} GB/s: "
            f"{digest / copied:.2f} times its time",
            end=" ",
        )
    assert digest > 0
