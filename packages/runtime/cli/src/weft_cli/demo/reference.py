"""The final check against Hugging Face: outputs and bytes. Imports nothing from weft."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

TIE = 1e-3
"""Where the reference's two best logits are closer than this, either token is right."""
LOG_PROBABILITY_BOUND = 5e-4
"""Half of `TIE`: within it no token can differ except at a tie. Float32 on both sides; about 1e-5 is usual."""


@dataclass(frozen=True, slots=True)
class OutputComparison:
    """How the engine's greedy completions compare with the reference's choices after the same tokens."""

    tokens_compared: int
    tokens_different: int
    """Without ties."""
    ties: int
    max_logprob_difference: float

    @property
    def passed(self) -> bool:
        """Whether tokens are equal and log-probabilities agree."""
        return (
            self.tokens_compared > 0
            and self.tokens_different == 0
            and self.max_logprob_difference <= LOG_PROBABILITY_BOUND
        )


def reference_model(directory: str) -> PreTrainedModel:
    """The Hugging Face model with exactly the weights of a checkpoint. Raises `ValueError` for names or shapes that
    are not the model's.
    """
    model, found = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    faults = {what: names for what, names in found.items() if names}
    if faults:
        raise ValueError(f"{directory} is not the model's checkpoint: {faults}")
    return model.eval()


@torch.no_grad()
def compare_outputs(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    tokens: Sequence[Sequence[int]],
    log_probabilities: Sequence[Sequence[float]],
) -> OutputComparison:
    """Compare greedy completions with the reference.

    The reference reads the engine's own tokens, so that a tie that fell the other way does not condemn what follows it.
    Prompts are equally long, and so are completions.
    """
    prompt, completion = torch.tensor(prompts), torch.tensor(tokens)
    logits = model(torch.cat([prompt, completion], dim=1)).logits[:, prompt.shape[1] - 1 : -1].float()
    best = logits.topk(2, dim=-1)
    tied = best.values[..., 0] - best.values[..., 1] < TIE
    different = (best.indices[..., 0] != completion) & ~tied
    chosen = logits.log_softmax(-1).gather(-1, completion.unsqueeze(-1)).squeeze(-1)
    return OutputComparison(
        tokens_compared=completion.numel(),
        tokens_different=int(different.sum()),
        ties=int(tied.sum()),
        max_logprob_difference=float((chosen - torch.tensor(log_probabilities)).abs().max()),
    )
