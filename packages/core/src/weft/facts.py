"""Facts: what a member runs on, as far as weights may depend on it. For people and for choosing; nothing is refused."""

from __future__ import annotations

import platform
from importlib import metadata

import msgspec
import torch


class Facts(msgspec.Struct, frozen=True, array_like=True):
    """A member's environment. What is not known is empty. New fields go to the end, with defaults."""

    weft: str = ""
    """Version of weft-core."""
    python: str = ""
    torch: str = ""
    cuda: str = ""
    """That torch was built for."""
    architecture: str = ""
    """Of the GPU that holds the weights, such as `sm_90`; empty on CPU."""
    framework: str = ""
    """Whose weights they are, such as `vllm`."""
    framework_version: str = ""

    def __str__(self) -> str:
        """In one line, without what is not known."""
        named = {
            self.framework: self.framework_version, "weft": self.weft, "torch": self.torch, "CUDA": self.cuda,
            "GPU": self.architecture, "Python": self.python,
        }  # fmt: skip
        return ", ".join(
            f"{name} {found}".strip() for name, found in named.items() if name and (found or name == self.framework)
        )


def facts_of(device: torch.device, framework: tuple[str, str] = ("", "")) -> Facts:
    """What this process runs on; its weights are on `device`, and of a framework of this name and version.

    Touches no GPU but the one that holds weights already, and raises nothing.
    """
    try:
        weft = metadata.version("weft-core")
    except metadata.PackageNotFoundError:
        weft = ""
    return Facts(
        weft, platform.python_version(), str(torch.__version__), torch.version.cuda or "", _architecture(device),
        *framework,
    )  # fmt: skip


def _architecture(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):  # no driver, or torch without CUDA
        return ""
    return f"sm_{major}{minor}"
