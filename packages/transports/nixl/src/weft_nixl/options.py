"""Options of the `nixl` transport, and the environment variables that would silently win over them (trap 32)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import msgspec

from weft.errors import ConfigError

Positive = Annotated[int, msgspec.Meta(ge=1)]


class NixlOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `transport_options` may hold."""

    backends: tuple[str, ...] = ("UCX",)
    """NIXL backends, as NIXL names them."""
    ucx_error_handling_mode: Literal["peer", "none"] = "peer"
    """`none` loses the death of a peer and is a little faster on some fabrics."""
    device_list: tuple[str, ...] = ()
    """Network devices as UCX names them (`mlx5_0:1`, `eth0`); empty takes the member's `nics`, or lets UCX choose."""
    num_workers: Positive | None = None
    """UCX workers of the agent; NIXL's default is 1."""
    num_threads: Positive | None = None
    """Threads of the UCX backend; NIXL's default is none."""
    split_batch_size: Positive | None = None
    """Descriptors per thread and batch; NIXL's default is 1024."""
    engine_config: dict[str, str | int] = {}
    """UCX settings without their `UCX_`, such as `{"MAX_RMA_RAILS": 4}`."""
    progress_thread: bool = False
    """NIXL's own thread, which spins on a whole core even while nothing moves: for machines with cores to spare."""
    idle_progress_seconds: Annotated[float, msgspec.Meta(gt=0)] = 0.005
    """How often a thread of the transport makes progress while the caller does not poll."""
    depth: Positive = 8
    """Most transfers in flight per peer; further posts wait their turn (trap 39)."""
    chunk_segments: Positive = 2048
    """Most descriptors per transfer: posting takes about 5 µs for each, during which the caller waits."""
    probe_seconds: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """How often connected peers are probed, so that a receiver learns of a dead sender."""


def backend_parameters(options: NixlOptions, nics: tuple[str, ...]) -> dict[str, dict[str, str]]:
    """Parameters of every backend as NIXL reads them; `nics` are the member's own."""
    devices = options.device_list or nics
    ucx = {
        "ucx_error_handling_mode": options.ucx_error_handling_mode,
        "device_list": ", ".join(devices),
        "num_workers": "" if options.num_workers is None else str(options.num_workers),
        "num_threads": "" if options.num_threads is None else str(options.num_threads),
        "split_batch_size": "" if options.split_batch_size is None else str(options.split_batch_size),
        "engine_config": ",".join(f"{key}={value}" for key, value in options.engine_config.items()),
    }
    return {
        backend: {key: value for key, value in ucx.items() if value} if backend == "UCX" else {}
        for backend in options.backends
    }


def check_environment(options: NixlOptions, nics: tuple[str, ...], environment: Mapping[str, str]) -> list[str]:
    """Variables `UCX_*` that are set, as `NAME=value`, since UCX obeys them before anything given here.

    Raises `ConfigError` that names every one which contradicts an option.
    """
    wanted = {f"UCX_{key}": str(value) for key, value in options.engine_config.items()}
    devices = options.device_list or nics
    if devices:
        wanted["UCX_NET_DEVICES"] = ",".join(devices)
    found = {name: value for name, value in sorted(environment.items()) if name.startswith("UCX_")}
    faults = [
        f"{name}={value} is set, but the options ask for {wanted[name]}"
        for name, value in found.items()
        if wanted.get(name, value) != value
    ]
    if faults:
        raise ConfigError(f"the environment overrides options of transport 'nixl': {'; '.join(faults)}; unset either")
    return [f"{name}={value}" for name, value in found.items()]
