"""Which NICs a member uses, on hosts described as sysfs describes them; and what UCX is then told."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.errors import ConfigError
from weft.member import Member
from weft.topology import Nic, Place, Topology, read_topology
from weft_nixl import NixlOptions, nics
from weft_nixl.environment import imposed, report, ucx_variables
from weft_nixl.nics import check_nics, choose_nics, nearest_nics

CPU, GPU = (Member("a", None, None, None, 0, "here", "here", device) for device in ("cpu", "cuda:1"))


class Sysfs:
    """A tree as the kernel makes it: devices under `devices`, and links to them from `class` and `bus`."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def device(self, path: str, numa: int = 0, **attributes: str) -> Path:
        """A PCI device at `pci0000:17/0000:17:01.0/…`, which is linked from `bus/pci/devices`."""
        folder = self.root / "devices" / path
        folder.mkdir(parents=True)
        write(folder, numa_node=str(numa), **attributes)
        link(self.root / "bus/pci/devices" / folder.name, folder)
        return folder

    def gpu(self, path: str, numa: int = 0) -> None:
        self.device(path, numa, vendor="0x10de", **{"class": "0x030200"})

    def rdma(self, name: str, path: str, numa: int = 0, **ports: str) -> None:
        """`p1="4: ACTIVE/400 Gb/sec (4X NDR)"` is the state and the rate of port 1."""
        device = self.device(path, numa, vendor="0x15b3", **{"class": "0x020700"})
        for number, words in ports.items():
            state, rate = words.split("/", 1)
            port = device / "infiniband" / name / "ports" / number.removeprefix("p")
            port.mkdir(parents=True)
            write(port, state=state, rate=rate)
        link(device / "infiniband" / name / "device", device)
        link(self.root / "class/infiniband" / name, device / "infiniband" / name)

    def interface(self, name: str, state: str, path: str = "virtual/net") -> None:
        folder = self.root / "devices" / path / "net" / name
        folder.mkdir(parents=True)
        write(folder, operstate=state)
        if path != "virtual/net":
            link(folder / "device", self.root / "devices" / path)
        link(self.root / "class/net" / name, folder)


def write(folder: Path, **attributes: str) -> None:
    for name, text in attributes.items():
        (folder / name).write_text(f"{text}\n")


def link(at: Path, to: Path) -> None:
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(os.path.relpath(to, at.parent))


ACTIVE = "4: ACTIVE/400 Gb/sec (4X NDR)"


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    """Two sockets with two switches each; two GPUs under every switch, with two, one and no NICs beside them."""
    tree = Sysfs(tmp_path)
    for root, numa in (("17", 0), ("3d", 0), ("97", 1), ("bd", 1)):
        for slot in ("1", "2"):
            tree.gpu(f"pci0000:{root}/0000:{root}:01.0/0000:{root}:0{slot}.1/0000:{root}:1{slot}.0", numa)
    tree.rdma("mlx5_0", "pci0000:17/0000:17:01.0/0000:17:03.0/0000:17:23.0", 0, p1=ACTIVE)
    tree.rdma("mlx5_1", "pci0000:17/0000:17:01.0/0000:17:04.0/0000:17:24.0", 0, p1=ACTIVE)
    tree.rdma("mlx5_2", "pci0000:3d/0000:3d:01.0/0000:3d:03.0/0000:3d:23.0", 0, p1="1: DOWN/400 Gb/sec (4X NDR)")
    tree.rdma("mlx5_3", "pci0000:97/0000:97:01.0/0000:97:03.0/0000:97:23.0", 1, p1="2: INIT/10 Gb/sec", p2=ACTIVE)
    tree.rdma("mlx5_4", "pci0000:97/0000:97:01.0/0000:97:04.0/0000:97:24.0", 1, p1="4: ACTIVE/25 Gb/sec (1X EDR)")
    tree.interface("eth0", "up", "pci0000:97/0000:97:01.0/0000:97:04.0/0000:97:24.0")
    tree.interface("eth1", "down")
    tree.interface("lo", "unknown")
    return tree


