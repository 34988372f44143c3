"""What `weft doctor` is told about NIXL here."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import TransportError
from weft.topology import Nic, Place, Topology
from weft_nixl import NixlTransport
from weft_nixl.diagnosis import diagnose, nearest_devices, preset_variables, ucx_version


def test_memory_registers_and_ucx_has_a_version() -> None:
    found = {finding.subject: finding for finding in diagnose(Path("/"))}
    assert (found["NIXL on cpu"].state, found["NIXL on cpu"].text) == ("ok", "memory registers")
    assert found["UCX"].text[0].isdigit()
    assert list(ucx_version("7f00-7f10 r-xp 00000000 08:01 11 /usr/lib/libc.so.6\n")) == []


def test_a_nixl_that_does_not_work_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: NixlTransport, member: object) -> None:
        raise TransportError("no backend at all")

    monkeypatch.setattr(NixlTransport, "open", fails)
    finding = diagnose(Path("/"))[0]
    assert (finding.state, finding.text) == ("broken", "no backend at all")
    assert finding.fix


@pytest.mark.trap(32)
def test_preset_variables_are_listed() -> None:
    (finding,) = preset_variables({"UCX_TLS": "tcp", "HOME": "/root", "UCX_NET_DEVICES": "mlx5_9:1"})
    assert (finding.state, finding.text) == ("note", "UCX_NET_DEVICES=mlx5_9:1, UCX_TLS=tcp")
    assert preset_variables({"HOME": "/root"}) == []


def test_the_port_that_a_gpu_uses_and_how_near_it_is_are_told() -> None:
    def port(name: str, place: Place, up: bool = True) -> Nic:
        return Nic(name, True, "4: ACTIVE" if up else "1: DOWN", up, "400 Gb/sec", "InfiniBand", place)

    gpus = {
        "0000:17:00.0": Place(("pci0000:15", "0000:15:01.0", "0000:16:00.0", "0000:17:00.0"), 0),
        "0000:27:00.0": Place(("pci0000:25", "0000:25:01.0", "0000:27:00.0"), 0),
        "0000:97:00.0": Place(("pci0000:95", "0000:95:01.0", "0000:97:00.0"), 1),
    }
    ports = (
        port("mlx5_0:1", Place(("pci0000:15", "0000:15:01.0", "0000:18:00.0"), 0)),
        port("mlx5_1:1", Place(("pci0000:25", "0000:25:02.0", "0000:28:00.0"), 0)),
        port("mlx5_2:1", Place(("pci0000:95", "0000:95:01.0", "0000:98:00.0"), 1), up=False),
    )
    told = {finding.subject: finding for finding in nearest_devices(Topology(gpus, ports))}
    assert told["GPU 0000:17:00.0"].text == "uses mlx5_0:1 of the same PCI bridge"
    assert told["GPU 0000:27:00.0"].text == "uses mlx5_1:1 of the same root complex"
    assert told["GPU 0000:97:00.0"].state == "note"
    assert told["GPU 0000:97:00.0"].text.endswith(" of another NUMA node")
    (finding,) = nearest_devices(Topology({"0000:17:00.0": Place((), 0)}, (port("mlx5_0:1", Place((), 0)),)))
    assert (finding.state, finding.text) == ("ok", "uses mlx5_0:1 of its NUMA node")
    assert list(nearest_devices(Topology(gpus, ports[2:]))) == []
    assert list(nearest_devices(Topology({}, ports))) == []
