"""Imitations of the CUDA runtime, compiled for the tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent
Compile = Callable[..., Path]


@pytest.fixture(scope="session")
def compile_library(tmp_path_factory: pytest.TempPathFactory) -> Compile:
    """Compiles a library: `compile_library("libcudart.so.13", "imitation.c", VERSION=12080)`."""
    if shutil.which("cc") is None:
        pytest.skip("no C compiler (cc) to make an imitation of the CUDA runtime with")

    def compile_one(name: str, source: str, **definitions: int) -> Path:
        made = tmp_path_factory.mktemp("library") / name
        flags = [f"-D{key}={value}" for key, value in definitions.items()]
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-Wl,-Bsymbolic", *flags, "-o", str(made), str(HERE / source)], check=True
        )
        return made

    return compile_one
