"""The compiled functions, over an imitation of the CUDA runtime with four devices."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from weft.errors import PluginError
from weft_cudamalloc.native import ALLOCATE, OBJECT, RELEASE, bind
from weft_cudamalloc.runtime import CudaRuntime, load_first

TOO_MUCH = (1 << 20) + 1


class Bound:
    """`libpool.so` and the imitation that it calls."""

    def __init__(self, runtime: CudaRuntime) -> None:
        self.cuda = runtime.library
        library = bind(runtime)
        self._allocate, self._release = getattr(library, ALLOCATE), getattr(library, RELEASE)
        self._allocate.restype = ctypes.c_void_p
        self._allocate.argtypes = [ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
        self._release.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]

    def allocate(self, nbytes: int, device: int) -> int | None:
        return self._allocate(nbytes, device, None)

    def release(self, address: int | None) -> None:
        self._release(address, 8, 0, None)

    def live(self) -> list[int]:
        return list((ctypes.c_int * 4).in_dll(self.cuda, "live"))

    def current(self) -> int:
        device = ctypes.c_int(-1)
        self.cuda.cudaGetDevice(ctypes.byref(device))
        return device.value


@pytest.fixture(scope="module")
def bound(compile_library) -> Bound:
    return Bound(load_first("13.0", [str(compile_library("libcudart.so.13", "imitation.c"))]))


def test_memory_is_of_the_device_asked_for_and_the_current_one_stays(bound: Bound) -> None:
    bound.cuda.cudaSetDevice(1)
    held = [bound.allocate(64, device) for device in (3, 1, 3)]
    assert all(held)
    assert bound.live() == [0, 1, 0, 2]
    assert bound.current() == 1
    for address in held:
        bound.release(address)
    assert bound.live() == [0, 0, 0, 0]
    assert bound.current() == 1


@pytest.mark.parametrize(("nbytes", "device"), [(TOO_MUCH, 1), (TOO_MUCH, 2), (64, 9)])
def test_no_memory_is_null_and_leaves_neither_an_error_nor_another_device(
    bound: Bound, nbytes: int, device: int
) -> None:
    bound.cuda.cudaSetDevice(1)
    assert bound.allocate(nbytes, device) is None
    assert bound.cuda.cudaPeekAtLastError() == 0
    assert bound.current() == 1
    assert bound.live() == [0, 0, 0, 0]


def test_an_error_of_freeing_is_not_left_to_the_next_kernel(bound: Bound) -> None:
    bound.release(None)
    assert bound.cuda.cudaPeekAtLastError() == 0


def test_threads_have_their_own_current_device(bound: Bound) -> None:
    wrong: list[str] = []

    def work(device: int) -> None:
        bound.cuda.cudaSetDevice(device)
        for n in range(500):
            address = bound.allocate(64, (device + n) % 4)
            if address is None or bound.current() != device:
                wrong.append(f"thread {device}, step {n}")
            bound.release(address)

    threads = [threading.Thread(target=work, args=(device,)) for device in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not wrong
    assert bound.live() == [0, 0, 0, 0]


def test_it_is_linked_to_no_library() -> None:
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    dynamic = subprocess.run(["readelf", "-d", str(OBJECT)], capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["readelf", "--dyn-syms", str(OBJECT)], capture_output=True, text=True, check=True).stdout
    assert "Dynamic section" in dynamic
    assert "NEEDED" not in dynamic
    assert ALLOCATE in symbols
    assert [line for line in symbols.splitlines() if " UND " in line and line.split()[-1] != "UND"] == []


def test_a_missing_object_says_how_to_build_it(bound: Bound, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"libpool\.so is missing.*compile_pool\.py"):
        bind(CudaRuntime("", bound.cuda, ""), tmp_path / "libpool.so")
