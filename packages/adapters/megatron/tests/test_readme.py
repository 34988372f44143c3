"""The README's example that needs no Megatron-Core works as it stands."""

from __future__ import annotations

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_the_analytic_example_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    found: dict[str, object] = {}
    exec(blocks[1], found)
    assert len(found["layouts"]) == 8  # type: ignore[arg-type]
