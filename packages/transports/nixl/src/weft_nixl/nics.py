"""Which network devices a member's agent uses: those it was given, or those nearest to its GPU (trap 32)."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weft.errors import ConfigError
from weft.member import Member
from weft.topology import SYSFS, Nic, Place, Topology, read_topology
from weft_nixl.options import NixlOptions

_LOG = logging.getLogger(__name__)
_SLOWEST = 0.5
"""RDMA ports of less than this share of the fastest one's rate are for management, not for weights."""


def choose_nics(options: NixlOptions, member: Member, sysfs: Path = SYSFS) -> tuple[str, ...]:
    """Devices as UCX names them; none leaves the choice to UCX.

    Those of the options, else the member's own; else, for memory on a GPU, the nearest RDMA ports. Raises `ConfigError`
    for devices that this host does not have or that are down, and for more rails than there are.
    """
    topology = read_topology(sysfs)
    if named := options.nics or member.nics:
        return check_nics(named, topology)
    device = torch.device(member.device)
    if options.choose_nics == "ucx" or device.type != "cuda":
        return ()
    ports = [nic for nic in topology.nics if nic.rdma]
    if not any(nic.up for nic in ports):
        states = ", ".join(f"{nic.name} is {nic.state}" for nic in ports) or "it has none"
        _LOG.warning("no RDMA device of this host is up (%s): UCX chooses among the others", states)
        return ()
    gpu = pci_address(device)
    if gpu not in topology.gpus:
        _LOG.warning("%s does not list GPU %s: UCX chooses its network devices", sysfs, gpu)
        return ()
    return nearest_nics(topology, options.rails)[gpu]


def pci_address(device: torch.device) -> str:
    """Of a CUDA device, as sysfs writes it. Never run on a GPU."""
    properties: Any = torch.cuda.get_device_properties(device)
    return f"{properties.pci_domain_id:04x}:{properties.pci_bus_id:02x}:{properties.pci_device_id:02x}.0"


def check_nics(names: Sequence[str], topology: Topology) -> tuple[str, ...]:
    """The devices of these names, an RDMA device without a port standing for its first one that is up, or its first.

    Raises `ConfigError` that lists all that do not exist or are down.
    """
    found, faults = [], []
    for name in names:
        matching = [nic for nic in topology.nics if name in (nic.name, nic.rdma and nic.name.partition(":")[0])]
        nic = next((nic for nic in matching if nic.up), next(iter(matching), None))
        if nic is None:
            has = ", ".join(nic.name for nic in topology.nics if nic.up) or "none"
            faults.append(f"this host has no network device {name!r}; up are {has}")
        elif not nic.up:
            faults.append(f"network device {nic.name!r} is not up but {nic.state!r}: enable it, or choose another")
        else:
            found.append(nic.name)
    if faults:
        raise ConfigError("transport 'nixl': " + "; ".join(faults))
    return tuple(found)


def nearest_nics(topology: Topology, rails: int = 1) -> dict[str, tuple[str, ...]]:
    """For every GPU by PCI address, the RDMA ports of its rank: as near as can be, then equally many GPUs to each.

    Pure, so that every process of a host comes to the same result without asking the others. Near is what shares most
    of the way from the root complex, then the NUMA node. Raises `ConfigError` when fewer ports than `rails` are up.
    """
    up = [nic for nic in topology.nics if nic.rdma and nic.up]
    fastest = max((nic.gigabits for nic in up), default=0.0)
    usable = [nic for nic in up if nic.gigabits >= _SLOWEST * fastest]
    if len(usable) < rails:
        names = ", ".join(nic.name for nic in usable) or "none"
        raise ConfigError(f"transport 'nixl': rails={rails}, but the RDMA ports of this host that are up are {names}")

    def choices(gpu: str) -> int:
        near = [nearness(topology.gpus[gpu], nic.place) for nic in usable]
        return near.count(max(near))

    # Who has the fewest equally near ports chooses first. These sets are nested or disjoint, as they come from a tree,
    # so that whoever chooses later can make up for any crowd.
    order = sorted(topology.gpus, key=lambda gpu: (choices(gpu), gpu))
    chosen: dict[str, list[Nic]] = {gpu: [] for gpu in topology.gpus}
    users: Counter[str] = Counter()
    for _ in range(rails):
        for gpu in order:
            free = [nic for nic in usable if nic not in chosen[gpu]]
            best = max(free, key=lambda nic: (*nearness(topology.gpus[gpu], nic.place), -users[nic.name]))
            chosen[gpu].append(best)
            users[best.name] += 1
    return {gpu: tuple(nic.name for nic in nics) for gpu, nics in chosen.items()}


def nearness(gpu: Place, nic: Place) -> tuple[int, bool]:
    """How many bridges of PCI two devices share, from the root complex, and whether they are on one NUMA node."""
    shared = 0
    for mine, its in zip(gpu.path, nic.path, strict=False):
        if mine != its:
            break
        shared += 1
    return shared, gpu.numa == nic.numa >= 0
