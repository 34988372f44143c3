"""The compiled functions of `pool.c`, bound to a CUDA runtime."""

from __future__ import annotations

import ctypes
from pathlib import Path

from weft.errors import PluginError
from weft_cudamalloc.runtime import CudaRuntime

OBJECT = Path(__file__).with_name("libpool.so")
"""What `build_hook.py` makes of `pool.c`."""
ALLOCATE, RELEASE = "weft_allocate", "weft_release"
"""Its functions with the signatures that `torch.cuda.memory.CUDAPluggableAllocator` asks for."""


class _Functions(ctypes.Structure):
    """`struct runtime` of `pool.c`."""

    _fields_ = tuple(
        (name, ctypes.c_void_p) for name in ("allocate", "release", "get_device", "set_device", "take_error")
    )


def bind(runtime: CudaRuntime, path: Path = OBJECT) -> ctypes.CDLL:
    """Load the functions and tell them which runtime to call. Raises `PluginError` when they have not been compiled."""
    if not path.is_file():
        raise PluginError(
            f"{path} is missing: weft-cudamalloc was not built here; pip install it again on a machine with a C "
            "compiler, or run packages/allocators/cudamalloc/compile_pool.py"
        )
    library = ctypes.CDLL(str(path))
    names = ("cudaMalloc", "cudaFree", "cudaGetDevice", "cudaSetDevice", "cudaGetLastError")
    library.weft_use_runtime(ctypes.byref(_Functions(*(runtime.address(name) for name in names))))
    return library
