"""Layouts of Megatron-Core ranks from a config and parallel sizes alone; Megatron-Core need not be installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weft.errors import ConfigError, NotSupportedError
from weft.layout import Layout
from weft_megatron.configs import read_config
from weft_megatron.family import DecoderModel
from weft_megatron.mesh import AXES, DEFAULT_ORDER, Mesh, padded_vocabulary
from weft_megatron.mlp_rows import EXPERT_BIAS
from weft_megatron.parameters import Part, Stage, parameters
from weft_megatron.placement import layout_of
from weft_megatron.rows import Spec
from weft_megatron.stages import Pipeline, Share


def megatron_layout(
    hf_config: Mapping[str, Any], parallel: Mapping[str, int], rank: int, dtype: str = "bfloat16"
) -> Layout:
    """The layout of one rank of a job with Megatron's defaults: `MegatronAdapter.layout`."""
    return MegatronAdapter().layout(hf_config, parallel, rank, dtype)


@dataclass(frozen=True, slots=True)
class MegatronAdapter:
    """The analytic side of weft-megatron (`weft.contracts.Adapter`), with Megatron's defaults."""

    axes: tuple[str, ...] = AXES
    order: str = DEFAULT_ORDER
    """Rank order, as in `initialize_model_parallel(order=...)`."""
    make_vocab_size_divisible_by: int = 128
    """As Megatron-LM's flag: rows of the embedding are padded to a multiple of this times tp."""
    spec: Spec = Spec.LOCAL
    norm_dtype: str | None = None
    """Dtype of norm weights where it differs, such as `float32` for a bfloat16 model outside `Float16Module`."""
    pipeline_layout: str | None = None
    """As `pipeline_model_parallel_layout`: what each chunk of each stage holds, such as `Et*3|(tt|)*29,m|L`."""
    account_for_embedding_in_pipeline_split: bool = False
    account_for_loss_in_pipeline_split: bool = False

    def world_size(self, parallel: Mapping[str, int]) -> int:
        """Number of ranks, `tp·pp·cp·dp`. Raises `ConfigError` for sizes that do not factor, naming them."""
        return Mesh.from_sizes(parallel, self.order).world

    def replicas(self, parallel: Mapping[str, int]) -> int:
        """One: data-parallel ranks of a Megatron job run in lock step, so all of them serve one version."""
        self.world_size(parallel)
        return 1

    def layouts(self, config: Mapping[str, Any], parallel: Mapping[str, int], dtype: str) -> Sequence[Layout]:
        """The layout of every rank in rank order; ranks that hold the same share one object.

        `config` is a Hugging Face config, `dtype` the dtype of the parameters, such as `bfloat16`. Raises `ConfigError`
        for sizes that do not fit and `NotSupportedError` for a family or an axis that is not mapped.
        """
        model, stages = self._stages(config, parallel)
        built = {stage: self._layout(model, stage, dtype) for stage in dict.fromkeys(stages)}
        return [built[stage] for stage in stages]

    def layout(self, config: Mapping[str, Any], parallel: Mapping[str, int], rank: int, dtype: str) -> Layout:
        """The layout of one rank. Raises what `layouts` raises, and `ConfigError` for a rank that is not there."""
        model, stages = self._stages(config, parallel)
        if not 0 <= rank < len(stages):
            raise ConfigError(f"rank {rank} of a megatron job: it has ranks 0 to {len(stages) - 1}")
        return self._layout(model, stages[rank], dtype)

    def _stages(self, config: Mapping[str, Any], parallel: Mapping[str, int]) -> tuple[DecoderModel, list[Stage]]:
        """What every rank holds."""
        mesh = Mesh.from_sizes(parallel, self.order)
        model = read_config(config).predicting(mesh.mtp)
        if mesh.ep > 1 and model.experts is None:
            raise NotSupportedError(f"ep={mesh.ep}: {model.family} of this config has no experts to divide")
        padded = padded_vocabulary(model.vocabulary, self.make_vocab_size_divisible_by, mesh.tp)
        shares = self._pipeline(mesh).deal(model.layers, model.predictors)
        return model, [_stage(mesh, model, shares, rank, padded) for rank in range(mesh.world)]

    def _pipeline(self, mesh: Mesh) -> Pipeline:
        return Pipeline(
            mesh.pp,
            mesh.vpp,
            mesh.first,
            mesh.last,
            self.account_for_embedding_in_pipeline_split,
            self.account_for_loss_in_pipeline_split,
            self.pipeline_layout,
        )

    def _layout(self, model: DecoderModel, stage: Stage, dtype: str) -> Layout:
        held = parameters(model, stage, self.spec)
        return layout_of(model, stage, held, {parameter.name: self._dtype(parameter.name, dtype) for parameter in held})

    def _dtype(self, name: str, dtype: str) -> str:
        if name.endswith(EXPERT_BIAS):
            return "float32"
        return self.norm_dtype or dtype if starts_in_float32(name) else dtype


def _stage(mesh: Mesh, model: DecoderModel, shares: Sequence[Share], rank: int, padded: int) -> Stage:
    """What a rank holds; equal for ranks that differ in data and context parallelism only."""
    at = mesh.coordinates(rank)
    share = shares[at.pp]
    predictors = tuple(range(model.layers, model.layers + model.predictors)) if share.predictors else ()
    return Stage(
        tensor=Part(at.tp, mesh.tp),
        layers=share.layers + predictors,
        first=share.first,
        last=share.last,
        padded_vocabulary=padded,
        experts=Part(at.ep, mesh.ep) if model.experts else Part(),
        expert_tensor=Part(at.etp, mesh.etp) if model.experts else Part(),
    )


def starts_in_float32(name: str) -> bool:
    """Whether Megatron makes a parameter in float32 whatever the model is, by its name: norms, Mamba's rates and skips.

    Not so the norm behind the state of Mamba.
    """
    return name.endswith(("norm.weight", "layer_norm_weight", *_MAMBA_IN_FLOAT32)) and not name.endswith(_MAMBA_NORM)


_MAMBA_IN_FLOAT32, _MAMBA_NORM = (".mixer.A_log", ".mixer.D"), ".mixer.norm.weight"
