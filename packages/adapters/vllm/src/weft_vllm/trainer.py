"""weft in vLLM's trainer factory: an RL script that sends weights through it changes the class of its init info.

`WeightTransferTrainerFactory.trainer_init(WeftTrainerInitInfo(rank=…, store=…, job=…), client=…, source=…)` meets the
engine, and `send_weights()` has it refitted. Written against `vllm/distributed/weight_transfer/base.py` of vLLM 0.32;
what is used here is the same in 0.31.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import msgspec
import torch

from weft.authentication import Secret
from weft.builder import LayoutBuilder
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, DeadlineError, LayoutError
from weft.live import LiveSource
from weft.policy import Policy
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft_vllm import compat, limits


@dataclass
class WeftTrainerInitInfo(compat.TrainerInitInfo):
    """What one trainer rank says; equal on all ranks but for `rank`. Making one registers the backend with vLLM.

    A job's secret is in the environment of trainer and engine: `WEFT_SECRET_FILE` or `WEFT_SECRET`.
    """

    backend: ClassVar[str] = compat.BACKEND
    store: str = field(repr=False)
    """URL of the store, such as `tcp://10.0.0.1:29511`; a password may be in it."""
    job: str
    """Name of the refit job."""
    ranks: int = 1
    """How many trainer ranks there are: each sends its part."""
    replica: str = "rollout0"
    """Name of the engine."""
    replicas: int = 1
    """How many engines the client drives: more than one only where they are data-parallel ranks of one."""
    version: int = 0
    """The version that the engine has; the first that is sent is the next one."""
    transport: str = "nixl"
    """Name of an installed transport plug-in."""
    transport_options: dict[str, Any] = field(default_factory=dict)
    deadlines: dict[str, float] = field(default_factory=dict)
    """Seconds by field of `weft.Deadlines`; the others keep their defaults."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Fields of `weft.Policy`; the others keep their defaults."""

    def __post_init__(self) -> None:
        compat.register_trainer_engine()


