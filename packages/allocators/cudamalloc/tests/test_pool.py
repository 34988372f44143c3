"""Pools where there is no CUDA, and what they do with what torch answers where there is."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import weft_cudamalloc
from weft.errors import ConfigError, NotSupportedError
from weft.plugins import load
from weft_cudamalloc import pools as module
from weft_cudamalloc.diagnosis import diagnose

needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")


@needs_no_cuda
def test_without_cuda_a_pool_does_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), weft_cudamalloc.pool() as held, held:
        made = torch.ones(8)
    assert made.sum() == 8
    assert not held.active
    assert held.device is None
    assert held.reserved_bytes() == 0
    assert held.reason in caplog.text
    assert "CUDA" in held.reason
    assert held.reason in repr(held)


def test_a_pool_is_on_a_cuda_device() -> None:
    with pytest.raises(ConfigError, match="not on cpu"):
        weft_cudamalloc.pool("cpu")


@needs_no_cuda
def test_the_allocator_of_the_entry_point_refuses_what_it_cannot_give() -> None:
    factory = load("weft.allocators", "cudamalloc")
    with pytest.raises(ConfigError, match=r"no memory on cuda:0: .*CUDA"):
        factory({}).allocate(8, torch.device("cuda:0"))
    with pytest.raises(ConfigError, match=r"not on cpu"):
        factory({}).allocate(8, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"no options, size are given"):
        factory({"size": 3})


@needs_no_cuda
def test_diagnosis_without_cuda_is_no_fault() -> None:
    (finding,) = diagnose(Path("/"))
    assert finding.state == "note"
    assert "is compiled" in finding.text


class ImitatedTorch:
    """As much of torch as a pool asks for: two devices, the second current, and a log of what happens where."""

    __version__ = "9.9"
    version = SimpleNamespace(cuda="13.0")
    uint8 = torch.uint8

    def __init__(self, expandable: bool = False, refusal: str = "") -> None:
        self.log: list[str] = []
        self.made_on: list[int] = []
        self._current, self._routed, self._expandable, self._refusal = 1, "", expandable, refusal
        self.cuda = SimpleNamespace(
            is_available=lambda: True, MemPool=self._make, use_mem_pool=self._route, device=self._make_current
        )

    @staticmethod
    def device(kind: Any, index: int | None = None) -> torch.device:
        return torch.device(kind) if index is None else torch.device(kind, index)

    def empty(self, numel: int, *, device: torch.device, dtype: torch.dtype | None = None) -> Any:
        where = torch.device("cuda", self._current if device.index is None else device.index)
        if numel and self._refusal:
            raise RuntimeError(self._refusal)
        if numel:
            self.log.append(f"{numel} on {where} from {self._routed or 'elsewhere'}")
        return SimpleNamespace(device=where)

    @contextmanager
    def _make_current(self, device: torch.device) -> Any:
        before, self._current = self._current, device.index
        yield
        self._current = before

    def _make(self, allocator: str) -> Any:
        assert allocator == "the allocator"
        self.made_on.append(self._current)
        segments = [{"total_size": 2 << 20, "is_expandable": self._expandable}]
        return SimpleNamespace(name=f"pool{self._current}", snapshot=lambda: segments)

    @contextmanager
    def _route(self, made: Any, device: torch.device) -> Any:
        before, self._routed = self._routed, f"{made.name} for {device}"
        try:
            yield
        finally:
            self._routed = before


def imitate(monkeypatch: pytest.MonkeyPatch, **arguments: Any) -> ImitatedTorch:
    torch_here = ImitatedTorch(**arguments)
    monkeypatch.setattr(module, "torch", torch_here)
    monkeypatch.setattr(module, "_allocator", lambda: SimpleNamespace(allocator=lambda: "the allocator"))
    return torch_here


def test_a_pool_is_made_and_entered_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = imitate(monkeypatch)
    pools = [weft_cudamalloc.pool(), weft_cudamalloc.pool(0), weft_cudamalloc.pool("cuda:1")]
    assert [held.device for held in pools] == [torch.device("cuda", index) for index in (1, 0, 1)]
    assert here.made_on == [1, 0, 1]
    assert here.log == ["1 on cuda:1 from pool1 for cuda:1", "1 on cuda:0 from pool0 for cuda:0", here.log[0]]
    assert pools[1].active
    assert pools[1].reserved_bytes() == 2 << 20
    here.log.clear()
    with pools[1], pools[0]:
        with pools[1]:
            here.empty(5, device=torch.device("cuda:0"))
        here.empty(6, device=torch.device("cuda:1"))
    here.empty(7, device=torch.device("cuda:0"))
    assert here.log == [
        "5 on cuda:0 from pool0 for cuda:0",
        "6 on cuda:1 from pool1 for cuda:1",
        "7 on cuda:0 from elsewhere",
    ]


def test_a_pool_is_left_when_what_was_in_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    here = imitate(monkeypatch)
    held = weft_cudamalloc.pool()
    with pytest.raises(ZeroDivisionError), held:
        raise ZeroDivisionError
    here.empty(7, device=torch.device("cuda"))
    assert here.log[-1] == "7 on cuda:1 from elsewhere"


@pytest.mark.trap(30)
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"expandable": True}, "its memory is in an expandable segment"),
        (
            {"refusal": "MemPool doesn't currently support expandable_segments.\nmore"},
            r"support expandable_segments\.\. ",
        ),
    ],
)
def test_a_torch_that_cannot_is_refused_with_its_own_words(
    monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], words: str
) -> None:
    imitate(monkeypatch, **arguments)
    with pytest.raises(NotSupportedError, match=rf"torch 9\.9 makes no cudaMalloc pool on cuda:1: .*{words}"):
        weft_cudamalloc.pool()


def test_other_errors_of_torch_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    imitate(monkeypatch, refusal="CUDA out of memory")
    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        weft_cudamalloc.pool()


def test_the_block_of_the_readme_runs(capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    exec(compile(block, "README.md", "exec"), {})
    assert capsys.readouterr().out.startswith("Pool(")


def test_the_allocator_keeps_one_pool_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here = imitate(monkeypatch)
    allocator = weft_cudamalloc.factory({})
    for nbytes, device in ((10, "cuda:0"), (11, "cuda:1"), (12, "cuda:0")):
        allocator.allocate(nbytes, torch.device(device))
    assert here.made_on == [0, 1]
    assert [line for line in here.log if not line.startswith("1 ")] == [
        "10 on cuda:0 from pool0 for cuda:0",
        "11 on cuda:1 from pool1 for cuda:1",
        "12 on cuda:0 from pool0 for cuda:0",
    ]


def test_a_stub_that_came_first_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    runtime = SimpleNamespace(shadow="/site/libcudart_stub.so", path="/cuda/libcudart.so.13")
    memory = SimpleNamespace(CUDAPluggableAllocator=lambda *names: names)
    monkeypatch.setattr(module, "load_runtime", lambda: runtime)
    monkeypatch.setattr(module, "bind", nullcontext)
    monkeypatch.setattr(module, "torch", SimpleNamespace(cuda=SimpleNamespace(memory=memory)))
    with caplog.at_level(logging.WARNING):
        names = module._allocator.__wrapped__()
    assert names == (str(module.OBJECT), "weft_allocate", "weft_release")
    assert "/site/libcudart_stub.so was loaded before the CUDA runtime /cuda/libcudart.so.13" in caplog.text


def test_importing_loads_no_cuda() -> None:
    program = "import weft_cudamalloc; print('libcudart' in open('/proc/self/maps').read().replace('libcudart_', ''))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    assert torch.cuda.is_available() or done.stdout == "False\n"
