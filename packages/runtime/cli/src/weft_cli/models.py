"""The model to plan for: a preset, a config.json, or a directory that holds one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from weft.errors import ConfigError


def presets() -> list[str]:
    """Names of the configurations that come with this package, sorted."""
    return sorted(
        entry.name.removesuffix(".json")
        for entry in files("weft_cli").joinpath("presets").iterdir()
        if entry.name.endswith(".json")
    )


def load_config(model: str) -> Mapping[str, Any]:
    """A Hugging Face config by preset name, file or checkpoint directory. Reads nothing from the network.

    Raises `ConfigError` when there is no such thing, or it is not a JSON object.
    """
    if model in presets():
        text = files("weft_cli").joinpath("presets", f"{model}.json").read_text()
    else:
        path = Path(model)
        path = path / "config.json" if path.is_dir() else path
        if not path.is_file():
            known = ", ".join(presets())
            raise ConfigError(
                f"model {model!r}: neither a preset ({known}), nor a config.json, nor a directory with one"
            )
        text = path.read_text()
    try:
        config = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"model {model!r}: its config is not JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model {model!r}: its config should be a JSON object, found {type(config).__name__}")
    return config
