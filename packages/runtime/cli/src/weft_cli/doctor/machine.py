"""The machine as Linux describes it under `sys`, `proc` and `dev`: GPUs, network devices, peer memory, limits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from weft.diagnosis import Finding
from weft.topology import Nic, Place, read_topology, text_of

_FEW_FILES, _ENOUGH_FILES = 1024, 65_536
_DOCKERS_SHARED_BYTES, _ENOUGH_SHARED_BYTES = 64 << 20, 1 << 30
_UNLIMITED = "unlimited"


def diagnose(root: Path) -> list[Finding]:
    """Everything of the machine itself. `root` is the folder in which `sys`, `proc` and `dev` are."""
    topology = read_topology(root / "sys")
    gpus, ports = topology.gpus, [nic for nic in topology.nics if nic.rdma]
    return [
        *_gpu_findings(root, gpus),
        *_port_findings(ports),
        *_interface_findings([nic for nic in topology.nics if not nic.rdma and nic.name != "lo"]),
        *_peer_memory_findings(root, bool(gpus) and bool(ports)),
        *_limit_findings(root, bool(ports)),
        *_shared_memory_findings(root),
    ]


def _gpu_findings(root: Path, gpus: Mapping[str, Place]) -> Iterator[Finding]:
    if not gpus:
        yield Finding("GPU", "note", "this machine has none: weights move through the processor's memory")
        return
    driver = re.search(r"(?<= )\d+\.\d+(\.\d+)?(?= )", text_of(root / "proc/driver/nvidia/version"))
    if driver is None:
        fix = "install NVIDIA's driver on the host; in a container, start it with --gpus all"
        yield Finding(
            "GPU driver", "broken", f"{len(gpus)} GPUs are on the PCI bus, and no driver of theirs is loaded", fix
        )
    else:
        yield Finding("GPU driver", "ok", driver[0])
    for gpu, place in gpus.items():
        information = text_of(root / "proc/driver/nvidia/gpus" / gpu / "information")
        model = re.search(r"Model:\s*(.+)", information)
        yield Finding(f"GPU {gpu}", "ok", f"{model[1] if model else 'unknown model'}, {_numa(place)}")


def _numa(place: Place) -> str:
    return "on no NUMA node of its own" if place.numa < 0 else f"NUMA node {place.numa}"


def _port_findings(ports: Sequence[Nic]) -> Iterator[Finding]:
    if not ports:
        yield Finding("RDMA", "note", "no device: between hosts, weights move over TCP")
    fix = "connect it, bring its interface up (ip link set … up) and, on InfiniBand, start a subnet manager"
    for port in ports:
        text = f"{port.state or 'in no state'}, {port.rate or 'unknown rate'}, {port.link}, {_numa(port.place)}"
        if port.up:
            yield Finding(f"NIC {port.name}", "ok", text)
        elif any(other.up for other in ports):
            yield Finding(f"NIC {port.name}", "note", text, fix)
        else:
            yield Finding(f"NIC {port.name}", "broken", f"{text}; no RDMA port is up", fix)


def _interface_findings(interfaces: Sequence[Nic]) -> Iterator[Finding]:
    words = ", ".join(f"{nic.name} {nic.state}" for nic in interfaces) or "none but the loopback"
    if any(nic.up for nic in interfaces):
        yield Finding("interfaces", "ok", words)
    else:
        yield Finding("interfaces", "note", f"{words}: nothing leaves this host", "bring one up: ip link set … up")


def _peer_memory_findings(root: Path, wanted: bool) -> Iterator[Finding]:
    """Whether a network device can reach GPU memory."""
    if not wanted:
        return
    if (root / "sys/module/nvidia_peermem").exists():
        yield Finding("peer memory", "ok", "nvidia_peermem is loaded: RDMA reaches GPU memory")
    elif "Open Kernel Module" in text_of(root / "proc/driver/nvidia/version"):
        yield Finding("peer memory", "ok", "NVIDIA's open kernel modules export GPU memory to RDMA by dmabuf")
    else:
        fix = "modprobe nvidia_peermem, or install NVIDIA's open kernel modules"
        yield Finding("peer memory", "broken", "RDMA cannot reach GPU memory: neither nvidia_peermem nor dmabuf", fix)


def _limit_findings(root: Path, rdma: bool) -> Iterator[Finding]:
    limits = text_of(root / "proc/self/limits")
    locked, files = (_limit(limits, name) for name in ("Max locked memory", "Max open files"))
    if not locked or not files:
        yield Finding("limits", "note", f"{root / 'proc/self/limits'} does not say how much may be locked and opened")
        return
    words = locked if locked == _UNLIMITED else f"{int(locked):,} bytes"
    if rdma and locked != _UNLIMITED:
        fix = "ulimit -l unlimited (docker: --ulimit memlock=-1; systemd: LimitMEMLOCK=infinity)"
        yield Finding("locked memory", "broken", f"{words} at most, and RDMA locks all that is registered", fix)
    else:
        yield Finding("locked memory", "ok", f"{words} at most")
    number = _ENOUGH_FILES if files == _UNLIMITED else int(files)
    fix = f"ulimit -n {_ENOUGH_FILES}"
    if number < _FEW_FILES:
        yield Finding("open files", "broken", f"{number:,} at most: every peer takes some", fix)
    elif number == _FEW_FILES:
        yield Finding("open files", "note", f"{number:,} at most: hundreds of peers take more", fix)
    else:
        yield Finding("open files", "ok", f"{files if files == _UNLIMITED else f'{number:,}'} at most")


def _limit(limits: str, name: str) -> str:
    """The soft limit of this name in the text of `/proc/self/limits`; empty if it has none."""
    found = re.search(rf"^{name}\s+(\S+)", limits, re.MULTILINE)
    return found[1] if found else ""


def _shared_memory_findings(root: Path) -> Iterator[Finding]:
    folder = root / "dev/shm"
    try:
        filesystem = os.statvfs(folder)
    except OSError as error:
        fix = "mount -t tmpfs tmpfs /dev/shm"
        yield Finding("shared memory", "broken", f"{folder} cannot be used: {error.strerror}", fix)
    else:
        yield shared_memory(filesystem.f_frsize * filesystem.f_blocks)


def shared_memory(total_bytes: int) -> Finding:
    """What `/dev/shm` of this size is good for."""
    words = f"{total_bytes / (1 << 20):,.0f} MiB"
    fix = "give it more: docker run --shm-size=8g, or mount -o remount,size=8g /dev/shm"
    if total_bytes <= _DOCKERS_SHARED_BYTES:
        return Finding("shared memory", "broken", f"{words}: too little for engines and transports", fix)
    if total_bytes < _ENOUGH_SHARED_BYTES:
        return Finding("shared memory", "note", f"{words}: little for engines with several workers", fix)
    return Finding("shared memory", "ok", words)
