"""Makes `docs/fault-matrix.md` from `docs/fault-matrix.json`, which `nox -s faults` writes.

python3 tools/fault_matrix.py            writes the page
python3 tools/fault_matrix.py --check    fails if the page is another one
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from distributions import ROOT

TABLE = ROOT / "docs" / "fault-matrix.json"
PAGE = ROOT / "docs" / "fault-matrix.md"
KINDS = {"memory": "cheap targets", "vllm": "vLLM engines"}
Row = dict[str, Any]

HEAD = """# The fault matrix

What happens when a process is struck at a step of the [protocol](protocol.md): every step × role × fault × transport ×
landing, in a [fleet](guide/fleets.md) of real processes over real NIXL (on UCX over TCP) and gloo. Made by
`tools/fault_matrix.py` from [fault-matrix.json](fault-matrix.json), which `python3 tools/dev.py faults` writes; CI runs
a sample in which every two values that can occur together do so.

A trainer of two sources feeds two replicas. One of them, of two members, is struck or stands in the middle; the other
one, of one member, looks on. Who ends a step stops before it says so, the fault strikes, and it goes on. Who was killed
is started again once the version has ended for the others, who was frozen goes on then; everybody else stays in the
process that it is in. Versions are offered until both replicas serve one.

In every row each byte is compared with the version that is said to be served, over memory that was overwritten before;
a replica that keeps its old version has to have it whole, and no member may serve another version than the rest of its
replica. Where a replica was struck, or anybody was delayed, the other replica has to have the version that was on its
way. With a shadow, a failure before the vote must not make the replica refuse.

In the tables marked vllm the replica that is struck is a real vLLM engine of one worker, over the weights of a tiny
Llama, beside a cheap one. Versions are checkpoints of which Transformers has said what they answer. After every refit
and after every failure the engine is asked: it has to answer as its version and no other does, and to have the bytes of
that checkpoint, or to refuse by name. All its processes stay those that they are, unless its worker is killed: the
engine ends with it, and another one is started. Every deadline is six seconds.

| fault | what is done |
| --- | --- |
| kill | SIGKILL |
| freeze | SIGSTOP, until the version has ended for the others |
| cut | every TCP connection of the process ends, also that to the store; new ones can be made |
| corrupt | one bit of what arrives there next, a bucket or a notice, is another one |
| delay | SIGSTOP for half a second; every deadline is three seconds |

| struck | what that is |
| --- | --- |
| sources' leader, source | a process of the trainer |
| replica's leader, member | a process of the cheap replica of two members |
| engine's worker | the process of a vLLM engine that has the weights |
| engine | all processes of a vLLM engine |
| store | the process of the store; killed, it comes back empty |

| in the tables | the replica that was struck, or was being fed |
| --- | --- |
| committed | serves the version that was on its way |
| kept | serves its old version until a later one is whole |
| refused | serves nothing until a later one is whole |
| ↻ | `offer` raised in the trainer, which was started again |
| – | not applicable |
| ? | not run: `python3 tools/dev.py faults -- --missing` does it |

Numbers are seconds from the fault until the replica serves that version or a later one; where something was started
again, a later one. Where an engine's worker is killed, most of them are the start of another engine on a busy machine.
"""


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    return "\n".join([HEAD, *_summary(rows), *_tables(rows), *_reasons(rows)])


def _summary(rows: Sequence[Row]) -> Iterator[str]:
    for engine in dict.fromkeys(row["engine"] for row in rows):
        held = [row for row in rows if row["engine"] == engine]
        counts = Counter((row["fault"], _outcome(row)) for row in held)
        outcomes = sorted({outcome for _, outcome in counts})
        yield f"## All {len(held)} rows of {KINDS[engine]}\n"
        yield f"| fault | {' | '.join(outcomes)} |"
        yield f"| --- |{' ---: |' * len(outcomes)}"
        for fault in dict.fromkeys(row["fault"] for row in held):
            yield f"| {fault} | {' | '.join(str(counts[fault, outcome]) for outcome in outcomes)} |"
        yield ""


def _tables(rows: Sequence[Row]) -> Iterator[str]:
    kinds = list(dict.fromkeys((row["engine"], row["transport"], row["landing"]) for row in rows))
    for kind in kinds:
        held = [row for row in rows if (row["engine"], row["transport"], row["landing"]) == kind]
        engine, transport, landing = kind
        faults = list(dict.fromkeys(row["fault"] for row in held))
        cells = {(row["step"], row["role"], row["fault"]): _cell(row) for row in held}
        where = "" if engine == "memory" else f" ({engine})"
        yield f"## {transport}, {landing.replace('_', ' ')}{where}\n"
        yield f"| step | struck | {' | '.join(faults)} |"
        yield f"| --- | --- |{' --- |' * len(faults)}"
        for step, role in dict.fromkeys((row["step"], row["role"]) for row in held):
            words = [cells.get((step, role, fault), "") for fault in faults]
            yield f"| `{step}` | {role} | {' | '.join(words)} |"
        yield ""


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    marks = {"not applicable": "Not applicable", "not run": "Not run", "failed": "Failed"}
    told = Counter((row["role"], row["fault"], row["outcome"]) for row in rows if ":" in row["outcome"])
    if told:
        yield "## Without an outcome\n"
    for (role, fault, outcome), number in sorted(told.items()):
        what, _, reason = outcome.partition(": ")
        yield f"- {marks[what]}, {number} rows: {fault} of the {role}: {reason}."


def _outcome(row: Row) -> str:
    return str(row["outcome"]).split(":")[0]


def _cell(row: Row) -> str:
    if ":" in row["outcome"]:
        return {"not applicable": "–", "not run": "?"}.get(_outcome(row), "**failed**")
    word = row["outcome"].split(",")[0].split(" ")[0]
    again = " ↻" if "trainer" in row["restarted"] and not _killed_source(row) else ""
    return f"{word} {row['seconds_to_recover']:.1f}{again}"


def _killed_source(row: Row) -> bool:
    return row["fault"] == "kill" and row["role"] in ("sources' leader", "source")


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is another one")
    check = parser.parse_args(arguments).check
    wanted = page(json.loads(TABLE.read_text())).rstrip("\n") + "\n"
    if check and PAGE.read_text() != wanted:
        print("docs/fault-matrix.md is not what docs/fault-matrix.json says: run python3 tools/fault_matrix.py")
        return 1
    if not check:
        PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
