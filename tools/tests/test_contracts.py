"""The import contracts name every distribution, in the layer of its folder."""

from __future__ import annotations

import tomllib

from distributions import PACKAGES, ROOT, Package, discover

ADAPTERS, RUNTIME = {"adapters"}, {"runtime"}
PLUG_INS = {"transports", "stores", "allocators", "encodings", "moe"}


def layer(package: Package) -> int:
    """0 runtime, 1 adapters, 2 plug-ins, 3 core: the order of import-linter."""
    group = package.path.relative_to(PACKAGES).parts[0]
    return next(index for index, groups in enumerate((RUNTIME, ADAPTERS, PLUG_INS, {"core"})) if group in groups)


def settings() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]


def test_contracts_name_exactly_the_packages_of_the_tree():
    assert sorted(settings()["root_packages"]) == sorted(package.import_name for package in discover())


def test_every_package_stands_in_the_layer_of_its_folder():
    (layers,) = [contract["layers"] for contract in settings()["contracts"] if contract["type"] == "layers"]
    for package in discover():
        assert package.import_name in layers[layer(package)].split(" | ")
    assert sum(len(each.split(" | ")) for each in layers) == len(discover())


def test_no_source_folder_is_left_out():
    sources = {folder.parent.parent for folder in PACKAGES.glob("**/src/*/__init__.py") for folder in [folder.parent]}
    assert sources == {package.path for package in discover()}
