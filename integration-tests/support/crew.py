"""Crews: child processes that outlive one test, and are replaced after a test that failed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from weft_cli.demo.processes import Child, Family, answers, ask

CALL_SECONDS = 240.0
"""For any command: longer than every deadline inside a child, and than importing its framework, which is part of the
first.
"""


class Crew:
    """`size` processes `python -m module`, started when first asked for; `start` are arguments of their first command,
    if there is one.
    """

    def __init__(
        self,
        name: str,
        module: str,
        size: int,
        logs: Path,
        environment: Mapping[str, str],
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self._name, self._module, self._size, self._logs = name, module, size, logs
        folder = str(Path(__file__).parents[1])
        paths = [folder, environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")]
        self._environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        self._start = start
        self._stack = ExitStack()
        self._children: list[Child] = []

    def children(self) -> list[Child]:
        """All of them, started."""
        if not self._children:
            family = self._stack.enter_context(Family(self._logs))
            self._children = [
                family.start(f"{self._name}/{number}", self._module, self._environment) for number in range(self._size)
            ]
            if self._start is not None:
                ask(self._children, CALL_SECONDS, "start", **self._start)
        return self._children

    def end(self) -> None:
        """End them and all that they started. The next `children` starts new ones."""
        self._children = []
        self._stack.close()


@contextmanager
def replaced_on_failure(*crews: Crew) -> Iterator[None]:
    """End the crews if the block fails, whatever it is: their processes may be anywhere."""
    try:
        yield
    except BaseException:
        for crew in crews:
            crew.end()
        raise


def tell(children: list[Child], do: str, **arguments: Any) -> None:
    """Give every child the same command; its answer is fetched with `hear`."""
    for child in children:
        child.send(do, **arguments)


def hear(children: list[Child], what: str) -> list[dict[str, Any]]:
    """One answer of every child."""
    return answers(children, CALL_SECONDS, what)


def order(children: list[Child], do: str, **arguments: Any) -> list[dict[str, Any]]:
    """Give every child the same command and collect the answers."""
    return ask(children, CALL_SECONDS, do, **arguments)
