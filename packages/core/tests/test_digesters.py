"""Digests of a device's memory are those of the processor, on CPU tensors: in torch's operations, and in Triton's
interpreter where Triton is installed.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some

from weft.digest import Digest, Runs, digest_array, tensor_seed
from weft.digest_pieces import BLOCK_BYTES, pieces
from weft.digesters import COMPILED_BYTES, NUMPY, TORCH, TRITON, Held, key_table, on_device, units, way_on
from weft.errors import NotSupportedError
from weft.policy import Policy
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft.testing.job import Job, Part, all_succeeded
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

from .nests import random_bytes, random_nest

COMPILING = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from weft import digest_triton as made

for width, unit in made._UNIT_TYPES.items():
    for in_block in (True, False):
        constants = {"UNIT": unit, "WIDTH": width, "IN_BLOCK": in_block, "ROWS": 4, "COLUMNS": 256, "STEPS": 2,
                     "BLOCK": made.BLOCK}
        pointers = dict.fromkeys(("p_tiles", "p_pieces", "p_table", "p_sums"), "*i64")
        signature = pointers | dict.fromkeys(constants, "constexpr")
        triton.compile(ASTSource(made._sum, signature, constants), target=GPUTarget("cuda", 90, 32))
"""
ITEMSIZES = some.sampled_from([1, 2, 4, 8])


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""A property of the whole process: Triton makes its own functions for one or the other when it is imported."""


@pytest.fixture(
    scope="module",
    params=[
        TORCH,
        pytest.param(TRITON, marks=pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")),
    ],
)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def in_own_process(*arguments: str, **environment: str) -> None:
    """Run Python where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed: its kernels are tested where it is")
    command, env = [sys.executable, *arguments], {**os.environ, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=560, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(600)
@pytest.mark.skipif(INTERPRETED, reason="begins that process")
def test_the_kernel_gives_the_digest_of_the_processor_in_tritons_interpreter() -> None:
    in_own_process("-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", TRITON, TRITON_INTERPRET="1")


@pytest.mark.timeout(600)
def test_the_kernel_compiles_for_every_width_of_units() -> None:
    """The interpreter takes what the compiler refuses. Compiling needs no GPU."""
    in_own_process("-c", COMPILING, TRITON_INTERPRET="0")


def on_way(way: str, held: list[Held]) -> Digest:
    return on_device(way, [unit for each in held for unit in units(*each)], key_table(torch.device("cpu")))()


@settings(max_examples=20 if INTERPRETED else 100)
@given(some.randoms(use_true_random=False), ITEMSIZES)
def test_any_nests_give_the_digest_of_the_processor(way: str, random: Random, itemsize: int) -> None:
    held = [random_nest(random, itemsize, 40) for _ in range(random.randint(1, 3))]
    assert on_way(way, held) == sum((runs.digest(memory.numpy()) for memory, runs in held), Digest())


@settings(max_examples=10 if INTERPRETED else 50)
@given(some.randoms(use_true_random=False), ITEMSIZES)
def test_runs_longer_than_blocks_give_the_digest_of_the_processor(way: str, random: Random, itemsize: int) -> None:
    numel = random.randint(1, 5 * BLOCK_BYTES // itemsize)
    start, offset = random.choice((0, random.randint(0, 5000))), random.choice((0, random.randint(0, 9)))
    memory = random_bytes(random, offset + numel * itemsize)
    runs = Runs.of_nest(tensor_seed("t"), itemsize, offset, start, [numel], [1], [1])
    assert on_way(way, [(memory, runs)]) == runs.digest(memory.numpy())


@pytest.mark.parametrize(
    ("shape", "left", "right"),
    [((700, 1024), 100, 612), ((96, 5120), 1280, 2560), ((40, 9000), 4, 8972), ((300, 999), 3, 500), ((9, 4096), 0, 4)],
)
def test_columns_of_a_matrix_give_the_digest_of_the_processor(
    way: str, shape: tuple[int, int], left: int, right: int
) -> None:
    rows, columns = shape
    memory = random_bytes(Random(left), rows * columns * 2)
    held = [
        (memory, Runs.of_nest(tensor_seed("t"), 2, low * 2, low, [rows, high - low], [columns, 1], [columns, 1]))
        for low, high in ((0, left), (left, right), (right, columns))
        if low < high
    ]
    assert on_way(way, held[1:2]) == held[1][1].digest(memory.numpy())
    assert on_way(way, held) == digest_array("t", memory.numpy().view(np.int16))


@given(some.randoms(use_true_random=False), ITEMSIZES)
def test_pieces_hold_every_element_once_and_say_which_lie_in_blocks(random: Random, itemsize: int) -> None:
    memory, runs = random_nest(random, itemsize, 30)
    count = np.zeros(memory.numel(), np.int64)
    for piece in pieces(runs, 8):
        i, j = np.arange(piece.rows)[:, None], np.arange(piece.columns)
        first = piece.position + i * piece.distance
        at = first + j // piece.parts * piece.step + j % piece.parts * piece.width
        assert piece.in_block == (at // BLOCK_BYTES == first // BLOCK_BYTES).all()
        assert not (
            np.concatenate([at.ravel(), [piece.offset, piece.row_bytes * (piece.rows > 1)]]) % piece.width
        ).any()
        begins = piece.offset + i * piece.row_bytes + j * piece.width
        np.add.at(count, (begins[..., None] + np.arange(piece.width)).ravel(), 1)
    expected = np.zeros_like(count)
    for offset in runs.offsets:
        begins = offset + np.arange(runs.rows)[:, None] * runs.row_bytes + np.arange(runs.length * itemsize)
        np.add.at(expected, begins.ravel(), 1)
    assert (count == expected).all()


def test_long_rows_and_runs_are_read_in_words_of_one_block() -> None:
    """What is fast on a device: whole words, and one block key per row."""
    for sizes, strides, start in (
        ([1 << 20], [1], 0), ([1 << 20], [1], 4), ([512, 2048], [4096, 1], 0), ([512, 1280], [5120, 1], 1280),
    ):  # fmt: skip
        runs = Runs.of_nest(tensor_seed("t"), 2, 0, start, sizes, strides, strides)
        found = list(pieces(runs, 8))
        assert all(piece.in_block and piece.width == 8 for piece in found)
        assert len(found) <= 16


def test_what_keeps_triton_from_running_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "weft.digest_triton", None)
    with pytest.raises(
        NotSupportedError, match=r"on cpu cannot be computed by triton: ModuleNotFoundError: .*digests=F"
    ):
        on_device(TRITON, [], key_table(torch.device("cpu")))


def test_what_keeps_numba_from_running_is_logged_and_numpy_takes_over(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "weft.digest_numba", None)
    caplog.set_level("INFO")
    assert way_on(torch.device("cpu"), COMPILED_BYTES - 1) == NUMPY
    assert not caplog.messages
    assert way_on(torch.device("cpu"), COMPILED_BYTES) == NUMPY
    assert "slower than by numba: import of weft.digest_numba halted" in caplog.text


@pytest.mark.parametrize("direct_run_bytes", [1, 1 << 40], ids=["direct", "packed"])
def test_refits_are_digested_by_pieces_as_by_the_processor(
    store_url: str, monkeypatch: pytest.MonkeyPatch, direct_run_bytes: int
) -> None:
    """Straight and staged buckets, and what a member copies by itself."""
    monkeypatch.setattr("weft.digesters.way_on", lambda device, nbytes: TORCH)
    tiny = Tiny()
    weights = tiny.tensors(1)

    def part(rank: int) -> Part:
        source = MemorySource(f"both/{rank}", tiny.source(rank, 2))
        target = MemoryTarget(f"both/{rank}", tiny.target(rank, 2))

        def act(refit: Refit) -> Report:
            source.load(weights)
            target.poison()
            report = refit.run(1)
            assert not mismatches(target.contents(), tiny.expected(rank, 2, weights))
            return report

        return Part(source.name, act, source=source, target=target, replica="both", replica_size=2)

    made = Job(
        store_url, Expect(2, 1), name=f"pieces{direct_run_bytes}", policy=Policy(direct_run_bytes=direct_run_bytes)
    )
    reports = made.run([part(0), part(1)])
    all_succeeded(reports)
    whole = (digest_array(name, tensor.view(torch.int16).numpy()) for name, tensor in weights.items())
    assert {report.digest for report in reports.values()} == {sum(whole, Digest()).hex()}
    assert {report.digested_by for report in reports.values()} == {"torch"}
