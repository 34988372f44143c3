"""Finding the CUDA runtime, and loading it beside stubs of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from weft.errors import PluginError
from weft_cudamalloc import load_runtime
from weft_cudamalloc.runtime import candidates, load_first, mapped_runtimes

MAPS = """\
7f00-7f10 r--p 00000000 08:01 11 /usr/lib/libc.so.6
7f10-7f20 r-xp 00000000 08:01 12 /site/tilelang/lib/libcudart_stub.so
7f20-7f30 r-xp 00000000 08:01 13 /site/nvidia/cuda runtime/lib/libcudart.so.12
7f30-7f40 r--p 00000000 08:01 13 /site/nvidia/cuda runtime/lib/libcudart.so.12
7f40-7f50 r--p 00000000 08:01 14 /site/torch/lib/libcudart-9335f6a2.so.12.8.57
7f50-7f60 rw-p 00000000 00:00 0
7f60-7f70 r-xp 00000000 08:01 15 /usr/local/cuda/lib64/libcudart.so.13.0.48
7f70-7f80 r-xp 00000000 08:01 16 /opt/libcudart.so.123
"""


def test_runtimes_of_the_right_version_are_found_and_stubs_are_not() -> None:
    assert mapped_runtimes(MAPS, 12) == [
        "/site/nvidia/cuda runtime/lib/libcudart.so.12",
        "/site/torch/lib/libcudart-9335f6a2.so.12.8.57",
    ]
    assert mapped_runtimes(MAPS, 13) == ["/usr/local/cuda/lib64/libcudart.so.13.0.48"]
    assert candidates("13.0", MAPS) == ["/usr/local/cuda/lib64/libcudart.so.13.0.48", "libcudart.so.13"]
    assert candidates("12.8", "") == ["libcudart.so.12"]


def test_everything_that_is_no_runtime_of_this_version_is_named(compile_library, tmp_path: Path) -> None:
    stub = compile_library("libcudart.so.13", "imitation.c", STUB=1)
    older = compile_library("libcudart.so.12", "imitation.c", VERSION=12080)
    other = compile_library("libother.so", "nothing.c")
    absent = tmp_path / "libcudart.so.13"
    with pytest.raises(PluginError, match=r"runtime of CUDA 13\.0") as caught:
        load_first("13.0", [str(stub), str(older), str(other), str(absent)])
    words = str(caught.value)
    for part in (f"{stub}: cudaRuntimeGetVersion fails with 34", f"{older}: it is of CUDA 12", str(other), str(absent)):
        assert part in words
    assert f"{other}: undefined symbol: cudaRuntimeGetVersion" in words


def test_a_torch_without_cuda_has_no_runtime() -> None:
    with pytest.raises(PluginError, match="built without CUDA"):
        load_runtime()


ORDER = """
import ctypes, json, sys
from weft_cudamalloc.native import bind
from weft_cudamalloc.runtime import load_first
stub, runtime, user, first = sys.argv[1:]
if first == "stub":
    ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
found = load_first("13.0", [stub, runtime])
if first == "runtime":
    ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
pool = bind(found)
pool.weft_allocate.restype = ctypes.c_void_p
gave = pool.weft_allocate(ctypes.c_size_t(8), 2, None)
live = list((ctypes.c_int * 4).in_dll(found.library, "live"))
print(json.dumps([found.path, found.shadow, bool(gave), live, ctypes.CDLL(user).use()]))
"""


@pytest.mark.parametrize("first", ["runtime", "stub"])
def test_whoever_is_loaded_first_answers_other_libraries_and_the_pool_calls_the_runtime(
    compile_library, first: str
) -> None:
    stub = compile_library("libcudart_stub.so", "imitation.c", STUB=1)
    runtime = compile_library("libcudart.so.13", "imitation.c")
    user = compile_library("libuser.so", "user.c")
    arguments = [str(stub), str(runtime), str(user), first]
    done = subprocess.run(
        [sys.executable, "-c", ORDER, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    path, shadow, gave, live, used = json.loads(done.stdout)
    assert path == str(runtime)
    assert gave
    assert live == [0, 0, 1, 0]
    if first == "runtime":
        assert (shadow, used) == ("", 0)
    else:
        assert (shadow, used) == (str(stub), 34)
