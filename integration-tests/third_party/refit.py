"""Two trainer ranks and an engine, each a process of its own, refit twice over the example's transport."""

from __future__ import annotations

import multiprocessing

import weft
from weft.testing.members import MemorySource, MemoryTarget
from weft.testing.tiny import Tiny, mismatches

MODEL = Tiny()


def run(name: str, store: str) -> None:
    """One process: joins and refits versions 1 and 2; the engine checks every buffer it has."""
    source = MemorySource(name, MODEL.source(int(name[-1]), 2)) if name.startswith("trainer") else None
    target = None if source else MemoryTarget(name, MODEL.target(0, 1))
    with weft.Refit(
        source=source,
        target=target,
        transport="example-sockets",
        transport_options={"host": "127.0.0.1"},
        store=store,
        job="example",
        name=name,
        replica="engine" if target else None,
        expect=weft.Expect(sources=2, replicas=1),
    ) as refit:
        for version in (1, 2):
            weights = MODEL.tensors(seed=version)
            if source:
                source.load(weights)
            if target:
                target.poison()
            refit.run(version)
            if target:
                wrong = mismatches(target.contents(), MODEL.expected(0, 1, weights))
                print(f"version {version}: {len(target.contents()) - len(wrong)} buffers right, {len(wrong)} wrong")


def main() -> None:
    context = multiprocessing.get_context("spawn")
    with weft.serve_store() as server:
        names = ["trainer0", "trainer1", "engine0"]
        processes = [context.Process(target=run, args=(name, server.url), daemon=True) for name in names]
        for process in processes:
            process.start()
        for name, process in zip(names, processes, strict=True):
            process.join(120)
            print(f"{name} ended with {process.exitcode}")


if __name__ == "__main__":
    main()