class WeftTrainerEngine(compat.TrainerWeightTransferEngine[WeftTrainerInitInfo]):
    """One trainer rank's side. For one thread; collective over the ranks, as all engines of the factory.

    Every rank copies its share of what the source yields into memory of its own, which weft reads: all tensors by
    turns, or those that the source says this rank holds.
    """

    init_info_cls = WeftTrainerInitInfo

    def __init__(self, info: WeftTrainerInitInfo, client: Any, source: Any) -> None:
        super().__init__(client=client, source=source, is_sender=info.is_sender)
        if source is None:
            raise ConfigError("the weft backend sends whole models: give trainer_init a source")
        self._kept = _Kept(source.metadata(), source.held_names(), info.rank, info.ranks)
        self._version, self._deadlines = info.version, Deadlines(**info.deadlines)
        self._refit = Refit(
            source=LiveSource(self._kept.layout, self._kept.memory, lambda: None),
            transport=info.transport,
            transport_options=info.transport_options,
            store=info.store,
            job=info.job,
            name=f"trainer/{info.rank}",
            expect=Expect(sources=info.ranks, replicas=info.replicas),
            deadlines=self._deadlines,
            policy=msgspec.convert(info.policy, Policy, strict=False),
            secret=Secret.of_environment(),
        )
        self.last: Report | None = None
        """This rank's account of the last `send_weights`."""

    @classmethod
    def trainer_init(cls, init_info: WeftTrainerInitInfo, *, client: Any, source: Any = None) -> Self:
        """Meet the other ranks and the engine. Raises what `weft.Refit.open` raises, and what the client does."""
        engine = cls(init_info, client, source)
        there = {
            "store": init_info.store, "job": init_info.job, "replica": init_info.replica, "sources": init_info.ranks,
            "replicas": init_info.replicas, "transport": init_info.transport,
            "transport_options": init_info.transport_options, "deadlines": init_info.deadlines,
            "policy": init_info.policy,
        }  # fmt: skip
        try:
            engine._beside(lambda: client.init_weight_transfer_engine(there), engine._refit.open, "rendezvous")
        except BaseException:
            engine.shutdown()
            raise
        return engine

    def send_weights(self) -> None:
        """Send what the source yields now, and have the engine install it; returns once it has.

        Neither this nor vLLM's clients pause: the caller does before (`pause_generation`, or `POST /pause`, with
        `clear_cache` left as it is, so that caches of the old version are forgotten) and resumes after, whatever the
        policy. A landing in shadow memory changes what is served in `update_weights`, too. Raises `RefitAbortedError`,
        and what the client does; the engine must then stay paused until a later call succeeds.
        """
        self._kept.fill(self.source)
        self._version += 1
        version = self._version

        def ask() -> None:
            self.client.start_weight_update()
            self.client.update_weights({"version": version})
            self.client.finish_weight_update(str(version))

        def send() -> None:
            offer = self._refit.offer(version)
            offer.released()
            self.last = offer.committed()

        self._beside(ask, send, "commit")

    def shutdown(self) -> None:
        """Leave the job. Idempotent."""
        self._refit.close()

    def _beside(self, ask: Callable[[], None], act: Callable[[], None], what: str) -> None:
        """Act here, while the sender's client asks the engine in another thread. Both must succeed."""
        faults: list[Exception] = []

        def asking() -> None:
            try:
                ask()
            except Exception as error:  # noqa: BLE001 - raised by the caller's thread
                faults.append(error)

        thread = threading.Thread(target=asking if self.is_sender else lambda: None, name="weft-client", daemon=True)
        thread.start()
        try:
            act()
        except Exception as error:  # noqa: BLE001 - the client's own words come first
            faults.append(error)
        seconds = limits.connected if what == "rendezvous" else limits.refitted
        limit = Deadline.after(seconds(self._deadlines))
        try:
            limit.wait(lambda: not thread.is_alive(), f"the engine's answer to the {what}", lambda: ["the client"])
        except DeadlineError as error:  # beside what went wrong here
            faults.append(error)
        if faults:
            raise faults[-1] if len(faults) == 1 else ExceptionGroup(f"{what} with the engine failed", faults)


class _Kept:
    """The memory that weft reads: one dense buffer per tensor of this rank's share."""

    def __init__(self, metadata: Iterable[Any], held: Collection[str] | None, rank: int, ranks: int) -> None:
        known = list(metadata)
        mine = known[rank::ranks] if held is None else [entry for entry in known if entry.name in set(held)]
        builder = LayoutBuilder()
        self._memory: dict[str, torch.Tensor] = {}
        for entry in mine:
            dtype = str(entry.dtype).removeprefix("torch.")
            builder.tensor(entry.name, entry.shape, dtype)
            builder.buffer(entry.name, dtype, torch.Size(entry.shape).numel(), group="all")
            builder.shard(entry.name, entry.name)
            self._memory[entry.name] = torch.zeros(torch.Size(entry.shape).numel(), dtype=entry.dtype)
        self.layout = builder.build()

    @property
    def memory(self) -> Mapping[str, torch.Tensor]:
        """By buffer, which is by tensor."""
        return self._memory

    def fill(self, source: Iterable[tuple[str, torch.Tensor | None]]) -> None:
        """Copy this rank's share; the source is iterated to its end, since that may be collective. Raises `LayoutError`
        with all tensors that it does not yield as it said.
        """
        missing, faults = set(self._memory), []
        for name, tensor in source:
            kept = self._memory.get(name)
            if kept is None or tensor is None:
                continue
            missing.discard(name)
            if (tensor.dtype, tensor.numel()) != (kept.dtype, kept.numel()):
                faults.append(
                    f"{name}: its metadata say {kept.numel()} elements of {kept.dtype}, the source yields "
                    f"{tensor.numel()} of {tensor.dtype}"
                )
                continue
            kept.copy_(tensor.detach().reshape(-1))
        faults += [f"{name}: its metadata are there, and the source does not yield it" for name in sorted(missing)]
        if faults:
            raise LayoutError(faults)
