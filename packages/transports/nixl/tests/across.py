"""One member of a refit, as a program: `across.py source|target STORE NICS`. Prints how many elements are wrong."""

from __future__ import annotations

import sys

from weft import Expect, LayoutBuilder, Refit
from weft.testing.members import MemorySource, MemoryTarget

ELEMENTS = 16 << 20
NBYTES = 2 * ELEMENTS


def main(role: str, store: str, nics: str) -> None:
    """Take part in one refit over TCP alone."""
    builder = LayoutBuilder()
    builder.tensor("w", (ELEMENTS,), "bfloat16")
    builder.buffer("w", "bfloat16", ELEMENTS, group="g")
    builder.shard("w", "w")
    source = MemorySource("trainer/0", builder.build()) if role == "source" else None
    target = MemoryTarget("rollout/0", builder.build()) if role == "target" else None
    (memory,) = (source or target).memory().values()  # type: ignore[union-attr]
    memory.fill_(3 if role == "source" else -1)
    with Refit(
        source=source,
        target=target,
        transport="nixl",
        transport_options={"nics": nics.split(","), "ucx_settings": {"TLS": "tcp"}},
        store=store,
        job="across",
        name="trainer/0" if role == "source" else "rollout/0",
        replica="rollout" if role == "target" else None,
        expect=Expect(sources=1, replicas=1),
    ) as refit:
        refit.run(1)
    print("wrong:", int((memory != 3).sum()))


if __name__ == "__main__":
    main(*sys.argv[1:])
