"""Facts: what a member runs on, as far as weights may depend on it. For people and for choosing; nothing is refused."""

from __future__ import annotations

import platform
from importlib import metadata

import msgspec
import torch

from weft.contracts import OfFramework


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
    frameworks: dict[str, str] = {}
    """By name, such as `vllm`, the version of every framework whose weights the member has."""

    def __str__(self) -> str:
        """In one line, without what is not known."""
        named = {
            **self.frameworks, "weft": self.weft, "torch": self.torch, "CUDA": self.cuda, "GPU": self.architecture,
            "Python": self.python,
        }  # fmt: skip
        return ", ".join(f"{name} {version}" for name, version in named.items() if version)


def facts_of(device: torch.device, *sides: object) -> Facts:
    """What this process runs on. Its weights are on `device`, and those of `sides`: sources and targets, which may say
    whose they are (`weft.contracts.OfFramework`).

    Touches no GPU but the one that holds the weights already, and raises nothing.
    """
    try:
        weft = metadata.version("weft-core")
    except metadata.PackageNotFoundError:
        weft = ""
    return Facts(
        weft, platform.python_version(), str(torch.__version__), torch.version.cuda or "", _architecture(device),
        dict(side.framework for side in sides if isinstance(side, OfFramework)),
    )  # fmt: skip


def _architecture(device: torch.device) -> str:
    if device.type != "cuda" or torch.version.cuda is None:
        return ""
    try:
        major, minor = torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError):  # no driver, or none that this torch can use
        return ""
    return f"sm_{major}{minor}"
