"""The pages of the documentation that need nothing but weft-core work as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[3] / "docs"


@pytest.mark.parametrize(
    "page",
    [
        "getting-started.md",
        "guide/fleets.md",
        "guide/install.md",
        "guide/plans.md",
        "guide/published.md",
        "guide/security.md",
    ],
)
def test_every_block_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks, f"{page} has no blocks to run"
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
