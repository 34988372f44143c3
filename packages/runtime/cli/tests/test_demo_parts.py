"""The parts of the demo that need no engine: reward, slices, channel, processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest
import torch

from weft.deadline import Deadline
from weft_cli.demo.processes import Child, ChildError, Family, answers, ask
from weft_cli.demo.reward import advantages, mean, token_rewards
from weft_cli.demo.sessions import end_session, members_of
from weft_cli.demo.slices import compare, expected_parameters

_HELPER = """
import mmap, os, subprocess, sys, time
from multiprocessing import shared_memory
from weft_cli.demo.channel import serve

def echo(text):
    return {"text": text, "process": os.getpid()}

def fail():
    raise ValueError("the cup is empty")

def sleep(seconds):
    time.sleep(seconds)

def share():
    block = shared_memory.SharedMemory(create=True, size=4096, track=False)
    keep.append(block)
    return {"name": block.name}

def leave():
    path = f"/dev/shm/weft-test-{os.getpid()}"
    with open(path, "wb+") as file:
        file.truncate(4096)
        keep.append(mmap.mmap(file.fileno(), 4096))
    return {"name": os.path.basename(path)}

def fork():
    return {"process": subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid}

keep = []
print("helper is up", flush=True)
serve({"echo": echo, "fail": fail, "sleep": sleep, "share": share, "leave": leave, "fork": fork})
"""


@pytest.fixture
def helper(tmp_path: Path) -> dict[str, str]:
    """The environment in which `python -m demo_helper` is a child that echoes, fails, sleeps, shares memory and
    forks.
    """
    source = _HELPER if sys.version_info >= (3, 13) else _HELPER.replace(", track=False", "")
    (tmp_path / "demo_helper.py").write_text(source)
    return {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}


def gone(process: int) -> bool:
    """Whether no such process runs; zombies do not run."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        stat = Path(f"/proc/{process}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_reward_reads_token_ids_only() -> None:
    rewards = token_rewards([[0, 1, 4], [2, 3, 8]])
    assert rewards == [[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert mean(rewards) == 0.5
    assert mean(advantages(rewards)) == 0.0


def test_children_answer_and_end_with_the_family(tmp_path: Path, helper: dict[str, str]) -> None:
    with Family(tmp_path) as family:
        children = [family.start(f"helper/{n}", "demo_helper", helper) for n in range(2)]
        found = ask(children, 60, "echo", text="ä" * 100_000)
        assert [answer["text"] for answer in found] == ["ä" * 100_000] * 2
    assert all(gone(answer["process"]) for answer in found)


@pytest.mark.trap(47)
def test_a_child_that_fails_is_named_with_the_end_of_its_log(tmp_path: Path, helper: dict[str, str]) -> None:
    with (
        pytest.raises(ChildError, match=r"(?s)cook died \(exit code 1\).*the cup is empty"),
        Family(tmp_path) as family,
    ):
        ask([family.start("cook", "demo_helper", helper)], 60, "fail")


@pytest.mark.trap(40)
def test_a_silent_child_is_named_when_the_deadline_passes(tmp_path: Path, helper: dict[str, str]) -> None:
    with Family(tmp_path) as family:
        child = family.start("cook", "demo_helper", helper)
        ask([child], 60, "echo", text="up")
        child.send("sleep", seconds=2)
        with pytest.raises(ChildError, match=r"cook is late: sleep: not within 0\.2 s"):
            answers([child], 0.2, "sleep")
    assert gone(child.process.pid)


def test_shared_memory_of_a_child_that_ends_in_peace_is_removed(tmp_path: Path, helper: dict[str, str]) -> None:
    with Family(tmp_path) as family:
        shared = ask([family.start("cook", "demo_helper", helper)], 60, "leave")[0]["name"]
        assert Path("/dev/shm", shared).exists()
    assert not Path("/dev/shm", shared).exists()


def leave_a_frozen_child(directory: Path, environment: dict[str, str]) -> None:
    """Start a child that shares memory and forks, freeze it, note what it made in `directory`, and be interrupted."""
    with Family(directory) as family:
        child = family.start("cook", "demo_helper", environment)
        shared = ask([child], 60, "share")[0]["name"]
        grandchild = ask([child], 60, "fork")[0]["process"]
        assert Path("/dev/shm", shared).exists()
        (directory / "made").write_text(f"{child.process.pid} {grandchild} {shared}")
        os.kill(child.process.pid, signal.SIGSTOP)  # it cannot end by itself
        raise KeyboardInterrupt


def test_ending_takes_grandchildren_and_shared_memory(tmp_path: Path, helper: dict[str, str]) -> None:
    with pytest.raises(KeyboardInterrupt):
        leave_a_frozen_child(tmp_path, helper)
    process, grandchild, shared = (tmp_path / "made").read_text().split()
    assert gone(int(process))
    assert gone(int(grandchild))
    assert not Path("/dev/shm", shared).exists()
    assert members_of(int(process)) == []


def test_children_end_when_the_parent_is_killed(tmp_path: Path, helper: dict[str, str]) -> None:
    parent = (
        "import pathlib, sys, time\n"
        "from weft_cli.demo.processes import Family, ask\n"
        "with Family(pathlib.Path(sys.argv[1])) as family:\n"
        "    child = family.start('cook', 'demo_helper', {})\n"
        "    ask([child], 60, 'fork')\n"
        "    child.send('sleep', seconds=600)\n"
        "    print(child.process.pid, flush=True)\n"
        "    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", parent, str(tmp_path)], stdout=subprocess.PIPE, env={**os.environ, **helper}
    )
    assert process.stdout is not None
    session = int(process.stdout.readline())
    try:
        assert len(members_of(session)) >= 2
        process.kill()
        process.wait(10)
        until = time.monotonic() + 10
        while members_of(session) and time.monotonic() < until:
            time.sleep(0.05)
        assert members_of(session) == []
    finally:
        process.stdout.close()
        end_session(session, 1.0)


def test_memory_that_the_session_did_not_map_is_left_alone(tmp_path: Path, helper: dict[str, str]) -> None:
    other = shared_memory.SharedMemory(create=True, size=64)
    try:
        with Family(tmp_path) as family:
            ask([family.start("cook", "demo_helper", helper)], 60, "share")
        assert Path("/dev/shm", other.name).exists()
    finally:
        other.close()
        other.unlink()


def state() -> dict[str, torch.Tensor]:
    """A one-layer Qwen3 whose elements are all different."""
    shapes = {
        "model.embed_tokens.weight": (100, 8),
        "model.layers.0.input_layernorm.weight": (8,),
        "model.layers.0.self_attn.q_proj.weight": (16, 8),
        "model.layers.0.self_attn.k_proj.weight": (8, 8),
        "model.layers.0.self_attn.v_proj.weight": (8, 8),
        "model.layers.0.self_attn.q_norm.weight": (4,),
        "model.layers.0.self_attn.o_proj.weight": (8, 16),
        "model.layers.0.mlp.gate_proj.weight": (12, 8),
        "model.layers.0.mlp.up_proj.weight": (12, 8),
        "model.layers.0.mlp.down_proj.weight": (8, 12),
        "model.norm.weight": (8,),
        "lm_head.weight": (100, 8),
    }
    made, start = {}, 1.0
    for name, shape in shapes.items():
        numel = torch.Size(shape).numel()
        made[name] = torch.arange(start, start + numel).view(shape)
        start += numel
    return made


@pytest.mark.trap(4, 5, 14)
def test_slices_fuse_per_rank_and_pad_the_vocabulary_with_zeros() -> None:
    whole = state()
    second = expected_parameters(whole, 1, 2)
    layer = "model.layers.0"
    assert second["lm_head.weight"].shape == (64, 8)
    assert torch.equal(second["lm_head.weight"][:36], whole["lm_head.weight"][64:])
    assert not second["lm_head.weight"][36:].any()
    fused = second[f"{layer}.self_attn.qkv_proj.weight"]
    assert torch.equal(fused[:8], whole[f"{layer}.self_attn.q_proj.weight"][8:])
    assert torch.equal(fused[8:12], whole[f"{layer}.self_attn.k_proj.weight"][4:])
    assert torch.equal(fused[12:], whole[f"{layer}.self_attn.v_proj.weight"][4:])
    gated = second[f"{layer}.mlp.gate_up_proj.weight"]
    assert torch.equal(gated, torch.cat([whole[f"{layer}.mlp.{part}_proj.weight"][6:] for part in ("gate", "up")]))
    assert torch.equal(second[f"{layer}.mlp.down_proj.weight"], whole[f"{layer}.mlp.down_proj.weight"][:, 6:])
    assert len(second) == 9


def test_slices_of_experts_are_stacked_before_they_are_packed() -> None:
    mlp = "model.layers.0.mlp"
    whole = {f"{mlp}.gate.weight": torch.rand(3, 8)}
    for expert in range(3):
        whole |= {f"{mlp}.experts.{expert}.{part}_proj.weight": torch.rand(4, 8) for part in ("gate", "up")}
        whole |= {f"{mlp}.experts.{expert}.down_proj.weight": torch.rand(8, 4)}
    second = expected_parameters(whole, 1, 2)
    assert second.keys() == {f"{mlp}.gate.weight", *(f"{mlp}.experts.routed_experts.w{n}_weight" for n in ("13", "2"))}
    assert torch.equal(second[f"{mlp}.gate.weight"], whole[f"{mlp}.gate.weight"])
    for expert in range(3):
        gate, up, down = (whole[f"{mlp}.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down"))
        assert torch.equal(second[f"{mlp}.experts.routed_experts.w13_weight"][expert], torch.cat([gate[2:], up[2:]]))
        assert torch.equal(second[f"{mlp}.experts.routed_experts.w2_weight"][expert], down[:, 2:])


def test_one_flipped_byte_is_found_and_named() -> None:
    expected = expected_parameters(state(), 0, 2)
    found = {name: tensor.clone() for name, tensor in expected.items()}
    assert compare(expected, found, 0).mismatched_parameters == ()
    found["model.norm.weight"].view(torch.uint8)[5] ^= 1
    outcome = compare(expected, found, 0)
    assert outcome.mismatched_bytes == 1
    assert outcome.mismatched_parameters == ("rank 0: model.norm.weight: 1 of 32 bytes differ",)
    assert outcome.compared_bytes == sum(tensor.numel() * 4 for tensor in expected.values())


@pytest.mark.trap(13)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found.pop("lm_head.weight"), "the engine does not have it"),
        (lambda found: found.update({"lm_head.weight": torch.empty(0)}), "has no elements"),
        (lambda found: found.update({"extra": torch.ones(1)}), "the reference does not have it"),
        (lambda found: found.update({"lm_head.weight": torch.ones(3, 8)}), "not torch.float32(64, 8)"),
    ],
)
def test_a_parameter_that_cannot_be_compared_is_a_failure(change, words: str) -> None:  # type: ignore[no-untyped-def]
    expected = expected_parameters(state(), 0, 2)
    found = dict(expected)
    change(found)
    (fault,) = compare(expected, found, 0).mismatched_parameters
    assert words in fault


def test_a_command_to_a_dead_child_names_it(tmp_path: Path, helper: dict[str, str]) -> None:
    child = Child("cook", "demo_helper", tmp_path / "cook.log", helper)
    child.process.kill()
    child.process.wait(10)
    with pytest.raises(ChildError, match="cook"):
        ask([child], 10, "echo", text="?")
    child.request_stop()
    child.end(Deadline.after(0.0))
