"""`weft doctor`: on machines made of files, and with plug-ins that hang, die and raise."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

import pytest

from weft.diagnosis import Finding
from weft_cli.doctor import command, machine, torch_here, versions
from weft_cli.doctor.asking import ask

HEALTHY: Mapping[str, str] = {
    "sys/devices/pci0000:15/0000:15:01.0/0000:17:00.0/vendor": "0x10de\n",
    "sys/devices/pci0000:15/0000:15:01.0/0000:17:00.0/class": "0x030200\n",
    "sys/devices/pci0000:15/0000:15:01.0/0000:17:00.0/numa_node": "0\n",
    "sys/devices/pci0000:15/0000:15:02.0/0000:18:00.0/vendor": "0x15b3\n",
    "sys/devices/pci0000:15/0000:15:02.0/0000:18:00.0/class": "0x020700\n",
    "sys/devices/pci0000:15/0000:15:02.0/0000:18:00.0/numa_node": "0\n",
    "sys/class/infiniband/mlx5_0/ports/1/state": "4: ACTIVE\n",
    "sys/class/infiniband/mlx5_0/ports/1/rate": "400 Gb/sec (4X NDR)\n",
    "sys/class/infiniband/mlx5_0/ports/1/link_layer": "InfiniBand\n",
    "sys/class/net/eth0/operstate": "up\n",
    "sys/class/net/lo/operstate": "unknown\n",
    "sys/class/net/bonding_masters": "\n",
    "sys/module/nvidia_peermem/refcnt": "0\n",
    "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27 2025\n",
    "proc/driver/nvidia/gpus/0000:17:00.0/information": "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 18\n",
    "proc/self/limits": "Limit   Soft Limit  Hard Limit  Units\n"
    "Max open files            65536                65536                files     \n"
    "Max locked memory         unlimited            unlimited            bytes     \n",
    "dev/shm/.keep": "",
}
LINKS = {
    "sys/bus/pci/devices/0000:17:00.0": "sys/devices/pci0000:15/0000:15:01.0/0000:17:00.0",
    "sys/bus/pci/devices/0000:18:00.0": "sys/devices/pci0000:15/0000:15:02.0/0000:18:00.0",
    "sys/class/infiniband/mlx5_0/device": "sys/devices/pci0000:15/0000:15:02.0/0000:18:00.0",
}
Machine = Callable[..., Path]


@pytest.fixture
def made(tmp_path: Path) -> Machine:
    """Makes the folder of a machine: a healthy one with other files (None takes one away)."""

    def make(changes: Mapping[str, str | None] | None = None) -> Path:
        root = tmp_path / "machine"
        for name, text in {**HEALTHY, **(changes or {})}.items():
            if text is not None:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
        for name, target in LINKS.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).symlink_to(root / target)
        return root

    return make


def by_subject(findings: list[Finding]) -> dict[str, Finding]:
    found = {finding.subject: finding for finding in findings}
    assert len(found) == len(findings)
    return found


def test_a_healthy_machine_is_described_and_nothing_is_wrong(made: Machine) -> None:
    found = by_subject(machine.diagnose(made()))
    assert {finding.state for finding in found.values()} == {"ok"}
    assert found["GPU driver"].text == "580.65.06"
    assert found["GPU 0000:17:00.0"].text == "NVIDIA H100 80GB HBM3, NUMA node 0"
    assert found["NIC mlx5_0:1"].text == "4: ACTIVE, 400 Gb/sec (4X NDR), InfiniBand, NUMA node 0"
    assert found["interfaces"].text == "eth0 up"
    assert "nvidia_peermem" in found["peer memory"].text
    assert found["locked memory"].text == "unlimited at most"
    assert found["open files"].text == "65,536 at most"
    assert not any(finding.fix for finding in found.values())


def limits(files: str, locked: str) -> str:
    return f"Max open files  {files}  {files}  files\nMax locked memory  {locked}  {locked}  bytes\n"


@pytest.mark.parametrize(
    ("changes", "subject", "state", "words", "fix"),
    [
        ({"proc/driver/nvidia/version": None}, "GPU driver", "broken", "1 GPUs", "install NVIDIA's driver"),
        ({"sys/module/nvidia_peermem/refcnt": None}, "peer memory", "broken", "neither", "modprobe nvidia_peermem"),
        (
            {"sys/class/infiniband/mlx5_0/ports/1/state": "1: DOWN\n"},
            "NIC mlx5_0:1", "broken", "no RDMA port is up", "subnet manager",
        ),
        (
            {"sys/class/infiniband/mlx5_1/ports/1/state": "2: INIT\n"},
            "NIC mlx5_1:1", "note", "2: INIT, unknown rate", "subnet manager",
        ),
        ({"sys/class/net/eth0/operstate": "down\n"}, "interfaces", "note", "eth0 down", "ip link set"),
        ({"proc/self/limits": limits("65536", "65536")}, "locked memory", "broken", "65,536 bytes", "ulimit -l"),
        ({"proc/self/limits": limits("1024", "unlimited")}, "open files", "note", "1,024", "ulimit -n 65536"),
        ({"proc/self/limits": limits("256", "unlimited")}, "open files", "broken", "256", "ulimit -n 65536"),
        ({"proc/self/limits": "nothing of this"}, "limits", "note", "does not say", ""),
        ({"dev/shm/.keep": None}, "shared memory", "broken", "dev/shm", "mount"),
    ],
)  # fmt: skip
def test_one_fault_is_one_finding_with_its_remedy(
    made: Machine, changes: Mapping[str, str | None], subject: str, state: str, words: str, fix: str
) -> None:
    (finding,) = [finding for finding in machine.diagnose(made(changes)) if finding.state != "ok"]
    assert (finding.subject, finding.state) == (subject, state)
    assert words in finding.text
    assert fix in finding.fix
    assert "\n" not in finding.fix


def test_open_kernel_modules_need_no_peer_module(made: Machine) -> None:
    version = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
    root = made({"sys/module/nvidia_peermem/refcnt": None, "proc/driver/nvidia/version": version})
    found = by_subject(machine.diagnose(root))
    assert found["peer memory"].state == "ok"
    assert "dmabuf" in found["peer memory"].text
    assert found["GPU driver"].text == "580.65.06"


def test_a_machine_of_which_nothing_is_known_raises_nothing(tmp_path: Path) -> None:
    found = by_subject(machine.diagnose(tmp_path))
    assert found["GPU"].state == found["RDMA"].state == found["interfaces"].state == found["limits"].state == "note"


@pytest.mark.parametrize(("mib", "state"), [(64, "broken"), (65, "note"), (1023, "note"), (1024, "ok")])
def test_little_shared_memory_is_a_fault(mib: int, state: str) -> None:
    finding = machine.shared_memory(mib << 20)
    assert finding.state == state
    assert bool(finding.fix) == (state != "ok")


@pytest.mark.trap(30)
@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_expandable_segments_are_a_fault_where_there_is_no_pool(name: str) -> None:
    environment = {name: "max_split_size_mb:64, Expandable_Segments:True"}
    (finding,) = torch_here.expandable_segments(environment, classic_pools=False)
    assert finding.state == "broken"
    assert name in finding.text
    assert "pip install weft-cudamalloc" in finding.fix
    (finding,) = torch_here.expandable_segments(environment, classic_pools=True)
    assert finding.state == "note"
    (finding,) = torch_here.expandable_segments({name: "expandable_segments:False"}, classic_pools=False)
    assert finding.state == "ok"


@pytest.mark.skipif(torch_here.torch.version.cuda is not None, reason="torch has CUDA here")
def test_a_torch_without_cuda_on_a_machine_with_gpus_is_a_fault(made: Machine) -> None:
    found = by_subject(torch_here.diagnose(made()))
    assert found["torch"].state == "broken"
    assert "1 GPUs" in found["torch"].text


def test_what_a_member_here_would_tell_the_others_is_shown(tmp_path: Path) -> None:
    found = by_subject(torch_here.diagnose(tmp_path))
    assert f"torch {torch_here.torch.__version__}" in found["a member here"].text


def test_versions_of_weft_must_be_one() -> None:
    present = {"weft-core": "0.10.0", "weft-nixl": "0.9.0", "nixl-cu12": "1.5.1", "nvidia-nccl-cu13": "2.28", "six": ""}
    found = by_subject(versions.findings(present))
    assert list(found) == ["weft", "nixl-cu12", "nvidia-nccl-cu13"]
    assert found["weft"].state == "broken"
    assert "weft-nixl 0.9.0" in found["weft"].text
    assert found["weft"].fix == "pip install weft-core==0.10.0 weft-nixl==0.10.0"
    assert versions.findings({"weft-core": "0.1.0", "weft-cli": "0.1.0"}) == [Finding("weft", "ok", "0.1.0")]
    assert versions.installed()["msgspec"]


PLUGINS = """
import os, signal, time
from weft.diagnosis import Finding

