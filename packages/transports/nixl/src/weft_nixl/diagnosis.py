"""What `weft doctor` learns from this package: whether NIXL works here, with which UCX, for which memory."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from weft.deadline import Deadline
from weft.diagnosis import Finding
from weft.errors import WeftError
from weft.member import Member, Region
from weft.topology import Topology, read_topology
from weft_nixl import factory
from weft_nixl.nics import nearest_nics, nearness

_SECONDS = 30.0
_BYTES = 1 << 20


def diagnose(root: Path) -> list[Finding]:
    """Opens an endpoint for the processor's memory and for that of every CUDA device, and registers some of each."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    return [
        *(_register(device) for device in devices),
        *nearest_devices(read_topology(root / "sys")),
        *ucx_version(Path("/proc/self/maps").read_text()),
        *preset_variables(os.environ),
    ]


def _register(device: torch.device) -> Finding:
    subject = f"NIXL on {device}"
    transport = factory({})
    try:
        transport.open(Member("doctor", None, None, None, 0, "here", "here", str(device)))
        memory = torch.zeros(_BYTES, dtype=torch.uint8, device=device)
        transport.register(Region("memory of weft doctor", memory), Deadline.after(_SECONDS))
    except WeftError as error:
        fix = "do what the message says; with UCX_LOG_LEVEL=info in its environment UCX says more"
        return Finding(subject, "broken", str(error), fix)
    finally:
        transport.close()
    return Finding(subject, "ok", "memory registers")


def nearest_devices(topology: Topology) -> Iterator[Finding]:
    """Which RDMA port each GPU of a host uses, and how near it is; nothing where there are none, or none is up."""
    ports = {nic.name: nic.place for nic in topology.nics if nic.rdma and nic.up}
    for gpu, names in nearest_nics(topology).items() if ports else ():
        shared, one_node = nearness(topology.gpus[gpu], ports[names[0]])
        if shared or one_node:
            near = "the same PCI bridge" if shared > 1 else "the same root complex" if shared else "its NUMA node"
            yield Finding(f"GPU {gpu}", "ok", f"uses {names[0]} of {near}")
        else:
            fix = "its traffic crosses processors: use GPUs that have a port of their own (CUDA_VISIBLE_DEVICES)"
            yield Finding(f"GPU {gpu}", "note", f"uses {names[0]} of another NUMA node", fix)


def ucx_version(maps: str) -> Iterator[Finding]:
    """Of the UCX that NIXL has loaded, by the text of `/proc/self/maps`; wheels rename it (`libucp-<hash>.so`)."""
    for path in dict.fromkeys(re.findall(r"/\S*/libucp(?:-[0-9a-f]+)?\.so\S*", maps)):
        library = ctypes.CDLL(path)
        library.ucp_get_version_string.restype = ctypes.c_char_p
        yield Finding("UCX", "ok", library.ucp_get_version_string().decode())


def preset_variables(environment: Mapping[str, str]) -> list[Finding]:
    """`UCX_*` of the environment, which count for NIXL, for an engine's own connectors, and for MPI alike."""
    preset = [f"{name}={value}" for name, value in sorted(environment.items()) if name.startswith("UCX_")]
    if not preset:
        return []
    return [Finding("UCX variables", "note", ", ".join(preset), "unset those that are not meant for this process")]
