"""The machine as Linux describes it under `sys`, `proc` and `dev`: GPUs, network devices, peer memory, limits."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from weft.diagnosis import Finding

_NVIDIA = "0x10de"
_GPU_CLASSES = ("0x0300", "0x0302")
"""Beginnings of a PCI class: VGA and 3D controllers (linux/pci_ids.h)."""
_FEW_FILES, _ENOUGH_FILES = 1024, 65_536
_DOCKERS_SHARED_BYTES, _ENOUGH_SHARED_BYTES = 64 << 20, 1 << 30
_UNLIMITED = "unlimited"


def diagnose(root: Path) -> list[Finding]:
    """Everything of the machine itself. `root` is the folder in which `sys`, `proc` and `dev` are."""
    gpus, ports = gpu_addresses(root), _rdma_ports(root)
    return [
        *_gpu_findings(root, gpus),
        *_port_findings(ports),
        *_interface_findings(root),
        *_peer_memory_findings(root, bool(gpus) and bool(ports)),
        *_limit_findings(root, bool(ports)),
        *_shared_memory_findings(root),
    ]


def gpu_addresses(root: Path) -> list[str]:
    """PCI addresses of NVIDIA's GPUs, sorted; of those that the kernel sees, with or without a driver."""
    devices = sorted((root / "sys/bus/pci/devices").glob("*"))
    return [
        device.name
        for device in devices
        if text_of(device / "vendor") == _NVIDIA and text_of(device / "class").startswith(_GPU_CLASSES)
    ]


def text_of(file: Path) -> str:
    """Contents of a file of the kernel's; empty where it has none, or gives none now."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""


def _gpu_findings(root: Path, gpus: Sequence[str]) -> Iterator[Finding]:
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
    for gpu in gpus:
        information = text_of(root / "proc/driver/nvidia/gpus" / gpu / "information")
        model = re.search(r"Model:\s*(.+)", information)
        yield Finding(f"GPU {gpu}", "ok", f"{model[1] if model else 'unknown model'}, {_numa(root, gpu)}")


def _numa(root: Path, address: str) -> str:
    node = text_of(root / "sys/bus/pci/devices" / address / "numa_node") or "-1"
    return "on no NUMA node of its own" if node.startswith("-") else f"NUMA node {node}"


class _Port:
    """One port of an RDMA device."""

    def __init__(self, root: Path, folder: Path) -> None:
        device = folder.parents[1]
        self.name = f"{device.name}:{folder.name}"
        self.state = text_of(folder / "state")  # such as "4: ACTIVE"
        self.up = self.state.endswith("ACTIVE")
        link = text_of(folder / "link_layer")
        where = _numa(root, (device / "device").resolve().name)
        self.text = f"{self.state or 'in no state'}, {text_of(folder / 'rate') or 'unknown rate'}, {link}, {where}"


def _rdma_ports(root: Path) -> list[_Port]:
    return [_Port(root, folder) for folder in sorted((root / "sys/class/infiniband").glob("*/ports/*"))]


def _port_findings(ports: Sequence[_Port]) -> Iterator[Finding]:
    if not ports:
        yield Finding("RDMA", "note", "no device: between hosts, weights move over TCP")
    fix = "connect it, bring its interface up (ip link set … up) and, on InfiniBand, start a subnet manager"
    for port in ports:
        if port.up:
            yield Finding(f"NIC {port.name}", "ok", port.text)
        elif any(other.up for other in ports):
            yield Finding(f"NIC {port.name}", "note", port.text, fix)
        else:
            yield Finding(f"NIC {port.name}", "broken", f"{port.text}; no RDMA port is up", fix)


def _interface_findings(root: Path) -> Iterator[Finding]:
    interfaces = {
        folder.name: text_of(folder / "operstate")
        for folder in sorted((root / "sys/class/net").glob("*"))
        if folder.name != "lo" and text_of(folder / "operstate")
    }
    words = ", ".join(f"{name} {state}" for name, state in interfaces.items()) or "none but the loopback"
    if any(state in ("up", "unknown") for state in interfaces.values()):  # tunnels know no more than `unknown`
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
