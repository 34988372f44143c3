"""One backward pass of the demo's policy on every trainer rank, against Hugging Face's; runs in spawned processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from support.megatron_model import end_job, start_job

from weft_cli.demo.gather import gather_state
from weft_cli.demo.megatron_slices import Cut
from weft_cli.demo.policy import Trainer, make_policy, padded_vocabulary
from weft_cli.demo.settings import Settings


def step(
    rank: int,
    world: int,
    rendezvous: str,
    settings: Settings,
    sequences: list[list[int]],
    advantages: list[list[float]],
) -> tuple[float, dict[str, float], bool]:
    """The loss; how far each gradient of this rank is from its part of the gradients in `settings.trained`, relative to
    their largest element, padding left out; whether all ranks hold one model after the optimizer's step.
    """
    start_job(
        rank,
        world,
        rendezvous,
        tensor_model_parallel_size=settings.trainer_tensor_parallel,
        expert_model_parallel_size=settings.trainer_expert_parallel,
    )
    try:
        config = json.loads(Path(settings.checkpoint, "config.json").read_text())
        model = make_policy(config, load_file(f"{settings.checkpoint}/model.safetensors"), torch.float32)
        loss = Trainer(model, settings).step(torch.tensor(sequences), torch.tensor(advantages))
        tp = parallel_state.get_tensor_model_parallel_world_size()
        cut = Cut.here(config, padded_vocabulary(config["vocab_size"], tp), float("nan"))
        gradients = load_file(f"{settings.trained}/model.safetensors")
        apart = {}
        for name, parameter in model.named_parameters():
            expected = cut.parameter(name, gradients)
            difference = (parameter.grad - expected)[~expected.isnan()]
            apart[name] = float(difference.abs().max() / expected.nan_to_num().abs().max())
        state = gather_state(model, config)
        return loss, apart, len(state) == len(gradients)
    finally:
        end_job()