def good(root):
    return [Finding("good", "ok", f"looked at {root}")]

def raises(root):
    raise ValueError("no such thing")

def wrong(root):
    return [Finding("wrong", "splendid", "a state that there is not")]

def hangs(root):
    time.sleep(3600)

def crashes(root):
    print("my last words", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)  # like SIGSEGV, but without a core dump, which may take long
"""
NAMES = ("raises", "wrong", "hangs", "crashes")


@pytest.fixture
def strange_plugins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Questions to plug-ins of a distribution, of which the first and the last are good."""
    metadata = tmp_path / "strange-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: strange\nVersion: 1.0\n")
    points = "".join(f"{name} = strange_plugins:{name}\n" for name in ("good", *NAMES))
    (metadata / "entry_points.txt").write_text(
        f"[weft.diagnoses]\n{points}zgood = strange_plugins:good\n[weft.adapters]\nstrange = strange_absent:adapter\n"
    )
    (tmp_path / "strange_plugins.py").write_text(PLUGINS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(tmp_path)
    return [f"weft.diagnoses:{name}" for name in ("good", *NAMES, "zgood")]


def test_what_raises_hangs_or_dies_is_named_and_all_others_answer(strange_plugins: list[str], tmp_path: Path) -> None:
    found = ask([*strange_plugins, "weft.adapters:strange"], tmp_path, seconds=10.0)
    assert (
        found["weft.diagnoses:good"]
        == found["weft.diagnoses:zgood"]
        == [Finding("good", "ok", f"looked at {tmp_path}")]
    )
    words = {
        "raises": "ValueError: no such thing",
        "wrong": "splendid",
        "hangs": "no answer within 10 s",
        "crashes": "died (SIGKILL): my last words",
    }
    for name in NAMES:
        (finding,) = found[f"weft.diagnoses:{name}"]
        assert (finding.subject, finding.state) == (name, "broken")
        assert words[name] in finding.text
        assert finding.fix
    (finding,) = found["weft.adapters:strange"]
    assert (finding.subject, finding.state) == ("adapter strange", "broken")
    assert "strange_absent" in finding.text


def test_a_process_that_cannot_start_is_one_finding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weft").mkdir()
    (tmp_path / "weft" / "__init__.py").write_text("raise ImportError('this weft is damaged')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    found = ask(["module:machine", "module:torch_here"], tmp_path, seconds=5.0)
    (finding,) = found["module:machine"]
    assert finding.state == "broken"
    assert "exit code 1" in finding.text
    assert "this weft is damaged" in finding.text
    assert found["module:torch_here"] == []


@pytest.fixture
def only_core(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out what else is installed here: engines, say."""
    everything = entry_points

    def of_core(*, group: str) -> list[EntryPoint]:
        return [point for point in everything(group=group) if point.dist and point.dist.name == "weft-core"]

    monkeypatch.setattr(command, "entry_points", of_core)


@pytest.mark.usefixtures("only_core")
def test_the_command_ends_with_1_exactly_when_something_is_broken(weft, made: Machine) -> None:
    root = made({name: None for name in HEALTHY if "pci" in name or "infiniband" in name or "nvidia" in name})
    code, out, _ = weft("doctor", "--json", "--root", root)
    report = json.loads(out)
    assert (code, report["broken"]) == (0, 0)
    found = {section["name"].split()[0]: section["findings"] for section in report["sections"]}
    assert list(found) == ["machine", "torch", "versions", "weft-core"]
    assert {"subject": "transport local", "state": "ok", "text": "loads", "fix": ""} in found["weft-core"]
    (root / "proc/self/limits").write_text(limits("99", "unlimited"))
    code, out, _ = weft("doctor", "--root", root)
    assert code == 1
    words = " ".join(out.split())
    assert "open files: ulimit -n 65536 " in words
    assert words.endswith("1 broken")


def test_a_plugin_is_listed_under_its_distribution(
    strange_plugins: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(questions: list[str], root: Path, seconds: float) -> dict[str, list[Finding]]:
        return {question: [Finding(question, "ok", "")] for question in questions}

    monkeypatch.setattr(command, "ask", answers)
    (section,) = [each for each in command.examine(tmp_path, seconds=5.0) if each.name == "strange 1.0"]
    assert [found.subject for found in section.findings] == ["weft.adapters:strange", *sorted(strange_plugins)]
