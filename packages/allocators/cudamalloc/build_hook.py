"""Puts the compiled `libpool.so` into the wheel, or beside the sources of an editable install."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompilePool(BuildHookInterface[Any]):
    """Where CUDA can be. On other systems than Linux the wheel has none, and says at run time that it does nothing."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if sys.platform != "linux":
            return
        script = Path(self.root) / "compile_pool.py"
        if subprocess.run([sys.executable, str(script)], check=False).returncode:
            raise SystemExit(1)
        build_data["artifacts"].append("src/weft_cudamalloc/libpool.so")
        build_data["pure_python"] = False
        # It is linked to no libc, so every glibc does.
        build_data["tag"] = f"py3-none-manylinux_2_17_{platform.machine()}"
