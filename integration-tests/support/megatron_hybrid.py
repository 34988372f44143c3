"""Megatron-Core's hybrids of Mamba, attention, MLPs and experts, from Hugging Face configs, on CPU.

What runs is `MambaModel` with its own `MambaMixer`; Triton kernels, which need a GPU, are answered in torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from weft_cli.demo import megatron_on_cpu

Config = Mapping[str, Any]
LETTERS = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}


def hybrid_config(config: Config, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's configuration of a Nemotron-H, for the groups that exist in this process."""
    experts: dict[str, Any] = {}
    if "moe" in config["layers_block_type"]:
        experts = {
            "num_moe_experts": config["n_routed_experts"],
            "moe_ffn_hidden_size": config["moe_intermediate_size"],
            "moe_shared_expert_intermediate_size": config["moe_shared_expert_intermediate_size"],
            "moe_router_topk": config["num_experts_per_tok"],
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
            **megatron_on_cpu.experts_on_cpu(),
        }
    named = dict(config) | {"num_hidden_layers": len(config["layers_block_type"])}
    return megatron_on_cpu.transformer_config(
        named | {"rms_norm_eps": config["layer_norm_epsilon"]},
        dtype,
        activation_func=squared_relu,
        gated_linear_unit=False,
        mamba_num_heads=config["mamba_num_heads"],
        mamba_head_dim=config["mamba_head_dim"],
        mamba_num_groups=config["n_groups"],
        mamba_state_dim=config["ssm_state_size"],
        use_mamba_mem_eff_path=False,
        **experts,
    )


def build_hybrid(config: Config, *, padded_vocabulary: int, dtype: torch.dtype = torch.float32) -> MambaModel:
    """This rank's part of the model. Collective: `parallel_state` is set up already."""
    pp = parallel_state.get_pipeline_model_parallel_rank()
    return MambaModel(
        hybrid_config(config, dtype),
        _stack(),
        vocab_size=padded_vocabulary,
        max_sequence_length=config["max_position_embeddings"],
        pre_process=pp == 0,
        post_process=pp == parallel_state.get_pipeline_model_parallel_world_size() - 1,
        hybrid_override_pattern="".join(LETTERS[kind] for kind in config["layers_block_type"]),
        parallel_output=False,
    )


def _stack() -> ModuleSpec:
    """As `mamba_stack_spec`, which needs Transformer Engine."""
    # The mixer asks for Triton when it is imported, for what it does with packed sequences.
    packed = ModuleType("megatron.core.inference.contexts.attention_context.triton.tensor_ops")
    for name in ("tensor_get_slice_after", "tensor_masked_update", "tensor_merge"):
        setattr(packed, name, None)
    sys.modules.setdefault(packed.__name__, packed)
    from megatron.core.ssm import mamba_block, mamba_layer, mamba_mixer, mlp_layer  # noqa: PLC0415 - see above

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.ExtendedRMSNorm = GatedNorm
    mamba_mixer.mamba_chunk_scan_combined = scan
    mamba_block.TENorm = WrappedTorchNorm
    mixer = mamba_mixer.MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear, core_attention=DotProductAttention, linear_proj=RowParallelLinear
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layers = mamba_block.MambaStackSubmodules(
        mamba_layer=ModuleSpec(
            module=mamba_layer.MambaLayer,
            submodules=mamba_layer.MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=ModuleSpec(module=mamba_mixer.MambaMixer, submodules=mixer),
                mamba_bda=get_bias_dropout_add,
            ),
        ),
        attention_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                ),
                self_attn_bda=get_bias_dropout_add,
            ),
        ),
        mlp_layer=ModuleSpec(
            module=mlp_layer.MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=ModuleSpec(module=MLP, submodules=mlp),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=get_moe_module_spec(use_te=False, num_experts=1, moe_grouped_gemm=False),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    )
    return ModuleSpec(module=mamba_block.MambaStack, submodules=layers)


class GatedNorm(torch.nn.Module):
    """`RMSNorm` of `mamba_ssm/ops/triton/layernorm_gated.py`, behind the gate."""

    def __init__(self, size: int, eps: float, group_size: int, dtype: torch.dtype, **_: Any) -> None:
        super().__init__()
        self.weight, self.eps, self.group_size = torch.nn.Parameter(torch.ones(size, dtype=dtype)), eps, group_size

    def forward(self, values: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        groups = (values * torch.nn.functional.silu(gate)).unflatten(-1, (-1, self.group_size))
        return torch.nn.functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * self.weight


def scan(
    values: torch.Tensor,
    steps: torch.Tensor,
    rates: torch.Tensor,
    write: torch.Tensor,
    read: torch.Tensor,
    chunk: int,
    *,
    D: torch.Tensor,
    dt_bias: torch.Tensor,
    **_: Any,
) -> torch.Tensor:
    """`mamba_chunk_scan_combined`, step by step.

    `values` are (batch, length, heads, elements), `steps` (batch, length, heads), `rates` (heads,), `write` and `read`
    (batch, length, groups, state).
    """
    steps = torch.nn.functional.softplus(steps + dt_bias)
    per_group = values.shape[2] // write.shape[2]
    write, read = (each.repeat_interleave(per_group, 2) for each in (write, read))
    state = values.new_zeros(*values.shape[:1], *values.shape[2:], write.shape[-1])
    found = []
    for value, step, into, out in zip(*(each.unbind(1) for each in (values, steps, write, read)), strict=True):
        added = (step[..., None] * value)[..., None] * into[:, :, None]
        state = state * (step * rates).exp()[..., None, None] + added
        found.append((state * out[:, :, None]).sum(-1) + D[:, None] * value)
    return torch.stack(found, 1)