def test_a_host_is_read_with_its_places_and_states(sysfs: Sysfs) -> None:
    (sysfs.root / "class/net/bonding_masters").write_text("")
    sysfs.device("pci0000:00/0000:00:02.0", vendor="0x8086", **{"class": "0x030000"})
    host = read_topology(sysfs.root)
    assert list(host.gpus) == [f"0000:{root}:1{slot}.0" for root in ("17", "3d", "97", "bd") for slot in "12"]
    path = ("pci0000:97", "0000:97:01.0", "0000:97:01.1", "0000:97:11.0")
    assert host.gpus["0000:97:11.0"] == Place(path, 1)
    found = {nic.name: nic for nic in host.nics}
    up = [name for name, nic in found.items() if nic.up]
    assert up == ["mlx5_0:1", "mlx5_1:1", "mlx5_3:2", "mlx5_4:1", "eth0", "lo"]
    assert (found["mlx5_2:1"].state, found["mlx5_2:1"].gigabits) == ("1: DOWN", 400.0)
    assert found["eth0"].place == Place(found["mlx5_4:1"].place.path, 1)
    assert found["lo"].place == Place()


def test_this_host_is_read_as_well() -> None:
    names = [nic.name for nic in read_topology().nics]
    assert "lo" in names
    assert read_topology(Path("/nowhere")) == Topology({}, ())


@pytest.mark.trap(32)
def test_the_nearest_ports_that_are_up_are_balanced_over_the_gpus(sysfs: Sysfs) -> None:
    chosen = nearest_nics(read_topology(sysfs.root))
    assert {gpu[5:7]: names for gpu, names in chosen.items() if gpu[5:7] != "17"} == {
        "3d": ("mlx5_0:1",) if chosen["0000:3d:12.0"] == ("mlx5_0:1",) else ("mlx5_1:1",),  # same socket
        "97": ("mlx5_3:2",),  # its second port, and not the slow one beside it
        "bd": ("mlx5_3:2",),
    }
    users = Counter(names for gpu, names in chosen.items() if gpu[5:7] in ("17", "3d"))
    assert users == {("mlx5_0:1",): 2, ("mlx5_1:1",): 2}, "the GPUs of one socket share two ports evenly"
    assert {chosen["0000:17:11.0"], chosen["0000:17:12.0"]} == {("mlx5_0:1",), ("mlx5_1:1",)}


def test_several_rails_take_the_next_nearest(sysfs: Sysfs) -> None:
    host = read_topology(sysfs.root)
    chosen = nearest_nics(host, 2)
    assert {frozenset(names) for gpu, names in chosen.items() if gpu[5:7] in ("17", "3d")} == {
        frozenset({"mlx5_0:1", "mlx5_1:1"})
    }
    assert {names[0] for gpu, names in chosen.items() if gpu[5:7] == "97"} == {"mlx5_3:2"}
    with pytest.raises(ConfigError, match="rails=4, but the RDMA ports of this host that are up are mlx5_0:1, "):
        nearest_nics(host, 4)


trees = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=8)


@settings(deadline=None)
@given(gpus=trees, ports=trees)
def test_no_gpu_has_a_farther_port_than_it_must_and_no_port_more_gpus_than_it_must(
    gpus: list[tuple[int, int, int]], ports: list[tuple[int, int, int]]
) -> None:
    def place(way: tuple[int, int, int], own: str) -> Place:
        return Place((f"pci{way[0]}", f"{way[:2]}", f"{way}", own), way[0])

    host = Topology(
        {f"gpu{i}": place(way, f"gpu{i}") for i, way in enumerate(gpus)},
        tuple(
            Nic(f"nic{i}", True, "4: ACTIVE", True, "400 Gb/sec", "InfiniBand", place(way, f"nic{i}"))
            for i, way in enumerate(ports)
        ),
    )
    chosen = nearest_nics(host)
    near: dict[str, list[str]] = {}
    for i, way in enumerate(gpus):
        shared = [next((k for k in range(3) if way[k] != port[k]), 3) for port in ports]
        near[f"gpu{i}"] = [f"nic{j}" for j, depth in enumerate(shared) if depth == max(shared)]
        assert chosen[f"gpu{i}"][0] in near[f"gpu{i}"]
    most = max(Counter(names[0] for names in chosen.values()).values())
    sets = [frozenset(names) for names in near.values()]
    crowded = [one for one in sets if sum(each <= one for each in sets) > (most - 1) * len(one)]
    assert crowded, f"{most} GPUs share a port, though all could have a nearest one shared by fewer"


@pytest.mark.trap(32)
def test_devices_that_are_not_there_or_down_are_refused_all_at_once(sysfs: Sysfs) -> None:
    host = read_topology(sysfs.root)
    assert check_nics(["mlx5_3", "eth0", "lo", "mlx5_4:1"], host) == ("mlx5_3:2", "eth0", "lo", "mlx5_4:1")
    with pytest.raises(ConfigError) as error:
        check_nics(["mlx5_2:1", "mlx5_2", "eth1", "mlx5_9"], host)
    assert str(error.value).count("is not up") == 3
    assert "no network device 'mlx5_9'; up are mlx5_0:1" in str(error.value)


