"""Pools on a GPU, under expandable segments. Each test is a process of its own: torch reads its settings once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.trap(30)]

BEGINNING = """
import json, threading, torch, weft_cudamalloc
from weft.errors import WeftError

def expandable(tensor):
    address = tensor.data_ptr()
    (found,) = [s for s in torch.cuda.memory_snapshot() if s["address"] <= address < s["address"] + s["total_size"]]
    return bool(found["is_expandable"])
"""


@pytest.fixture(autouse=True)
def _cuda() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")


def on_gpu(program: str) -> Any:
    """What a program prints as JSON, run under expandable segments."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTORCH_ALLOC_CONF"}
    environment["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    done = subprocess.run(
        [sys.executable, "-c", BEGINNING + program], capture_output=True, text=True, timeout=300, check=False,
        env=environment,
    )  # fmt: skip
    if "NotSupportedError" in done.stderr:
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_memory_of_a_pool_is_in_no_expandable_segment_and_all_other_memory_is() -> None:
    found = on_gpu("""
before = torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
with weft_cudamalloc.pool() as held:
    small, large = (torch.full((n,), 7, dtype=torch.uint8, device="cuda") for n in (100, 100 << 20))
after = torch.zeros(4 << 20, dtype=torch.uint8, device="cuda")
right = bool((small == 7).all() and (large == 7).all())
print(json.dumps([[expandable(t) for t in (before, small, large, after)], right, held.active, held.reserved_bytes()]))
""")
    assert found[:3] == [[True, False, False, True], True, True]
    assert found[3] >= 100 << 20


def test_memory_goes_back_to_the_device() -> None:
    found = on_gpu("""
torch.zeros(1, device="cuda")
def free(): torch.cuda.synchronize(); return torch.cuda.mem_get_info()[0]
held = weft_cudamalloc.pool()
start = free()
with held:
    weights = torch.ones(512 << 20, dtype=torch.uint8, device="cuda")
used = free()
del held
torch.cuda.empty_cache()
kept = free(), int(weights[-1])
del weights
torch.cuda.empty_cache()
print(json.dumps([start, used, kept, free()]))
""")
    start, used, (kept, last), end = found
    assert start - used >= 500 << 20
    assert used + (64 << 20) > kept
    assert last == 1
    assert end - used >= 500 << 20


def test_threads_and_freed_tensors_do_not_block_one_another() -> None:
    assert on_gpu("""
def work():
    with weft_cudamalloc.pool():
        for n in range(200):
            tensor = torch.ones((n + 1) << 16, dtype=torch.uint8, device="cuda")
            del tensor
threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join(120)
print(json.dumps(not any(thread.is_alive() for thread in threads)))
""")


def test_running_out_of_memory_is_torchs_own_error_and_harms_nothing() -> None:
    assert on_gpu("""
with weft_cudamalloc.pool():
    try:
        torch.empty(1 << 45, dtype=torch.uint8, device="cuda")
        said = "nothing"
    except torch.OutOfMemoryError:
        said = "out of memory"
    sum_after = int(torch.ones(10, device="cuda").sum())
print(json.dumps([said, sum_after]))
""") == ["out of memory", 10]


def test_every_device_has_its_own_pool() -> None:
    devices = torch.cuda.device_count()
    if devices == 1:
        pytest.skip("one CUDA device")
    found = on_gpu("""
import contextlib
with contextlib.ExitStack() as entered:
    for n in range(torch.cuda.device_count()): entered.enter_context(weft_cudamalloc.pool(n))
    tensors = [torch.zeros(1 << 20, device=f"cuda:{n}") for n in reversed(range(torch.cuda.device_count()))]
print(json.dumps([torch.cuda.current_device(), [[t.device.index, expandable(t)] for t in tensors]]))
""")
    assert found == [0, [[n, False] for n in reversed(range(devices))]]


def test_registration_takes_pool_memory_and_refuses_other_memory_by_name() -> None:
    pytest.importorskip("weft_nixl")
    found = on_gpu("""
from weft.deadline import Deadline
from weft.member import Member, Region
from weft.plugins import load
transport = load("weft.transports", "nixl")({})
transport.open(Member("a", None, None, None, 0, "here", "here", "cuda:0"))
with weft_cudamalloc.pool():
    good = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
bad = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
transport.register(Region("good", good), Deadline.after(60))
try:
    transport.register(Region("bad", bad), Deadline.after(60))
    said = "nothing"
except WeftError as error:
    said = str(error)
transport.close()
print(json.dumps(said))
""")
    assert "'bad'" in found
    assert "weft_cudamalloc.pool" in found
