"""The cases that have names: the same bytes over different networks, in different pieces, through different staging."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from weft.errors import ConfigError
from weft.policy import Policy
from weft_cli.bench.settings import Case
from weft_cli.models import load_config
from weft_cli.sides import parse_side

STAGING_BYTES = 64 << 20
_EVERYTHING = 1 << 40
"""Bytes: longer than any run, so that all are packed."""
_UNLIMITED = 1 << 40
_SECONDS = 300.0
_SAMPLED = 8
"""One bucket in so many has a digest."""


def case_of(
    name: str, config: Mapping[str, Any], source: str, target: str, transport: str, policy: Policy, cycles: int,
    **more: Any,
) -> Case:  # fmt: skip
    """A case in bfloat16. `more` are further fields of `Case`."""
    held, wanted = parse_side(source), parse_side(target)
    return Case(
        name=name, config=dict(config), source=(held.framework, dict(held.parallel)),
        target=(wanted.framework, dict(wanted.parallel)), transport=transport, transport_options={}, policy=policy,
        cycles=cycles, dtype="bfloat16", seconds=_SECONDS, **more,
    )  # fmt: skip


def named_case(name: str, digests: bool, cycles: int, *, reuse: bool) -> Case:
    """Raises `ConfigError` with all names for one that is not there."""
    if name not in NAMED:
        raise ConfigError(f"no case {name!r}; there are {', '.join(NAMED)}")
    return NAMED[name](name, digests, cycles, reuse)


def _dense(name: str, digests: bool, cycles: int, reuse: bool, **more: Any) -> Case:
    transport = "gloo" if name.startswith("gloo") else "nixl"
    more = {"config": load_config("qwen3-0.6b"), "policy": Policy(digests=digests), **more}
    return case_of(
        name, source="megatron:tp2", target="vllm:tp2", transport=transport, cycles=cycles, reuse=reuse, **more
    )


def _tcp(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    return _dense(name, digests, cycles, reuse, environment={"UCX_TLS": "tcp"})


def _gloo(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    return _dense(name, digests, cycles, reuse, tensor_by_tensor=True)


def _gloo_large(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    return _dense(name, digests, cycles, reuse, config=_large(), tensor_by_tensor=True)


def _gloo_packed(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    packed = Policy(digests=digests, direct_run_bytes=_EVERYTHING)
    return _dense(name, digests, cycles, reuse, policy=packed, tensor_by_tensor=True)


def _moe(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    policy = Policy(digests=digests)
    return case_of(name, _small(), "megatron:ep2,dp2", "vllm:tp2,ep2", "nixl", policy, cycles, reuse=reuse)


def _staging(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    packed, unlimited = (
        Policy(digests=digests, direct_run_bytes=_EVERYTHING, staging_bytes=size)
        for size in (STAGING_BYTES, _UNLIMITED)
    )
    return _dense(name, digests, cycles, reuse, policy=packed, beside=unlimited)


def _shadow(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    """Landing beside what is served, in turn with landing in place: what counts is the pause."""
    shadow = Policy(digests=digests, landing="shadow")
    tcp = {"environment": {"UCX_TLS": "tcp"}} if "tcp" in name else {}
    return _dense(name, digests, cycles, reuse, policy=shadow, beside=Policy(digests=digests), **tcp)


def _digested(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    """Digests of every bucket, or of one in eight, in turn with refits without any."""
    policy = Policy(digests=digests, digest_every=_SAMPLED if name.endswith("sampled") else 1)
    return _dense(name, digests, cycles, reuse, policy=policy, beside=Policy(digests=False))


def _pull(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    """Receivers read instead of senders writing, as they do in the refits beside."""
    pushed = NAMED[name.removesuffix("-pull")](name, digests, cycles, reuse)
    return msgspec.structs.replace(pushed, transport_options={"direction": "pull"}, beside=pushed.policy)


def _four(name: str, digests: bool, cycles: int, reuse: bool) -> Case:
    transport, policy = name.rpartition("-")[2], Policy(digests=digests)
    return case_of(
        name, load_config("qwen3-0.6b"), "megatron:tp2,pp2", "megatron:tp4", transport, policy, cycles, reuse=reuse,
        collocated=True, beside_megatron=True, environment={"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


NAMED: Mapping[str, Callable[[str, bool, int, bool], Case]] = {
    "nixl-dense": _dense,
    "nixl-tcp-dense": _tcp,
    "gloo-dense": _gloo,
    "gloo-large": _gloo_large,
    "gloo-packed": _gloo_packed,
    "nixl-moe": _moe,
    "nixl-dense-pull": _pull,
    "nixl-moe-pull": _pull,
    "nixl-staging": _staging,
    "nixl-shadow": _shadow,
    "nixl-tcp-shadow": _shadow,
    "nixl-digested": _digested,
    "nixl-sampled": _digested,
    "gloo-digested": _digested,
    "four-ranks-gloo": _four,
    "four-ranks-nixl": _four,
}


def _small() -> Mapping[str, Any]:
    """A mixture of experts whose trainer has 9,984 parameters of 78 and 156 kB."""
    return {
        **load_config("qwen3-moe-0.6b"), "num_hidden_layers": 39, "hidden_size": 256, "moe_intermediate_size": 152,
        "num_experts": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 32768,
    }  # fmt: skip


def _large() -> Mapping[str, Any]:
    """A dense model of few large matrices: all but 2 % of its bytes are in runs of 4 MiB and more."""
    return {
        **load_config("qwen3-0.6b"), "num_hidden_layers": 7, "hidden_size": 2048, "intermediate_size": 8192,
        "num_attention_heads": 32, "num_key_value_heads": 2, "vocab_size": 32768,
    }  # fmt: skip