def test_what_is_named_comes_before_what_is_near(
    sysfs: Sysfs, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nics, "pci_address", lambda device: {1: "0000:97:11.0", 2: "0000:ff:00.0"}[device.index])
    named = Member("a", None, None, None, 0, "here", "here", "cuda:1", nics=("eth0",))
    assert choose_nics(NixlOptions(nics=("mlx5_1",)), named, sysfs.root) == ("mlx5_1:1",)
    assert choose_nics(NixlOptions(), named, sysfs.root) == ("eth0",)
    assert choose_nics(NixlOptions(), GPU, sysfs.root) == ("mlx5_3:2",)
    assert choose_nics(NixlOptions(choose_nics="ucx"), GPU, sysfs.root) == ()
    assert choose_nics(NixlOptions(), CPU, sysfs.root) == ()
    assert caplog.messages == []
    unlisted = Member("a", None, None, None, 0, "here", "here", "cuda:2")
    assert choose_nics(NixlOptions(), unlisted, sysfs.root) == ()
    assert "does not list GPU 0000:ff:00.0" in caplog.messages[0]


@pytest.mark.trap(32)
def test_a_host_whose_rdma_ports_are_all_down_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tree = Sysfs(tmp_path)
    tree.rdma("mlx5_0", "pci0000:17/0000:17:01.0", p1="1: DOWN/10 Gb/sec")
    assert choose_nics(NixlOptions(), GPU, tmp_path) == ()
    assert "no RDMA device of this host is up (mlx5_0:1 is 1: DOWN)" in caplog.messages[0]


def test_the_address_of_a_gpu_is_written_as_sysfs_does(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        pci_domain_id, pci_bus_id, pci_device_id = 0, 0x3D, 0

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    assert nics.pci_address(torch.device("cuda:0")) == "0000:3d:00.0"


def test_ucx_is_told_its_devices_one_rail_each_and_what_the_settings_say() -> None:
    assert ucx_variables(NixlOptions(), ()) == {}
    assert ucx_variables(NixlOptions(), ("a:1",)) == {"UCX_NET_DEVICES": "a:1"}
    three = ("a:1", "b:1", "c:1")
    rails = {"UCX_MAX_RMA_RAILS": "3", "UCX_MAX_RNDV_RAILS": "3"}
    assert ucx_variables(NixlOptions(), three) == {"UCX_NET_DEVICES": "a:1,b:1,c:1", **rails}
    own = NixlOptions(ucx_settings={"MAX_RMA_RAILS": 1, "TLS": "rc,cuda_copy"})
    assert ucx_variables(own, three) == {
        "UCX_NET_DEVICES": "a:1,b:1,c:1", **rails, "UCX_MAX_RMA_RAILS": "1", "UCX_TLS": "rc,cuda_copy",
    }  # fmt: skip


@pytest.mark.trap(32)
def test_preset_variables_are_reported_whether_they_count_or_not(caplog: pytest.LogCaptureFixture) -> None:
    environment = {"UCX_NET_DEVICES": "mlx5_9:1", "UCX_TLS": "tcp", "UCX_MAX_RMA_RAILS": "2", "HOME": "/root"}
    report({"UCX_NET_DEVICES": "mlx5_0:1", "UCX_MAX_RMA_RAILS": "2"}, environment)
    assert caplog.record_tuples == [
        ("weft_nixl.environment", logging.WARNING, text)
        for text in (
            "transport 'nixl' uses UCX_NET_DEVICES=mlx5_0:1, not mlx5_9:1 of the environment",
            "transport 'nixl' obeys UCX_TLS=tcp of the environment",
        )
    ]


@pytest.mark.trap(32)
def test_the_environment_is_as_before_after_an_agent_even_one_that_failed() -> None:
    environment = {"UCX_NET_DEVICES": "mlx5_9:1", "HOME": "/root"}
    before: Mapping[str, str] = dict(environment)
    wanted = {"UCX_NET_DEVICES": "lo", "UCX_TLS": "tcp"}
    inside: list[dict[str, str]] = []

    def fail() -> None:
        with imposed(wanted, environment):
            inside.append(dict(environment))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == [{**before, **wanted}]
    assert environment == before
