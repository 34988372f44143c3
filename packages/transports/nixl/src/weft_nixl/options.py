"""Options of the `nixl` transport."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

import msgspec

from weft.errors import ConfigError


def _at_least_one(unit: str) -> msgspec.Meta:
    return msgspec.Meta(ge=1, extra={"unit": unit})


_Seconds = Annotated[float, msgspec.Meta(gt=0)]


class NixlOptions(msgspec.Struct, frozen=True, kw_only=True, tag_field="name", tag="nixl"):
    """What `transport_options` may hold."""

    direction: Literal["push", "pull"] = "push"
    """Who moves the bytes. `push`: the sender writes them into the receiver's memory. `pull`: the sender says that they
    are ready, and the receiver reads them. The same for all members.
    """
    backends: tuple[str, ...] = ("UCX",)
    """NIXL's back ends, as NIXL names them."""
    backend_parameters: dict[str, dict[str, str]] = {}
    """Parameters by back end, as it names them, such as `{"LIBFABRIC": {…}}`; NIXL ignores those it does not know."""
    nics: tuple[str, ...] = ()
    """Network devices as UCX names them (`mlx5_0:1`, `eth0`), a rail each, over all of which UCX stripes large writes;
    empty takes the member's own, else what `choose_nics` says.
    """
    choose_nics: Literal["nearest", "ucx"] = "nearest"
    """`nearest`: for memory on a GPU the RDMA ports that are up and nearest to it by PCI topology, balanced over the
    GPUs of the host; UCX chooses for other memory, and where no RDMA port is up. `ucx`: UCX and its variables choose.
    """
    rails: Annotated[int, _at_least_one("NICs")] = 1
    """How many NICs `nearest` takes for each GPU."""
    ucx_settings: dict[str, str | int] = {}
    """UCX's settings without their `UCX_`, such as `{"TLS": "rc,cuda_copy"}`. They win over the environment, for this
    agent only; a variable that contradicts nothing here is obeyed, and reported in the log.
    """
    ucx_error_handling_mode: Literal["peer", "none"] = "peer"
    """`none` loses the death of a peer and is a little faster on some fabrics."""
    num_workers: Annotated[int, _at_least_one("workers")] | None = None
    """UCX workers of the agent; NIXL's default is 1."""
    num_threads: Annotated[int, _at_least_one("threads")] | None = None
    """Threads of the UCX back end; NIXL's default is none."""
    split_batch_size: Annotated[int, _at_least_one("descriptors")] | None = None
    """Descriptors per thread and batch; NIXL's default is 1024."""
    progress_thread: bool = False
    """NIXL's own thread, which spins on a whole core even while nothing moves: for machines with cores to spare."""
    idle_progress_seconds: _Seconds = 0.005
    """How often a thread of the transport makes progress while the caller does not poll."""
    depth: Annotated[int, _at_least_one("transfers")] = 8
    """Most transfers in flight per peer; further posts wait their turn (trap 39)."""
    chunk_segments: Annotated[int, _at_least_one("segments")] = 2048
    """Most descriptors per transfer: posting takes about 5 µs for each, during which the caller waits."""
    probe_seconds: _Seconds = 1.0
    """How often connected peers are probed, so that a receiver learns of a dead sender."""

    renamed: ClassVar[Mapping[str, str]] = {"device_list": "nics", "engine_config": "ucx_settings"}


def backend_parameters(options: NixlOptions) -> dict[str, dict[str, str]]:
    """Parameters of every back end as NIXL reads them.

    Raises `ConfigError` for those of one that is not used, and for more UCX workers than `pull` can use: what a peer
    says through several of them comes in any order.
    """
    unused = sorted(set(options.backend_parameters) - set(options.backends))
    if unused:
        raise ConfigError(
            f"transport 'nixl': backend_parameters has {', '.join(unused)}, but backends are "
            f"{', '.join(options.backends)}"
        )
    ucx = {
        "ucx_error_handling_mode": options.ucx_error_handling_mode,
        "num_workers": options.num_workers,
        "num_threads": options.num_threads,
        "split_batch_size": options.split_batch_size,
    }
    own = {"UCX": {key: str(value) for key, value in ucx.items() if value is not None}}
    every = {name: {**own.get(name, {}), **options.backend_parameters.get(name, {})} for name in options.backends}
    workers = every.get("UCX", {}).get("num_workers", "1")
    if options.direction == "pull" and workers != "1":
        raise ConfigError(f"transport 'nixl': direction is 'pull', which needs num_workers=1, not {workers}")
    return every
