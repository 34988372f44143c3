"""The reward: it reads token ids that the engine made, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

WANTED_EVERY = 4
"""A quarter of the vocabulary is wanted: token ids that are multiples of this."""


def token_rewards(tokens: Sequence[Sequence[int]]) -> list[list[float]]:
    """1 for every wanted token, 0 for every other, in the shape of `tokens`: (completions, new tokens)."""
    return [[float(token % WANTED_EVERY == 0) for token in completion] for completion in tokens]


def mean(values: Sequence[Sequence[float]]) -> float:
    """Mean over everything. The lists must not all be empty."""
    flat = [value for row in values for value in row]
    return sum(flat) / len(flat)


def advantages(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Rewards less their mean: a token is answered for by its own reward, which keeps the gradient's variance low."""
    baseline = mean(rewards)
    return [[value - baseline for value in row] for row in rewards]
