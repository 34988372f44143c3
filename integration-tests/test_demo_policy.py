"""The demo's policy learns from the gradients that one process with the whole model and batch would compute."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.demo_gradients import step
from support.processes import run_ranks

from weft_cli.demo.checkpoint import write_checkpoint
from weft_cli.demo.policy import padded_vocabulary
from weft_cli.demo.reference import reference_model
from weft_cli.demo.settings import MODELS, Settings


def names_on_disk(name: str, gradient: torch.Tensor) -> dict[str, torch.Tensor]:
    """The parts of one of Hugging Face's gradients under the names of the checkpoint: it holds experts fused."""
    mlp, experts, kind = name.partition(".experts.")
    if not experts:
        return {name: gradient}
    parts = ("gate_proj", "up_proj") if kind == "gate_up_proj" else ("down_proj",)
    return {
        f"{mlp}.experts.{number}.{part}.weight": half.contiguous()
        for number, expert in enumerate(gradient)
        for part, half in zip(parts, expert.chunk(len(parts)), strict=True)
    }


@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_two_ranks_are_those_of_the_whole_batch(model: str, tmp_path: Path) -> None:
    settings = Settings(str(tmp_path), model_name=model)
    write_checkpoint(settings)
    generator = torch.Generator().manual_seed(1)
    sequences = torch.randint(0, settings.model.vocabulary, (6, settings.prompt_tokens + 5), generator=generator)
    advantages = torch.randn(6, 5, generator=generator)
    reference = reference_model(settings.checkpoint)
    ranks = settings.trainer_tensor_parallel
    padding = padded_vocabulary(settings.model.vocabulary, ranks) - settings.model.vocabulary
    # Megatron's loss counts the rows that pad the vocabulary, whose logits are zero here.
    logits = torch.nn.functional.pad(reference(sequences).logits[:, settings.prompt_tokens - 1 : -1], (0, padding))
    taken = logits.log_softmax(-1).gather(-1, sequences[:, settings.prompt_tokens :].unsqueeze(-1)).squeeze(-1)
    loss = -(advantages * taken).mean()
    loss.backward()
    gradients: dict[str, torch.Tensor] = {}
    for name, parameter in reference.named_parameters():
        gradients |= names_on_disk(name, parameter.grad)
    Path(settings.trained).mkdir()
    save_file(gradients, f"{settings.trained}/model.safetensors")
    arguments = (str(tmp_path / "ranks"), settings, sequences.tolist(), advantages.tolist())
    for found, apart, whole in run_ranks(step, settings.trainer_ranks, *arguments):
        assert abs(found - float(loss.detach())) < 1e-5
        assert max(apart.values()) < 1e-4, sorted(apart.items(), key=lambda item: item[1])[-3:]
        assert whole
