"""weft as a weight-transfer engine of vLLM: one object per worker, created by vLLM when the model has been loaded.

vLLM's calls and weft's steps: `init_weight_transfer_engine` makes the target and meets the others;
`start_weight_update` begins the version that the sources offer; `update_weights` moves, verifies, votes and prepares;
`finish_weight_update` commits. An error of any step reaches the caller of the `LLM` with the words of every worker;
weights may then be mixed, and `weft_vllm.control` refuses.

Where the policy lands in shadow memory, a thread beside the worker's own fetches every version as it is offered or
published (`weft_vllm.watch`); `start_weight_update` picks that up, and only `update_weights` changes what is served.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import msgspec

from weft.authentication import Secret
from weft.deadline import Deadline, Deadlines
from weft.errors import ConfigError, StoreError
from weft.fleet import FleetMember
from weft.installation import Installation
from weft.policy import Policy
from weft.protocol.target import Stage
from weft.publication import Subscriber
from weft.refit import Refit
from weft.report import Report
from weft.roster import Expect
from weft_vllm import compat, limits
from weft_vllm.comparison import verify_worker
from weft_vllm.target import VllmTarget
from weft_vllm.watch import Watcher

_LOG = logging.getLogger(__name__)


@dataclass
class WeftInitInfo(compat.WeightTransferInitInfo):
    """What `init_weight_transfer_engine({"init_info": {...}})` takes: plain values, equal on every worker.

    A job's secret is not among them, since they are logged: it comes from the worker's environment (`WEFT_SECRET_FILE`
    or `WEFT_SECRET`).
    """

    store: str = field(repr=False)
    """URL of the store, such as `tcp://10.0.0.1:29511`."""
    job: str
    """Name of the refit job; sources use the same."""
    replica: str
    """Name of this engine, unique in the job; its workers are the members `<replica>/0`, `<replica>/1` … Data-parallel
    engines that share experts are one replica; others are one each: the first has this name, the next are
    `<replica>.dp1`, `<replica>.dp2` …
    """
    sources: int = 0
    """How many sources the job has; not where versions are published."""
    replicas: int = 1
    """How many replicas the job has; not where versions are published."""
    transport: str = "nixl"
    """Name of an installed transport plug-in."""
    transport_options: dict[str, Any] = field(default_factory=dict)
    deadlines: dict[str, float] = field(default_factory=dict)
    """Seconds by field of `weft.Deadlines`; the others keep their defaults."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Fields of `weft.Policy`, equal to the sources'; the others keep their defaults. With a `landing` in shadow memory
    the engine watches: it fetches while it serves. With the `drive` `published` it reads from whoever holds a version
    (`weft.Subscriber`).
    """
    relay: bool = False
    """Where versions are published: whether this engine passes on what it has."""
    fleet: bool = False
    """Whether the sources are a `weft.Fleet`, which engines join and leave while it runs on. After a refit that raised,
    `init_weight_transfer_engine` is called again.
    """
    scratch_slots: int = 2
    """Groups of packed weights that may be in flight at once; each costs the largest group's memory."""


@dataclass
class WeftUpdateInfo(compat.WeightTransferUpdateInfo):
    """What `update_weights({"update_info": {...}})` takes."""

    version: int | None = None
    """The version the caller means; None accepts the one that was begun."""


