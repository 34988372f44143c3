"""Checks that the installed distributions offer exactly the entry points declared here, and that each loads.

Run where the built wheels, every engine, and the example of `integration-tests/third_party` are installed.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution

from distributions import Package, discover
from weft.plugins import GROUPS
from weft.plugins import discover as plugins


def entry_point_faults(package: Package) -> list[str]:
    """What is wrong with the entry points of one distribution of weft."""
    declared = {
        (group, name, value)
        for group, points in package.project.get("entry-points", {}).items()
        for name, value in points.items()
    }
    declared |= {("console_scripts", name, value) for name, value in package.project.get("scripts", {}).items()}
    installed = distribution(package.name)
    offered = {(point.group, point.name, point.value): point for point in installed.entry_points}
    faults = []
    if offered.keys() != declared:
        faults.append(f"{package.name} offers {sorted(offered)}, its pyproject.toml declares {sorted(declared)}")
    where = str(installed.locate_file(package.import_name))
    if "site-packages" not in where:
        faults.append(f"{package.name} is not installed from a wheel but from {where}")
    if (package.path / "build_hook.py").is_file() and not any(file.suffix == ".so" for file in installed.files or ()):
        faults.append(f"{package.name} has a build hook that compiles, and nothing compiled in its wheel")
    for (group, name, value), point in sorted(offered.items()):
        try:
            point.load()
        except Exception as error:  # noqa: BLE001  (whatever it is, it is reported)
            faults.append(f"{package.name}: {group} {name} = {value}: {type(error).__name__}: {error}")
        else:
            print(f"{group:22} {name:10} {value}")
    return faults


def third_party_faults() -> list[str]:
    """What is wrong with how weft lists the plug-in of `integration-tests/third_party`."""
    listed = [info for group in GROUPS for info in plugins(group) if info.distribution.startswith("example")]
    found = [(info.name, info.version, info.state, info.reason) for info in listed]
    return [] if found == [("example-sockets", "1.2.3", "ok", "")] else [f"the third party's plug-ins are {found}"]


def main() -> int:
    faults = [fault for package in discover() for fault in entry_point_faults(package)] + third_party_faults()
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
