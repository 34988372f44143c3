"""Lists which traps of `docs/traps.md` have a test: those marked `@pytest.mark.trap(5)`, or `trap(3, 5)`.

python3 tools/traps.py           a table
python3 tools/traps.py --json    {"covered": {"5": ["packages/…::test_…"]}, "missing": [6, …]}
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from distributions import ROOT

FOLDERS = ("packages", "integration-tests", "tools")


def traps() -> dict[int, str]:
    """Number and text of every trap of the list."""
    text = (ROOT / "docs" / "traps.md").read_text()
    return {int(number): line for number, line in re.findall(r"(?m)^(\d+)\. (.*)$", text)}


def numbers(tree: ast.AST) -> Iterator[int]:
    """The arguments of all `….mark.trap(…)` calls in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("mark.trap"):
            yield from (argument.value for argument in node.args if isinstance(argument, ast.Constant))


def marked(file: Path) -> Iterator[tuple[int, str]]:
    """(trap, test) of every marked test, class or module (`pytestmark`, a parameter's marks) in `file`."""
    where = str(file.relative_to(ROOT))
    for statement in ast.parse(file.read_text(), str(file)).body:
        if isinstance(statement, ast.ClassDef):
            for number in (n for decorator in statement.decorator_list for n in numbers(decorator)):
                yield number, f"{where}::{statement.name}"
            for inner in statement.body:
                name = f"::{inner.name}" if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef) else ""
                yield from ((number, f"{where}::{statement.name}{name}") for number in numbers(inner))
        else:
            name = f"::{statement.name}" if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef) else ""
            yield from ((number, where + name) for number in numbers(statement))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="machine-readable")
    as_json = parser.parse_args().json
    known, covered = traps(), defaultdict[int, list[str]](list)
    for folder in FOLDERS:
        shipped = (ROOT / folder).glob("**/testing/*.py")  # conformance suites, which tests subclass
        for file in sorted([*(ROOT / folder).glob("**/test_*.py"), *shipped]):
            for number, test in marked(file):
                covered[number].append(test)
    unknown = sorted(covered.keys() - known.keys())
    missing = sorted(known.keys() - covered.keys())
    if as_json:
        print(json.dumps({"covered": {str(n): covered[n] for n in sorted(covered)}, "missing": missing}, indent=2))
    else:
        for number, text in known.items():
            tests = covered.get(number, [])
            print(f"{number:3} {'yes' if tests else ' - '} {text[:110]}")
            for test in tests:
                print(f"          {test}")
        print(f"{len(known) - len(missing)} of {len(known)} traps have a test")
    for number in unknown:
        print(f"trap({number}) is not in docs/traps.md: {', '.join(covered[number])}", file=sys.stderr)
    return 1 if unknown else 0


if __name__ == "__main__":
    sys.exit(main())
