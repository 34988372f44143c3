"""The distributions of this repository, discovered from `packages/**/pyproject.toml`."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ROOT / "packages"


@dataclass(frozen=True, slots=True)
class Package:
    """One distribution: `path` is its folder, `project` the `[project]` table of its `pyproject.toml`."""

    path: Path
    project: dict[str, Any]

    @property
    def name(self) -> str:
        """The distribution's name, `weft-nixl`."""
        return str(self.project["name"])

    @property
    def short(self) -> str:
        """The folder's name, `nixl`: what sessions and constraints files are called after."""
        return self.path.name

    @property
    def version(self) -> str:
        return str(self.project["version"])

    @property
    def import_name(self) -> str:
        """The one import package under `src/`."""
        (found,) = [child.name for child in (self.path / "src").iterdir() if (child / "__init__.py").is_file()]
        return found

    @property
    def siblings(self) -> list[str]:
        """Names of the distributions of this repository that it depends on, extras left out."""
        return [requirement.split("==")[0] for requirement in self.project["dependencies"] if is_sibling(requirement)]


def is_sibling(requirement: str) -> bool:
    return requirement.startswith("weft-")


def discover() -> list[Package]:
    """All distributions, weft-core first, then by path."""
    found = []
    for file in PACKAGES.glob("**/pyproject.toml"):
        found.append(Package(file.parent, tomllib.loads(file.read_text())["project"]))
    return sorted(found, key=lambda package: (package.name != "weft-core", package.path.relative_to(PACKAGES).parts))


def closure(package: Package) -> list[Package]:
    """`package` and the distributions of this repository that it needs, dependencies first."""
    by_name = {each.name: each for each in discover()}
    ordered: list[Package] = []

    def visit(name: str) -> None:
        for sibling in by_name[name].siblings:
            visit(sibling)
        if by_name[name] not in ordered:
            ordered.append(by_name[name])

    visit(package.name)
    return ordered