class WeftWeightTransferEngine(compat.WeightTransferEngine[WeftInitInfo, WeftUpdateInfo]):
    """Lives in a vLLM worker and is called from its thread. Every wait ends by `WeftInitInfo.deadlines`."""

    init_info_cls = WeftInitInfo
    update_info_cls = WeftUpdateInfo
    supports_draft_weight_update = False

    _target: VllmTarget | None = None
    _refit: Refit | Subscriber | None = None
    _watcher: Watcher | None = None
    _deadlines = Deadlines()
    _installation: Installation | None = None
    _latest: Installation | None = None
    _last: Report | None = None

    def init_transfer_engine(self, init_info: WeftInitInfo) -> None:
        """Make this worker a member of the job. Collective: returns when everybody is there, planned and connected.

        A second call leaves the former job first. Raises `ConfigError` for values that weft does not know, and whatever
        `weft.Refit.open` raises.
        """
        try:
            self.shutdown()
        except StoreError as error:  # which is away, or has lost what it held: everything has been let go of even so
            _LOG.warning("nobody could be told that this worker leaves its former job: %s", error)
        try:
            deadlines = Deadlines(**init_info.deadlines)
            policy = msgspec.convert(init_info.policy, Policy, strict=False)
        except (TypeError, msgspec.ValidationError) as error:
            raise ConfigError(f"init_info of the weft backend: {error}") from error
        unknown = sorted(init_info.policy.keys() - set(Policy.__struct_fields__))
        faults = [f"policy has no {', '.join(unknown)}"] if unknown else []
        if faults := [*faults, *_contradictions(init_info, policy)]:
            raise ConfigError(f"init_info of the weft backend: {'; '.join(faults)}")
        place = compat.place(self.parallel_config, init_info.replica)
        self._target = VllmTarget.from_worker(self.model, self.vllm_config, scratch_slots=init_info.scratch_slots)
        common: dict[str, Any] = {
            "target": self._target, "transport": init_info.transport, "transport_options": init_info.transport_options,
            "store": init_info.store, "job": init_info.job, "name": f"{place.replica}/{place.rank}",
            "replica": place.replica, "replica_size": place.size, "deadlines": deadlines, "policy": policy,
            "secret": Secret.of_environment(),
        }  # fmt: skip
        self._deadlines = deadlines
        member: Refit | Subscriber
        if policy.drive == "published":
            member = Subscriber(rank=place.rank, relay=init_info.relay, **common)
        elif init_info.fleet:
            member = FleetMember(sources=init_info.sources, **common)
        else:
            member = Refit(expect=Expect(init_info.sources, init_info.replicas), **common)
        self._refit = member
        member.open()
        if policy.shadow:
            self._watcher = Watcher(member, self.device)
            self._watcher.start()

    def start_weight_update(self) -> None:
        """Wait for the sources' offer and let them write: no forward pass may run from now on. A worker that watches
        waits until its version is fetched instead, and picks it up.
        """
        if self._refit is None:
            raise ConfigError(
                "the weft backend is not connected: call init_weight_transfer_engine with store and job first"
            )
        if self._installation is not None:
            raise ConfigError(
                f"version {self._installation.version} is still being installed: finish or abort it first"
            )
        if self._watcher is None:
            self._installation = self._refit.begin()
        else:
            self._installation = self._watcher.take(Deadline.after(limits.fetched(self._deadlines)))
        self._latest = self._installation

    def receive_weights(self, update_info: WeftUpdateInfo) -> None:
        """Take every byte of the version, verify it, vote, and prepare the commit. Collective in the replica."""
        installation = self._active()
        if update_info.version not in (None, installation.version):
            error = ConfigError(
                f"version {update_info.version} is asked for, but the sources offer {installation.version}"
            )
            self.give_up(str(error))
            raise error
        try:
            installation.update()
        except BaseException as error:
            installation.abort(error)
            self._end()
            raise

    def finish_weight_update(self) -> None:
        """Make the version the one that is served. Collective in the replica: returns when all members have committed,
        within twice `Deadlines.commit`.
        """
        installation = self._active()
        try:
            self._last = installation.commit()
            if isinstance(self._refit, Subscriber):
                self._refit.installed(self._last)
        except BaseException as error:
            installation.abort(error)
            raise
        finally:
            self._end()

    def give_up(self, reason: str) -> None:
        """Abort the version that is under way, if any, on every member of the replica. A failure to fetch one is then
        known to the caller.
        """
        if self._installation is not None:
            self._installation.abort(ConfigError(reason))
            self._end()
        elif self._watcher is not None:
            self._watcher.acknowledge()

    def _end(self) -> None:
        """Nothing is being installed any more: the next version may be fetched."""
        self._installation = None
        if self._watcher is not None:
            self._watcher.start()

    def shutdown(self) -> None:
        """Leave the job; weights stay as they are. Idempotent."""
        self.give_up("the engine is shutting down")
        if self._watcher is not None:
            fetched = self._watcher.stop(Deadline.after(limits.fetched(self._deadlines)))
            self._watcher = None
            if fetched is not None:
                fetched.abort(ConfigError("the engine is shutting down"))
        refit, self._refit = self._refit, None
        if refit is not None:
            refit.close()

    def report(self) -> dict[str, Any]:
        """The installed version, this rank's layout, and the last refit, as plain values."""
        target = self._target
        return {
            "engine": compat.installed(),
            "rank": self.parallel_config.rank,
            "version": None if target is None else target.version,
            "target": None if target is None else target.report(),
            "refit": None if self._last is None else msgspec.to_builtins(self._last),
        }

    def state(self) -> dict[str, Any]:
        """What the watcher is at, if there is one, and whether the last update may have changed what is served without
        all members having it whole.
        """
        latest = self._latest
        return {
            "watched": None if self._watcher is None else self._watcher.report(),
            "touched": latest is not None and latest.touched and latest.state is not Stage.INSTALLED,
        }

    def verify(self, path: str, casts: list[list[str]]) -> dict[str, Any]:
        """This rank's weights against the checkpoint at `path`, as plain values: a `weft.compare.RankComparison` under
        `comparison`, or the reason why there is none under `error`. Only reads.
        """
        if self._installation is not None:
            return {"error": f"version {self._installation.version} is being installed: verify when it is finished"}
        return verify_worker(self.model, self.vllm_config, path, casts)

    def _active(self) -> Installation:
        if self._installation is None:
            raise ConfigError("no version has been begun: call start_weight_update first")
        return self._installation


def _contradictions(init_info: WeftInitInfo, policy: Policy) -> list[str]:
    if policy.drive != "published":
        faults = ["sources is missing: how many the job has"] if init_info.sources < 1 else []
        if init_info.fleet and init_info.replicas != 1:
            faults.append("a fleet has no fixed number of replicas: leave replicas out")
        return [*faults, 'relay is for drive "published"'] if init_info.relay else faults
    faults = ['sources and replicas are for drive "lock_step"'] if init_info.sources or init_info.replicas != 1 else []
    return [*faults, 'fleet is for drive "lock_step"'] if init_info.fleet else faults
