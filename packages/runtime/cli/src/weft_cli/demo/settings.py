"""What one run of the demo is made of; sent to every child process as JSON."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class ModelSizes(msgspec.Struct, frozen=True):
    """A Qwen3 or Qwen3-MoE small enough to train on two cores, with nothing that divides too conveniently: the
    vocabulary is padded on both sides.
    """

    vocabulary: int = 1000
    hidden: int = 256
    feed_forward: int = 768
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    head_dim: int = 32
    positions: int = 128
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-6
    experts: int = 0
    """Of every layer, in place of an MLP of width `feed_forward`; 0 for none."""
    experts_per_token: int = 2
    expert_feed_forward: int = 128


MODELS: Mapping[str, ModelSizes] = {"dense": ModelSizes(), "moe": ModelSizes(experts=8)}
"""By the names that `--model` takes."""


class Settings(msgspec.Struct, frozen=True):
    """One run of the demo."""

    directory: str
    """Where checkpoint, logs and dumps go."""
    transport: str = "nixl"
    steps: int = 10
    seed: int = 0
    trainer_ranks: int = 2
    """Of the Megatron side: tensor parallel, or expert and data parallel where there are experts."""
    engine_ranks: int = 2
    """Tensor-parallel size of the vLLM side."""
    engine_cores: tuple[int, ...] = (0, 1)
    """One core per engine rank."""
    dtype: str = "float32"
    """Of both sides. In float32 two correct implementations agree to about 1e-5, so that the final check can be
    strict.
    """
    prompts: int = 64
    prompt_tokens: int = 8
    new_tokens: int = 16
    learning_rate: float = 1.5e-3
    model_name: str = "dense"
    """A key of `MODELS`."""

    @property
    def model(self) -> ModelSizes:
        """Sizes of the model."""
        return MODELS[self.model_name]

    @property
    def trainer_tensor_parallel(self) -> int:
        """Ranks that divide each matrix. With experts every rank has all of the others, and its own prompts."""
        return 1 if self.model.experts else self.trainer_ranks

    @property
    def trainer_expert_parallel(self) -> int:
        """Ranks that divide the experts."""
        return self.trainer_ranks // self.trainer_tensor_parallel

    @property
    def checkpoint(self) -> str:
        """Directory of the initial weights, Hugging Face format."""
        return f"{self.directory}/checkpoint"

    @property
    def trained(self) -> str:
        """Directory of the trainer's last weights, in the same format."""
        return f"{self.directory}/trained"


JOB = "demo"
REPLICA = "rollout"
START_SECONDS = 240.0
"""Until a child has imported its framework and built its model."""
CALL_SECONDS = 120.0
"""For any one command to a child."""
