"""Writes `constraints/<environment>.txt`, one per environment, from the one table `constraints/table.toml`.

    python3 tools/constraints.py            write the files
    python3 tools/constraints.py --check    exit 1 if one of them is out of date

Each file is closed: it pins everything that its environment holds.
"""

from __future__ import annotations

import argparse
import re
import sys
import tomllib

from distributions import ROOT

FOLDER = ROOT / "constraints"


def name_of(pin: str) -> str:
    """The normalised name in `Name==version`; anything but an exact pin is an error."""
    match = re.fullmatch(r"([A-Za-z0-9._-]+)==[A-Za-z0-9.+!_-]+", pin)
    if match is None:
        raise SystemExit(f"constraints/table.toml: {pin!r} is no exact pin (name==version)")
    return re.sub(r"[-_.]+", "-", match[1]).lower()


def render(environment: str, sets: list[str], table: dict[str, list[str]]) -> str:
    """The text of one environment's file. Two versions of one name are an error."""
    pins: dict[str, str] = {}
    for each in sets:
        for pin in table[each]:
            if pins.setdefault(name_of(pin), pin) != pin:
                raise SystemExit(
                    f"constraints/table.toml: environment {environment} has {pins[name_of(pin)]} and {pin}"
                )
    lines = [f"# Environment {environment}; written by tools/constraints.py from table.toml, do not edit."]
    return "\n".join([*lines, *(pins[name] for name in sorted(pins))]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a file is out of date")
    check = parser.parse_args().check
    table = tomllib.loads((FOLDER / "table.toml").read_text())
    texts = {f"{name}.txt": render(name, sets, table["sets"]) for name, sets in table["environments"].items()}
    present = {file.name: file.read_text() for file in FOLDER.glob("*.txt")}
    stale = sorted(name for name in texts.keys() | present.keys() if texts.get(name) != present.get(name))
    if check:
        for name in stale:
            print(f"constraints/{name} is out of date: run python3 tools/constraints.py", file=sys.stderr)
        return 1 if stale else 0
    for name in stale:
        if name in texts:
            (FOLDER / name).write_text(texts[name])
        else:
            (FOLDER / name).unlink()
        print(f"constraints/{name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
