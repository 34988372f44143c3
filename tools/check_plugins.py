"""Checks that the installed distributions offer exactly the entry points declared here, and that each loads.

Run in an environment that holds the built wheels and every engine.
"""

from __future__ import annotations

import sys
from importlib.metadata import distribution

from distributions import discover


def main() -> int:
    faults = []
    for package in discover():
        declared = {
            (group, name, value)
            for group, points in package.project.get("entry-points", {}).items()
            for name, value in points.items()
        }
        declared |= {("console_scripts", name, value) for name, value in package.project.get("scripts", {}).items()}
        installed = distribution(package.name)
        offered = {(point.group, point.name, point.value): point for point in installed.entry_points}
        if offered.keys() != declared:
            faults.append(f"{package.name} offers {sorted(offered)}, its pyproject.toml declares {sorted(declared)}")
        where = str(installed.locate_file(package.import_name))
        if "site-packages" not in where:
            faults.append(f"{package.name} is not installed from a wheel but from {where}")
        for (group, name, value), point in sorted(offered.items()):
            try:
                point.load()
            except Exception as error:  # noqa: BLE001  (whatever it is, it is reported)
                faults.append(
                    f"{package.name}: {group} {name} = {value} does not load: {type(error).__name__}: {error}"
                )
            else:
                print(f"{group:22} {name:10} {value}")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
