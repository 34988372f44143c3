"""The CUDA runtime that torch uses: found among what is loaded, made visible to everything that is loaded later."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from weft.errors import PluginError

_VERSIONS_PER_MAJOR = 1000
"""`cudaRuntimeGetVersion` gives 12080 for 12.8: thousands are the major version."""


@dataclass(frozen=True, slots=True)
class CudaRuntime:
    """A loaded CUDA runtime."""

    path: str
    library: ctypes.CDLL
    shadow: str
    """Another library that answers `cudaMalloc` for libraries loaded from now on, since it came first; empty if none
    does. This package calls `library` in any case.
    """

    def address(self, function: str) -> int:
        """Where a function of the runtime is."""
        return address_of(self.library, function)


def mapped_runtimes(maps: str, major: int) -> list[str]:
    """Paths of CUDA runtimes of a major version in the text of `/proc/self/maps`, in order.

    Wheels rename the library (`libcudart-<hash>.so.12`); stubs are called otherwise (`libcudart_stub.so`) and left out.
    """
    name = re.compile(rf".*/libcudart(-[0-9a-f]+)?\.so\.{major}(\.\d+)*")
    paths = [line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6]
    return list(dict.fromkeys(path for path in paths if name.fullmatch(path)))


def candidates(cuda: str, maps: str) -> Sequence[str]:
    """What may be torch's runtime, best first; `cuda` is `torch.version.cuda`, such as `"12.8"`."""
    major = int(cuda.split(".")[0])
    return [*mapped_runtimes(maps, major), f"libcudart.so.{major}"]


def load_runtime() -> CudaRuntime:
    """Load the CUDA runtime of this torch globally: libraries loaded later find its functions, not those of a stub.

    Call it as early as possible where such stubs are about; calling it again is harmless. Raises `PluginError` with
    every library that was tried: one that does not load, is a stub, or is of another major version than torch's; and
    for a torch without CUDA.
    """
    if torch.version.cuda is None:
        raise PluginError(f"torch {torch.__version__} is built without CUDA: install a build with it")
    return load_first(torch.version.cuda, candidates(torch.version.cuda, Path("/proc/self/maps").read_text()))


def load_first(cuda: str, paths: Sequence[str]) -> CudaRuntime:
    """The first of these libraries that is a runtime of CUDA `cuda` (such as `"12.8"`), loaded globally."""
    reasons = []
    for path in paths:
        try:
            fault = _fault(ctypes.CDLL(path), int(cuda.split(".")[0]))
        except (OSError, AttributeError) as error:
            fault = str(error)
        if not fault:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)  # not sooner: what is refused stays invisible
            return CudaRuntime(path, library, _shadow(library))
        reasons.append(f"{path}: {fault}")
    raise PluginError(
        f"the runtime of CUDA {cuda}, which torch was built for, is not found: {'; '.join(reasons)}. Install torch's "
        "own dependencies (pip install --force-reinstall torch), or add the folder of libcudart to LD_LIBRARY_PATH"
    )


def address_of(library: ctypes.CDLL, function: str) -> int:
    """Address of a function of a library. Raises `AttributeError` if it has none of that name."""
    address = ctypes.cast(getattr(library, function), ctypes.c_void_p).value
    assert address is not None
    return address


def _fault(library: ctypes.CDLL, major: int) -> str:
    version = ctypes.c_int(0)
    code = library.cudaRuntimeGetVersion(ctypes.byref(version))
    if code:
        return f"cudaRuntimeGetVersion fails with {code}, as a stub's does"
    found = version.value // _VERSIONS_PER_MAJOR
    return "" if found == major else f"it is of CUDA {found}"


class _SymbolInfo(ctypes.Structure):
    """`Dl_info` of glibc's `dlfcn.h`."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _shadow(library: ctypes.CDLL) -> str:
    everything = ctypes.CDLL(None)
    address = address_of(everything, "cudaMalloc")  # what the next library to be loaded gets
    if address == address_of(library, "cudaMalloc"):
        return ""
    found = _SymbolInfo()
    everything.dladdr(ctypes.c_void_p(address), ctypes.byref(found))
    return os.fsdecode(found.file or b"an unnamed library")
