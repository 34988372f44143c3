"""Makes checkpoints of one tiny model that all answer differently, and writes down what.

Run as `python -m vllm_engine.answers FOLDER COUNT` by `support.engine_company`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import torch
from vllm_engine.models import prompts, reference_tokens, save_checkpoint

PROMPTS, PROMPT_TOKENS = 2, 40
"""More than one block of the prefix cache."""


def asked() -> list[list[int]]:
    """The prompts."""
    return prompts(PROMPTS, PROMPT_TOKENS)


def main(arguments: Sequence[str]) -> None:
    """`FOLDER/0`, `FOLDER/1` … and `FOLDER/answers.json`, for `support.checkpoints`."""
    folder, count = Path(arguments[0]), int(arguments[1])
    options = {"family": "llama", "tied": False, "kv_heads": 2, "dtype": torch.float32}
    models = [save_checkpoint(folder / str(number), seed=number + 1, **options) for number in range(count)]
    answers = [reference_tokens(model, asked()) for model in models]
    assert all(one[0] != other[0] for one, other in combinations(answers, 2)), "two checkpoints answer the same"
    (folder / "answers.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1:])
