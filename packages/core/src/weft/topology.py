"""What Linux's sysfs says of this host's GPUs and network devices: where they sit, and which of them are up."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SYSFS = Path("/sys")
_PCI_ADDRESS = re.compile(r"[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_GPU_CLASSES = ("0x0300", "0x0302")  # VGA and 3D controllers, linux/pci_ids.h
_GPU_VENDOR = "0x10de"  # NVIDIA
_UP = ("up", "unknown")  # operstate of interfaces that carry traffic; `lo` and tunnels know no more


@dataclass(frozen=True, slots=True)
class Place:
    """Where a device sits."""

    path: tuple[str, ...] = ()
    """From its root complex through every bridge to the device itself; empty for what is not on PCI."""
    numa: int = -1
    """NUMA node; -1 when the machine does not say."""


@dataclass(frozen=True, slots=True)
class Nic:
    """A network device as UCX names it: a port of an RDMA device such as `mlx5_0:1`, or an interface such as `eth0`."""

    name: str
    rdma: bool
    state: str
    """In the kernel's words: `4: ACTIVE`, `1: DOWN`, `up`, `down`."""
    up: bool
    rate: str
    """Of an RDMA port, in the kernel's words: `400 Gb/sec (4X NDR)`; empty when it does not say, and for interfaces."""
    link: str
    """Of an RDMA port: `InfiniBand` or `Ethernet`."""
    place: Place

    @property
    def gigabits(self) -> float:
        """Of an RDMA port, per second; 0 when it does not say."""
        return float(self.rate.split()[0]) if self.rate else 0.0


@dataclass(frozen=True, slots=True)
class Topology:
    """A host."""

    gpus: dict[str, Place]
    """By PCI address."""
    nics: tuple[Nic, ...]


def read_topology(sysfs: Path = SYSFS) -> Topology:
    """The host as `sysfs` describes it, in order of PCI addresses and names, which is equal for all its processes."""
    return Topology(dict(_gpus(sysfs)), (*_rdma_ports(sysfs), *_interfaces(sysfs)))


def _gpus(sysfs: Path) -> Iterator[tuple[str, Place]]:
    for device in sorted((sysfs / "bus/pci/devices").glob("*")):
        if text_of(device / "vendor") == _GPU_VENDOR and text_of(device / "class").startswith(_GPU_CLASSES):
            yield device.name, _place(device)


def _rdma_ports(sysfs: Path) -> Iterator[Nic]:
    for port in sorted((sysfs / "class/infiniband").glob("*/ports/*")):
        device = port.parents[1]
        state = text_of(port / "state")
        yield Nic(
            name=f"{device.name}:{port.name}", rdma=True, state=state, up=state.endswith("ACTIVE"),
            rate=text_of(port / "rate"), link=text_of(port / "link_layer"), place=_place(device / "device"),
        )  # fmt: skip


def _interfaces(sysfs: Path) -> Iterator[Nic]:
    for interface in sorted((sysfs / "class/net").glob("*")):
        state = text_of(interface / "operstate")
        if state:  # what else lies in this folder, such as `bonding_masters`, is no interface
            yield Nic(interface.name, False, state, state in _UP, "", "", _place(interface / "device"))


def _place(device: Path) -> Place:
    """Of a link into `devices`; interfaces without hardware have none."""
    if not device.exists():
        return Place()
    real = device.resolve()
    path = tuple(part for part in real.parts if part.startswith("pci") or _PCI_ADDRESS.fullmatch(part))
    numa = text_of(real / "numa_node")
    return Place(path, int(numa) if numa else -1)


def text_of(file: Path) -> str:
    """Contents of an attribute; empty where the kernel has none or gives none now, as for the speed of what is down."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
