"""Lists every message that weft's errors can carry; `docs/guide/when-something-goes-wrong.md` explains each of them.

python3 tools/errors.py             a table: where, class, message with … for what varies
python3 tools/errors.py --missing   those that the page does not explain, and what it explains that nothing raises
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from distributions import PACKAGES, ROOT

PAGE = ROOT / "docs" / "guide" / "when-something-goes-wrong.md"
VARIES = "…"
FEWEST_LETTERS = 3
"""A text with fewer is made of others: of a list of faults, or of what a library said."""
NOT_FOR_USERS = "testing"
"""Folder whose errors are for those who write plug-ins and tests."""
_FAULTS = re.compile(r"(.*_)?faults?")
_FORMS = {"DeadlineError": f"{{}}: not within {VARIES} s; late: {VARIES}", "PeerLostError": f"lost {VARIES}: {{}}"}
"""What classes make of their text (`weft/errors.py`)."""
_ARGUMENT = {"DeadlineError": slice(0, 1), "PeerLostError": slice(1, 2)}
"""Which of a class's arguments is its text; all of them elsewhere."""


@dataclass(frozen=True, slots=True)
class Message:
    """One text that an error can carry: a whole message, or one of the faults that an error lists."""

    file: Path
    line: int
    raised_as: str
    """Class of the error; empty for a fault, which several classes may list."""
    text: str
    """With `…` for what varies."""

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}: {self.raised_as or 'a fault'}: {self.text}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One explained message of the page."""

    text: str

    @property
    def pattern(self) -> re.Pattern[str]:
        """What it matches: `…` stands for anything."""
        return re.compile(".*".join(re.escape(part) for part in self.text.split(VARIES)), re.DOTALL)


def sources() -> list[Path]:
    """Every module that users can meet an error of."""
    files = PACKAGES.glob("**/src/**/*.py")
    return sorted(file for file in files if NOT_FOR_USERS not in file.relative_to(PACKAGES).parts)


def error_classes(trees: dict[Path, ast.Module]) -> set[str]:
    """`WeftError` and all that is derived from it."""
    bases = {
        node.name: {ast.unparse(base).rpartition(".")[2] for base in node.bases}
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    known = {"WeftError"}
    while found := {name for name, of in bases.items() if of & known} - known:
        known |= found
    return known


def messages() -> list[Message]:
    """Every message of every source file, in order of files and lines."""
    trees = {file: ast.parse(file.read_text(), str(file)) for file in sources()}
    classes = error_classes(trees)
    found = [
        Message(file, node.lineno, raised_as, form.format(text))
        for file, tree in trees.items()
        for node, raised_as, form in _texts(tree, classes)
        for text in _templates(node)
        if len(re.findall("[A-Za-z]", text)) >= FEWEST_LETTERS
    ]
    return list(dict.fromkeys(found))


def _texts(tree: ast.Module, classes: set[str]) -> Iterator[tuple[ast.expr, str, str]]:
    """(expression, class, format) of what errors are made with, of what lists of faults get, of what is awaited, and
    of reasons for giving a refit up.
    """
    lists = _fault_lists(tree, classes)
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(attr="append" | "extend", value=value), args=given) if (
                _name(value) in lists
            ):
                yield from ((argument, "", "{}") for argument in given)
            case ast.Call(func=ast.Attribute(attr="wait" | "until"), args=[_, *given]):
                yield from ((argument, "DeadlineError", _FORMS["DeadlineError"]) for argument in given)
            case ast.Call(func=ast.Attribute(attr="withdraw" | "give_up" | "refuse"), args=given):
                yield from ((argument, "RefitAbortedError", "{}") for argument in given)
            case ast.Call(func=ast.Name(id="decoded"), args=[_, _, fault]):
                yield fault, "RecordError", f"{{}}: {VARIES}"
            case ast.Call(func=function, args=given) if _name(function) in classes:
                name = _name(function)
                chosen = given[_ARGUMENT[name]] if name in _ARGUMENT else given
                yield from ((argument, name, _FORMS.get(name, "{}")) for argument in chosen)
            case ast.AugAssign(target=target, value=value) if _name(target) in lists:
                yield value, "", "{}"
            case ast.Assign(targets=[target], value=value) if _name(target) in lists:
                yield value, "", "{}"
            case ast.AnnAssign(target=target, value=ast.expr() as value) if _name(target) in lists:
                yield value, "", "{}"
            case ast.FunctionDef(name=name) if _FAULTS.fullmatch(name) or _gives_texts(node):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return | ast.Yield) and inner.value is not None:
                        yield inner.value, "", "{}"


def _fault_lists(tree: ast.Module, classes: set[str]) -> set[str]:
    """Variables whose names say that they hold faults, or that errors are made with, or that are added to such."""
    names = {_name(node) for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)}
    lists = {name for name in names if _FAULTS.fullmatch(name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) in classes:
            lists |= {argument.id for argument in node.args if isinstance(argument, ast.Name)}
    while True:
        added = {
            node.value.id
            for node in ast.walk(tree)
            if isinstance(node, ast.AugAssign) and _name(node.target) in lists and isinstance(node.value, ast.Name)
        }
        if added <= lists:
            return lists
        lists |= added


def _gives_texts(node: ast.FunctionDef) -> bool:
    return node.returns is not None and ast.unparse(node.returns) == "list[str]"


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2] if isinstance(node, ast.Name | ast.Attribute) else ""


def _templates(node: ast.expr) -> Iterator[str]:
    """The texts that an expression can be: of both branches of a conditional, of every element of a list."""
    match node:
        case ast.Constant(value=str(text)):
            yield text
        case ast.JoinedStr():
            yield re.sub(f"{VARIES}+", VARIES, "".join(_literal(part) for part in node.values))
        case ast.BinOp(op=ast.Add()):
            yield from _templates(node.left)
            yield from _templates(node.right)
        case ast.IfExp():
            yield from _templates(node.body)
            yield from _templates(node.orelse)
        case ast.List() | ast.Tuple():
            for element in node.elts:
                yield from _templates(element)
        case ast.Starred():
            yield from _templates(node.value)
        case ast.ListComp() | ast.GeneratorExp():
            yield from _templates(node.elt)


def _literal(node: ast.expr) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else VARIES


def entries() -> list[Entry]:
    """The page's entries: rows of tables that begin with a code span, below the heading `Every message`."""
    _, _, below = PAGE.read_text().partition("## Every message")
    rows = re.findall(r"(?m)^\| (`+)(.+?)\1 \|", below)
    return [Entry(text.strip().replace("\\|", "|")) for _, text in rows]


def explained(message: Message, known: Sequence[Entry]) -> list[Entry]:
    """The entries that explain a message: of those that match, the ones that say most of it. One, if all is well."""
    matching = [entry for entry in known if entry.pattern.fullmatch(message.text)]
    most = max((len(entry.text.replace(VARIES, "")) for entry in matching), default=0)
    return [entry for entry in matching if len(entry.text.replace(VARIES, "")) == most]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--missing", action="store_true", help="only what the page does not explain, or explains twice")
    only_missing = parser.parse_args().missing
    known, found = entries(), messages()
    wrong = [message for message in found if len(explained(message, known)) != 1]
    used = {entry for message in found for entry in explained(message, known)}
    stale = [entry for entry in known if entry not in used]
    for message in wrong if only_missing else found:
        print(message)
    for entry in stale:
        print(f"{PAGE.relative_to(ROOT)} explains what nothing raises: {entry.text}")
    return 1 if only_missing and (wrong or stale) else 0


if __name__ == "__main__":
    sys.exit(main())
