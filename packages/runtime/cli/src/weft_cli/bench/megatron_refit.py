"""Megatron-Core's own refit over gloo: `megatron/core/resharding` 0.16 between its own models, on CPU.

Its functions run unchanged; CUDA streams, which it makes even for gloo, are answered. Every rank holds its part of both
models, as Megatron's collocated refit wants it.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

from weft.contracts import Store
from weft.deadline import Deadline
from weft.errors import WeftError
from weft.testing.members import poison
from weft_cli.bench import bare, pattern
from weft_cli.bench.settings import Case, Seat

_HOST = "127.0.0.1"
_VOCABULARY_MULTIPLE = 128

# torch's own annotations leave these out.
_dist: Any = dist


class MegatronRefit:
    """One rank's part of both models of a collocated case, and what fills the target from the source.

    Making one is collective, and so is `run`. The source holds version 1 of `pattern`.
    """

    def __init__(self, case: Case, seat: Seat, store: Store, ranks: int, deadline: Deadline) -> None:
        rank = seat.source
        assert rank is not None
        assert rank == seat.target
        left = timedelta(seconds=deadline.remaining())
        _dist.init_process_group(
            "gloo", store=_meeting(store, rank, deadline), rank=rank, world_size=ranks, timeout=left
        )
        sides = case.source[1], case.target[1]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Megatron warns about what is not installed beside it
            helpers = importlib.import_module("weft_cli.demo.megatron_on_cpu")
            live = importlib.import_module("weft_megatron")
            self._refit = importlib.import_module("megatron.core.resharding.refit")
            helpers.answer_cuda_calls()
            most = max(sizes.get("tp", 1) for sizes in sides)
            self._source, self._target = (_model(helpers, case.config, sizes, most) for sizes in sides)
        held, self._wanted = (live.MegatronSource(model, case.config) for model in (self._source, self._target))
        pattern.fill(held.layout(), held.memory(), 1)

    def poison(self) -> None:
        """Overwrite the target."""
        poison(list(self._wanted.memory().values()))

    def run(self) -> None:
        """Fill the target. The first call plans."""
        with patch.object(torch.cuda, "Stream", _NoStream), patch.object(torch.cuda, "current_stream", _NoStream):
            self._refit.swap_model_weights(self._source, self._target, "gloo")

    def check(self) -> None:
        """Raise `WeftError` unless every byte of the target is an independent slice of the version."""
        wrong = pattern.wrong_bytes(self._wanted.layout(), self._wanted.memory(), 1)
        if wrong:
            raise WeftError(f"Megatron-Core's own refit left {wrong:,} bytes wrong, so that nothing can be compared")

    def close(self) -> None:
        """Leave its process group."""
        self._refit.clear_service_cache()
        _dist.destroy_process_group()


class _NoStream:
    """Stands for a CUDA stream."""

    def wait_stream(self, other: Any) -> None:
        pass


def _meeting(store: Store, rank: int, deadline: Deadline) -> Any:
    """A store of torch's, which rank 0 hosts."""
    left = timedelta(seconds=deadline.remaining())
    if rank:
        port = int(bare.wait_for(store, "megatron/port", deadline))
        return _dist.TCPStore(_HOST, port, is_master=False, wait_for_workers=False, timeout=left)
    server = _dist.TCPStore(_HOST, 0, is_master=True, wait_for_workers=False, timeout=left)
    store.set("megatron/port", str(server.port).encode())
    return server


def _model(helpers: Any, config: Mapping[str, Any], sizes: Mapping[str, int], tensor: int) -> Any:
    """This rank's part in bfloat16, uninitialised; its groups stay with it. Both sides' vocabularies are padded alike.

    `tensor` is the larger of both sides' tensor-parallel sizes.
    """
    state = importlib.import_module("megatron.core.parallel_state")
    multiple = _VOCABULARY_MULTIPLE * tensor
    state.initialize_model_parallel(
        tensor_model_parallel_size=sizes.get("tp", 1), pipeline_model_parallel_size=sizes.get("pp", 1)
    )
    made = helpers.build_model(
        {"rope_parameters": {"rope_theta": config.get("rope_theta", 10_000)}, **config},
        padded_vocabulary=-(-config["vocab_size"] // multiple) * multiple,
        dtype=torch.bfloat16,
        init_method=_as_it_is,
        output_layer_init_method=_as_it_is,
    )
    state.destroy_model_parallel()
    return made.bfloat16()


def _as_it_is(weight: torch.Tensor) -> None:
    """Initialisation takes a minute and is overwritten."""
