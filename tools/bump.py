"""Moves the version of all distributions together, with the pins between them.

python3 tools/bump.py 0.2.0      set it everywhere
python3 tools/bump.py --check    exit 1 unless all versions and sibling pins are one
"""

from __future__ import annotations

import argparse
import re
import sys

from distributions import Package, discover, is_sibling

VERSION = r"\d+\.\d+\.\d+(?:(?:a|b|rc)\d+|\.dev\d+)?"


def faults(packages: list[Package]) -> list[str]:
    """Where the lockstep is broken, one sentence each."""
    core, names = packages[0].version, {package.name for package in packages}
    found = []
    for package in packages:
        if package.version != core:
            found.append(f"{package.name} has version {package.version}, weft-core has {core}")
        extras = package.project.get("optional-dependencies", {})
        for requirement in [
            *package.project.get("dependencies", []),
            *(each for extra in extras.values() for each in extra),
        ]:
            if not is_sibling(requirement):
                continue
            name = re.split(r"[\[=<>~! ]", requirement)[0]
            if name not in names:
                found.append(f"{package.name} requires {name}, which is not in this repository")
            elif not requirement.endswith(f"=={core}"):
                found.append(f"{package.name} requires {requirement!r}, expected {name}=={core}")
    return found


def bump(packages: list[Package], version: str) -> None:
    """Rewrites `version = ` and every sibling pin."""
    for package in packages:
        file = package.path / "pyproject.toml"
        text = re.sub(r'(?m)^version = "[^"]*"$', f'version = "{version}"', file.read_text(), count=1)
        text = re.sub(r'"(weft-[a-z0-9-]+(?:\[[a-z0-9,-]+\])?)==[^"]*"', rf'"\1=={version}"', text)
        file.write_text(text)
        print(file.relative_to(package.path.parent.parent))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("version", nargs="?", help="the new version, as 0.2.0, 0.2.0rc1 or 0.2.0.dev1")
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 unless all are in lockstep")
    arguments = parser.parse_args()
    if arguments.check == bool(arguments.version):
        parser.error("give a version, or --check")
    if arguments.version:
        if not re.fullmatch(VERSION, arguments.version):
            parser.error(f"{arguments.version!r} is no version: expected something like 0.2.0")
        bump(discover(), arguments.version)
    found = faults(discover())
    for fault in found:
        print(fault, file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
