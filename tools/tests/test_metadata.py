"""What every distribution's metadata keeps to."""

from __future__ import annotations

import pytest

from bump import faults
from distributions import ROOT, Package, discover

ENGINES = ("megatron", "nixl", "ray", "torchvision", "triton", "vllm")

every_package = pytest.mark.parametrize("package", discover(), ids=lambda package: package.name)


@every_package
def test_name_follows_the_folder(package: Package):
    assert package.name == f"weft-{package.short}"
    assert package.import_name == ("weft" if package.short == "core" else f"weft_{package.short}")


@every_package
def test_no_engine_is_forced(package: Package):
    for requirement in package.project["dependencies"]:
        assert not requirement.startswith(ENGINES)


@every_package
def test_typed_tested_licensed(package: Package):
    assert (package.path / "src" / package.import_name / "py.typed").is_file()
    assert "test" in package.project["optional-dependencies"]
    assert package.project["license"] == "Apache-2.0"
    assert (package.path / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert package.project["requires-python"] == ">=3.11"


def test_versions_move_in_lockstep():
    assert faults(discover()) == []


def test_a_broken_lockstep_is_named(tmp_path):
    core = Package(tmp_path / "core", {"name": "weft-core", "version": "0.2.0"})
    other = Package(
        tmp_path / "gloo",
        {"name": "weft-gloo", "version": "0.1.0", "dependencies": ["weft-core==0.1.0", "weft-no==0.2.0"]},
    )
    assert faults([core, other]) == [
        "weft-gloo has version 0.1.0, weft-core has 0.2.0",
        "weft-gloo requires 'weft-core==0.1.0', expected weft-core==0.2.0",
        "weft-gloo requires weft-no, which is not in this repository",
    ]
