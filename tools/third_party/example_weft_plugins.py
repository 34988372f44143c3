"""A store of a third party. See pyproject.toml beside this."""

from __future__ import annotations

from typing import NoReturn


def open_example(url: str) -> NoReturn:
    raise NotImplementedError(f"an example of a plug-in opens nothing, not {url}")
